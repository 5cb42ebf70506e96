"""A published `config.json`, read strictly.

Omitted settings take their documented defaults. One that would change the result and is not
implemented is refused. What a folder or a config is, is said before its keys are looked at.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from nanovlm.errors import NanoVLMError, quoted
from nanovlm.hub.names import LANGUAGE_FAMILIES, VISION_FAMILIES
from nanovlm.utils.config import check_number, unknown_key
from nanovlm.utils.files import open_regular, read_json
from nanovlm.utils.sniff import FIRST_BYTES, what_is

T = TypeVar("T")

# Keys of any family's file that cannot change a forward pass.
IGNORED = frozenset({
    # Who wrote the file, for whom, and how to initialise and call the model.
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version",
    "_name_or_path", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id",
    "initializer_range", "use_cache", "chunk_size_feed_forward", "id2label", "label2id",
    "problem_type", "output_attentions", "output_hidden_states", "return_dict",
    "is_encoder_decoder", "_attn_implementation", "_attn_implementation_autoset",
    # Defaults that older files repeat: of generation, of tasks and of other frameworks.
    "add_cross_attention", "bad_words_ids", "begin_suppress_tokens",
    "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample",
    "early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty",
    "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "is_decoder",
    "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups",
    "num_beams", "num_return_sequences", "output_scores", "prefix", "pruned_heads",
    "remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "sep_token_id",
    "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss",
    "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p", "torchscript", "typical_p",
    "use_bfloat16", "use_return_dict", "trust_remote_code", "tokenizer_model_max_length",
    "keys_to_ignore_at_inference", "transformers.js_config",
    # How a model is trained or computed, not what.
    "attn_implementation", "flash_attention", "gradient_checkpointing", "initializer_factor",
    "model_max_length", "use_flash_attention", "use_flash_attn",
})  # fmt: skip
# Keys by which tools and authors sign a file, and dropouts, which are off in a forward pass.
_SIGNATURES = re.compile(
    r"_.*|unsloth_.*|.*_version|.*_revision|.*_hash|.*dropout.*|.*_pdrop"
    r"|name|model_name|author|license|description|comment"
)

# Files by which a folder that lacks `config.json` or weights is recognised, and what it is.
_NEEDS_A_PART = "give a vision encoder or a language model"
_FOLDERS = {
    "adapter.json": "is an adapter folder; give the model that it was trained on, and this folder "
    "as --adapter",
    "adapter_config.json": "is an adapter folder of PEFT; merge it into the model that it was "
    "trained on (`merge_and_unload`), and give the result",
    "model_index.json": f"is a pipeline of diffusers, which makes images; {_NEEDS_A_PART}",
    "modules.json": f"is a model of sentence-transformers; {_NEEDS_A_PART}",
    "*.gguf": "holds a GGUF file (llama.cpp), a format that is not read; take the folder with "
    "model.safetensors that it was made from",
    "consolidated*": "holds weights in their first publisher's layout; take the folder of the same "
    "model in the layout of transformers",
    "*.incomplete": "holds an interrupted download; download it again",
    ".cache/huggingface/download/*.incomplete": "is an interrupted download; download it again",
    "._____temp": "is an interrupted download; download it again",
}
# What to do about a key that is none of those known: it may change a result.
UNKNOWN = "what it changes is not implemented; take another model"
# Tables of a whole vision-language model's config.
_PARTS_OF_VLM = (
    "vision_config", "visual", "mm_vision_tower", "vision_tower", "vision", "image_config",
    "audio_config",
)  # fmt: skip


def read_config(folder: Path, parse: Callable[[dict[str, Any]], T]) -> tuple[str, T]:
    """The model_type of `folder`'s `config.json`, and what `parse` makes of it.

    An error names the folder, and what it is instead of a model's.
    """
    path = folder / "config.json"
    if not path.exists():
        raise NanoVLMError(f"{folder}: {explain_folder(folder, 'no config.json')}")
    config = read_json(path)
    try:
        _refuse_quantized(config)
        return config.get("model_type", ""), parse(config)
    except NanoVLMError as error:
        raise NanoVLMError(f"{folder}: {error}") from None


def explain_folder(folder: Path, lacks: str) -> str:
    """What `folder` is, which holds `lacks` ("no config.json"), and what to give instead."""
    if not folder.is_dir():
        if not folder.exists():
            return "there is no such folder; check the path"
        with open_regular(folder) as file:
            what = what_is(file.read(FIRST_BYTES))
        kind = f"{what.partition(':')[0]}, not a folder" if what else "a file, not a folder"
        return f"is {kind}; give the folder of a model, with its config.json"
    if (folder / "model" / "config.json").exists():
        return f"is the folder of a run; give its model, {folder / 'model'}"
    if (folder / "settings.toml").exists():
        return "is the folder of a run that has not ended; its model is written at the end"
    snapshots = sorted((folder / "snapshots").glob("*"), key=lambda path: path.stat().st_mtime)
    if snapshots:
        return f"is the root of a cache of the hub; give its snapshot, {snapshots[-1]}"
    if any(folder.glob("models--*")):
        return "is a cache of the hub with many models; give models--…/snapshots/… of one"
    for path in folder.iterdir():
        if path.is_symlink() and not path.exists():
            return f"{path.name} is a link to a file that is gone; download the folder again"
    for pattern, explanation in _FOLDERS.items():
        if any(folder.glob(pattern)):
            return explanation
    if not any(folder.iterdir()):
        return "is an empty folder; was the download interrupted?"
    inner = next(iter(sorted(folder.glob("*/config.json"))), None)
    advice = f"; give the folder that does, such as {inner.parent}" if inner else ""
    return f"holds {lacks}{advice or '; is it the right folder, and complete?'}"


def _refuse_quantized(config: Mapping[str, Any]) -> None:
    for key in ("quantization_config", "compression_config", "quantization"):
        if table := config.get(key):
            table = table if isinstance(table, Mapping) else {}
            method = table.get("quant_method") or table.get("format") or table.get("mode")
            named = f" ({quoted(method)})" if isinstance(method, str) else ""
            raise NanoVLMError(
                f"its weights are quantised{named}, which is not read; take the folder with the "
                "full weights, in bf16, fp16 or fp32"
            )


def is_harmless(key: str, value: Any) -> bool:
    """Whether a key that is not known cannot change a result: it signs the file, or says null."""
    return value is None or _SIGNATURES.fullmatch(key) is not None


def parse_hub_config(
    config: Mapping[str, Any],
    model_types: Iterable[str],
    defaults: Mapping[str, Any],
    ignored: Iterable[str] = (),
) -> dict[str, Any]:
    """The settings of a hub `config.json`, with `defaults` for what it omits or sets to null.

    model_types: those implemented; another one is an error.
    defaults: the settings that are read; a value of another type than its default is an error, as
        is a number that is not finite and within its limits.
    ignored: further keys that cannot change a forward pass. Any other key is an error, unless it
        is null or only says which tool wrote the file.
    """
    model_type = config.get("model_type")
    implemented = tuple(model_types)
    if model_type not in implemented or _is_whole(config):
        advice = f"implemented are {', '.join(implemented)}"
        if model_type == "nanovlm":
            advice = "give it as --init, or to infer.py as --model"
        elif _is_whole(config):
            advice = (
                "give a part alone: data_tools/extract_vision.py takes vision encoders out; "
                + advice
            )
        raise NanoVLMError(
            f"config.json: model_type is {quoted(model_type)}{what_model(config)}; {advice}"
        )
    known = {*defaults, *ignored, *IGNORED}
    for key, value in config.items():
        if key not in known and not is_harmless(key, value):
            raise unknown_key(key, known, "config.json", UNKNOWN)
    given = {key: value for key, value in config.items() if key in defaults and value is not None}
    for key, value in given.items():
        if not _has_type_of(defaults[key], value):
            wanted = f"a value such as {defaults[key]!r}"
            wanted = "a whole number" if isinstance(value, float) else wanted
            raise NanoVLMError(f"config.json: {key} is {quoted(value)}, expected {wanted}")
        check_number(key, value, f"config.json: {key}", defaults[key])
    return {"model_type": model_type, **defaults, **given}


def what_model(config: Mapping[str, Any]) -> str:
    """What a config is of, to follow its model_type; nothing if that is not known."""
    model_type = str(config.get("model_type"))
    if model_type == "nanovlm":
        return ", a model that was trained here"
    if _is_whole(config):
        return ", a whole vision-language model"
    if model_type in LANGUAGE_FAMILIES:
        return ", a language model"
    if model_type in VISION_FAMILIES:
        return ", a vision encoder"
    return ", part of a pipeline of diffusers" if "_class_name" in config else ""


def _is_whole(config: Mapping[str, Any]) -> bool:
    return any(isinstance(config.get(key), Mapping | str) for key in _PARTS_OF_VLM)


def require(config: Mapping[str, Any], where: str = "config.json", **implemented: Any) -> None:
    """Refuse a setting whose value is not the one implemented."""
    for key, value in implemented.items():
        if key in config and config[key] != value:
            raise NanoVLMError(
                f"{where}: {key} = {quoted(config[key])} is not implemented, only {value!r}"
            )


def _has_type_of(default: Any, value: Any) -> bool:
    """Whole numbers stand in for fractions; true and false are no numbers."""
    if default is None:
        return True
    if isinstance(value, bool) or isinstance(default, bool):
        return type(value) is type(default)
    return isinstance(value, (int, float) if isinstance(default, float) else type(default))
