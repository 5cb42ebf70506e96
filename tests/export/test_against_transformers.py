"""An exported folder, asked through `transformers`, gives what our model gives.

Tensors, pixels, ids, logits and answers are compared; then the folder is read back.
"""

import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    SmolVLMImageProcessorPil,
)
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from nanovlm.data.collate import prepare
from nanovlm.export import __main__ as export
from nanovlm.generate import generate
from nanovlm.hub.image_configs import read_image_config
from nanovlm.hub.models import join_parts, load_model, save_model
from nanovlm.inputs.batch import Batch
from nanovlm.inputs.chat import IMAGE, Message
from nanovlm.inputs.image_config import ImageConfig
from nanovlm.model.projector import ProjectorConfig
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.sampling import Sampling
from tests.reference import hub_folders
from tests.reference.models import byte_pair, qwen, randomise
from tests.reference.published import smolvlm_folder

TINY = Path(__file__).parents[2] / "nanovlm/assets/tiny-vlm"
# Odd sizes, wide, tall, and far smaller than a tile.
IMAGES = [Image.effect_noise(size, 80).convert("RGB") for size in ((61, 40), (31, 97), (5, 7))]


def user(text: str, images: int = 1) -> Message:
    """A question as infer.py asks it: each image opens the turn, on a line of its own."""
    return Message("user", (*[IMAGE, "\n"] * images, text))


def answer(text: str) -> Message:
    return Message("assistant", (text,))


SYSTEM = Message("system", ("Describe the picture.",))
QUESTIONS = (
    "图中有几个红色的圆形？",
    "描述图片",
    "左边是什么？",
    "三角形比正方形大吗？",
    "还有几个? 12",
    "What is it?",
    "Describe the picture.",
    "What is left\nof the red circle?",
    "Where?",
)
CONVERSATIONS = [
    *([user(text)] for text in QUESTIONS),
    [user("两张图有什么不同？", images=2)],
    [user("A, B\tor C?  D", images=3)],
    [user("Who are you? 😀 é", images=0)],
    [SYSTEM, user("还有几个?")],
    [SYSTEM, user("你好", images=0)],
    [user("What is it?"), answer("三个 red circles."), user("左边呢？", images=0)],
    [user("图中有什么？"), answer("A girl in a dress"), user("And here?", images=2)],
    [SYSTEM, user("One", images=0), answer("Two."), user("三", images=0), answer("4"), user("5")],
    [Message("user", ("Look at ", IMAGE, " and at ", IMAGE, "\nWhat?"))],
    [user("Hi", images=0), answer(" A space before it"), user("Why?")],
    [SYSTEM, user("a"), answer("b"), user("c"), answer("d"), user("e")],
]


@dataclass
class Exported:
    """A model, the folder that it was exported to, and what `transformers` makes of that."""

    ours: VisionLanguageModel
    folder: Path
    reference: Any
    processor: Any

    def asked(self, conversation: Sequence[Message]) -> tuple[dict[str, Any], Batch]:
        """What the reference's processor and ours make of a conversation."""
        images = iter(IMAGES)
        turns = [
            {"role": message.role, "content": parts(message, images)} for message in conversation
        ]
        theirs = self.processor.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        count = sum(message.num_images for message in conversation)
        ours = prepare(self.ours, [conversation], [IMAGES[:count]], add_generation_prompt=True)
        return dict(theirs), ours


def parts(message: Message, images) -> list[dict[str, Any]]:
    """A turn as the reference takes it: without the line ends behind the images that open it."""
    content: list[dict[str, Any]] = []
    for part in message.content:
        if part is IMAGE:
            content.append({"type": "image", "image": next(images)})
        elif part != "\n":
            content.append({"type": "text", "text": part})
    return content


def joined(
    root: Path,
    vision: str,
    language: str,
    kind: str,
    layer: int = -1,
    image_size: int = 28,
    **settings: Any,
) -> VisionLanguageModel:
    """A random model of two published parts, joined as in training."""
    for name, writers in ((vision, hub_folders.VISION_ENCODERS), (language, LANGUAGE_MODELS)):
        if not (root / name).exists():
            root.mkdir(parents=True, exist_ok=True)
            writers[name](root / name)
    torch.manual_seed(0)
    image = read_image_config(root / vision)
    if image_size != 28:
        image = ImageConfig(image_size, image_size, mean=image.mean, std=image.std)
    tiles = image.max_tiles is not None
    model = join_parts(
        root / vision,
        root / language,
        ProjectorConfig(kind, bias=not tiles),
        image,
        layer,
        vision_norm=tiles,
        **settings,
    )
    randomise(model.projector, seed=1)
    return model.float().eval()


def write_llama3(folder: Path) -> None:
    special = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    tokenizer = byte_pair(folder, special=special)
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e5}
    settings: dict[str, Any] = {"vocab_size": len(tokenizer) + 1, "rope_parameters": scaling}
    settings |= {"attention_bias": True, "mlp_bias": True, "max_position_embeddings": 1024}
    qwen(folder, "llama", **settings)


def write_plain(folder: Path) -> None:
    """The tiny language model of the package, with its SentencePiece tokenizer."""
    shutil.copytree(TINY.with_name("tiny-language-model"), folder)


LANGUAGE_MODELS = hub_folders.LANGUAGE_MODELS | {"llama3": write_llama3, "plain": write_plain}


def smolvlm_qwen3(root: Path) -> VisionLanguageModel:
    """As the preset: Qwen3 has tokens that begin a tile."""
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
    tokenizer = byte_pair(root / "qwen3", special=(*special, "<|image_pad|>"))
    rows = len(tokenizer) + 3
    qwen(root / "qwen3", "qwen3", vocab_size=rows, head_dim=16, max_position_embeddings=2048)
    return joined(root, "smolvlm", "qwen3", "pixel_shuffle")


def published_smolvlm(root: Path) -> VisionLanguageModel:
    """As published, with its own template, whose answers begin with a space."""
    smolvlm_folder(root / "published", scale_factor=4, tie_word_embeddings=True)
    return load_model(root / "published")


MODELS: dict[str, Callable[[Path], VisionLanguageModel]] = {
    "tiny": lambda root: load_model(TINY, torch.float32),
    "dinov2-qwen3": lambda root: joined(root, "dinov2", "qwen3", "mlp"),
    "siglip-qwen2": lambda root: joined(root, "siglip", "qwen2", "linear", system="你是助手"),
    "clip-vicuna": lambda root: joined(root, "clip", "vicuna", "mlp", -2, system='A "chat" #}.'),
    "smolvlm2": published_smolvlm,
    "smolvlm-qwen3": smolvlm_qwen3,
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Callable[[str], Exported]:
    root, made = tmp_path_factory.mktemp("exported"), {}

    def get(name: str) -> Exported:
        if name not in made:
            model = MODELS[name](root / "parts")
            save_model(model, root / f"{name}-ours")
            made[name] = export_and_load(model, root / f"{name}-ours", root / name)
        return made[name]

    return get


def export_and_load(model: VisionLanguageModel, ours: Path, out: Path, *flags: str) -> Exported:
    """Export `ours`, the folder of `model`; no tensor may be missing, and none too many."""
    export.main(["--out", str(out), "--dtype", "float32", *flags, str(ours)])
    loaded: Any = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    reference, info = loaded
    assert not any(info.values()), info
    if reference.config.model_type == "smolvlm":  # whose processor needs torchvision for videos
        return Exported(model, out, reference, SmolVLMProcessor(out))
    return Exported(model, out, reference, AutoProcessor.from_pretrained(out))


class SmolVLMProcessor:
    """What transformers' class of that name does with images, by its own functions."""

    def __init__(self, folder: Path) -> None:
        self.images: Any = SmolVLMImageProcessorPil.from_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        settings = json.loads((folder / "processor_config.json").read_text())
        self.image_seq_len = settings["image_seq_len"]

    def apply_chat_template(self, turns: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
        text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        parts = [part for turn in turns for part in turn["content"] if part["type"] == "image"]
        inputs, marker = {}, self.tokenizer.image_token
        if parts:
            images = [[part["image"] for part in parts]]
            inputs = self.images(images, return_row_col_info=True, return_tensors="pt")
            first, *rest = text.split(marker)
            for piece, rows, columns in zip(rest, inputs.pop("rows")[0], inputs.pop("cols")[0]):
                fake = self.tokenizer.fake_image_token
                sizes = (rows, columns, self.image_seq_len)
                first += get_image_prompt_string(*sizes, fake, marker, "<global-img>") + piece
            text = first
        return {**self.tokenizer(text, return_tensors="pt"), **inputs}


def logits(model: VisionLanguageModel, batch: Batch) -> torch.Tensor:
    with torch.inference_mode():
        hidden_states = model.language_model.hidden_states(model.embed(batch), batch.attention_mask)
        return model.language_model.logits(hidden_states)


def check_same(model: Exported, conversation: Sequence[Message]) -> None:
    """Pixels, ids, logits and the greedy answer."""
    theirs, ours = model.asked(conversation)
    assert ours.input_ids.tolist() == theirs["input_ids"].tolist()
    if ours.pixels is not None:
        pixels = theirs["pixel_values"].reshape(ours.pixels.shape)  # (B, N, 3, H, W) in SmolVLM
        torch.testing.assert_close(ours.pixels, pixels, atol=1e-5, rtol=0)
    with torch.inference_mode():
        expected = model.reference(**theirs).logits
        written = model.reference.generate(**theirs, max_new_tokens=6)
    own = logits(model.ours, ours)
    torch.testing.assert_close(own, expected[..., : own.shape[-1]], atol=1e-4, rtol=0)
    written = written[0, ours.input_ids.shape[1] :].tolist()
    ended = itertools.takewhile(lambda id: id not in model.ours.chat.stop_ids, written)
    ids = list(ended)
    assert generate(model.ours, ours, 6, Sampling()) == [ids]
    text = model.processor.tokenizer.decode(ids, skip_special_tokens=True)
    if "\ufffd" not in text:  # random bytes; the two count them differently
        assert model.ours.tokenizer.decode(ids, skip_special=True) == text


@pytest.mark.parametrize("name", MODELS)
def test_twenty_conversations_are_the_same_in_transformers(exported, name):
    assert len(CONVERSATIONS) == 20
    for conversation in CONVERSATIONS:
        check_same(exported(name), conversation)


@pytest.mark.parametrize("name", MODELS)
def test_the_folder_read_back_gives_the_same(exported, name):
    model = exported(name)
    again = load_model(model.folder)
    assert again.config.chat == model.ours.config.chat
    assert again.config.image == model.ours.config.image
    for conversation in CONVERSATIONS[::4]:
        _, batch = model.asked(conversation)
        own, read = logits(model.ours, batch), logits(again, batch)
        torch.testing.assert_close(read[..., : own.shape[-1]], own, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("vision", "size"), [("siglip", 42), ("clip", 21), ("dinov2", 35)])
def test_images_of_another_size_than_the_position_table(tmp_path, vision, size):
    model = joined(tmp_path, vision, "qwen2", "mlp", -2, image_size=size)
    save_model(model, tmp_path / "ours")
    exported = export_and_load(model, tmp_path / "ours", tmp_path / "out")
    check_same(exported, CONVERSATIONS[15])


@pytest.mark.slow
@pytest.mark.parametrize("language", ["qwen2", "qwen3", "llama", "vicuna", "llama3", "plain"])
@pytest.mark.parametrize(("vision", "layer"), [("dinov2", -1), ("siglip", -2), ("clip", -2)])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_every_pairing(tmp_path, vision, layer, language, kind):
    model = joined(tmp_path, vision, language, kind, layer)
    save_model(model, tmp_path / "ours")
    exported = export_and_load(model, tmp_path / "ours", tmp_path / "out")
    for conversation in CONVERSATIONS:
        check_same(exported, conversation)
