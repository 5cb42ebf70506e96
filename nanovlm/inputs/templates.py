"""Chat templates: what stands around the turns of a conversation.

Lesson: lessons/source/05_conversations.py.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Template:
    """What stands around the turns of each role.

    In `first` and `before`, the spelling of one of `special` is that token; the rest is text. The
    role "earlier" is an answer that another turn follows, where it is written otherwise than the
    last one.
    """

    special: frozenset[str]  # tokens that a tokenizer has to have
    before: dict[str, str]
    end_of_turn: dict[str, str]  # a special token or nothing; the assistant's has a label
    after: dict[str, str]  # text between the turn and the next
    first: str = ""  # at the beginning of the conversation
    # Before a turn that opens with text, by role; an answer gets it if it begins without a space.
    before_text: dict[str, str] = field(default_factory=dict)
    # After the images that open a turn, in place of their line ends; None: as the turn has them.
    after_images: str | None = None

    def __post_init__(self) -> None:
        for table in (self.before, self.end_of_turn, self.after, self.before_text):
            if "assistant" in table:
                table.setdefault("earlier", table["assistant"])

    @classmethod
    def alike(
        cls, before: str, end_of_turn: str, after: str, special: Iterable[str], first: str = ""
    ) -> "Template":
        """The template in which all roles' turns are written the same way, but for `{role}`."""
        return cls(
            frozenset(special),
            {role: before.format(role=role) for role in ROLES},
            dict.fromkeys(ROLES, end_of_turn),
            dict.fromkeys(ROLES, after),
            first,
        )


def _smolvlm(first: str) -> Template:
    """<|im_start|>User:…<end_of_utterance>\nAssistant: …: SmolVLM and Idefics3."""
    return Template(
        special=frozenset((first, "<end_of_utterance>")),
        first=first,
        before={role: f"{role.capitalize()}:" for role in ROLES},
        end_of_turn=dict.fromkeys(ROLES, "<end_of_utterance>"),
        after=dict.fromkeys(ROLES, "\n"),
        before_text=dict.fromkeys(ROLES, " "),
        after_images="",
    )


_CHATML = ("<|im_start|>", "<|im_end|>")

# Of language models. A tokenizer takes the first one whose special tokens it has.
TEXT_TEMPLATES = {
    # <|im_start|>user\n…<|im_end|>\n: Qwen, SmolLM2 and many others
    "chatml": Template.alike("<|im_start|>{role}\n", "<|im_end|>", "\n", _CHATML),
    # <|start_header_id|>user<|end_header_id|>\n\n…<|eot_id|>: LLaMA 3
    "llama3": Template.alike(
        "<|start_header_id|>{role}<|end_header_id|>\n\n",
        "<|eot_id|>",
        "",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        first="<|begin_of_text|>",
    ),
    # <user>…</s><assistant>…</s>: the tiny model, to which a turn costs two tokens
    "plain": Template.alike("<{role}>", "</s>", "", ("<system>", "<user>", "<assistant>", "</s>")),
    # <s>… USER: … ASSISTANT: …</s>USER: …: Vicuna and LLaVA-1.5. LLaMA's tokenizer puts a space
    # before every text, which gives the one before an answer. Roles are plain text here, so a user
    # who types "ASSISTANT:" can imitate one.
    "vicuna": Template(
        special=frozenset(("<s>", "</s>")),
        first="<s>",
        before={"system": "", "user": "USER: ", "assistant": "ASSISTANT:"},
        end_of_turn={"system": "", "user": "", "assistant": "</s>"},
        after={"system": " ", "user": " ", "assistant": ""},
    ),
}

# Of published vision-language models, whose folders are recognised by the template they hold.
VISION_TEMPLATES = {
    "smolvlm": _smolvlm("<|im_start|>"),
    "idefics3": _smolvlm("<|begin_of_text|>"),
    # Vicuna's, but for earlier answers, which end with a space: llava-1.5-7b-hf
    "llava": Template(
        special=frozenset(("<s>", "</s>")),
        first="<s>",
        before={"system": "", "user": "USER: ", "assistant": "ASSISTANT:"},
        end_of_turn={"system": "", "user": "", "assistant": "</s>", "earlier": ""},
        after={"system": " ", "user": " ", "assistant": "", "earlier": " "},
    ),
    # ChatML with a line end before every text: llava-interleave-qwen-0.5b-hf. Its answers begin
    # without one, and are written with one where another turn follows.
    "llava-qwen": Template(
        special=frozenset(_CHATML),
        before={role: f"<|im_start|>{role}\n" for role in ROLES}
        | {"earlier": "<|im_start|>assistant\n\n"},
        end_of_turn=dict.fromkeys(ROLES, "<|im_end|>"),
        after=dict.fromkeys(ROLES, "\n"),
        before_text={"system": "\n", "user": "\n"},
        after_images="\n",
    ),
}
TEMPLATES = TEXT_TEMPLATES | VISION_TEMPLATES
