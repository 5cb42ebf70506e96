"""How a published model writes its conversations: its folder → `ChatConfig`."""

import dataclasses
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nanovlm.errors import NanoVLMError, quoted, see
from nanovlm.inputs.chat import EMPTY_THINK, IMAGE_MARKER, ChatConfig
from nanovlm.inputs.jinja import read_jinja
from nanovlm.inputs.templates import TEMPLATES, TEXT_TEMPLATES, Template
from nanovlm.tokenizer import Tokenizer
from nanovlm.utils.config import check_number
from nanovlm.utils.files import read_json, read_text
from nanovlm.utils.sniff import refuse_stand_in

# One of the tokens without a meaning, which only the first Qwen's vocabulary has, and the system
# prompt of its published code: its folder holds no template.
_FIRST_QWEN_TOKEN = "<|extra_0|>"
_FIRST_QWEN_SYSTEM = "You are a helpful assistant."

# Tokens that can stand for a visual token. A vocabulary takes the first that it has, and gets
# IMAGE_MARKER if it has none.
_PLACEHOLDERS = ("<|image_pad|>", IMAGE_MARKER, _FIRST_QWEN_TOKEN)

# The default system prompt in a published template that does not write it between tokens: as the
# value of a variable, or as the words by which Vicuna's begins.
_DEFAULT_SYSTEM = re.compile(
    r"""(?:\bset\s+\w{0,40}system\w{0,40}\s*=\s*|(?=.A chat between ))(?P<quote>['"])"""
    r"""(?P<text>(?:\\.|(?!(?P=quote))[^\\])++)(?P=quote)""",
    re.DOTALL,
)
# In the outline of a published template: the name of a turn's role, and any other text that is
# filled in, such as what a turn says. Private characters, which no template writes.
_ROLE, _FILLED = "\ue000", "\ue001"
_MAX_TEMPLATE = 2**18  # characters; the longest published templates, with tools, have a tenth
_JINJA_WORDS = ("if", "else", "and", "or", "not", "is", "in")
# The whole outlines of vision-language models' templates, by our name of them.
_VISION_OUTLINES = {
    "smolvlm": rf"<\|im_start\|>{_ROLE}:: {_FILLED}<image>(<video>)?<end_of_utterance>\nAssistant:",
    "idefics3": rf"<\|begin_of_text\|>{_ROLE}:: {_FILLED}<image><end_of_utterance>\nAssistant:",
    "llava": rf"{_ROLE}: <image>\n({_FILLED} ){{1,2}}ASSISTANT:",
    "llava-qwen": rf"<\|im_start\|>{_ROLE}\n<image>(\n{_FILLED}){{1,2}}<\|im_end\|>\n"
    r"<\|im_start\|>assistant",
}


def read_chat_config(
    folder: str | Path, tokenizer: Tokenizer, default: str | None = None
) -> ChatConfig:
    """Work out a hub folder's template from its special tokens and its chat template.

    The published template is a program, and is not run. Its outline has to be that of one of ours:
    the text that it writes around a turn of the user and of the assistant. Two more facts are read
    from it: the default system prompt, which stands in it word for word (Qwen2, Qwen2.5, SmolLM2,
    Vicuna), and whether it has think blocks (Qwen3). One that `write_jinja` wrote says all that
    itself. Without a published template, `default` is
    taken, or the first of ours whose special tokens the tokenizer has. The end tokens are those of
    `generation_config.json`.

    Raises NanoVLMError if no template fits, with what each of them needs.
    """
    folder, special = Path(folder), tokenizer.special_tokens
    config = _read_if_there(folder / "tokenizer_config.json")
    source = _template_source(folder, config)
    if (ours := read_jinja(source, tokenizer)) is not None:
        return _with_end_ids(ours, folder, tokenizer)
    tokens = {name: _content(config.get(name)) for name in ("bos_token", "eos_token")}
    outline = _outline(source, tokens)
    whole = None if source else default
    for name, pattern in _VISION_OUTLINES.items():
        whole = name if re.fullmatch(pattern, outline.rstrip("\n")) else whole
    candidates = [whole] if whole else [*TEXT_TEMPLATES]
    fitting = [name for name in candidates if TEMPLATES[name].special <= special.keys()]
    if not fitting:
        raise _no_template(folder, "it lacks special tokens of each", candidates)
    if source and not whole:
        fitting = [name for name in fitting if _is_written(TEMPLATES[name], outline, tokens)]
    if not fitting:
        raise _no_template(folder, "its chat template is another one")
    template = fitting[0]
    system = _default_system(TEMPLATES[template], source, outline)
    if _FIRST_QWEN_TOKEN in special and not source:
        system = _FIRST_QWEN_SYSTEM
    config = ChatConfig(
        template=template,
        image_token=next((token for token in _PLACEHOLDERS if token in special), IMAGE_MARKER),
        default_system=system,
        empty_think=EMPTY_THINK in outline,
    )
    return _with_end_ids(config, folder, tokenizer)


def _with_end_ids(config: ChatConfig, folder: Path, tokenizer: Tokenizer) -> ChatConfig:
    end_of_turn = tokenizer.special_tokens[TEMPLATES[config.template].end_of_turn["assistant"]]
    end_ids = tuple(id for id in _end_ids(folder) if id != end_of_turn)
    return dataclasses.replace(config, end_ids=end_ids)


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _content(token: Any) -> str:
    """The text of a token that a file gives as such or as an object; nothing without one."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""


def _end_ids(folder: Path) -> tuple[int, ...]:
    """The ids of the tokens that end an answer, of `generation_config.json`."""
    path = folder / "generation_config.json"
    given = _read_if_there(path).get("eos_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(type(id) is int for id in ids):
        raise NanoVLMError(f"{path}: eos_token_id is {quoted(given)}, expected an id, or several")
    for id in ids:
        check_number("token_id", id, f"{path}: eos_token_id", default=0)
    return tuple(dict.fromkeys(ids))


def _template_source(folder: Path, config: dict[str, Any]) -> str:
    """The text of a hub folder's chat template; nothing where it has none.

    It is a file of its own in newer folders and those of whole models, a setting of the tokenizer
    in older ones: the text, or a list of named ones.
    """
    path, source = folder / "chat_template.jinja", config.get("chat_template")
    if path.exists():
        source = refuse_stand_in(path, read_text(path))
    elif (folder / "chat_template.json").exists():
        source = read_json(folder / "chat_template.json").get("chat_template")
    elif isinstance(source, list):
        named = [item for item in source if isinstance(item, dict)]
        source = next((it.get("template") for it in named if it.get("name") == "default"), source)
    if source is not None and (not isinstance(source, str) or len(source) > _MAX_TEMPLATE):
        raise _no_template(folder, "its chat template is no text, or too long")
    return (source or "").replace("\r\n", "\n")  # as Jinja reads it


def _outline(source: str, tokens: dict[str, str]) -> str:
    """All that a Jinja template writes, in the order of its text, whatever its conditions say.

    `tokens` are the texts of the variables that name tokens.
    """
    written, position, after_block = [], 0, False
    while position < len(source):
        opening = re.compile(r"\{[%{#]").search(source, position)
        text = source[position : opening.start() if opening else None]
        if after_block:  # as transformers sets Jinja up: a line of its own for a block is no text
            text = text.removeprefix("\n")
        if opening is None:
            written.append(text)
            break
        kind = opening[0]
        end = source.find({"{%": "%}", "{{": "}}", "{#": "#}"}[kind], opening.end())
        end = len(source) if end < 0 else end
        inside, position = source[opening.end() : end], end + 2
        if kind != "{{" and "\n" in text:
            text = text.rstrip(" \t")
        written.append(text.rstrip() if inside.startswith("-") else text)
        inside, trims = inside.strip("-+"), inside.endswith("-")
        if kind == "{{":
            written += _written_by(inside, tokens)
        elif kind == "{%" and re.match(r"\s*set\b[^=]*=", inside) and "<" in inside:
            written += _written_by(inside.partition("=")[2], tokens)
        while trims and source[position : position + 1].isspace():
            position += 1
        after_block = kind != "{{"
    return "".join(written)


def _written_by(expression: str, tokens: dict[str, str]) -> Iterator[str]:
    """What a Jinja expression writes: its strings, and marks in the place of its variables."""
    skipped, piece, before = 0, "", ""
    for match in re.finditer(r"""'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)"|\w+|\S""", expression):
        token = match[0]
        follows = before not in _JINJA_WORDS and re.match(r"[\w)\]'\"]", before[-1:])
        if skipped or (token in ("(", "[") and follows):
            # Arguments and subscripts write nothing.
            skipped += (token in ("(", "[")) - (token in (")", "]"))
            piece = _ROLE if token[1:-1] == "role" and piece else piece
        elif token[0] in "'\"":
            yield piece
            piece = _unescaped(match[1] or match[2] or "")
        elif before in (".", "|"):  # an attribute or a filter
            piece = _ROLE if token == "role" else piece
        elif token.isidentifier() and token not in _JINJA_WORDS:
            yield piece
            piece = tokens.get(token, _ROLE if "role" in token else _FILLED)
            piece = "" if token == "raise_exception" else piece
        before = token
    yield piece


def _is_written(template: Template, outline: str, tokens: dict[str, str]) -> bool:
    """Whether a published template with this outline writes turns as `template` does."""
    first = tokens["bos_token"]
    if not template.first and first and first not in template.special and first in outline:
        return False  # it opens a conversation with a token that ours has not
    for role in ("user", "assistant"):
        before, end = re.escape(template.before[role]), re.escape(template.end_of_turn[role])
        after = re.escape(template.after[role])
        this = before.replace(role, rf"\w{{0,20}}(?:{_ROLE}|{role})[\w{_ROLE}]{{0,40}}")
        if not re.search(f"{this} ?{_FILLED}+{end}{after}", outline):
            return False
        if end and re.search(rf"{end}(?!{after}|\Z)", outline):
            return False  # another text follows a turn
        opening = template.before[role].partition(role)[0]
        any_role = before.replace(role, rf"[\w{_ROLE}]{{1,60}}")
        if opening in template.special and outline.count(opening) != len(
            re.findall(any_role, outline)
        ):
            return False  # another text opens a turn
    return _opens_answer(template, outline)


def _opens_answer(template: Template, outline: str) -> bool:
    """Whether a published template opens an answer as `template` does, or writes no opening.

    A model that may think opens it with an empty think block. One that always does is not ours.
    """
    if outline.endswith(EMPTY_THINK):
        outline = outline.removesuffix(EMPTY_THINK).removesuffix("<think>\n")
    opening, end = template.before["assistant"], template.end_of_turn["assistant"]
    return outline.rstrip(f" \n{_FILLED}").endswith((opening.rstrip(), end))


def _default_system(template: Template, source: str, outline: str) -> str | None:
    """The default system prompt of a published template that writes turns as `template` does.

    It is what the template writes word for word in a turn of the system.
    """
    before, end = template.before["system"], template.end_of_turn["system"]
    marks = f"{_ROLE}{_FILLED}"
    pattern = rf"{re.escape(before)}((?:(?!{re.escape(before)})[^{marks}])+?){re.escape(end)}"
    if end and (written := re.search(pattern, outline)):
        return written[1].strip()
    found = _DEFAULT_SYSTEM.search(source)
    return _unescaped(found["text"]).partition("USER:")[0].strip() if found else None


def _unescaped(text: str) -> str:
    """The text of a string as Jinja writes it down, without its quotes."""
    return re.sub(r"\\(.)", lambda match: {"n": "\n", "t": "\t"}.get(match[1], match[1]), text)


def _no_template(
    folder: str | Path, problem: str, names: Iterable[str] = TEXT_TEMPLATES
) -> NanoVLMError:
    needs = "; ".join(f"{name} needs {' '.join(sorted(TEMPLATES[name].special))}" for name in names)
    return NanoVLMError(
        f"{folder}: no chat template fits its tokenizer: {problem} ({needs}); "
        f"{see('chat-template')}"
    )
