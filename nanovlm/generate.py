"""Writing an answer: one pass over the prompt (prefill), then a token at a time (decode).

Lesson: lessons/source/10_generation.py.
"""

import contextlib
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovlm.beams import Beams
from nanovlm.errors import NanoVLMError
from nanovlm.inputs.batch import Batch
from nanovlm.model.attention import KVCache, StaticCache
from nanovlm.model.language_model import LanguageModel
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.sampling import Sampling, penalise, sample
from nanovlm.utils.compiler import Compiler, require_compiler

SMALLEST_CACHE = 256  # places of a compiled step's cache


@dataclass
class Prompt:
    """What a language model reads before it writes: B rows of T tokens, padded on either side.

    The first tokens may have been read already; the cache then holds their keys and values.
    """

    embeddings: Tensor  # (B, T, C), or of the last tokens alone, those that are not in the cache
    input_ids: Tensor  # (B, T), for the repetition penalty
    attention_mask: Tensor | None = None  # (B, T), as in `LanguageModel.hidden_states`
    groups: Tensor | None = None  # (B, T), as there
    cache: KVCache | None = None  # with room for the answer, too

    @classmethod
    @torch.inference_mode()
    def of(cls, model: VisionLanguageModel, batch: Batch) -> "Prompt":
        """The rows of `batch`, read from the beginning."""
        groups = model.image_groups(batch)
        return cls(model.embed(batch), batch.input_ids, batch.attention_mask, groups)

    def last_tokens(self) -> Tensor:
        """The index of each row's last token that is not padding, (B,)."""
        rows, length = self.input_ids.shape
        if self.attention_mask is None:
            return torch.full((rows,), length - 1, device=self.input_ids.device)
        index = torch.arange(length, device=self.input_ids.device)
        return (self.attention_mask.ne(0) * index).argmax(dim=-1)

    def lengths(self) -> Tensor:
        """The number of tokens of each row, without padding, (B,)."""
        if self.attention_mask is None:
            return torch.full_like(self.input_ids[:, 0], self.input_ids.shape[1])
        return (self.attention_mask > 0).sum(dim=1)

    def known_ids(self, vocab_size: int) -> Tensor:
        """The ids that the repetition penalty is about, (B, T).

        No logit belongs to a placeholder outside the vocabulary, and padding is not part of the
        text: the row's last token stands in for them.
        """
        known = self.input_ids < vocab_size
        if self.attention_mask is not None:
            known &= self.attention_mask > 0
        last = self.input_ids.gather(1, self.last_tokens()[:, None])
        return torch.where(known, self.input_ids, last)


def compile_decoding(model: LanguageModel) -> None:
    """Let `decode` take compiled steps with `model` from now on; an error without a compiler.

    Compiling takes tens of seconds, as much as thousands of tokens save. So it is for those who
    write many answers, and only they ask for it.
    """
    require_compiler(next(model.parameters()).device)
    model.compiled_steps = CompiledSteps(model)  # pyright: ignore[reportArgumentType]


def generate(
    model: VisionLanguageModel,
    batch: Batch,
    max_new_tokens: int = 128,
    sampling: Sampling = Sampling(),
    on_tokens: Callable[[list[int]], None] | None = None,
) -> list[list[int]]:
    """Answer every row of `batch`: B lists of token ids, without the end-of-turn token.

    Rows may be padded on either side. `on_tokens` is called with the B tokens of each step as they
    come, -1 for rows that have ended.
    """
    return complete(model, Prompt.of(model, batch), max_new_tokens, sampling, on_tokens)


def complete(
    model: VisionLanguageModel,
    prompt: Prompt,
    max_new_tokens: int,
    sampling: Sampling,
    on_tokens: Callable[[list[int]], None] | None = None,
) -> list[list[int]]:
    """As `generate`, of what is embedded already."""
    answers: list[list[int]] = [[] for _ in range(len(prompt.input_ids))]
    stop_ids = model.chat.stop_ids
    for tokens in decode(model.language_model, prompt, max_new_tokens, stop_ids, sampling):
        for answer, token in zip(answers, tokens):
            answer += [token] if token >= 0 else []
        if on_tokens is not None:
            on_tokens(tokens)
    return answers


@torch.inference_mode()
def decode(
    model: LanguageModel,
    prompt: Prompt,
    max_new_tokens: int,
    stop_ids: Collection[int],
    sampling: Sampling | Sequence[Sampling] = Sampling(),
    use_cache: bool = True,
) -> Generator[list[int], Collection[int] | None]:
    """Yield the next token of each row, and -1 once a row has ended.

    It stops when all rows have ended or `max_new_tokens` are written. The caller may `send` the
    indices of rows that are to end. `sampling` is that of all rows together, or one for each row,
    whose tokens are then those that it would have alone. `use_cache=False` reads the whole text
    again for every token; it is the reference that the cache is tested against. With beams, all
    tokens are yielded when the best answer of each row is found (`search`).
    """
    _check_positions(model, prompt, max_new_tokens)
    batch, length = prompt.input_ids.shape
    device = prompt.embeddings.device
    samplings = [sampling] if isinstance(sampling, Sampling) else sampling
    if any(each.beams > 1 for each in samplings):
        if len(set(samplings)) > 1:
            raise NanoVLMError("with beam search, all rows have to have the same sampling")
        found = search(model, prompt, max_new_tokens, stop_ids, samplings[0], use_cache)
        best = [answers[0][0] if answers else [] for answers in found]
        yield from _in_steps(best, max_new_tokens)
        return
    generators = [torch.Generator(device).manual_seed(each.seed) for each in samplings]
    stops = torch.tensor(sorted(stop_ids), device=device)
    ended = torch.zeros(batch, dtype=torch.bool, device=device)
    seen = prompt.known_ids(model.config.vocab_size)
    compiled = getattr(model, "compiled_steps", None) if use_cache else None
    steps = compiled or Steps(model, use_cache)
    logits = steps.begin(prompt, length + max_new_tokens)  # (B, V)
    for written in range(1, max_new_tokens + 1):
        rows = batch // len(samplings)  # all of them, or one by one
        parts = zip(logits.split(rows), seen.split(rows), samplings, generators)
        token = torch.cat([sample(*part) for part in parts])  # (B,)
        ended |= torch.isin(token, stops)
        tokens = torch.where(ended, -1, token).tolist()  # the only wait for the device
        for row in (yield tokens) or ():
            ended[row], tokens[row] = True, -1
        if max(tokens) < 0 or written == max_new_tokens:
            return
        seen = torch.cat((seen, token[:, None]), dim=1)
        logits = steps.add(token)


@torch.inference_mode()
def search(
    model: LanguageModel,
    prompt: Prompt,
    max_new_tokens: int,
    stop_ids: Collection[int],
    sampling: Sampling,
    use_cache: bool = True,
) -> list[list[tuple[list[int], float]]]:
    """Beam search: of each row up to `sampling.beams` answers and their scores, best first.

    Answers are token ids without the end token; `Beams` says how they score. The prompt is read
    once, and then has its keys and values copied for each beam. The repetition penalty is one on
    log probabilities, as in `transformers`.
    """
    check_not_compiled(sampling, getattr(model, "compiled_steps", None) is not None)
    _check_positions(model, prompt, max_new_tokens)
    (rows, length), count = prompt.input_ids.shape, sampling.beams
    stops = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=prompt.embeddings.device)
    beams = Beams(rows, count, stops, sampling.length_penalty)
    prompt_ids = prompt.known_ids(model.config.vocab_size).repeat_interleave(count, dim=0)
    steps = Steps(model, use_cache)
    logits = steps.begin(prompt, length).repeat_interleave(count, dim=0)  # (B · beams, V)
    steps.repeat(count, length + max_new_tokens)
    for written in range(1, max_new_tokens + 1):
        seen = torch.cat((prompt_ids, beams.ids.flatten(0, 1)), dim=1)
        log_probs = penalise(logits.log_softmax(dim=-1), seen, sampling.repetition_penalty)
        parents = beams.advance(log_probs, is_last=written == max_new_tokens)
        if not beams.going_on.any():  # the only wait for the device
            break
        steps.reorder(parents)
        logits = steps.add(beams.ids[..., -1].flatten())
    return beams.answers()


def _in_steps(
    answers: list[list[int]], max_new_tokens: int
) -> Generator[list[int], Collection[int] | None]:
    """Yield whole answers as `decode` does."""
    for written in range(max_new_tokens):
        tokens = [answer[written] if written < len(answer) else -1 for answer in answers]
        for row in (yield tokens) or ():
            answers[row], tokens[row] = [], -1
        if max(tokens) < 0:
            return


def check_not_compiled(sampling: Sampling, compiled: bool) -> None:
    """Refuse beam search in compiled steps, whose cache has no order that changes."""
    if compiled and sampling.beams > 1:
        raise NanoVLMError("beam search has no compiled steps; leave out --compile or --beams")


def _check_positions(model: LanguageModel, prompt: Prompt, max_new_tokens: int) -> None:
    length, limit = prompt.input_ids.shape[1], model.config.max_position_embeddings
    if length + max_new_tokens > limit:
        raise NanoVLMError(
            f"a prompt of {length} tokens and {max_new_tokens} new ones exceed the language "
            f"model's {limit} positions; shorten the prompt or lower --max-new-tokens"
        )


class Steps:
    """The logits after a prompt, and after each token that is added to it.

    `use_cache=False` reads the whole text again for every token; it is the reference that the cache
    is tested against.
    """

    def __init__(self, model: LanguageModel, use_cache: bool = True) -> None:
        self.model, self.use_cache = model, use_cache
        self.cache: KVCache | None = None

    def begin(self, prompt: Prompt, max_length: int) -> Tensor:
        """Read `prompt`, of a text of at most `max_length` tokens → logits (B, V) in fp32."""
        self.inputs, self.mask, self.groups = (
            prompt.embeddings,
            prompt.attention_mask,
            prompt.groups,
        )
        self.lengths, batch = prompt.lengths(), len(prompt.input_ids)
        self.row_starts = torch.arange(batch, device=prompt.input_ids.device)
        self.cache = prompt.cache
        if self.use_cache and self.cache is None:
            self.cache = self.model.new_cache(batch, max_length)
        read = prompt.cache.length if prompt.cache else 0
        return self._logits(prompt.last_tokens() - read)

    def add(self, tokens: Tensor) -> Tensor:
        """The next token of each row, (B,) → logits (B, V) in fp32."""
        mask, groups, batch = self.mask, self.groups, len(tokens)
        self.mask = None if mask is None else torch.cat((mask, mask.new_ones(batch, 1)), dim=1)
        if groups is not None:
            self.groups = torch.cat((groups, groups.new_zeros(batch, 1)), dim=1)
        new = self.model.embed_tokens(tokens[:, None])  # (B, 1, C)
        self.inputs = new if self.use_cache else torch.cat((self.inputs, new), dim=1)
        return self._logits(torch.full_like(self.row_starts, self.inputs.shape[1] - 1))

    def repeat(self, copies: int, max_length: int) -> None:
        """Go on with `copies` of each row, side by side, and with room for `max_length` tokens."""
        self.mask, self.groups = (
            None if each is None else each.repeat_interleave(copies, dim=0)
            for each in (self.mask, self.groups)
        )
        self.lengths = self.lengths.repeat_interleave(copies)
        self.row_starts = torch.arange(len(self.lengths), device=self.lengths.device)
        if self.cache is None:
            self.inputs = self.inputs.repeat_interleave(copies, dim=0)
        else:
            self.shared = self.cache.length  # tokens that all copies have in common
            self.cache = self.cache.longer(max_length, copies)

    def reorder(self, rows: Tensor) -> None:
        """Let the i-th row go on as row `rows[i]`, (B,), a copy of the same row of the prompt."""
        if self.cache is None:
            self.inputs = self.inputs.index_select(0, rows)
        else:
            self.cache.reorder(rows, self.shared)

    def _logits(self, last: Tensor) -> Tensor:
        with _fast_products(self.inputs.shape[0] * self.inputs.shape[1], self.inputs):
            hidden_states = self.model.hidden_states(
                self.inputs,
                self.mask,
                self.cache,
                positions=self.row_starts * self.inputs.shape[1] + last,  # flat
                groups=self.groups,
                prompt_lengths=self.lengths,
            )
            return self.model.logits(hidden_states).float()


class CompiledSteps:
    """The same, by a step that is compiled once; on CUDA it is replayed as one CUDA graph.

    A graph is for fixed sizes. So the cache has places for a power of two of tokens, and is kept
    for later prompts that need no more; where they have fewer rows, these are filled up.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.rows = model, 0
        self.cache: StaticCache | None = None
        compiler = Compiler("decoding", mode="reduce-overhead", fullgraph=True, dynamic=False)
        self._next_logits = compiler.compile(next_logits)

    def begin(self, prompt: Prompt, max_length: int) -> Tensor:
        """As `Steps.begin`, which reads the prompt."""
        plain = Steps(self.model)
        logits = plain.begin(prompt, prompt.input_ids.shape[1])
        assert plain.cache is not None
        layers, self.rows, heads, _, width = plain.cache.keys.shape
        if self.cache is None or not self.cache.has_room(self.rows, max_length):
            rows, places = self.rows, max(max_length, SMALLEST_CACHE)
            if self.cache is not None:
                rows, places = max(rows, self.cache.batch), max(places, self.cache.max_length)
                self.cache = None  # freed before the larger one is made
            shape = layers, rows, heads, 2 ** (places - 1).bit_length(), width
            self.cache = StaticCache(shape, plain.cache.keys.dtype, plain.cache.keys.device)
        self.cache.load(plain.cache, prompt.attention_mask, prompt.lengths())
        return logits

    def add(self, tokens: Tensor) -> Tensor:
        """As `Steps.add`."""
        assert self.cache is not None, "begin has to be called first"
        tokens = F.pad(tokens, (0, self.cache.batch - self.rows))
        torch.compiler.cudagraph_mark_step_begin()  # the last logits may be overwritten
        with _fast_products(self.cache.batch, self.cache.keys[0]):
            return self._next_logits(self.model, tokens, self.cache)[: self.rows]


def next_logits(model: LanguageModel, tokens: Tensor, cache: StaticCache) -> Tensor:
    """One token a row, (B,), behind what `cache` holds → the logits of the next, (B, V) in fp32."""
    hidden_states = model.hidden_states(model.embed_tokens(tokens[:, None]), cache=cache)
    return model.logits(hidden_states[:, 0]).float()


@contextlib.contextmanager
def _fast_products(rows: int, like: Tensor) -> Iterator[None]:
    """Switch oneDNN off for one bf16 vector on a CPU: PyTorch's own loop is twice as fast."""
    one_vector = like.device.type == "cpu" and like.dtype == torch.bfloat16 and rows == 1
    enabled = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = enabled and not one_vector  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = enabled
