"""Published folders are asked as `transformers` asks them: tiles, pixels, ids, logits, answers."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    Idefics3Processor,
    PreTrainedModel,
    SmolVLMImageProcessorPil,
)
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from nanovlm.data.collate import prepare
from nanovlm.generate import generate
from nanovlm.hub.models import load_model, save_model
from nanovlm.inputs.batch import Batch
from nanovlm.inputs.chat import IMAGE, Message
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.sampling import Sampling
from tests.reference import published
from tests.reference.published import llava_folder, smolvlm_folder

# Odd sizes, wide, tall, and far smaller than a tile.
IMAGES = [Image.effect_noise(size, 80).convert("RGB") for size in ((61, 40), (31, 97), (5, 7))]
QUESTION = Message("user", ("还有几个? 12",))
CONVERSATIONS = {
    "a question": [Message("user", (IMAGE, "\n", "图中有几个红色的圆形？"))],
    "two images": [Message("user", (IMAGE, "\n", IMAGE, "\n", "What is left?\nOf what?"))],
    "turns": [
        Message("user", (IMAGE, "\nWhat is it?")),
        Message("assistant", ("三个 red circles.",)),
        QUESTION,
        Message("assistant", ("A girl",)),
        Message("user", (IMAGE, "\n", IMAGE, "\n", "Where?")),
    ],
    "system": [Message("system", ("Describe the picture.",)), QUESTION],
    "text": [QUESTION],
}


@dataclass
class Published:
    """A folder, the reference's model and processor of it, and ours."""

    folder: Path
    reference: PreTrainedModel
    processor: Any
    ours: VisionLanguageModel

    def asked(self, conversation: Sequence[Message]) -> tuple[dict[str, Any], Batch]:
        """What the reference's processor and ours make of a conversation."""
        count = sum(message.num_images for message in conversation)
        turns = [{"role": message.role, "content": parts(message)} for message in conversation]
        text = self.processor.apply_chat_template(turns, add_generation_prompt=True)
        # As `apply_chat_template` with tokenize=True does.
        starts = text.startswith(self.processor.tokenizer.bos_token or "\0")
        images = IMAGES[:count] or None
        tiled = isinstance(self.ours.config.image.max_tiles, int)
        theirs = self.processor(
            text=text,
            images=[images] if images and tiled else images,
            add_special_tokens=not starts,
            return_tensors="pt",
        )
        theirs.pop("token_type_ids", None)
        ours = prepare(self.ours, [conversation], [images or []], add_generation_prompt=True)
        return theirs, ours


def parts(message: Message) -> list[dict[str, str]]:
    """A turn as the reference takes it: without the line ends behind images."""
    content = []
    for part in message.content:
        if part is IMAGE:
            content.append({"type": "image"})
        elif text := str(part).removeprefix("\n" if content else ""):
            content.append({"type": "text", "text": text})
    return content


def smolvlm(folder: Path, **settings: Any) -> Published:
    reference = smolvlm_folder(folder, **settings)
    if settings.get("family", "smolvlm") != "smolvlm":
        return Published(
            folder, reference, AutoProcessor.from_pretrained(folder), load_model(folder)
        )
    # `SmolVLMProcessor` needs torchvision for videos. It writes images as Idefics3's does.
    processor = Idefics3Processor(
        SmolVLMImageProcessorPil.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
        image_seq_len=16 // reference.config.scale_factor**2,
        chat_template=published.SMOLVLM_TEMPLATE,
    )
    return Published(folder, reference, processor, load_model(folder))


def llava(folder: Path, *names: str, **settings: Any) -> Published:
    reference = llava_folder(folder, *names, **settings)
    return Published(folder, reference, AutoProcessor.from_pretrained(folder), load_model(folder))


FOLDERS: dict[str, Callable[[Path], Published]] = {
    "smolvlm": smolvlm,
    "smolvlm-rows-are-text": lambda folder: smolvlm(
        folder, row_tokens=False, max_shard_size="30KB", scale_factor=4, tie_word_embeddings=True
    ),
    "idefics3": lambda folder: smolvlm(folder, family="idefics3"),
    "idefics3-llama3": lambda folder: smolvlm(folder, family="idefics3-llama3", row_tokens=False),
    "clip-vicuna": lambda folder: llava(folder, "clip", "vicuna", max_shard_size="30KB"),
    "siglip-qwen2": lambda folder: llava(
        folder, "siglip", "qwen2", layout="new", text_config={"tie_word_embeddings": True}
    ),
    "dinov2-vicuna": lambda folder: llava(
        folder, "dinov2", "vicuna", layout="new", vision_feature_layer=1
    ),
    "registers-qwen3": lambda folder: llava(
        folder,
        "dinov2_with_registers",
        "qwen2",
        vision_feature_layer=-3,
        text_config={"model_type": "qwen3"},
    ),
    "clip-full": lambda folder: llava(
        folder,
        "clip",
        "qwen2",
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        projector_hidden_act="quick_gelu",
        multimodal_projector_bias=False,
    ),
    "siglip-first-patch-left-out": lambda folder: llava(
        folder,
        "siglip",
        "vicuna",
        vision_feature_select_strategy="default",
        text_config={"model_type": "mistral", "sliding_window": None},
    ),
}


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> Callable[[str], Published]:
    root, made = tmp_path_factory.mktemp("published"), {}

    def get(name: str) -> Published:
        if name not in made:
            made[name] = FOLDERS[name](root / name)
        return made[name]

    return get


def logits(model: VisionLanguageModel, batch: Batch) -> torch.Tensor:
    with torch.inference_mode():
        hidden_states = model.language_model.hidden_states(model.embed(batch), batch.attention_mask)
        return model.language_model.logits(hidden_states)


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("name", FOLDERS)
def test_pixels_ids_and_logits_are_the_references(asked, name, conversation):
    model = asked(name)
    theirs, ours = model.asked(conversation)
    assert ours.input_ids.tolist() == theirs["input_ids"].tolist()
    if ours.pixels is not None:  # (B, N, 3, H, W) in SmolVLM
        expected = theirs["pixel_values"].flatten(0, -4)
        torch.testing.assert_close(ours.pixels, expected, atol=1e-5, rtol=0)
    with torch.inference_mode():
        expected = model.reference(**theirs).logits
    torch.testing.assert_close(logits(model.ours, ours), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FOLDERS)
def test_greedy_answers_are_the_references(asked, name):
    model = asked(name)
    theirs, ours = model.asked(CONVERSATIONS["turns"])
    with torch.inference_mode():
        expected = model.reference.generate(**theirs, do_sample=False, max_new_tokens=12)
    answer = expected[0, theirs["input_ids"].shape[1] :].tolist()
    answer = list(itertools.takewhile(lambda id: id not in model.ours.chat.stop_ids, answer))
    assert answer and generate(model.ours, ours, 12, Sampling()) == [answer]
    text = model.processor.tokenizer.decode(answer, skip_special_tokens=True)
    if "\ufffd" not in text:  # random bytes; the two count them differently
        assert model.ours.tokenizer.decode(answer, skip_special=True).strip() == text.strip()


@pytest.mark.parametrize("name", ["smolvlm", "clip-full", "siglip-first-patch-left-out"])
def test_a_saved_folder_is_ours_and_gives_the_same_logits(asked, name, tmp_path):
    model = asked(name).ours
    _, batch = asked(name).asked(CONVERSATIONS["turns"])
    save_model(model, tmp_path / "saved")
    saved = load_model(tmp_path / "saved")
    assert saved.config == model.config
    assert torch.equal(logits(saved, batch), logits(model, batch))


@pytest.mark.parametrize("name", ["idefics3", "siglip-qwen2"])
def test_what_newer_versions_save_is_the_same_model(asked, name, tmp_path):
    model = asked(name)
    model.reference.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)  # one file of settings, and chat_template.jinja
    assert not (tmp_path / "preprocessor_config.json").exists()
    _, batch = model.asked(CONVERSATIONS["turns"])
    saved = load_model(tmp_path)
    assert saved.config == model.ours.config
    assert torch.equal(logits(saved, batch), logits(model.ours, batch))


def test_tiles_are_written_as_smolvlms_own_processor_writes_them(asked):
    model = asked("smolvlm").ours
    for image, (rows, columns) in zip(IMAGES, ((2, 3), (3, 1), (3, 3))):
        tokens = model.image_tokens(*image.size)
        assert (tokens.rows, tokens.columns) == (rows, columns)
        text = get_image_prompt_string(
            rows, columns, 4, published.FAKE, published.IMAGE, "<global-img>"
        )
        ids = model.tokenizer.encode_with_special(text)
        assert model.chat._image_ids(tokens) == ids


def test_a_llama3_llava_writes_each_image_on_a_line_of_its_own(tmp_path):
    model = llava(tmp_path, "clip", "llama")
    text = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat?<|eot_id|>"
    text += "<|start_header_id|>assistant<|end_header_id|>\n\n"
    theirs = model.processor(
        text=text, images=IMAGES[:1], add_special_tokens=False, return_tensors="pt"
    )
    question = [Message("user", (IMAGE, "\n", "What?"))]
    ours = prepare(model.ours, [question], [IMAGES[:1]], add_generation_prompt=True)
    assert ours.input_ids.tolist() == theirs["input_ids"].tolist()
    with torch.inference_mode():
        expected = model.reference(**theirs).logits
    torch.testing.assert_close(logits(model.ours, ours), expected, atol=1e-4, rtol=0)
