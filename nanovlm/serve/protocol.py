"""OpenAI's chat completions: a request's JSON → messages and images; an answer → JSON.

https://platform.openai.com/docs/api-reference/chat
"""

import re
import secrets
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from nanovlm.engine.answering import Answer
from nanovlm.errors import quoted
from nanovlm.inputs.chat import IMAGE, ImageSlot, Message
from nanovlm.sampling import Sampling
from nanovlm.serve.limits import Limits, RequestError
from nanovlm.utils.files import parse_json

# Parameters that change no answer.
IGNORED = frozenset(
    (
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",
    )
)
# Parameters that would change the answer, and their values that do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
SMALLEST_TEMPERATURE, SMALLEST_TOP_P = 1e-6, 1e-6  # below, an answer is greedy


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


def _whole_characters(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a UTF-16 pair is no character") from None
    return text


Text = Annotated[str, AfterValidator(_whole_characters)]


class TextPart(_Strict):
    """A piece of a message's text."""

    type: Literal["text"]
    text: Text


class ImageURL(_Strict):
    """Where an image is; `detail` is accepted, and every image is read as the model does."""

    url: str
    detail: str = "auto"


class ImagePart(_Strict):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageURL


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _as_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
StopText = Annotated[Text, Field(min_length=1)]


class Turn(_Strict):
    """A message."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], BeforeValidator(_as_parts)]
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    @property
    def urls(self) -> list[str]:
        """Where its images are."""
        return [part.image_url.url for part in self.content if isinstance(part, ImagePart)]

    def message(self) -> Message:
        """The turn as the model reads it.

        Images before or after the whole text open the turn, each on a line of its own, as in the
        training records. Those between texts stay there.
        """
        role = "system" if self.role == "developer" else self.role
        texts = [index for index, part in enumerate(self.content) if isinstance(part, TextPart)]
        parts = list(self.content)
        if not texts or texts == list(range(texts[0], texts[-1] + 1)):
            parts.sort(key=lambda part: isinstance(part, TextPart))
        content: list[str | ImageSlot] = []
        for part in parts:
            content += [part.text] if isinstance(part, TextPart) else [IMAGE, "\n"]
        return Message(role, tuple(content))


class StreamOptions(_Strict):
    """What a stream has beside the answer."""

    include_usage: bool = False


class ChatRequest(_Strict):
    """The body of a request, without what changes no answer."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: Text
    messages: Annotated[list[Turn], Field(min_length=1)]
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    repetition_penalty: Annotated[float, Field(ge=0.001, le=1000)] = 1.0
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Annotated[list[StopText], Field(max_length=4), BeforeValidator(_as_list)] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @property
    def urls(self) -> list[str]:
        """Where the conversation's images are, in their order."""
        return [url for turn in self.messages for url in turn.urls]

    def sampling(self) -> Sampling:
        """How tokens are chosen; without a seed, with a new one."""
        return Sampling(
            0.0 if self.temperature < SMALLEST_TEMPERATURE else self.temperature,
            max(self.top_p, SMALLEST_TOP_P),
            self.top_k,
            self.repetition_penalty,
            secrets.randbits(32) if self.seed is None else self.seed,
        )

    def max_new_tokens(self, limit: int) -> int | None:
        """The longest answer that the client asks for; None where it does not say."""
        name = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        asked = getattr(self, name)
        if asked is not None and asked > limit:
            raise RequestError(
                f"{name} is {asked:,}, and this server writes at most {limit:,} (--max-tokens)",
                param=name,
            )
        return asked


def read_request(body: bytes, limits: Limits) -> ChatRequest:
    """Check the body of a request; raises RequestError."""
    try:
        value = parse_json(body.decode())
    except ValueError as error:  # also UnicodeDecodeError
        raise RequestError(f"the body cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise RequestError("the body has to be a JSON object")
    value = {name: each for name, each in value.items() if each is not None}
    for name in [*value]:
        if name in IGNORED:
            del value[name]
        elif name in NEUTRAL:
            _check_neutral(name, value.pop(name))
    try:
        request = ChatRequest.model_validate(value)
    except ValidationError as error:
        raise _told(error) from None
    _check_turns(request, limits)
    return request


def _check_neutral(name: str, value: Any) -> None:
    if value not in NEUTRAL[name]:
        allowed = " or ".join(map(repr, NEUTRAL[name]))
        raise RequestError(
            f"{name} {quoted(value)} is not supported; leave it out, or give {allowed}",
            param=name,
            code="unsupported_value",
        )


def _told(error: ValidationError) -> RequestError:
    """The first thing that pydantic found, in one line."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = "".join(f"[{each}]" if isinstance(each, int) else f".{each}" for each in first["loc"])
    place = re.sub(r"\.(text|image_url)(?=\.)", "", place.removeprefix("."), count=1)
    if first["type"] == "extra_forbidden":
        return RequestError(
            f"{quoted(place)} is not a parameter that this server knows; leave it out",
            param=place[:200].encode(errors="replace").decode(),
            code="unknown_parameter",
        )
    if first["type"] == "missing":
        return RequestError(f"{place} is missing", param=place, code="missing_required_parameter")
    return RequestError(f"{place}: {first['msg']}", param=place, code="invalid_value")


def _check_turns(request: ChatRequest, limits: Limits) -> None:
    for index, turn in enumerate(request.messages):
        if turn.urls and turn.role != "user":
            raise RequestError(
                f"messages[{index}]: an image in a message of the {turn.role}; images belong to "
                "messages of the user",
                param=f"messages[{index}].content",
            )
    if request.messages[-1].role != "user":
        raise RequestError(
            "the last message has to be the user's, to which the model answers", param="messages"
        )
    check_image_count(len(request.urls), limits)


def check_image_count(count: int, limits: Limits) -> None:
    """Refuse more images than a conversation may have."""
    if count > limits.images:
        raise RequestError(
            f"{count} images, and this server reads at most {limits.images} in a conversation "
            "(--max-images)",
            param="messages",
        )


class Completion:
    """The JSON of one answer, whole or in chunks."""

    def __init__(self, model: str) -> None:
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The response to a request that does not stream."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": None,
            "finish_reason": answer.finish_reason,
        }
        head = {**self._head, "object": "chat.completion"}
        return {**head, "choices": [choice], "usage": usage(answer)}

    def chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        """A piece of the answer."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self._chunk([choice])

    def usage_chunk(self, answer: Answer) -> dict[str, Any]:
        """The last chunk of a stream for which `include_usage` is set."""
        return {**self._chunk([]), "usage": usage(answer)}

    def _chunk(self, choices: Sequence[dict]) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", "choices": choices}


def usage(answer: Answer) -> dict[str, int]:
    """Tokens read and written."""
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
    }
