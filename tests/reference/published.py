"""Published vision-language models as a user would fetch them: toy widths, random weights.

The files are those of HuggingFaceTB/SmolVLM-256M-Instruct, SmolVLM2-256M-Video-Instruct,
llava-hf/llava-1.5-7b-hf and llava-interleave-qwen-0.5b-hf, with their chat templates and image
processors. `transformers` writes the weights and `config.json`. An image or tile of 28 × 28 pixels
is a grid of 4 × 4 patches.
"""

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from tests.reference.models import CORPUS, VISION_SHAPE, byte_pair, save, sentence_piece

TEXT_SHAPE = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
)
FAKE, IMAGE, END = "<fake_token_around_image>", "<image>", "<end_of_utterance>"
ROW_COLUMN = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
LLAMA3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# The published chat templates, word for word.
SMOLVLM_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
IDEFICS3_TEMPLATE = SMOLVLM_TEMPLATE.replace("<|im_start|>", "<|begin_of_text|>").replace(
    "message['role'] | capitalize", "message['role'].capitalize()"
)
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
LLAVA_QWEN_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>' }}{% endfor %}{# Render all text next #}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\n' + content['text'] }}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ '\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}"
    "{{'<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def smolvlm_folder(
    path: Path,
    family: str = "smolvlm",
    *,
    row_tokens: bool = True,
    max_shard_size: str = "1GB",
    **settings: Any,
) -> PreTrainedModel:
    """A SmolVLM ("smolvlm"), or an Idefics3 with SmolVLM's or LLaMA 3's first token.

    family: "smolvlm" (SmolVLM2), "idefics3" (SmolVLM) or "idefics3-llama3".
    row_tokens: whether rows and columns are special tokens, as in the two smaller models.
    settings: of the whole model's config; those of the language model are in `text_config`.
    Returns the reference.
    """
    llama3 = family == "idefics3-llama3"
    ids = _smolvlm_tokenizer(path, row_tokens, "<|begin_of_text|>" if llama3 else "<|im_start|>")
    kind = "SmolVLM" if family == "smolvlm" else "Idefics3"
    text = TEXT_SHAPE | {"model_type": "llama", "vocab_size": max(ids.values()) + 6}
    text |= {
        "bos_token_id": ids[CHATML[1]],
        "eos_token_id": ids[END],
        "pad_token_id": ids[CHATML[2]],
    }
    settings = {
        "scale_factor": 2,
        "image_token_id": ids[IMAGE],
        "vision_config": VISION_SHAPE,
    } | settings
    settings["text_config"] = text | settings.get("text_config", {})
    config_class, model_class = {
        "SmolVLM": (SmolVLMConfig, SmolVLMForConditionalGeneration),
        "Idefics3": (Idefics3Config, Idefics3ForConditionalGeneration),
    }[kind]
    model = save(model_class(config_class(**settings)), path, 0, max_shard_size=max_shard_size)
    _write_json(
        path / "preprocessor_config.json",
        image_processor_type=f"{kind}ImageProcessor",
        processor_class=f"{kind}Processor",
        **{f"do_{step}": True for step in ("convert_rgb", "image_splitting", "normalize", "pad")},
        do_rescale=True,
        do_resize=True,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        resample=1,
        rescale_factor=1 / 255,
        max_image_size={"longest_edge": 28},
        size={"longest_edge": 84},
    )
    scale = settings["scale_factor"]
    _write_json(
        path / "processor_config.json",
        image_seq_len=16 // scale**2,
        processor_class=f"{kind}Processor",
    )
    template = IDEFICS3_TEMPLATE if llama3 else SMOLVLM_TEMPLATE
    _write_json(path / "chat_template.json", chat_template=template)
    _write_json(path / "generation_config.json", eos_token_id=ids[END], pad_token_id=ids[CHATML[2]])
    return model


def _smolvlm_tokenizer(path: Path, row_tokens: bool, first: str) -> dict[str, int]:
    """SmolLM2's kind of tokenizer with SmolVLM's added tokens. Returns their ids."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=list(CHATML), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((*CORPUS, "User: Assistant: System:"), trainer)
    added = [*(ROW_COLUMN if row_tokens else ()), FAKE, IMAGE, END]
    added = [*({first} - set(CHATML)), *(["<global-img>"] if row_tokens else []), *added]
    tokenizer.add_special_tokens(added)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    tokens = {"bos_token": first, "eos_token": END, "pad_token": CHATML[2], "unk_token": CHATML[0]}
    _write_json(
        path / "tokenizer_config.json",
        **tokens,
        additional_special_tokens=[FAKE, IMAGE, END],
        model_max_length=2048,
        tokenizer_class="PreTrainedTokenizerFast",
    )
    return tokenizer.get_vocab()


def llava_folder(
    path: Path,
    vision: str = "clip",
    language: str = "vicuna",
    *,
    layout: str = "old",
    max_shard_size: str = "1GB",
    **settings: Any,
) -> PreTrainedModel:
    """A LLaVA.

    vision: "clip", "siglip", "dinov2" or "dinov2_with_registers".
    language: "vicuna" (as LLaVA-1.5), "qwen2" (as llava-interleave) or "llama" (LLaMA 3).
    layout: of the tensors' names, "old" (`language_model.model.layers…`) or "new"
        (`model.language_model.layers…`).
    settings: of the whole model's config; those of the language model are in `text_config`.
    Returns the reference.
    """
    image_id, rows, ids = _llava_tokenizer(path, language)
    family = "qwen2" if language == "qwen2" else "llama"
    text = TEXT_SHAPE | {"model_type": family, "vocab_size": rows + 6} | ids
    siglip = vision == "siglip"
    settings = {
        "image_token_index": image_id,
        "vision_feature_layer": -1 if siglip else -2,
        "vision_feature_select_strategy": "full" if siglip else "default",
    } | settings
    settings["text_config"] = AutoConfig.for_model(**(text | settings.get("text_config", {})))
    shape = {
        key: value for key, value in VISION_SHAPE.items() if "inter" not in key or vision[0] != "d"
    }
    kind = vision if vision.startswith("dinov2") else f"{vision}_vision_model"
    more = {"num_register_tokens": 4} if vision.endswith("registers") else {}
    settings["vision_config"] = AutoConfig.for_model(kind, **shape, **more)
    model = LlavaForConditionalGeneration(LlavaConfig(**settings))
    save(model, path, 0, max_shard_size=max_shard_size)
    if layout == "new":
        _rename_to_new(path)
    _write_llava_processor(path, vision, settings["vision_feature_select_strategy"])
    _write_json(path / "generation_config.json", eos_token_id=ids["eos_token_id"])
    return model


def _llava_tokenizer(path: Path, language: str) -> tuple[int, int, dict[str, int]]:
    """Write the tokenizer. Returns the image token's id, the number of ids and the text's ids."""
    if language == "vicuna":
        tokenizer = sentence_piece(path)
        _add_first_token(path / "tokenizer.json", "<s>", tokenizer.get_vocab()["<s>"])
        _write_json(path / "chat_template.json", chat_template=LLAVA_TEMPLATE)
        bos, end = "<s>", "</s>"
    elif language == "qwen2":
        tokenizer = byte_pair(path, special=(*CHATML, IMAGE))
        _write_json(path / "chat_template.json", chat_template=LLAVA_QWEN_TEMPLATE)
        bos, end = CHATML[0], CHATML[2]
    else:
        tokenizer = byte_pair(path, LLAMA3_TEMPLATE, special=(*LLAMA3, IMAGE))
        bos, end = LLAMA3[0], LLAMA3[3]
        config = json.loads((path / "tokenizer_config.json").read_text())
        _write_json(path / "tokenizer_config.json", **config, bos_token=bos, eos_token=end)
    vocab = tokenizer.get_vocab()
    ids = {"bos_token_id": vocab[bos], "eos_token_id": vocab[end]}
    return vocab[IMAGE], len(tokenizer), ids


def _add_first_token(path: Path, token: str, id: int) -> None:
    """Let the reference begin a text with `token`, as the published `tokenizer.json` does."""
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, id)]
    )
    tokenizer.save(str(path))


def _write_llava_processor(path: Path, vision: str, strategy: str) -> None:
    if vision == "siglip":
        kind, size, mean = "SiglipImageProcessor", {"size": {"height": 28, "width": 28}}, [0.5] * 3
        deviation = mean
    else:
        kind = "CLIPImageProcessor" if vision == "clip" else "BitImageProcessor"
        size = {
            "size": {"shortest_edge": 28 if vision == "clip" else 32},
            "crop_size": {"height": 28, "width": 28},
            "do_center_crop": True,
        }
        mean = [0.48145466, 0.4578275, 0.40821073]
        deviation = [0.26862954, 0.26130258, 0.27577711]
    _write_json(
        path / "preprocessor_config.json",
        image_processor_type=kind,
        processor_class="LlavaProcessor",
        **{f"do_{step}": True for step in ("convert_rgb", "normalize", "rescale", "resize")},
        image_mean=mean,
        image_std=deviation,
        resample=3,
        rescale_factor=1 / 255,
        **size,
    )
    prefix = {"clip": 1, "siglip": 0, "dinov2": 1, "dinov2_with_registers": 5}[vision]
    _write_json(
        path / "processor_config.json",
        image_token=IMAGE,
        num_additional_image_tokens=prefix,
        patch_size=7,
        processor_class="LlavaProcessor",
        vision_feature_select_strategy=strategy,
    )


def _rename_to_new(path: Path) -> None:
    """Change the names of a single file's tensors to those of newer folders."""

    def new(name: str) -> str:
        if name.startswith("language_model.lm_head"):
            return name.removeprefix("language_model.")
        return f"model.{name}".replace("language_model.model.", "language_model.")

    weights = load_file(path / "model.safetensors")
    renamed: dict[str, torch.Tensor] = {new(name): tensor for name, tensor in weights.items()}
    save_file(renamed, path / "model.safetensors", metadata={"format": "pt"})


def _write_json(path: Path, **content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
