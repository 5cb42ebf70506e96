"""Every kind of vision encoder and language model as a user would fetch it, at toy widths.

All vision encoders give a grid of 4 × 4 vectors for each tile.
"""

import base64
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from nanovlm.hub.names import OWN
from tests.reference.models import (
    FIXTURES,
    byte_pair,
    dinov2,
    qwen,
    qwen1,
    sentence_piece,
    vision_model,
)
from tests.reference.scratch import LANGUAGE_CONFIG

SQUARE = {"height": 28, "width": 28}


def _write_processor(folder: Path, kind: str, **settings) -> None:
    config = {"image_processor_type": kind, **settings}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))


def write_dinov2(folder: Path, registers: int = 0) -> None:
    dinov2(folder, registers=registers)
    _write_processor(folder, "BitImageProcessor", size={"shortest_edge": 32}, crop_size=SQUARE)


def write_dinov2_with_registers(folder: Path) -> None:
    write_dinov2(folder, registers=4)


def write_siglip(folder: Path) -> None:
    vision_model(folder, "siglip_vision_model")
    _write_processor(folder, "SiglipImageProcessor", size=SQUARE)


def write_clip(folder: Path) -> None:
    vision_model(folder, "clip_vision_model")
    _write_processor(folder, "CLIPImageProcessor", size={"shortest_edge": 28}, crop_size=28)


def write_smolvlm(folder: Path) -> None:
    vision_model(folder, "smolvlm_vision")
    sizes = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}}
    _write_processor(folder, "SmolVLMImageProcessor", **sizes)


def write_qwen_vl(folder: Path) -> None:
    """The recorded vision encoder, as `extract_vision.py` writes one."""
    folder.mkdir()
    stored = load_file(FIXTURES / "qwen_vl_vision.safetensors")
    weights = {name: tensor for name, tensor in stored.items() if not name.startswith("fixture.")}
    save_file(weights, folder / "model.safetensors")
    config = json.loads((FIXTURES / "qwen_vl_vision.json").read_text())["visual"]
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen_vl_vision", **config}))
    _write_processor(folder, "ViTImageProcessor", size={"height": 56, "width": 56})


def write_qwen1(folder: Path) -> None:
    """The recorded language model with a vocabulary of single bytes and the special tokens."""
    qwen1(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"vocab_size": 256 + 208, "max_position_embeddings": 1024}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    for seed, name in enumerate(("transformer.wte.weight", "lm_head.weight")):
        generator = torch.Generator().manual_seed(seed)
        weights[name] = torch.randn(config["vocab_size"], 64, generator=generator) / 8
    save_file(weights, folder / "model.safetensors")
    lines = (f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256))
    (folder / "qwen.tiktoken").write_text("".join(lines))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "QWenTokenizer"}))


def write_qwen2(folder: Path) -> None:
    qwen(folder, vocab_size=len(byte_pair(folder)), max_position_embeddings=1024)


def write_qwen3(folder: Path) -> None:
    tokenizer = byte_pair(
        folder,
        chat_template="{% for turn in messages %}"
        "{{ '<|im_start|>' + turn.role + '\\n' + turn.content + '<|im_end|>\\n' }}{% endfor %}"
        "{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}",
    )
    qwen(folder, "qwen3", vocab_size=len(tokenizer), head_dim=16, max_position_embeddings=1024)


def write_llama(folder: Path) -> None:
    """Like SmolLM2: a byte-pair vocabulary, and an embedding table with unused rows at its end."""
    tokenizer = byte_pair(folder, special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    sizes = {"vocab_size": len(tokenizer) + 7, "max_position_embeddings": 1024}
    qwen(folder, "llama", **sizes, tie_word_embeddings=True)


def write_vicuna(folder: Path) -> None:
    """Like Vicuna: the embedding table has rows for the SentencePiece model's pieces only."""
    sentence_piece(folder, added=())
    qwen(folder, "llama", vocab_size=420, max_position_embeddings=1024)


def write_scratch_tokenizer(folder: Path) -> None:
    """A tokenizer.model and nothing else, for the language model that `scratch_shape` describes."""
    sentence_piece(folder, added=())
    for path in folder.iterdir():
        if path.name != "tokenizer.model":
            path.unlink()


def scratch_shape(folder: Path) -> Path:
    """The config.json of a language model from scratch: what `language_model_shape` names."""
    folder.mkdir()
    config = dataclasses.replace(LANGUAGE_CONFIG, vocab_size=420, max_position_embeddings=1024)
    written = {"model_type": OWN, **dataclasses.asdict(config)}
    (folder / "config.json").write_text(json.dumps(written))
    return folder


VISION_ENCODERS: dict[str, Callable[[Path], None]] = {
    "dinov2": write_dinov2,
    "dinov2-registers": write_dinov2_with_registers,
    "siglip": write_siglip,
    "clip": write_clip,
    "smolvlm": write_smolvlm,
    "qwen-vl": write_qwen_vl,
}
LANGUAGE_MODELS: dict[str, Callable[[Path], None]] = {
    "qwen1": write_qwen1,
    "qwen2": write_qwen2,
    "qwen3": write_qwen3,
    "llama": write_llama,
    "vicuna": write_vicuna,
    "scratch": write_scratch_tokenizer,
}
