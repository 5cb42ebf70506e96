"""How a published model writes its conversations: its folder → `ChatConfig`."""

import re
from pathlib import Path

from nanovlm.errors import NanoVLMError
from nanovlm.inputs.chat import IMAGE_MARKER, TEMPLATES, ChatConfig
from nanovlm.tokenizer import Tokenizer
from nanovlm.utils.files import read_json

FIRST_QWEN = "<|extra_0|>"  # of the tokens without a meaning that only its vocabulary has


PLACEHOLDERS = (
    "<|image_pad|>",
    IMAGE_MARKER,
    FIRST_QWEN,
)  # a tokenizer without any gets IMAGE_MARKER


DEFAULT_SYSTEM = {  # as it stands in a published template
    "chatml": re.compile(r"<\|im_start\|>system(?:\n|\\n)(?P<text>[^<'{]+)<\|im_end\|>"),
    "vicuna": re.compile(
        r"""(?P<quote>['"])(?P<text>A chat between (?:\\.|(?!(?P=quote)).)+?)\s*(?:USER:.*?)?(?P=quote)""",
        re.DOTALL,
    ),
}


def read_chat_config(folder: str | Path, tokenizer: Tokenizer) -> ChatConfig:
    """Work out a hub folder's template from its special tokens and its chat template.

    The published template is a program, which is not run; of it only two facts are read: the
    default system prompt, which stands in it word for word (Qwen2, Qwen2.5, SmolLM2, Vicuna), and
    whether it has think blocks (Qwen3). Raises if no template fits, with what each would need.
    LLaMA's tokenizer, whose <s> and </s> many templates share, is taken for Vicuna's only with its
    template or with none.
    """
    special, source = tokenizer.special_tokens, _template_source(Path(folder))
    fitting = [name for name, template in TEMPLATES.items() if template.special <= special.keys()]
    if not fitting or (fitting[0] == "vicuna" and source and "ASSISTANT:" not in source):
        needs = "; ".join(
            f"{name} needs {' '.join(sorted(template.special))}"
            for name, template in TEMPLATES.items()
        )
        reason = (
            "its chat template is another one" if fitting else "it lacks special tokens of each"
        )
        raise NanoVLMError(f"{folder}: no chat template fits its tokenizer: {reason} ({needs})")
    image_token = next((token for token in PLACEHOLDERS if token in special), IMAGE_MARKER)
    default = DEFAULT_SYSTEM[fitting[0]].search(source) if fitting[0] in DEFAULT_SYSTEM else None
    system = default["text"].replace("\\'", "'").strip() if default else None
    if FIRST_QWEN in special and not source:
        system = (
            "You are a helpful assistant."  # of the published code; the folder holds no template
        )
    return ChatConfig(
        fitting[0], image_token, system, empty_think=fitting[0] == "chatml" and "<think>" in source
    )


def _template_source(folder: Path) -> str:
    """The text of a hub folder's chat template: a file of its own in newer folders, a setting in
    older ones."""
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
    path = folder / "tokenizer_config.json"
    return str(read_json(path).get("chat_template") or "") if path.exists() else ""
