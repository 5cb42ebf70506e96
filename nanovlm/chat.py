"""A conversation → token ids and labels. What is a special token is decided here, never by what a user typed."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nanovlm.config import from_dict
from nanovlm.errors import NanoVLMError
from nanovlm.files import read_json
from nanovlm.tokenizer import Tokenizer

IGNORED = -100  # the label of a token that is not learned
IMAGE_MARKER = "<image>"  # how records and prompts write down the place of an image


class ImageSlot:
    """The place of one image in a message."""

    def __repr__(self) -> str:
        return "IMAGE"

    def __reduce__(self) -> str:
        return "IMAGE"  # pickled by name: in a worker process, too, there is one


IMAGE = ImageSlot()


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `content` is text and `IMAGE`s in reading order; images belong to user turns."""

    role: str  # system, user or assistant
    content: tuple[str | ImageSlot, ...]

    @classmethod
    def parse(cls, role: str, text: str) -> "Message":
        """A turn written as one string, in which `<image>` marks the images of a user turn."""
        if role != "user":
            return cls(role, (text,))
        parts: list[str | ImageSlot] = []
        for index, piece in enumerate(text.split(IMAGE_MARKER)):
            parts += [IMAGE] if index else []
            parts += [piece] if piece else []
        return cls(role, tuple(parts))

    @property
    def num_images(self) -> int:
        return sum(part is IMAGE for part in self.content)


@dataclass(frozen=True)
class ChatConfig:
    """How a model's conversations are written down."""

    template: str = "chatml"  # a name of TEMPLATES
    image_token: str = "<|image_pad|>"  # the placeholder whose embeddings the visual tokens replace
    default_system: str | None = None  # stands in where a conversation has no system turn
    empty_think: bool = False  # Qwen3 with thinking off: an empty think block opens the last answer

    @classmethod
    def from_dict(cls, config: dict) -> "ChatConfig":
        return from_dict(cls, config)

    @classmethod
    def from_hf(cls, folder: str | Path, tokenizer: Tokenizer) -> "ChatConfig":
        """Work out a hub folder's template from its special tokens and its `tokenizer_config.json`.

        The published template is a program, which is not run; of it only two facts are read: the default system
        prompt, which stands in it word for word (Qwen2, Qwen2.5), and whether it has think blocks (Qwen3).
        """
        if "<|im_start|>" not in tokenizer.special_tokens:
            return cls(template="plain", image_token=IMAGE_MARKER)
        source = _template_source(Path(folder))
        default = re.search(r"<\|im_start\|>system(?:\n|\\n)([^<'{]+)<\|im_end\|>", source)
        has_placeholder = "<|image_pad|>" in tokenizer.special_tokens
        return cls(image_token="<|image_pad|>" if has_placeholder else IMAGE_MARKER,
                   default_system=default[1] if default else None, empty_think="<think>" in source)


def _template_source(folder: Path) -> str:
    """The text of a hub folder's chat template: a file of its own in newer folders, a setting in older ones."""
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
    path = folder / "tokenizer_config.json"
    return str(read_json(path).get("chat_template", "")) if path.exists() else ""


@dataclass(frozen=True)
class Template:
    """The frame of one turn: `opening` special token(s), `header` text, the content, `end_of_turn`, `separator` text."""

    opening: dict[str, str]
    header: dict[str, str]
    end_of_turn: str
    separator: str


ROLES = ("system", "user", "assistant")
TEMPLATES = {
    # <|im_start|>user\n…<|im_end|>\n — Qwen and many others
    "chatml": Template(opening=dict.fromkeys(ROLES, "<|im_start|>"), header={role: f"{role}\n" for role in ROLES},
                       end_of_turn="<|im_end|>", separator="\n"),
    # <user>…</s><assistant>…</s> — the tiny model; one token a frame
    "plain": Template(opening={role: f"<{role}>" for role in ROLES}, header=dict.fromkeys(ROLES, ""),
                      end_of_turn="</s>", separator=""),
}
EMPTY_THINK = "<think>\n\n</think>\n\n"


@dataclass
class Encoded:
    """Token ids of a conversation and, for each, its label: itself where it is to be learned, else IGNORED."""

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def extend(self, ids: Iterable[int], learned: bool) -> None:
        ids = list(ids)
        self.input_ids += ids
        self.labels += ids if learned else [IGNORED] * len(ids)


class Chat:
    """Turns conversations into ids for one tokenizer and template."""

    def __init__(self, config: ChatConfig, tokenizer: Tokenizer) -> None:
        if config.template not in TEMPLATES:
            raise NanoVLMError(f"chat template {config.template!r} is not known; take one of {', '.join(TEMPLATES)}")
        self.config, self.tokenizer, self.template = config, tokenizer, TEMPLATES[config.template]
        self.image_token_id = self._special(config.image_token)
        self.end_of_turn_id = self._special(self.template.end_of_turn)

    def encode(self, messages: Sequence[Message], image_lengths: Sequence[int] = (), *,
               add_generation_prompt: bool = False) -> Encoded:
        """Ids and labels of a conversation whose i-th image takes `image_lengths[i]` placeholder tokens.

        Labels are the words of every assistant turn and its end-of-turn token. `add_generation_prompt` ends with the
        opening of an assistant turn, for the model to go on. An answer is tokenized apart from its header, as it
        will be when generated. Raises if the images and their places differ in number.
        """
        places = sum(message.num_images for message in messages)
        if places != len(image_lengths):
            raise NanoVLMError(f"the conversation has places for {places} images, and {len(image_lengths)} are given; "
                               f"write one {IMAGE_MARKER} for each image")
        if self.config.default_system and (not messages or messages[0].role != "system"):
            messages = [Message("system", (self.config.default_system,)), *messages]
        encoded, lengths = Encoded(), iter(image_lengths)
        last_query = max((i for i, message in enumerate(messages) if message.role == "user"), default=-1)
        for index, message in enumerate(messages):
            self._encode_turn(encoded, message, lengths, think=index > last_query)
        if add_generation_prompt:
            encoded.extend([self._special(self.template.opening["assistant"])], learned=False)
            encoded.extend(self.tokenizer.encode(self._header("assistant", think=True)), learned=False)
        return encoded

    def _encode_turn(self, encoded: Encoded, message: Message, lengths: Iterable[int], think: bool) -> None:
        if message.role not in ROLES:
            raise NanoVLMError(f"role {message.role!r} is not known; take one of {', '.join(ROLES)}")
        learned = message.role == "assistant"
        encoded.extend([self._special(self.template.opening[message.role])], learned=False)
        text = self._header(message.role, think)
        if learned:  # the boundary between what is given and what is learned is a boundary between tokens
            encoded.extend(self.tokenizer.encode(text), learned=False)
            text = ""
        for part in message.content:
            if isinstance(part, str):
                text += part
            elif message.role != "user":
                raise NanoVLMError(f"an image in a {message.role} turn; images belong to user turns")
            else:
                encoded.extend(self.tokenizer.encode(text), learned=False)
                encoded.extend([self.image_token_id] * next(lengths), learned=False)
                text = ""
        encoded.extend(self.tokenizer.encode(text), learned)
        encoded.extend([self.end_of_turn_id], learned)
        encoded.extend(self.tokenizer.encode(self.template.separator), learned=False)

    def _header(self, role: str, think: bool) -> str:
        opens_with_think = think and role == "assistant" and self.config.empty_think
        return self.template.header[role] + (EMPTY_THINK if opens_with_think else "")

    def _special(self, token: str) -> int:
        if token not in self.tokenizer.special_tokens:
            raise NanoVLMError(f"the tokenizer has no special token {token!r}, which the {self.config.template} template needs")
        return self.tokenizer.special_tokens[token]
