"""How a published model writes its conversations: its folder → `ChatConfig`."""

import re
from pathlib import Path

from nanovlm.errors import NanoVLMError
from nanovlm.inputs.chat import IMAGE_MARKER, TEMPLATES, ChatConfig
from nanovlm.tokenizer import Tokenizer
from nanovlm.utils.files import read_json

# One of the tokens without a meaning, which only the first Qwen's vocabulary has, and the system
# prompt of its published code: its folder holds no template.
_FIRST_QWEN_TOKEN = "<|extra_0|>"
_FIRST_QWEN_SYSTEM = "You are a helpful assistant."

# Tokens that can stand for a visual token. A vocabulary takes the first that it has, and gets
# IMAGE_MARKER if it has none.
_PLACEHOLDERS = ("<|image_pad|>", IMAGE_MARKER, _FIRST_QWEN_TOKEN)

# By our template: the default system prompt as it stands in the text of a published template.
_DEFAULT_SYSTEM = {
    "chatml": re.compile(r"<\|im_start\|>system(?:\n|\\n)(?P<text>[^<'{]+)<\|im_end\|>"),
    "vicuna": re.compile(
        r"""(?P<quote>['"])(?P<text>A chat between (?:\\.|(?!(?P=quote)).)+?)\s*"""
        r"""(?:USER:.*?)?(?P=quote)""",
        re.DOTALL,
    ),
}


def read_chat_config(folder: str | Path, tokenizer: Tokenizer) -> ChatConfig:
    """Work out a hub folder's template from its special tokens and its chat template.

    The published template is a program, and is not run. Two facts are read from its text: the
    default system prompt, which stands in it word for word (Qwen2, Qwen2.5, SmolLM2, Vicuna), and
    whether it has think blocks (Qwen3). LLaMA's tokenizer, whose <s> and </s> many templates
    share, counts as Vicuna's only with Vicuna's template or with none.

    Raises NanoVLMError if no template fits, with what each of them needs.
    """
    special, source = tokenizer.special_tokens, _template_source(Path(folder))
    fitting = [name for name, template in TEMPLATES.items() if template.special <= special.keys()]
    if not fitting:
        raise _no_template(folder, "it lacks special tokens of each")
    if fitting[0] == "vicuna" and source and "ASSISTANT:" not in source:
        raise _no_template(folder, "its chat template is another one")
    template = fitting[0]
    system = _default_system(template, source)
    if _FIRST_QWEN_TOKEN in special and not source:
        system = _FIRST_QWEN_SYSTEM
    return ChatConfig(
        template=template,
        image_token=next((token for token in _PLACEHOLDERS if token in special), IMAGE_MARKER),
        default_system=system,
        empty_think=template == "chatml" and "<think>" in source,
    )


def _template_source(folder: Path) -> str:
    """The text of a hub folder's chat template; nothing where it has none.

    It is a file of its own in newer folders, a setting of the tokenizer in older ones.
    """
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
    path = folder / "tokenizer_config.json"
    return str(read_json(path).get("chat_template") or "") if path.exists() else ""


def _default_system(template: str, source: str) -> str | None:
    """The default system prompt in the text of a published template that is our `template`."""
    pattern = _DEFAULT_SYSTEM.get(template)
    found = pattern.search(source) if pattern else None
    return found["text"].replace("\\'", "'").strip() if found else None


def _no_template(folder: str | Path, problem: str) -> NanoVLMError:
    needs = "; ".join(
        f"{name} needs {' '.join(sorted(template.special))}" for name, template in TEMPLATES.items()
    )
    return NanoVLMError(f"{folder}: no chat template fits its tokenizer: {problem} ({needs})")
