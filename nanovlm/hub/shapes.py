"""Published models by their shapes alone, to plan with one before it is downloaded.

The tables hold what the models' own `config.json` and `preprocessor_config.json` say; the same code
reads them. Once `python -m data_tools.download NAME` has fetched a model to `weights/NAME`, its
name stands for that folder.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanovlm.errors import NanoVLMError
from nanovlm.hub.image_configs import parse_image_config
from nanovlm.hub.language_configs import parse_language_model_config
from nanovlm.hub.names import OWN
from nanovlm.hub.vision_configs import parse_vision_encoder_config
from nanovlm.inputs.chat import ChatConfig
from nanovlm.inputs.image_config import ImageConfig
from nanovlm.model.language_model import LanguageModelConfig
from nanovlm.model.vision_encoder import VisionEncoderConfig


@dataclass(frozen=True)
class PublishedVisionEncoder:
    """Where a vision encoder is published, its shape, and how it takes an image."""

    hub: str
    config: dict[str, Any]
    processor: dict[str, Any]

    @property
    def vision_encoder(self) -> VisionEncoderConfig:
        """The shape."""
        return parse_vision_encoder_config(self.config)

    @property
    def image(self) -> ImageConfig:
        """How an image becomes pixels."""
        return parse_image_config(self.processor)


@dataclass(frozen=True)
class PublishedLanguageModel:
    """Where a language model is published, its shape, and how its conversations are written."""

    hub: str
    config: dict[str, Any]
    chat: ChatConfig = ChatConfig()

    @property
    def language_model(self) -> LanguageModelConfig:
        """The shape."""
        return parse_language_model_config(self.config)


_HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def _shape(model_type: str, width: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    """A published `config.json`: the keys that most of them share, and `more`."""
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {"model_type": model_type, **sizes, **more}


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def _dinov2(size: str, width: int, layers: int, heads: int) -> PublishedVisionEncoder:
    processor = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256}}
    return PublishedVisionEncoder(
        f"facebook/dinov2-{size}",
        _shape("dinov2", width, layers, heads, image_size=518),
        {**processor, "crop_size": 224, **_IMAGENET},
    )


def _clip(side: int) -> PublishedVisionEncoder:
    sizes = {"intermediate_size": 4096, "patch_size": 14, "image_size": side}
    processor = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": side}}
    return PublishedVisionEncoder(
        "openai/clip-vit-large-patch14" + ("" if side == 224 else f"-{side}"),
        _shape("clip_vision_model", 1024, 24, 16, **sizes),
        {**processor, "crop_size": side},
    )


_SO400M = {"intermediate_size": 4304, "patch_size": 14, "image_size": 384}

VISION_ENCODERS: dict[str, PublishedVisionEncoder] = {
    "dinov2-small": _dinov2("small", 384, 12, 6),
    "dinov2-base": _dinov2("base", 768, 12, 12),
    "dinov2-large": _dinov2("large", 1024, 24, 16),
    "clip-large-224": _clip(224),
    "clip-large-336": _clip(336),
    "siglip-so400m-384": PublishedVisionEncoder(
        "google/siglip-so400m-patch14-384",
        _shape("siglip_vision_model", 1152, 27, 16, **_SO400M),
        {"image_processor_type": "SiglipImageProcessor", "size": _square(384), **_HALF},
    ),
    "smolvlm2-256m": PublishedVisionEncoder(
        "HuggingFaceTB/SmolVLM2-256M-Video-Instruct",
        _shape("smolvlm_vision", 768, 12, 12, patch_size=16, image_size=512),
        {
            "image_processor_type": "SmolVLMImageProcessor",
            "size": {"longest_edge": 2048},
            "max_image_size": {"longest_edge": 512},
            "resample": 1,
            **_HALF,
        },
    ),
    "qwen-vl": PublishedVisionEncoder(
        "Qwen/Qwen-VL (its vision encoder, by data_tools/extract_vision.py)",
        {
            "model_type": "qwen_vl_vision",
            "image_size": 448,
            "patch_size": 14,
            "width": 1664,
            "layers": 48,
            "heads": 16,
            "mlp_ratio": 4.9231,
            "output_dim": 4096,
            "n_queries": 256,
        },
        {"image_processor_type": "ViTImageProcessor", "size": _square(448), "resample": 3, **_CLIP},
    ),
}


def _qwen2(hub: str, width: int, layers: int, heads: int, **more: Any) -> PublishedLanguageModel:
    common = {"vocab_size": 151936, "num_key_value_heads": 2, "tie_word_embeddings": True}
    common |= {"rope_theta": 1e6, "max_position_embeddings": 32768}
    return PublishedLanguageModel(hub, _shape("qwen2", width, layers, heads, **common | more))


# A Qwen2 with one key and value head per query head.
_QWEN15_7B = {"intermediate_size": 11008, "num_key_value_heads": 32, "tie_word_embeddings": False}
_QWEN3 = {
    "vocab_size": 151936,
    "intermediate_size": 3072,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_theta": 1e6,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}
_QWEN_7B = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "kv_channels": 128,
    "seq_length": 8192,
    "max_position_embeddings": 32768,
    "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "no_bias": True,
    "tie_word_embeddings": False,
}
_SMOLLM2 = {
    "vocab_size": 49152,
    "intermediate_size": 2560,
    "num_key_value_heads": 5,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e5,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
# Made from scratch. Widths that the original project does not give are those of a 0.5B model.
_SVLM = {
    "vocab_size": 32000,
    "intermediate_size": 2048,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "norm": "layer",
    "mlp": "gelu",
    "mlp_bias": True,
    "output_bias": True,
    "positions": "learned",
    "max_position_embeddings": 1024,
    "dropout": 0.1,
    "num_experts": 4,
    "experts_per_token": 2,
    "num_shared_experts": 1,
    "balance_loss": 0.01,
    "embedding_size": 4096,
    "reducer_size": 384,
    "tie_word_embeddings": False,
}

LANGUAGE_MODELS: dict[str, PublishedLanguageModel] = {
    # The first two are not published: small ones to measure.
    "decoder-0.1b": _qwen2("", 640, 12, 10, intermediate_size=2560, vocab_size=32000),
    "decoder-0.25b": _qwen2("", 896, 16, 14, intermediate_size=3584, vocab_size=64000),
    "qwen2-0.5b": _qwen2("Qwen/Qwen2-0.5B-Instruct", 896, 24, 14, intermediate_size=4864),
    "qwen2.5-0.5b": _qwen2("Qwen/Qwen2.5-0.5B-Instruct", 896, 24, 14, intermediate_size=4864),
    "qwen2.5-1.5b": _qwen2("Qwen/Qwen2.5-1.5B-Instruct", 1536, 28, 12, intermediate_size=8960),
    "qwen1.5-7b": _qwen2("Qwen/Qwen1.5-7B-Chat", 4096, 32, 32, **_QWEN15_7B),
    "qwen3-0.6b": PublishedLanguageModel(
        "Qwen/Qwen3-0.6B", _shape("qwen3", 1024, 28, 16, **_QWEN3), ChatConfig(empty_think=True)
    ),
    "qwen-7b": PublishedLanguageModel(
        "Qwen/Qwen-7B-Chat",
        _shape("qwen", 4096, 32, 32, **_QWEN_7B),
        ChatConfig(image_token="<|extra_0|>"),
    ),
    "smollm2-360m": PublishedLanguageModel(
        "HuggingFaceTB/SmolLM2-360M-Instruct",
        _shape("llama", 960, 32, 15, **_SMOLLM2),
        ChatConfig(image_token="<image>"),
    ),
    "svlm": PublishedLanguageModel(
        "", _shape(OWN, 1024, 14, 4, **_SVLM), ChatConfig("vicuna", image_token="<image>")
    ),
}
TOKENIZERS = {"llama-tokenizer": "llava-hf/llava-1.5-7b-hf"}  # published alone: no shape

# Whole models to ask, by their names in commands and on the hub, in small letters.
MODELS = {
    "smolvlm2-256m": "smolvlm2-256m",
    "smolvlm2-256m-video-instruct": "smolvlm2-256m",
    "llava-1.5-7b": "llava-1.5-7b",
    "llava-1.5-7b-hf": "llava-1.5-7b",
}
WEIGHTS = Path("weights")


def fetched(name: str) -> str:
    """The folder that `data_tools.download` made for a published name; else what was given."""
    is_name = name and Path(name).name == name and not Path(name).exists()
    return str(WEIGHTS / name) if is_name and (WEIGHTS / name).is_dir() else name


def download_command(names: Iterable[str]) -> str:
    """The command that fetches published models by their names."""
    return f"`python -m data_tools.download {' '.join(names)}`"


def find_model(given: str | Path) -> Path:
    """The folder of a whole model: as given, or in WEIGHTS by its name.

    A NanoVLMError says how to fetch what is a published name and no folder.
    """
    folder = Path(fetched(str(given)))
    if folder.exists():
        return folder
    advice = "check the path; `python -m data_tools.download --list` shows what can be fetched"
    if near := difflib.get_close_matches(folder.name.lower()[:100], MODELS, n=1, cutoff=0.7):
        name = MODELS[near[0]]
        advice = f"fetch it with {download_command([name])}, then give {WEIGHTS / name}"
    raise NanoVLMError(f"{given}: there is no such folder; {advice}")
