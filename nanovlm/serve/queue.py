"""Requests that wait for the model: one thread answers them, those that wait together at once."""

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from nanovlm.data.collate import collate
from nanovlm.engine.answering import (
    Answer,
    EncodedRequest,
    Request,
    Writer,
    answer_together,
    encode_request,
)
from nanovlm.engine.conversation import Conversation, common_length
from nanovlm.errors import NanoVLMError
from nanovlm.inputs.chat import Message
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.sampling import Sampling
from nanovlm.serve.images import image_error, open_bounded
from nanovlm.serve.limits import Limits, RequestError
from nanovlm.utils.console import first_line, say

CONVERSATIONS = 4  # whose caches are kept for their next turns
MAX_CHARACTERS = 64  # a token, beyond which nothing is tokenized
ENCODERS = 2  # images that are decoded at a time


@dataclasses.dataclass
class Question:
    """What a client asks."""

    messages: Sequence[Message]
    images: Sequence[bytes]  # files, in the order of their places
    max_new_tokens: int | None  # None: as many as there may be
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()


class Job:
    """A place in the queue, from a request's arrival until its answer is complete or `close`."""

    def __init__(self, queue: "AnswerQueue") -> None:
        self.queue, self.began = queue, time.monotonic()
        self.encoded: EncodedRequest | None = None
        self.answer: Answer | None = None
        self.closed = False
        self.watching: asyncio.Task[None] | None = None  # closes it when the client leaves
        self._loop = asyncio.get_running_loop()
        self._told: asyncio.Queue[str | Answer | BaseException] = asyncio.Queue()

    def seconds_left(self) -> float:
        """How long the request may still take."""
        return self.began + self.queue.limits.seconds - time.monotonic()

    async def ask(self, question: Question) -> None:
        """Encode a question and let it wait; raises RequestError where it cannot be answered."""
        encoding = self._loop.run_in_executor(self.queue.encoders, self._encode, question)
        self.encoded = await asyncio.wait_for(encoding, self.seconds_left())
        self.queue.put(self)

    async def texts(self) -> AsyncIterator[str]:
        """The pieces of the answer as they come; after the last one `answer` is set.

        Raises TimeoutError after the time of a request, and RequestError where answering failed.
        """
        while not self.answer:
            told = await asyncio.wait_for(self._told.get(), self.seconds_left())
            if isinstance(told, BaseException):
                raise told
            if isinstance(told, Answer):
                self.answer = told
            else:
                yield told

    def tell(self, what: str | Answer | BaseException) -> bool:
        """Hand on what the model's thread has to say; whether anybody still listens.

        The last thing gives the place back, however slowly the client reads.
        """
        if not isinstance(what, str):
            self.queue.remove(self, closed=False)
        if not self.closed and (what or not isinstance(what, str)):
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._told.put_nowait, what)
        return not self.closed

    def close(self) -> None:
        """Give the place back; what is being written for it ends with its next token."""
        self.queue.remove(self)
        self._told.put_nowait(RequestError("the request is gone", 499))

    def _encode(self, question: Question) -> EncodedRequest:
        """In a thread of its own, in which images are decoded and tokens counted."""
        model, limits = self.queue.model, self.queue.limits
        most = MAX_CHARACTERS * model.config.language_model.max_position_embeddings
        if sum(len(message.text) for message in question.messages) > most:
            raise RequestError(
                f"the conversation has more than {most:,} characters, which the model cannot read",
                param="messages",
                code="context_length_exceeded",
            )
        for message in question.messages:
            if token := model.chat.control_token(message.text):
                raise RequestError(
                    f"a message contains {token!r}, which only the program may place; take it out",
                    param="messages",
                    code="control_token",
                )
        images = []
        for number, file in enumerate(question.images, 1):
            try:
                images.append(open_bounded(file, limits))
            except NanoVLMError as error:
                raise image_error(number, error) from None
        request = Request(
            question.messages,
            images,
            question.max_new_tokens or 1,
            question.sampling,
            question.stop,
            on_text=self.tell,
            on_end=self.tell,
        )
        try:
            encoded = encode_request(model, request)
        except NanoVLMError as error:
            raise RequestError(
                str(error), param="messages", code="context_length_exceeded"
            ) from None
        room = model.config.language_model.max_position_embeddings - len(encoded)
        longest = question.max_new_tokens or min(limits.tokens, room)
        # Without the images, which are tiles by now.
        encoded.request = dataclasses.replace(request, images=(), max_new_tokens=longest)
        return encoded


class AnswerQueue:
    """A bounded queue before one thread that answers."""

    def __init__(self, model: VisionLanguageModel, limits: Limits) -> None:
        self.model, self.limits = model, limits
        self.encoders = ThreadPoolExecutor(ENCODERS, "encoder")
        self._waiting: deque[Job] = deque()
        self._jobs: set[Job] = set()  # everyone who has a place
        self._changed = threading.Condition()
        self._refusing = self._stopped = False
        self._conversations: list[Conversation] = []  # the last one used is the last
        self._thread = threading.Thread(target=self._work, name="answers", daemon=True)
        self._thread.start()

    @property
    def places(self) -> int:
        """Requests that are read, wait, or are being answered."""
        return len(self._jobs)

    def new_job(self) -> Job:
        """A place for a request; raises RequestError if there is none."""
        if self._refusing:
            raise RequestError("the server is shutting down", 503, code="shutting_down")
        if len(self._jobs) >= self.limits.queue:
            raise RequestError(
                f"{self.limits.queue} requests are waiting already (--max-queue); ask again later",
                429,
                code="queue_full",
            )
        job = Job(self)
        self._jobs.add(job)
        return job

    def put(self, job: Job) -> None:
        """Let a job wait whose question is encoded."""
        with self._changed:
            if not job.closed:
                self._waiting.append(job)
                self._changed.notify()

    def remove(self, job: Job, closed: bool = True) -> None:
        """Give back a job's place; nobody listens to it any more if it is `closed`."""
        with self._changed:
            job.closed |= closed
            self._jobs.discard(job)
            with contextlib.suppress(ValueError):
                self._waiting.remove(job)

    def refuse_more(self) -> None:
        """Take no more requests; those that have a place are answered."""
        self._refusing = True

    def stop(self) -> None:
        """End the thread, after what it is answering."""
        self.refuse_more()
        with self._changed:
            self._stopped = True
            self._waiting.clear()
            self._changed.notify()
        self.encoders.shutdown(cancel_futures=True)
        self._thread.join()

    def _work(self) -> None:
        while jobs := self._take():
            try:
                self._answer(jobs)
            except Exception as error:  # of memory, above all; the next request may fit
                self._conversations.clear()
                say(f"error: {type(error).__name__}: {first_line(error)}")
                failed = RequestError("the answer failed; the server's log says why", 500)
                for job in jobs:
                    job.tell(failed)

    def _take(self) -> list[Job]:
        """What waits together, in the order of arrival; none if there is nothing more to do."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stopped)
            count = min(len(self._waiting), self.limits.together)
            return [self._waiting.popleft() for _ in range(count)]

    def _answer(self, jobs: list[Job]) -> None:
        encoded = [job.encoded for job in jobs if job.encoded]
        if len(encoded) > 1:
            answer_together(self.model, encoded)
        else:
            self._answer_one(encoded[0])

    def _answer_one(self, encoded: EncodedRequest) -> None:
        """Answer a request alone, behind what an earlier turn has read already."""
        model = self.model
        batch = collate([encoded.sequence], model.chat.image_token_id, encoded.tiles, pad_left=True)
        batch.attention_mask = None
        writer = Writer(model, encoded)

        def put(tokens: list[int]) -> None:
            if not writer.put(tokens[0]):
                raise _EndedError

        conversation = self._conversation(encoded.sequence.input_ids)
        batch = batch.to(next(model.parameters()).device)
        request = encoded.request
        with contextlib.suppress(_EndedError):
            conversation.generate(batch, request.max_new_tokens, request.sampling, put)

    def _conversation(self, ids: list[int]) -> Conversation:
        """The kept conversation that `ids` go on with, or a new one in place of the oldest."""
        kept = self._conversations

        def common(conversation: Conversation) -> int:
            return common_length(ids, conversation.input_ids)

        best = max(kept, key=common, default=None)
        if best is None or 2 * common(best) < len(best.input_ids):
            best = Conversation(self.model) if len(kept) < CONVERSATIONS else kept[0]
        self._conversations = [each for each in kept if each is not best] + [best]
        return best


class _EndedError(Exception):
    """The answer is complete."""
