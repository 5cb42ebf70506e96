"""Every kind of eyes and of voice as the hub folder that a user would fetch, at toy widths. All eyes see a grid of 4 × 4
vectors, in an image of one picture or in each tile."""

import base64
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from nanovlm.hub.families import OWN
from tests.reference.models import FIXTURES, byte_pair, dinov2, qwen, qwen1, sentence_piece, tower
from tests.reference.scratch import TEXT

PIXELS = {"size": {"height": 28, "width": 28}}


def _processor(folder: Path, kind: str, **settings) -> None:
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": kind, **settings})
    )


def dinov2_eyes(folder: Path) -> None:
    dinov2(folder)
    _processor(
        folder,
        "BitImageProcessor",
        size={"shortest_edge": 32},
        crop_size={"height": 28, "width": 28},
    )


def registers_eyes(folder: Path) -> None:
    dinov2(folder, registers=4)
    _processor(
        folder,
        "BitImageProcessor",
        size={"shortest_edge": 32},
        crop_size={"height": 28, "width": 28},
    )


def siglip_eyes(folder: Path) -> None:
    tower(folder, "siglip_vision_model")
    _processor(folder, "SiglipImageProcessor", **PIXELS)


def clip_eyes(folder: Path) -> None:
    tower(folder, "clip_vision_model")
    _processor(folder, "CLIPImageProcessor", size={"shortest_edge": 28}, crop_size=28)


def smolvlm_eyes(folder: Path) -> None:
    tower(folder, "smolvlm_vision")
    _processor(
        folder,
        "SmolVLMImageProcessor",
        size={"longest_edge": 56},
        max_image_size={"longest_edge": 28},
    )


def qwen_vl_eyes(folder: Path) -> None:
    """The recorded tower, as `extract_vision.py` leaves one."""
    folder.mkdir()
    stored = load_file(FIXTURES / "qwen_vl_vision.safetensors")
    weights = {name: tensor for name, tensor in stored.items() if not name.startswith("fixture.")}
    save_file(weights, folder / "model.safetensors")
    config = json.loads((FIXTURES / "qwen_vl_vision.json").read_text())["visual"]
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen_vl_vision", **config}))
    _processor(folder, "ViTImageProcessor", size={"height": 56, "width": 56})


def qwen1_voice(folder: Path) -> None:
    """The recorded decoder with a vocabulary of single bytes and the special tokens that stand in no file."""
    qwen1(folder)
    config, weights = (
        json.loads((folder / "config.json").read_text()),
        load_file(folder / "model.safetensors"),
    )
    config |= {"vocab_size": 256 + 208, "max_position_embeddings": 1024}
    for seed, name in enumerate(("transformer.wte.weight", "lm_head.weight")):
        weights[name] = (
            torch.randn(config["vocab_size"], 64, generator=torch.Generator().manual_seed(seed)) / 8
        )
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    lines = (f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256))
    (folder / "qwen.tiktoken").write_text("".join(lines))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "QWenTokenizer"}))


def qwen2_voice(folder: Path) -> None:
    qwen(folder, vocab_size=len(byte_pair(folder)), max_position_embeddings=1024)


def qwen3_voice(folder: Path) -> None:
    tokenizer = byte_pair(folder, chat_template="{{ '<think>\\n\\n</think>\\n\\n' }}")
    qwen(folder, "qwen3", vocab_size=len(tokenizer), head_dim=16, max_position_embeddings=1024)


def llama_voice(folder: Path) -> None:
    """Like SmolLM2: a byte-pair vocabulary whose last rows nobody has taken."""
    tokenizer = byte_pair(folder, special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    qwen(
        folder,
        "llama",
        vocab_size=len(tokenizer) + 7,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )


def vicuna_voice(folder: Path) -> None:
    """Like Vicuna: the SentencePiece model's pieces are all that the embedding table has rows for."""
    sentence_piece(folder, added=())
    qwen(folder, "llama", vocab_size=420, max_position_embeddings=1024)


def scratch_words(folder: Path) -> None:
    """A tokenizer.model and nothing else; `scratch_shape` is the decoder that learns to use it."""
    sentence_piece(folder, added=())
    for path in folder.iterdir():
        if path.name != "tokenizer.model":
            path.unlink()


def scratch_shape(folder: Path) -> Path:
    """The config.json of a decoder made from scratch: what `language_model_shape` names."""
    folder.mkdir()
    config = dataclasses.asdict(
        dataclasses.replace(TEXT, vocab_size=420, max_position_embeddings=1024)
    )
    (folder / "config.json").write_text(json.dumps({"model_type": OWN, **config}))
    return folder


VISION_ENCODERS: dict[str, Callable[[Path], None]] = {
    "dinov2": dinov2_eyes,
    "dinov2-registers": registers_eyes,
    "siglip": siglip_eyes,
    "clip": clip_eyes,
    "smolvlm": smolvlm_eyes,
    "qwen-vl": qwen_vl_eyes,
}
LANGUAGE_MODELS: dict[str, Callable[[Path], None]] = {
    "qwen1": qwen1_voice,
    "qwen2": qwen2_voice,
    "qwen3": qwen3_voice,
    "llama": llama_voice,
    "vicuna": vicuna_voice,
    "scratch": scratch_words,
}
