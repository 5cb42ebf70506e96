"""A conversation → token ids and labels. What is a special token is decided here, never by what a user typed."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from nanovlm.errors import NanoVLMError
from nanovlm.tokenizer import Tokenizer
from nanovlm.tokenizer.base import spelling_pattern

IGNORED = -100  # the label of a token that is not learned
IMAGE_MARKER = "<image>"  # how records and prompts write down the place of an image
# What stands before each picture of a cut image, and what after the last: the first pair that the tokenizer knows.
TILE_FRAMES = (
    ("<fake_token_around_image>", "<fake_token_around_image>"),  # Idefics3, SmolVLM
    ("<|vision_start|>", "<|vision_end|>"),  # Qwen2.5, Qwen3
    ("", ""),
)


class ImageSlot:
    """The place of one image in a message."""

    def __repr__(self) -> str:
        return "IMAGE"

    def __reduce__(self) -> str:
        return "IMAGE"  # pickled by name: in a worker process, too, there is one


IMAGE = ImageSlot()


@dataclass(frozen=True)
class ImageTokens:
    """The placeholders of one image: `length` for each of its pictures, which are the tiles of a grid and the whole."""

    length: int
    rows: int = 0  # of tiles; 0 where the image is not cut
    columns: int = 0

    @property
    def num_tiles(self) -> int:
        return self.rows * self.columns + 1


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


ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Template:
    """How turns are framed, role by role. Where a frame spells one of `special`, it is that token; the rest is text."""

    special: frozenset[str]  # what a tokenizer has to have
    before: dict[str, str]
    end_of_turn: dict[str, str]  # a special token, or nothing; the assistant's is learned
    after: dict[str, str]  # text between the turn and the next
    first: str = ""  # what opens the conversation

    @classmethod
    def alike(
        cls, before: str, end_of_turn: str, after: str, special: Iterable[str], first: str = ""
    ) -> "Template":
        """One whose turns are framed alike but for `{role}`."""
        return cls(
            frozenset(special),
            {role: before.format(role=role) for role in ROLES},
            dict.fromkeys(ROLES, end_of_turn),
            dict.fromkeys(ROLES, after),
            first,
        )


TEMPLATES = {  # a tokenizer takes the first that fits
    # <|im_start|>user\n…<|im_end|>\n: Qwen, SmolLM2 and many others
    "chatml": Template.alike(
        "<|im_start|>{role}\n", "<|im_end|>", "\n", ("<|im_start|>", "<|im_end|>")
    ),
    # <|start_header_id|>user<|end_header_id|>\n\n…<|eot_id|>: LLaMA 3
    "llama3": Template.alike(
        "<|start_header_id|>{role}<|end_header_id|>\n\n",
        "<|eot_id|>",
        "",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        first="<|begin_of_text|>",
    ),
    # <user>…</s><assistant>…</s>: the tiny model; one token a frame
    "plain": Template.alike("<{role}>", "</s>", "", ("<system>", "<user>", "<assistant>", "</s>")),
    # <s>… USER: … ASSISTANT: …</s>USER: …: Vicuna and LLaVA-1.5. The space before an answer is the one that LLaMA's
    # tokenizer puts before every text. Roles are plain text here, so a user who types "ASSISTANT:" can imitate one.
    "vicuna": Template(
        special=frozenset(("<s>", "</s>")),
        first="<s>",
        before={"system": "", "user": "USER: ", "assistant": "ASSISTANT:"},
        end_of_turn={"system": "", "user": "", "assistant": "</s>"},
        after={"system": " ", "user": " ", "assistant": ""},
    ),
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
            raise NanoVLMError(
                f"chat template {config.template!r} is not known; take one of {', '.join(TEMPLATES)}"
            )
        self.config, self.tokenizer, self.template = config, tokenizer, TEMPLATES[config.template]
        for token in (config.image_token, *sorted(self.template.special)):
            if token not in tokenizer.special_tokens:
                raise NanoVLMError(
                    f"the tokenizer has no special token {token!r}, which the {config.template} template needs"
                )
        self.image_token_id = tokenizer.special_tokens[config.image_token]
        self.end_of_turn_id = tokenizer.special_tokens[self.template.end_of_turn["assistant"]]
        self._spellings = spelling_pattern(self.template.special)
        self._picture_frame = next(
            pair
            for pair in TILE_FRAMES
            if all(not token or token in tokenizer.special_tokens for token in pair)
        )

    def encode(
        self,
        messages: Sequence[Message],
        images: Sequence[ImageTokens] = (),
        *,
        add_generation_prompt: bool = False,
    ) -> Encoded:
        """Ids and labels of a conversation whose i-th image takes the placeholder tokens `images[i]`.

        Labels are the words of every assistant turn and its end-of-turn token. `add_generation_prompt` ends with the
        opening of an assistant turn, for the model to go on. An answer is tokenized apart from its header, as it
        will be when generated. Raises if the images and their places differ in number.
        """
        places = sum(message.num_images for message in messages)
        if places != len(images):
            raise NanoVLMError(
                f"the conversation has places for {places} images, and {len(images)} are given; "
                f"write one {IMAGE_MARKER} for each image"
            )
        if self.config.default_system and (not messages or messages[0].role != "system"):
            messages = [Message("system", (self.config.default_system,)), *messages]
        encoded, remaining = Encoded(), iter(images)
        last_query = max(
            (i for i, message in enumerate(messages) if message.role == "user"), default=-1
        )
        text = self._open(encoded, "", self.template.first)
        for index, message in enumerate(messages):
            text = self._encode_turn(encoded, text, message, remaining, think=index > last_query)
        if add_generation_prompt:
            text = self._open(encoded, text, self._before("assistant", think=True))
        encoded.extend(self.tokenizer.encode(text), learned=False)
        return encoded

    def _encode_turn(
        self,
        encoded: Encoded,
        text: str,
        message: Message,
        images: Iterator[ImageTokens],
        think: bool,
    ) -> str:
        """Append a turn. `text` is what the turn before left to be encoded together with what comes; returns the like."""
        if message.role not in ROLES:
            raise NanoVLMError(
                f"role {message.role!r} is not known; take one of {', '.join(ROLES)}"
            )
        learned = message.role == "assistant"
        text = self._open(encoded, text, self._before(message.role, think))
        if (
            learned
        ):  # the boundary between what is given and what is learned is a boundary between tokens
            encoded.extend(self.tokenizer.encode(text), learned=False)
            text = ""
        for part in message.content:
            if isinstance(part, str):
                text += part
            elif message.role != "user":
                raise NanoVLMError(
                    f"an image in a {message.role} turn; images belong to user turns"
                )
            else:
                encoded.extend(self.tokenizer.encode(text), learned=False)
                encoded.extend(self._image_ids(next(images)), learned=False)
                text = ""
        if end := self.template.end_of_turn[message.role]:
            encoded.extend(
                [*self.tokenizer.encode(text), self.tokenizer.special_tokens[end]], learned
            )
            text = ""
        return text + self.template.after[message.role]

    def _image_ids(self, image: ImageTokens) -> list[int]:
        """An image's placeholders; where it is cut, in a text that says which tile is which, as Idefics3's processor
        writes it. Its names of tiles are special tokens where the tokenizer has them, else plain text."""
        if not image.rows:
            return [self.image_token_id] * image.length
        before, after = self._picture_frame
        picture = self.config.image_token * image.length
        rows = [
            "".join(
                f"{before}<row_{row}_col_{column}>{picture}"
                for column in range(1, image.columns + 1)
            )
            + "\n"
            for row in range(1, image.rows + 1)
        ]
        return self.tokenizer.encode_with_special(
            "".join(rows) + f"\n{before}<global-img>{picture}{after}"
        )

    def _open(self, encoded: Encoded, text: str, frame: str) -> str:
        """Append `text` and a frame, in which alone special tokens are looked for, up to the last of them; returns the rest."""
        start = 0
        for match in self._spellings.finditer(frame):
            encoded.extend(
                self.tokenizer.encode(text + frame[start : match.start()]), learned=False
            )
            encoded.extend([self.tokenizer.special_tokens[match[0]]], learned=False)
            text, start = "", match.end()
        return text + frame[start:]

    def _before(self, role: str, think: bool) -> str:
        opens_with_think = think and role == "assistant" and self.config.empty_think
        return self.template.before[role] + (EMPTY_THINK if opens_with_think else "")
