"""A conversation → token ids and labels.

Special tokens come from the template and the images' places alone, never from what a user typed.

Lesson: lessons/source/05_conversations.py.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from nanovlm.errors import NanoVLMError
from nanovlm.inputs.templates import ROLES, TEMPLATES
from nanovlm.tokenizer import Tokenizer
from nanovlm.tokenizer.base import spelling_pattern

IGNORED = -100  # the label of a token that the model is not trained to predict
IMAGE_MARKER = "<image>"  # how records and prompts write down the place of an image
# The tokens before each tile of an image that is cut, and after the last one. A tokenizer takes the
# first pair that it has.
TILE_FRAMES = (
    ("<fake_token_around_image>", "<fake_token_around_image>"),  # Idefics3, SmolVLM
    ("<|vision_start|>", "<|vision_end|>"),  # Qwen2.5, Qwen3
    ("", ""),
)


def tile_frame(tokenizer: Tokenizer) -> tuple[str, str]:
    """The pair of TILE_FRAMES that `tokenizer` takes."""
    special = tokenizer.special_tokens
    return next(pair for pair in TILE_FRAMES if all(not it or it in special for it in pair))


class ImageSlot:
    """The place of one image in a message."""

    def __repr__(self) -> str:
        return "IMAGE"

    def __reduce__(self) -> str:
        return "IMAGE"  # pickled by name, so that a worker process gets the same object


IMAGE = ImageSlot()


@dataclass(frozen=True)
class ImageTokens:
    """The placeholders of one image: `length` for each of its tiles, the whole image included."""

    length: int
    rows: int = 0  # of the grid of tiles; 0 where the image is not cut
    columns: int = 0

    @property
    def num_tiles(self) -> int:
        """Tiles of the image, the whole image included."""
        return self.rows * self.columns + 1


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `content` is text and `IMAGE`s in reading order; images belong to user turns."""

    role: str  # system, user or assistant
    content: tuple[str | ImageSlot, ...]
    labelled: bool = True  # of an answer: whether the model is trained to give it

    @classmethod
    def parse(cls, role: str, text: str, labelled: bool = True) -> "Message":
        """A turn written as one string, in which `<image>` marks the images of a user turn."""
        if role != "user":
            return cls(role, (text,), labelled)
        parts: list[str | ImageSlot] = []
        for index, piece in enumerate(text.split(IMAGE_MARKER)):
            parts += [IMAGE] if index else []
            parts += [piece] if piece else []
        return cls(role, tuple(parts))

    @property
    def text(self) -> str:
        """The turn without its images."""
        return "".join(part for part in self.content if isinstance(part, str))

    @property
    def num_images(self) -> int:
        """Images in the turn."""
        return sum(part is IMAGE for part in self.content)


@dataclass(frozen=True)
class ChatConfig:
    """How a model's conversations are written down."""

    template: str = "chatml"  # a name of TEMPLATES
    image_token: str = "<|image_pad|>"  # the placeholder whose embeddings the visual tokens replace
    default_system: str | None = None  # for conversations without a system turn
    empty_think: bool = False  # Qwen3 with thinking off: the last answer opens with an empty block
    end_ids: tuple[int, ...] = ()  # tokens that end an answer besides the template's end of turn
    tile_end: str | None = None  # after the last tile of an image; None: as in TILE_FRAMES


_CONTROL_TOKEN = re.compile(r"<\|\w{1,40}\|>")  # as most families spell theirs
EMPTY_THINK = "<think>\n\n</think>\n\n"


@dataclass
class Sample:
    """An encoded conversation: token ids, and a label for each.

    A label is the token itself where the model is trained to predict it, and otherwise IGNORED.
    """

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def extend(self, ids: Iterable[int], labelled: bool = False) -> None:
        """Append tokens, with themselves as labels or without labels."""
        ids = list(ids)
        self.input_ids += ids
        self.labels += ids if labelled else [IGNORED] * len(ids)


class Chat:
    """Turns conversations into ids for one tokenizer and template."""

    def __init__(self, config: ChatConfig, tokenizer: Tokenizer) -> None:
        if config.template not in TEMPLATES:
            raise NanoVLMError(
                f"chat template {config.template!r} is not known; "
                f"take one of {', '.join(TEMPLATES)}"
            )
        self.config, self.tokenizer, self.template = config, tokenizer, TEMPLATES[config.template]
        for token in (config.image_token, *sorted(self.template.special)):
            if token not in tokenizer.special_tokens:
                raise NanoVLMError(
                    f"the tokenizer has no special token {token!r}, "
                    f"which the {config.template} template needs"
                )
        self.image_token_id = tokenizer.special_tokens[config.image_token]
        self.end_of_turn_id = tokenizer.special_tokens[self.template.end_of_turn["assistant"]]
        self.stop_ids = {self.end_of_turn_id, *config.end_ids}  # each of them ends an answer
        # Whether the model writes a space before its answers, which is no part of them.
        self.space_opens_answer = self.template.before_text.get("assistant") == " "
        self._spellings = spelling_pattern(self.template.special)
        before, after = tile_frame(tokenizer)
        self.tile_frame = before, after if config.tile_end is None else config.tile_end

    def control_token(self, text: str) -> str:
        """A control token that a text spells, of this model or of another; "" if there is none.

        A prompt with one is refused, because it was copied from somewhere else. In records they are
        ordinary text: `encode` gives special ids to the template's tokens alone.
        """
        own = (token for token in (*self.tokenizer.special_tokens, IMAGE_MARKER) if token in text)
        others = _CONTROL_TOKEN.search(text)
        return next(own, others[0] if others else "")

    def encode(
        self,
        messages: Sequence[Message],
        images: Sequence[ImageTokens] = (),
        *,
        add_generation_prompt: bool = False,
    ) -> Sample:
        """Ids and labels of a conversation whose i-th image takes the placeholders `images[i]`.

        The text of every `labelled` assistant turn and its end-of-turn token have labels. With
        `add_generation_prompt` the ids end with the opening of an assistant turn, for the model to
        continue. Answers are tokenized apart from what is before them, as when they are generated.
        Raises if the images and their places differ in number.
        """
        places = sum(message.num_images for message in messages)
        if places != len(images):
            raise NanoVLMError(
                f"the conversation has places for {places} images, and {len(images)} are given; "
                f"write one {IMAGE_MARKER} for each image"
            )
        if self.config.default_system and (not messages or messages[0].role != "system"):
            messages = [Message("system", (self.config.default_system,)), *messages]
        sample, remaining = Sample(), iter(images)
        last_query = max(
            (i for i, message in enumerate(messages) if message.role == "user"), default=-1
        )
        text = self._open(sample, "", self.template.first)
        last = len(messages) - (not add_generation_prompt)  # of a last answer, if there is one
        for index, message in enumerate(messages):
            role = "earlier" if message.role == "assistant" and index < last else message.role
            if message.role not in ROLES:
                raise NanoVLMError(
                    f"role {message.role!r} is not known; take one of {', '.join(ROLES)}"
                )
            text = self._open(sample, text, self._before(role, think=index > last_query))
            text = self._encode_turn(sample, text, message, role, remaining)
        if add_generation_prompt:
            text = self._open(sample, text, self._before("assistant", think=True))
        sample.extend(self.tokenizer.encode(text))
        return sample

    def answer_ids(self, text: str) -> list[int]:
        """The tokens of an answer, as `encode` writes them, without the end-of-turn token."""
        (laid_out,) = self._laid_out(Message("assistant", (text,)), "assistant")
        return self.tokenizer.encode(str(laid_out))

    def _encode_turn(
        self, sample: Sample, text: str, message: Message, role: str, images: Iterator[ImageTokens]
    ) -> str:
        """Append a turn to `sample`, behind its opening.

        `text` is the end of that opening, not yet tokenized, because it is tokenized together with
        what follows; returns the end of this turn. `role` is the template's for it.
        """
        is_answer = message.role == "assistant"
        labelled = is_answer and message.labelled
        if is_answer:  # no token reaches from the prompt into the answer
            sample.extend(self.tokenizer.encode(text))
            text = ""
        for part in self._laid_out(message, role):
            if isinstance(part, str):
                text += part
            elif message.role != "user":
                raise NanoVLMError(
                    f"an image in a {message.role} turn; images belong to user turns"
                )
            else:
                sample.extend(self.tokenizer.encode(text))
                sample.extend(self._image_ids(next(images)))
                text = ""
        end, after = self.template.end_of_turn[role], self.template.after[role]
        if is_answer or end:
            sample.extend(self.tokenizer.encode(text), labelled)
            text = ""
        if end:
            sample.extend([self.tokenizer.special_tokens[end]], labelled)
        elif is_answer and self.tokenizer.puts_space:
            after = after.removeprefix(" ")  # the tokenizer puts it before the next text
        return text + after

    def _laid_out(self, message: Message, role: str) -> list[str | ImageSlot]:
        """The turn's content as the template writes it.

        Records and prompts put each image that opens a turn on a line of its own.
        """
        content = list(message.content)
        if content and isinstance(content[0], str):
            is_spaced = message.role == "assistant" and content[0][:1].isspace()
            before = "" if is_spaced else self.template.before_text.get(role, "")
            return [before + content[0], *content[1:]]
        if self.template.after_images is None:
            return content
        images, text = [], ""
        while content and not text:
            part = content.pop(0)
            if isinstance(part, str):
                text = part.removeprefix("\n")
            else:
                images.append(part)
        return [*images, self.template.after_images + text, *content] if text else images

    def _image_ids(self, image: ImageTokens) -> list[int]:
        """An image's placeholders.

        If it is cut, each tile has its row and column before it, as Idefics3's processor writes
        them: special tokens if the tokenizer has them, else text.
        """
        if not image.rows:
            return [self.image_token_id] * image.length
        before, after = self.tile_frame
        tile = self.config.image_token * image.length
        text = ""
        for row in range(1, image.rows + 1):
            for column in range(1, image.columns + 1):
                text += f"{before}<row_{row}_col_{column}>{tile}"
            text += "\n"
        return self.tokenizer.encode_with_special(f"{text}\n{before}<global-img>{tile}{after}")

    def _open(self, sample: Sample, text: str, frame: str) -> str:
        """Append `text` and `frame` up to the last special token in `frame`; returns the rest.

        The rest is not yet tokenized. Special tokens are looked for in `frame` only, which comes
        from the template.
        """
        start = 0
        for match in self._spellings.finditer(frame):
            sample.extend(self.tokenizer.encode(text + frame[start : match.start()]))
            sample.extend([self.tokenizer.special_tokens[match[0]]])
            text, start = "", match.end()
        return text + frame[start:]

    def _before(self, role: str, think: bool) -> str:
        is_answer = role in ("assistant", "earlier")
        opens_with_think = think and is_answer and self.config.empty_think
        return self.template.before[role] + (EMPTY_THINK if opens_with_think else "")
