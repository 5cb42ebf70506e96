"""Reading a published `config.json` strictly: documented defaults are filled in, what would change
the result is refused."""

from collections.abc import Iterable, Mapping
from typing import Any

from nanovlm.errors import NanoVLMError
from nanovlm.utils.config import unknown_key

# What hub files say about themselves, about generation or about initialisation: nothing that
# changes a forward pass.
HUB_BOOKKEEPING = frozenset(
    {
        "architectures",
        "model_type",
        "torch_dtype",
        "dtype",
        "transformers_version",
        "_name_or_path",
        "auto_map",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "initializer_range",
        "use_cache",
        "chunk_size_feed_forward",
        "id2label",
        "label2id",
        "problem_type",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "is_encoder_decoder",
        "_attn_implementation",
        "_attn_implementation_autoset",
        # What older files repeat of the library's defaults, in the table of each part: generation,
        # tasks, other frameworks.
        "add_cross_attention",
        "bad_words_ids",
        "begin_suppress_tokens",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "is_decoder",
        "length_penalty",
        "max_length",
        "min_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_scores",
        "prefix",
        "pruned_heads",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict_in_generate",
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torchscript",
        "typical_p",
        "use_bfloat16",
    }
)


def read_hf_config(
    config: Mapping[str, Any],
    model_types: tuple[str, ...],
    defaults: Mapping[str, Any],
    ignored: Iterable[str] = (),
) -> dict[str, Any]:
    """Fill the defaults a hub `config.json` leaves out or sets to null; a value of another type is
    an error.

    `ignored` names keys known not to change a forward pass.
    """
    model_type = config.get("model_type")
    if model_type not in model_types:
        raise NanoVLMError(
            f"config.json: model_type is {model_type!r}; implemented are {', '.join(model_types)}"
        )
    known = {*defaults, *ignored, *HUB_BOOKKEEPING}
    for key in config:
        if key not in known:
            raise unknown_key(key, known, "config.json")
    given = {key: value for key, value in config.items() if key in defaults and value is not None}
    for key, value in given.items():
        default = defaults[key]
        accepted = (int, float) if type(default) in (int, float) else type(default)
        fits = isinstance(value, accepted) and isinstance(value, bool) == isinstance(default, bool)
        if not fits and default is not None:
            raise NanoVLMError(
                f"config.json: {key} is {value!r}, expected a value such as {default!r}"
            )
    return {"model_type": model_type, **defaults, **given}


def require(config: Mapping[str, Any], where: str = "config.json", **implemented: Any) -> None:
    """Refuse a setting whose value is not the one implemented."""
    for key, value in implemented.items():
        if key in config and config[key] != value:
            raise NanoVLMError(
                f"{where}: {key} = {config[key]!r} is not implemented, only {value!r}"
            )
