"""A published `config.json`, read strictly.

Omitted settings take their documented defaults. One that would change the result and is not
implemented is refused.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from nanovlm.errors import NanoVLMError
from nanovlm.utils.config import unknown_key
from nanovlm.utils.files import read_json

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
    "use_bfloat16",
})  # fmt: skip


def read_config(folder: Path, parse: Callable[[dict[str, Any]], T]) -> tuple[str, T]:
    """The model_type of `folder`'s `config.json`, and what `parse` makes of it.

    An error names the folder.
    """
    config = read_json(folder / "config.json")
    try:
        return config.get("model_type", ""), parse(config)
    except NanoVLMError as error:
        raise NanoVLMError(f"{folder}: {error}") from None


def parse_hub_config(
    config: Mapping[str, Any],
    model_types: Iterable[str],
    defaults: Mapping[str, Any],
    ignored: Iterable[str] = (),
) -> dict[str, Any]:
    """The settings of a hub `config.json`, with `defaults` for what it omits or sets to null.

    model_types: those implemented; another one is an error.
    defaults: the settings that are read; a value of another type than its default is an error.
    ignored: further keys that cannot change a forward pass. Any other key is an error.
    """
    model_type = config.get("model_type")
    if model_type not in (implemented := tuple(model_types)):
        raise NanoVLMError(
            f"config.json: model_type is {model_type!r}; implemented are {', '.join(implemented)}"
        )
    known = {*defaults, *ignored, *IGNORED}
    for key in config:
        if key not in known:
            raise unknown_key(key, known, "config.json")
    given = {key: value for key, value in config.items() if key in defaults and value is not None}
    for key, value in given.items():
        if not _has_type_of(defaults[key], value):
            raise NanoVLMError(
                f"config.json: {key} is {value!r}, expected a value such as {defaults[key]!r}"
            )
    return {"model_type": model_type, **defaults, **given}


def require(config: Mapping[str, Any], where: str = "config.json", **implemented: Any) -> None:
    """Refuse a setting whose value is not the one implemented."""
    for key, value in implemented.items():
        if key in config and config[key] != value:
            raise NanoVLMError(
                f"{where}: {key} = {config[key]!r} is not implemented, only {value!r}"
            )


def _has_type_of(default: Any, value: Any) -> bool:
    """Whole numbers and fractions stand in for each other; true and false are no numbers."""
    if default is None:
        return True
    if isinstance(value, bool) or isinstance(default, bool):
        return type(value) is type(default)
    return isinstance(value, (int, float) if isinstance(default, (int, float)) else type(default))
