"""The tokenizer, the chat template and the end tokens of a model, for other tools."""

import json
from pathlib import Path
from typing import Any

from nanovlm.export.families import Form
from nanovlm.inputs.chat import Chat
from nanovlm.inputs.jinja import write_jinja
from nanovlm.tokenizer.conversion import to_tokenizer_json
from nanovlm.tokenizer.sentence_piece import SentencePieceTokenizer
from nanovlm.utils.files import read_json, write_atomically, write_json

# Tokens that fill up a batch. A tokenizer takes the first that it has.
PADDING = ("<pad>", "<|endoftext|>", "<|finetune_right_pad_id|>", "<unk>")


def write_tokenizer(chat: Chat, form: Form, folder: Path, max_length: int) -> None:
    """Write the tokenizer's files and `chat_template.jinja`.

    The chat template writes all tokens of a conversation; `transformers` adds none before one that
    begins with the tokenizer's first token.
    """
    tokenizer, path = chat.tokenizer, folder / "tokenizer.json"
    tokenizer.save(folder)
    if isinstance(tokenizer, SentencePieceTokenizer):
        document = to_tokenizer_json(tokenizer)
        write_atomically(path, json.dumps(document, ensure_ascii=False))
    elif not chat.template.first:  # it stays as it came, but for tokens before every text
        document = read_json(path) | {"post_processor": None}
        write_atomically(path, json.dumps(document, ensure_ascii=False))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": form.processor["processor_class"],
        "eos_token": _end_token(chat),
        "pad_token": padding_token(chat),
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
        "add_bos_token": False,
        "add_eos_token": False,
    }
    if chat.template.first:
        config["bos_token"] = chat.template.first
    if form.named_tokens:
        config["extra_special_tokens"] = form.named_tokens
    write_json(folder / "tokenizer_config.json", config)
    write_atomically(folder / "chat_template.jinja", write_jinja(chat))


def write_generation_config(chat: Chat, form: Form, folder: Path) -> None:
    """Write `generation_config.json`: greedy, and which tokens end an answer."""
    special = chat.tokenizer.special_tokens
    ends = [chat.end_of_turn_id, *sorted(chat.stop_ids - {chat.end_of_turn_id})]
    config: dict[str, Any] = {
        "do_sample": False,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "pad_token_id": special[padding_token(chat)],
    }
    if chat.template.first:
        config["bos_token_id"] = special[chat.template.first]
    if form.has_new_row:  # of zeros, which is no word
        config["suppress_tokens"] = [chat.image_token_id]
    write_json(folder / "generation_config.json", config)


def padding_token(chat: Chat) -> str:
    """The token that fills up a batch."""
    special = chat.tokenizer.special_tokens
    return next((token for token in PADDING if token in special), _end_token(chat))


def _end_token(chat: Chat) -> str:
    return chat.template.end_of_turn["assistant"]
