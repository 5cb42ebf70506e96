"""Tiny random models as folders: those of `transformers`, the trusted reference, and ours."""

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.idefics3.modeling_idefics3 import (
    Idefics3VisionConfig,
    Idefics3VisionTransformer,
)
from transformers.models.smolvlm.modeling_smolvlm import (
    SmolVLMVisionConfig,
    SmolVLMVisionTransformer,
)

from nanovlm.hub.models import join_parts
from nanovlm.inputs.image_config import ImageConfig
from nanovlm.model.projector import ProjectorConfig
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.tokenizer.pretokenize import QWEN_PATTERN

FIXTURES = Path(__file__).parents[1] / "fixtures"
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>")
CORPUS = (
    "system\nuser\nassistant\n图中有几个红色的圆形？有三个红色的圆形。左边的蓝色三角形比右边的绿色正方形大。",
    (
        "A little girl in a pink dress climbs the stairs. Describe the picture. "
        "What is left of the red circle?"
    ),
)


def randomise(model: nn.Module, seed: int) -> None:
    """Give every parameter random values: as initialised, biases are 0 and scales are 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim in (2, 4):  # matrices and convolutions preserve the scale
            noise *= parameter[0].numel() ** -0.5
        elif parameter.ndim == 1 and not name.endswith("bias"):
            noise = 1 + 0.2 * noise
        parameter.data = noise


def save(model: PreTrainedModel, folder: Path, seed: int, **options: Any) -> PreTrainedModel:
    randomise(model, seed)
    model.save_pretrained(folder, **options)
    return model.eval()


def dinov2(
    folder: Path, *, registers: int = 0, swiglu: bool = False, seed: int = 0
) -> PreTrainedModel:
    """A DINOv2 of three blocks for a 4 × 4 grid of 7-pixel patches, saved to `folder`."""
    shape = dict(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=28,
        patch_size=7,
        use_swiglu_ffn=swiglu,
    )
    if registers:
        model = Dinov2WithRegistersModel(
            Dinov2WithRegistersConfig(**shape, num_register_tokens=registers)
        )
    else:
        model = Dinov2Model(Dinov2Config(**shape))
    return save(model, folder, seed)


# By the model_type of the vision encoder, and by that of the whole model it is published in.
VISION_CLASSES = {
    "siglip_vision_model": (SiglipVisionConfig, SiglipVisionModel),
    "clip_vision_model": (CLIPVisionConfig, CLIPVisionModel),
    "smolvlm_vision": (SmolVLMVisionConfig, SmolVLMVisionTransformer),
    "idefics3_vision": (Idefics3VisionConfig, Idefics3VisionTransformer),
}
WHOLE_MODELS = {
    "siglip": (SiglipConfig, SiglipModel),
    "clip": (CLIPConfig, CLIPModel),
    "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration),
    "idefics3": (Idefics3Config, Idefics3ForConditionalGeneration),
    "llava": (LlavaConfig, LlavaForConditionalGeneration),
}
VISION_SHAPE = dict(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=3,
    image_size=28,
    patch_size=7,
)


def vision_model(
    folder: Path, model_type: str, *, seed: int = 0, **settings: Any
) -> PreTrainedModel:
    """A vision encoder of three blocks for a 4 × 4 grid of 7-pixel patches, saved to `folder`."""
    config_class, model_class = VISION_CLASSES[model_type]
    return save(model_class(config_class(**(VISION_SHAPE | settings))), folder, seed)


def whole_model(
    folder: Path, model_type: str, *, seed: int = 0, max_shard_size: str = "1GB", **settings: Any
) -> PreTrainedModel:
    """A whole model with such a vision encoder, saved to `folder`. Returns the vision encoder."""
    config_class, model_class = WHOLE_MODELS[model_type]
    text = dict(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    text |= dict(bos_token_id=0, eos_token_id=1, pad_token_id=2)
    if model_type not in ("siglip", "clip"):
        text |= dict(model_type="llama", num_key_value_heads=2)
    vision = VISION_SHAPE | settings
    if model_type == "llava":
        vision |= {"model_type": "clip_vision_model"}
    model = model_class(config_class(vision_config=vision, text_config=text))
    save(model, folder, seed, max_shard_size=max_shard_size)
    names = {"vision_model", "model.vision_model", "model.vision_tower"}
    return next(module for name, module in model.named_modules() if name in names)


def qwen(
    folder: Path,
    family: str = "qwen2",
    *,
    seed: int = 0,
    max_shard_size: str = "1GB",
    **settings: Any,
) -> PreTrainedModel:
    """A Qwen2, Qwen3, LLaMA or Mistral of three blocks, saved to `folder`.

    `settings` are those of its config.
    """
    classes = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
    }
    config_class, model_class = classes[family]
    shape = dict(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    )
    model = model_class(config_class(**(shape | settings)))
    return save(model, folder, seed, max_shard_size=max_shard_size)


def qwen1(folder: Path) -> dict[str, torch.Tensor]:
    """The recorded model of Qwen's first generation as a hub folder.

    Returns the recorded inputs and outputs.
    """
    stored = load_file(FIXTURES / "qwen1_text.safetensors")
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor for name, tensor in stored.items() if not name.startswith("fixture.")}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text((FIXTURES / "qwen1_text.json").read_text())
    return {
        name.removeprefix("fixture."): tensor
        for name, tensor in stored.items()
        if name.startswith("fixture.")
    }


def byte_pair(
    folder: Path, chat_template: str = "", special: tuple[str, ...] = SPECIAL_TOKENS
) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer like Qwen's, with 320 tokens and `special` ones, saved to `folder`."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=320,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_special_tokens(list(special))
    tokenizer.add_tokens(["<think>", "</think>"])  # as in Qwen3: found in text, not special
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": chat_template}), encoding="utf-8"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=chat_template, bos_token=special[0]
    )


def sentence_piece(
    folder: Path, chat_template: str = "", added: tuple[str, ...] = ("<image>", "<pad>")
) -> PreTrainedTokenizerFast:
    """A folder like LLaVA's: a SentencePiece model, and its conversion for `tokenizers`.

    The reference reads the conversion. `added` tokens follow the model's own pieces in
    `tokenizer_config.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "tokenizer.model", "wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS * 9),
            model_writer=file,
            model_type="bpe",
            vocab_size=420,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
            num_threads=1,
        )
    model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    special = ("<unk>", "<s>", "</s>", *added)
    tokenizer = _converted(model)
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(folder / "tokenizer.json"))
    flags = dict(lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)
    numbered = {str(tokenizer.token_to_id(text)): {"content": text, **flags} for text in special}
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "added_tokens_decoder": numbered,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "legacy": True,
        "chat_template": chat_template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=chat_template, bos_token="<s>", eos_token="</s>"
    )


def _converted(model: SentencePieceProcessor) -> tokenizers.Tokenizer:
    """A SentencePiece model as a byte-pair model with byte fallback."""
    ids = {model.id_to_piece(id): id for id in range(len(model))}
    pairs = [
        (ids[piece], ids[piece[:at]], ids[piece[at:]], piece[:at], piece[at:])
        for piece in ids
        for at in range(1, len(piece))
        if not model.is_byte(ids[piece]) and piece[:at] in ids and piece[at:] in ids
    ]
    merges = [pair[3:] for pair in sorted(pairs)]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def tiny_vlm(
    folder: Path,
    projector: ProjectorConfig = ProjectorConfig("pixel_shuffle"),
    family: str = "qwen2",
    image: ImageConfig = ImageConfig(28, 28),
    **settings: Any,
) -> VisionLanguageModel:
    """A random model for images of 28 × 28 pixels, its parts saved to `folder`.

    By default an image has 16 patches and 4 visual tokens. `settings` are the language model's.
    """
    vision_folder, language_folder = folder / "vision_encoder", folder / "language_model"
    torch.manual_seed(0)
    dinov2(vision_folder)
    tokenizer = byte_pair(language_folder)
    settings = {"vocab_size": len(tokenizer), "tie_word_embeddings": True} | settings
    qwen(language_folder, family, **settings)
    return join_parts(vision_folder, language_folder, projector, image).eval()
