"""Published models by their shapes alone: to plan with one before it is fetched, and to run it at
toy widths.

What stands here is what the models' own `config.json` and `preprocessor_config.json` say, read by
the same code.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanovlm.hub.image_configs import parse_image_config
from nanovlm.hub.language_configs import parse_language_model_config
from nanovlm.hub.vision_configs import parse_vision_encoder_config
from nanovlm.inputs.chat import TEMPLATES, ChatConfig
from nanovlm.inputs.image_config import ImageConfig
from nanovlm.model.language_model import LanguageModelConfig
from nanovlm.model.vision_encoder import VisionEncoderConfig
from nanovlm.model.vlm import VisionLanguageModel, VLMConfig
from nanovlm.tokenizer import load_tokenizer

ASSETS = Path(__file__).parents[1] / "assets"  # the weights and words that ship
TOY_LAYERS = 4  # of each tower
TOY_SIDE = 64  # pixels of an image, as the toy world draws them


@dataclass(frozen=True)
class PublishedVisionEncoder:
    """A vision tower: where it is published, its shape, and how it is shown an image."""

    hub: str
    config: dict[str, Any]
    processor: dict[str, Any]

    @property
    def vision_encoder(self) -> VisionEncoderConfig:
        return parse_vision_encoder_config(self.config)

    @property
    def image(self) -> ImageConfig:
        return parse_image_config(self.processor)


@dataclass(frozen=True)
class PublishedLanguageModel:
    """A language model: where it is published, its shape, and how its conversations are written
    down."""

    hub: str
    config: dict[str, Any]
    chat: ChatConfig = ChatConfig()

    @property
    def language_model(self) -> LanguageModelConfig:
        return parse_language_model_config(self.config)


_HALF = [0.5, 0.5, 0.5]
_CLIP_MEAN, _CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
_DINOV2 = {
    "image_processor_type": "BitImageProcessor",
    "size": {"shortest_edge": 256},
    "crop_size": 224,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def _dinov2(size: str, width: int, layers: int, heads: int) -> PublishedVisionEncoder:
    return PublishedVisionEncoder(
        f"facebook/dinov2-{size}",
        {
            "model_type": "dinov2",
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "image_size": 518,
        },
        _DINOV2,
    )


def _clip(side: int) -> PublishedVisionEncoder:
    return PublishedVisionEncoder(
        "openai/clip-vit-large-patch14" + ("" if side == 224 else f"-{side}"),
        {
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "patch_size": 14,
            "image_size": side,
        },
        {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": side},
            "crop_size": side,
        },
    )


VISION_ENCODERS: dict[str, PublishedVisionEncoder] = {
    "dinov2-small": _dinov2("small", 384, 12, 6),
    "dinov2-base": _dinov2("base", 768, 12, 12),
    "dinov2-large": _dinov2("large", 1024, 24, 16),
    "clip-large-224": _clip(224),
    "clip-large-336": _clip(336),
    "siglip-so400m-384": PublishedVisionEncoder(
        "google/siglip-so400m-patch14-384",
        {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "patch_size": 14,
            "image_size": 384,
        },
        {
            "image_processor_type": "SiglipImageProcessor",
            "size": {"height": 384, "width": 384},
            "image_mean": _HALF,
            "image_std": _HALF,
        },
    ),
    "smolvlm2-256m": PublishedVisionEncoder(
        "HuggingFaceTB/SmolVLM2-256M-Video-Instruct",
        {
            "model_type": "smolvlm_vision",
            "hidden_size": 768,
            "num_attention_heads": 12,
            "patch_size": 16,
            "image_size": 512,
        },
        {
            "image_processor_type": "SmolVLMImageProcessor",
            "size": {"longest_edge": 2048},
            "max_image_size": {"longest_edge": 512},
            "resample": 1,
            "image_mean": _HALF,
            "image_std": _HALF,
        },
    ),
    "qwen-vl": PublishedVisionEncoder(
        "Qwen/Qwen-VL (its eyes, by data_tools/extract_vision.py)",
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
        {
            "image_processor_type": "ViTImageProcessor",
            "size": {"height": 448, "width": 448},
            "resample": 3,
            "image_mean": _CLIP_MEAN,
            "image_std": _CLIP_STD,
        },
    ),
}


def _qwen2(
    hub: str,
    width: int,
    inner: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocabulary: int = 151936,
    tied: bool = True,
) -> PublishedLanguageModel:
    return PublishedLanguageModel(
        hub,
        {
            "model_type": "qwen2",
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "rope_theta": 1e6,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": tied,
        },
    )


LANGUAGE_MODELS: dict[str, PublishedLanguageModel] = {
    "decoder-0.1b": _qwen2(
        "", 640, 2560, 12, 10, 2, 32000
    ),  # these two are nobody's: small ones to measure
    "decoder-0.25b": _qwen2("", 896, 3584, 16, 14, 2, 64000),
    "qwen2-0.5b": _qwen2("Qwen/Qwen2-0.5B-Instruct", 896, 4864, 24, 14, 2),
    "qwen2.5-0.5b": _qwen2("Qwen/Qwen2.5-0.5B-Instruct", 896, 4864, 24, 14, 2),
    "qwen2.5-1.5b": _qwen2("Qwen/Qwen2.5-1.5B-Instruct", 1536, 8960, 28, 12, 2),
    "qwen1.5-7b": _qwen2("Qwen/Qwen1.5-7B-Chat", 4096, 11008, 32, 32, 32, tied=False),
    "qwen3-0.6b": PublishedLanguageModel(
        "Qwen/Qwen3-0.6B",
        {
            "model_type": "qwen3",
            "vocab_size": 151936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rope_theta": 1e6,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": True,
        },
        ChatConfig(empty_think=True),
    ),
    "qwen-7b": PublishedLanguageModel(
        "Qwen/Qwen-7B-Chat",
        {
            "model_type": "qwen",
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 22016,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
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
        },
        ChatConfig(image_token="<|extra_0|>"),
    ),
    "smollm2-360m": PublishedLanguageModel(
        "HuggingFaceTB/SmolLM2-360M-Instruct",
        {
            "model_type": "llama",
            "vocab_size": 49152,
            "hidden_size": 960,
            "intermediate_size": 2560,
            "num_hidden_layers": 32,
            "num_attention_heads": 15,
            "num_key_value_heads": 5,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e5,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
        ChatConfig(image_token="<image>"),
    ),
    "svlm": PublishedLanguageModel(
        "",
        {  # of our own making: where its inventor is silent, the widths are those of a 0.5B model
            "model_type": "nanovlm_language_model",
            "vocab_size": 32000,
            "hidden_size": 1024,
            "intermediate_size": 2048,
            "num_hidden_layers": 14,
            "num_attention_heads": 4,
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
        },
        ChatConfig("vicuna", image_token="<image>"),
    ),
}


def toy_model(config: VLMConfig) -> VisionLanguageModel:
    """The architecture of `config` at toy widths, with random weights and the words of the toy
    world."""
    tokenizer = load_tokenizer(ASSETS / "tiny-language-model")
    for token in (*sorted(TEMPLATES[config.chat.template].special), config.chat.image_token):
        tokenizer.add_special_token(token)
    return VisionLanguageModel(toy_config(config, tokenizer.vocab_size), tokenizer).eval()


def toy_config(config: VLMConfig, vocab_size: int) -> VLMConfig:
    """`config` with every switch as it is and every number small, for images of TOY_SIDE pixels."""
    eyes, voice, image = config.vision_encoder, config.language_model, config.image
    cuts = image.fit == "tiles"
    side, patch_size = (
        (TOY_SIDE // 2, TOY_SIDE // 16) if cuts else (TOY_SIDE, TOY_SIDE // 8)
    )  # 8×8 patches either way
    table = round(
        side / patch_size * eyes.image_size / image.height
    )  # as much smaller or larger than an image as it was
    vision = dataclasses.replace(
        eyes,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=TOY_LAYERS,
        num_attention_heads=4,
        patch_size=patch_size,
        image_size=table * patch_size,
        num_queries=16 if eyes.num_queries else 0,
        output_size=64 if eyes.num_queries else 0,
    )
    text = dataclasses.replace(
        voice,
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=TOY_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4 if voice.num_key_value_heads == voice.num_attention_heads else 2,
        head_dim=16 * round(voice.head_dim * voice.num_attention_heads / voice.hidden_size),
        max_position_embeddings=1024,
        embedding_size=128 if voice.embedding_size else 0,
        reducer_size=32,
        original_max_position_embeddings=512 if voice.original_max_position_embeddings else 0,
    )
    projector = dataclasses.replace(
        config.projector, grid=4, scale=min(config.projector.scale, 4), num_queries=8, num_heads=4
    )
    image = dataclasses.replace(image, height=side, width=side, max_tiles=2 if cuts else None)
    return dataclasses.replace(
        config, vision_encoder=vision, language_model=text, projector=projector, image=image
    )
