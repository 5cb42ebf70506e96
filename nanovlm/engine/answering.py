"""Several requests answered together: one pass writes a token of each.

What a pass takes most of is reading the weights, so sixteen answers take little longer than one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from nanovlm.data.collate import collate, encode
from nanovlm.data.sequences import TokenSequence
from nanovlm.errors import NanoVLMError
from nanovlm.generate import Prompt, decode
from nanovlm.inputs.chat import Message
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.sampling import Sampling
from nanovlm.tokenizer.streaming import TextStreamer

OnText = Callable[[str], bool | None]


@dataclass
class Request:
    """A conversation that waits for its next answer."""

    messages: Sequence[Message]
    images: Sequence[Image.Image] = ()  # RGB, in the order of their places
    max_new_tokens: int = 128
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()  # texts before which the answer ends
    # Called for each token with the text that it adds, often none; False ends the answer.
    on_text: OnText | None = None
    on_end: Callable[["Answer"], object] | None = None  # called when it is complete


@dataclass
class Answer:
    """What was written for a request."""

    text: str
    finish_reason: str  # "stop", or "length" where the limit of tokens ended it
    prompt_tokens: int
    completion_tokens: int


@dataclass
class EncodedRequest:
    """A request as tokens and tiles: how long it is, is known before it is answered."""

    request: Request
    sequence: TokenSequence
    tiles: list[torch.Tensor]  # (n, 3, H, W) of each image

    def __len__(self) -> int:
        """Tokens of the prompt."""
        return len(self.sequence)


def encode_request(model: VisionLanguageModel, request: Request) -> EncodedRequest:
    """Encode a request; raises NanoVLMError where it cannot be answered."""
    sequence, tiles = encode(model, request.messages, request.images, add_generation_prompt=True)
    limit = model.config.language_model.max_position_embeddings
    if len(sequence) + request.max_new_tokens > limit:
        raise NanoVLMError(
            f"a prompt of {len(sequence)} tokens and {request.max_new_tokens} new ones exceed the "
            f"language model's {limit} positions; shorten the prompt or ask for fewer tokens"
        )
    return EncodedRequest(request, sequence, tiles)


def answer_together(model: VisionLanguageModel, requests: Sequence[EncodedRequest]) -> list[Answer]:
    """Answer all requests, each as if it were alone, up to rounding.

    They are padded to one length and so answered faster if they are about as long.
    """
    writers = [Writer(model, encoded) for encoded in requests]
    for group in _fitting(model, writers):
        _answer(model, group)
    return [writer.answer() for writer in writers]


class Writer:
    """The answer to one request as it grows."""

    def __init__(self, model: VisionLanguageModel, encoded: EncodedRequest) -> None:
        self.encoded, self.request = encoded, encoded.request
        self.streamer = TextStreamer(model.tokenizer, model.chat.space_opens_answer)
        self.tokens = 0
        self.text = ""  # given to `on_text`
        self.held = ""  # kept back: the beginning of a stop text, perhaps
        self.finish_reason = ""

    def put(self, token: int) -> bool:
        """Add a token, -1 for the end; whether the answer goes on."""
        if token < 0:
            return self._end("stop")
        self.tokens += 1
        self.held += self.streamer.put(token)
        found = [place for stop in self.request.stop if (place := self.held.find(stop)) >= 0]
        if found:
            self.held = self.held[: min(found)]
            return self._end("stop", cut=True)
        keep = _unfinished(self.held, self.request.stop)
        if not self._give(len(self.held) - keep):
            return self._end("stop", cut=True)
        return self.tokens < self.request.max_new_tokens or self._end("length")

    def _end(self, reason: str, cut: bool = False) -> bool:
        if not self.finish_reason:
            self.finish_reason = reason
            self.held += "" if cut else self.streamer.end()
            self._give(len(self.held))
            if self.request.on_end is not None:
                self.request.on_end(self.answer())
        return False

    def _give(self, length: int) -> bool:
        new, self.held = self.held[:length], self.held[length:]
        self.text += new
        return self.request.on_text is None or self.request.on_text(new) is not False

    def answer(self) -> Answer:
        """The whole answer."""
        return Answer(self.text, self.finish_reason, len(self.encoded), self.tokens)


def _answer(model: VisionLanguageModel, writers: Sequence[Writer]) -> None:
    encoded = [writer.encoded for writer in writers]
    tiles = [image for each in encoded for image in each.tiles]
    sequences = [each.sequence for each in encoded]
    batch = collate(sequences, model.chat.image_token_id, tiles, pad_left=True)
    if len(writers) == 1:
        batch.attention_mask = None
    prompt = Prompt.of(model, batch.to(next(model.parameters()).device))
    longest = max(writer.request.max_new_tokens for writer in writers)
    samplings = [writer.request.sampling for writer in writers]
    steps = decode(model.language_model, prompt, longest, model.chat.stop_ids, samplings)
    tokens = next(steps)
    while True:
        ended = [row for row, writer in enumerate(writers) if not writer.put(tokens[row])]
        try:
            tokens = steps.send(ended)
        except StopIteration:
            return


def _fitting(model: VisionLanguageModel, writers: Sequence[Writer]) -> list[list[Writer]]:
    """Groups in which the longest prompt and the longest answer fit the model together."""
    limit = model.config.language_model.max_position_embeddings
    groups: list[list[Writer]] = []
    for writer in writers:
        for group in groups:
            both = [*group, writer]
            longest = max(len(each.encoded) for each in both)
            if longest + max(each.request.max_new_tokens for each in both) <= limit:
                group.append(writer)
                break
        else:
            groups.append([writer])
    return groups


def _unfinished(text: str, stops: Sequence[str]) -> int:
    """The length of the longest end of `text` that begins one of `stops`."""
    lengths = (
        length
        for stop in stops
        for length in range(min(len(stop) - 1, len(text)), 0, -1)
        if text.endswith(stop[:length])
    )
    return max(lengths, default=0)
