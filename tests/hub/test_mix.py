"""Any vision encoder, language model and projector: joined from folders, or refused in one line."""

import dataclasses
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image

from nanovlm.data.collate import collate
from nanovlm.data.sequences import TokenSequence
from nanovlm.errors import NanoVLMError
from nanovlm.generate import generate
from nanovlm.hub.models import _new, load_model, save_model
from nanovlm.inputs.batch import Batch
from nanovlm.inputs.chat import ChatConfig, Message
from nanovlm.inputs.image import image_pixels
from nanovlm.model.language_model import LanguageModel, LanguageModelConfig
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.training import building
from nanovlm.training.building import build_model
from nanovlm.training.presets import load_settings
from nanovlm.training.settings import Settings
from tests.reference import hub_folders
from tests.reference.models import byte_pair, qwen, vision_model

VISION_ENCODERS = tuple(hub_folders.VISION_ENCODERS)
LANGUAGE_MODELS = tuple(hub_folders.LANGUAGE_MODELS)
# Of 4 × 4 patch vectors.
VISUAL_TOKENS = {"linear": 16, "mlp": 16, "pixel_shuffle": 4, "bilinear": 9, "resampler": 5}
CHATS = {
    "qwen1": ChatConfig(image_token="<|extra_0|>"),
    "qwen2": ChatConfig(),
    "qwen3": ChatConfig(empty_think=True),
    "llama": ChatConfig(image_token="<image>", end_ids=(2,)),  # of its generation_config.json
    "vicuna": ChatConfig("vicuna", "<image>"),
    "scratch": ChatConfig("vicuna", "<image>"),
}
# All pairs of vision encoder and language model; each of either meets every projector.
MIXES = [
    (vision, language, list(VISUAL_TOKENS)[(i + j) % len(VISUAL_TOKENS)])
    for (i, vision), (j, language) in itertools.product(
        enumerate(VISION_ENCODERS), enumerate(LANGUAGE_MODELS)
    )
]
# SmolVLM2 cuts it into 2 × 2 tiles, and the whole image is a fifth.
IMAGE = Image.effect_noise((60, 40), 80).convert("RGB")


@dataclass
class Hub:
    """Folders of all kinds; the tests read them and write none."""

    root: Path

    def settings(self, vision: str, language: str, projector: str = "mlp", **changes) -> Settings:
        settings = {
            "vision_encoder": str(self.root / vision),
            "language_model": str(self.root / language),
            "projector": projector,
            "grid": 3,
            "num_queries": 5,
            "vision_layer": -2 if vision == "clip" else -1,
            "vision_norm": vision != "clip",
        }
        if language == "scratch":
            settings["language_model_shape"] = str(self.root / "shape")
        return Settings(**settings | changes)


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Hub:
    root = tmp_path_factory.mktemp("hub")
    for name, write in (hub_folders.VISION_ENCODERS | hub_folders.LANGUAGE_MODELS).items():
        write(root / name)
    hub_folders.scratch_shape(root / "shape")
    return Hub(root)


def batch_of(model: VisionLanguageModel, answer: str | None = "一个圆。") -> Batch:
    """A question about an image, and its answer or none."""
    messages = [Message.parse("user", "<image>\n描述图片")]
    if answer:
        messages.append(Message.parse("assistant", answer))
    images = [model.image_tokens(*IMAGE.size)]
    encoded = model.chat.encode(messages, images, add_generation_prompt=not answer)
    batch = collate([TokenSequence.of(encoded)], model.chat.image_token_id)
    batch.pixels = image_pixels(IMAGE, model.config.image)
    return batch


@pytest.mark.parametrize(("vision", "language", "projector"), MIXES)
def test_any_mix_trains_answers_and_is_saved(
    hub: Hub, vision: str, language: str, projector: str, tmp_path: Path
):
    torch.manual_seed(0)
    model = build_model(hub.settings(vision, language, projector)).eval()
    assert model.image_length == VISUAL_TOKENS[projector] and model.config.chat == CHATS[language]
    batch = batch_of(model)
    tiles = 5 if vision == "smolvlm" else 1
    assert len(batch.pixels) == tiles
    assert len(batch.image_positions) == tiles * VISUAL_TOKENS[projector]

    loss = model(batch)
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad.any() for parameter in model.projector.parameters())

    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert again.config == model.config and torch.equal(again(batch), loss)
    prompt = batch_of(model, answer=None)
    assert generate(again, prompt, max_new_tokens=3) == generate(model, prompt, max_new_tokens=3)


@pytest.mark.parametrize("vision", VISION_ENCODERS)
@pytest.mark.parametrize("tiles", [1, 3])
def test_any_vision_encoder_gets_tiles_or_the_whole_image(hub: Hub, vision: str, tiles: int):
    model = build_model(hub.settings(vision, "qwen2", "pixel_shuffle", tiles=tiles))
    batch = batch_of(model)  # 3 × 2 tiles and the whole image
    assert len(batch.pixels) == (1 if tiles == 1 else 7)
    assert len(batch.image_positions) == 4 * len(batch.pixels)
    assert model(batch).isfinite()


def test_a_language_model_from_scratch_by_its_published_name(hub: Hub, monkeypatch):
    """`--language-model-shape svlm --language-model DIR`, where DIR holds a tokenizer alone."""
    shape = dataclasses.replace(
        building.LANGUAGE_MODELS["svlm"],
        config=json.loads((hub.root / "shape" / "config.json").read_text()),
    )
    monkeypatch.setattr(building, "LANGUAGE_MODELS", {"svlm": shape})
    assert [path.name for path in (hub.root / "scratch").iterdir()] == ["tokenizer.model"]
    model = build_model(hub.settings("dinov2", "scratch", language_model_shape="svlm"))
    language = model.config.language_model
    assert language.vocab_size == 421  # the placeholder is a new token
    assert language.num_experts == 4
    assert model(batch_of(model)).isfinite()


def refusal(settings: Settings) -> str:
    with pytest.raises(NanoVLMError) as caught:
        build_model(settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"projector": "pixel_shuffle", "scale": 3},
            "a grid of 4×4 patches is not made of 3×3 squares; change the image size or",
        ),
        (
            {"projector": "bilinear", "grid": 5},
            r"16 patches cannot be averaged down to 5×5; use a smaller one \(--grid\)",
        ),
        (
            {"projector": "mpl"},
            (
                "projector 'mpl' is not known; "
                "take one of linear, mlp, pixel_shuffle, bilinear, resampler"
            ),
        ),
        (
            {"image_size": 280},
            (
                r"an image takes up to 1600 visual tokens, which leave no room .* 1024 positions; "
                "take a projector"
            ),
        ),
        (
            {"image_size": 30},
            "an image of 30×30 pixels is not made of 7-pixel patches; resize it to multiples of 7",
        ),
        (
            {"vision_layer": -2},
            r"the final norm follows layer -1, not layer -2; set vision_norm = false \(--no-vis",
        ),
        (
            {"vision_layer": -5},
            "layer -5 of a vision transformer with 3 blocks; take one from -4 to 3",
        ),
        ({"projector_activation": "relu"}, "activation is 'relu'; take one of gelu"),
        (
            {"vision_encoder": "siglip-so400m-384"},
            "fetch with `python -m data_tools.download siglip-so400m-384`, or give a folder with",
        ),
        (
            {"vision_encoder": "nowhere"},
            (
                "--vision-encoder nowhere: is no folder with a config.json; "
                "give one, or one of dinov2-small"
            ),
        ),
        (
            {"language_model": "nowhere"},
            "--language-model nowhere: is no folder with a config.json; give one, or one of",
        ),
        (
            {"language_model_shape": "nothing"},
            "--language-model-shape nothing: is no folder with a config.json; give one, or one of",
        ),
        (
            {"language_model": "", "language_model_shape": "svlm"},
            "--language-model is missing, which gives the tokenizer; name a folder with one",
        ),
        (
            {"language_model": "qwen2.5-0.5b"},
            "weights/qwen2.5-0.5b: not there yet; fetch with `python -m data_tools.download qwen2",
        ),
        (
            {"language_model": "decoder-0.1b"},
            "decoder-0.1b is a shape that nobody publishes; give --language-model DIR, a folder",
        ),
        (
            {"language_model": "{hub}/siglip"},
            "siglip: config.json: model_type is 'siglip_vision_model', a vision encoder; implem",
        ),
        (
            {"vision_encoder": "{hub}/qwen2"},
            "qwen2: config.json: model_type is 'qwen2', a language model; implemented are dinov2",
        ),
    ],
)
def test_what_cannot_fit_is_one_line(hub: Hub, changes: dict, message: str):
    changes = {
        name: value.format(hub=hub.root) if isinstance(value, str) else value
        for name, value in changes.items()
    }
    with pytest.raises(NanoVLMError, match=message) as caught:
        build_model(hub.settings("siglip", "qwen2", **changes))
    assert "\n" not in str(caught.value)


def test_heads_of_a_resampler_have_to_divide_the_width(hub: Hub, tmp_path: Path):
    vision_model(tmp_path, "siglip_vision_model", hidden_size=36)
    settings = hub.settings(
        "siglip", "qwen2", "resampler", vision_encoder=str(tmp_path), image_size=28
    )
    assert refusal(settings) == (
        "patch vectors of 36 numbers cannot be split into the resampler's 8 heads; "
        "take another projector, or another num_heads"
    )


@pytest.mark.parametrize(
    ("special", "rows", "remove", "message"),
    [
        (
            ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
            300,
            "",
            "the tokenizer has 326 tokens and the language model 300; they do",
        ),
        (
            ("<|endoftext|>",),
            330,
            "",
            "no chat template fits its tokenizer: it lacks special tokens of each",
        ),
        (
            ("<|im_start|>", "<|im_end|>"),
            330,
            "tokenizer.json",
            "holds no tokenizer; expected tokenizer.json",
        ),
    ],
)
def test_a_language_model_without_the_tokens_for_it(
    hub: Hub, tmp_path: Path, special: tuple, rows: int, remove: str, message: str
):
    byte_pair(tmp_path, special=special)
    qwen(tmp_path, vocab_size=rows)
    if remove:
        (tmp_path / remove).unlink()
    assert message in refusal(hub.settings("siglip", "qwen2", language_model=str(tmp_path)))


def test_a_preset_without_folders_says_what_to_fetch():
    assert refusal(load_settings("stage1", ["--preset", "mary"])) == (
        "weights/siglip-so400m-384 and weights/qwen2.5-0.5b: not there yet; fetch with "
        "`python -m data_tools.download siglip-so400m-384 qwen2.5-0.5b`, or give a folder with "
        "--vision-encoder and --language-model, or add --tiny to a preset, which needs none"
    )


def test_a_new_part_is_compared_with_the_memory_before_it_is_built():
    config = LanguageModelConfig(hidden_size=2**16, intermediate_size=2**19, num_hidden_layers=60)
    with pytest.raises(NanoVLMError, match=r"the new LanguageModel takes [\d.]+ GB, and this mach"):
        _new(lambda: LanguageModel(config))
