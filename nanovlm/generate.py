"""Writing an answer: one pass over the prompt, then one token at a time through the cache."""

import codecs
import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nanovlm.errors import NanoVLMError
from nanovlm.inputs.batch import Batch
from nanovlm.model.language_model import LanguageModel
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy: the most likely token, always the same answer."""

    temperature: float = 0.0
    top_p: float = 1.0  # keep the most likely tokens that together have this probability (Holtzman et al. 2020)
    top_k: int = 0  # keep this many of the most likely tokens; 0 keeps all
    repetition_penalty: float = (
        1.0  # above 1, tokens already there become less likely (Keskar et al. 2019)
    )
    seed: int = 0

    def __post_init__(self) -> None:
        for name, fits, expected in (
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("seed", -(2**63) <= self.seed < 2**63, "below 2 to the power of 63"),
        ):
            if not fits:
                raise NanoVLMError(f"{name} is {getattr(self, name)}; it has to be {expected}")


def generate(
    model: VisionLanguageModel,
    batch: Batch,
    max_new_tokens: int = 128,
    sampling: Sampling = Sampling(),
    on_tokens: Callable[[list[int]], None] | None = None,
) -> list[list[int]]:
    """Answer every row of `batch`, padded on either side: B lists of token ids, without the end-of-turn token.

    `on_tokens` is called with the (B) tokens of each step as they come, -1 for rows that have ended.
    """
    with torch.inference_mode():
        embeddings = model.embed(batch)
        answers: list[list[int]] = [[] for _ in range(len(batch.input_ids))]
        for tokens in decode(
            model.language_model,
            embeddings,
            batch.input_ids,
            batch.attention_mask,
            max_new_tokens,
            {model.chat.end_of_turn_id},
            sampling,
            groups=model.image_groups(batch),
        ):
            for answer, token in zip(answers, tokens):
                answer += [token] if token >= 0 else []
            if on_tokens is not None:
                on_tokens(tokens)
    return answers


@torch.inference_mode()
def decode(
    decoder: LanguageModel,
    embeddings: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    max_new_tokens: int,
    stop_ids: Collection[int],
    sampling: Sampling = Sampling(),
    use_cache: bool = True,
    groups: Tensor | None = None,
) -> Iterator[list[int]]:
    """Yield the next token of each row, -1 once a row has ended, until all have or `max_new_tokens` are written.

    `embeddings` (B, T, C) is the prompt as the decoder reads it and `input_ids` (B, T) its ids, for the repetition
    penalty; `groups`: see `LanguageModel.hidden_states`. `use_cache=False` reads everything again for every token; it is there to
    check the cache against.
    """
    batch, length, _ = embeddings.shape
    limit = decoder.config.max_position_embeddings
    if length + max_new_tokens > limit:
        raise NanoVLMError(
            f"a prompt of {length} tokens and {max_new_tokens} new ones exceed the decoder's {limit} positions; "
            "shorten the prompt or lower --max-new-tokens"
        )
    cache = decoder.new_cache(batch, length + max_new_tokens) if use_cache else None
    generator = torch.Generator(embeddings.device).manual_seed(sampling.seed)
    ended = torch.zeros(batch, dtype=torch.bool, device=embeddings.device)
    stops = torch.tensor(sorted(stop_ids), device=embeddings.device)
    last, inputs = _last_token(attention_mask, length, batch, embeddings.device), embeddings
    lengths = (
        torch.full_like(last, length) if attention_mask is None else (attention_mask > 0).sum(dim=1)
    )
    # Padding has been seen by nobody, and no logit belongs to a placeholder: a token that is there stands in for them.
    is_seen = input_ids < decoder.config.vocab_size
    if attention_mask is not None:
        is_seen &= attention_mask > 0
    seen = torch.where(is_seen, input_ids, input_ids.gather(1, last[:, None]))
    for step in range(max_new_tokens):
        wanted = torch.arange(batch, device=last.device) * inputs.shape[1] + last
        with _products_for(inputs):
            logits = decoder.logits(
                decoder.hidden_states(
                    inputs, attention_mask, cache, wanted, prompt_lengths=lengths, groups=groups
                )
            ).float()  # (B, V)
        token = choose(logits, seen, sampling, generator)
        ended |= torch.isin(token, stops)
        tokens = torch.where(ended, -1, token).tolist()
        yield tokens
        if max(tokens) < 0:
            return
        if attention_mask is not None:
            attention_mask = torch.cat((attention_mask, attention_mask.new_ones(batch, 1)), dim=1)
        if groups is not None:
            groups = torch.cat((groups, groups.new_zeros(batch, 1)), dim=1)
        seen = torch.cat((seen, token[:, None]), dim=1)
        new = decoder.embed_tokens(token[:, None])
        inputs = new if use_cache else torch.cat((inputs, new), dim=1)
        last = torch.full_like(last, inputs.shape[1] - 1)


@contextlib.contextmanager
def _products_for(inputs: Tensor) -> Iterator[None]:
    """On a CPU, oneDNN multiplies a bf16 matrix with a single vector at half the speed of PyTorch's own loop."""
    one_vector = (
        inputs.device.type == "cpu"
        and inputs.dtype == torch.bfloat16
        and inputs.shape[:2].numel() == 1
    )
    enabled = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = enabled and not one_vector
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = enabled


def choose(logits: Tensor, seen: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """(B, V) logits and the (B, T) ids so far → (B,) next tokens."""
    if sampling.repetition_penalty != 1:
        values = logits.gather(1, seen)
        logits = logits.scatter(
            1,
            seen,
            torch.where(
                values > 0,
                values / sampling.repetition_penalty,
                values * sampling.repetition_penalty,
            ),
        )
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    logits, order = (logits / sampling.temperature).sort(dim=-1, descending=True)
    if sampling.top_k:
        logits[:, sampling.top_k :] = -torch.inf
    probabilities = logits.softmax(dim=-1)
    # A token goes when those before it already reach top_p, so the most likely one always stays.
    probabilities[probabilities.cumsum(dim=-1) - probabilities >= sampling.top_p] = 0
    return order.gather(1, torch.multinomial(probabilities, 1, generator=generator))[:, 0]


def _last_token(
    attention_mask: Tensor | None, length: int, batch: int, device: torch.device
) -> Tensor:
    """The index of each row's last real token, wherever its padding is."""
    if attention_mask is None:
        return torch.full((batch,), length - 1, device=device)
    return (attention_mask.ne(0) * torch.arange(length, device=device)).argmax(dim=-1)


class TextStreamer:
    """Token ids in, text out, whole characters only: a character's last byte may be several tokens away."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._put_space = tokenizer.puts_space  # before the first word, where nobody wrote one

    def put(self, token: int) -> str:
        """The characters that `token` completes; often one word, sometimes nothing yet."""
        text = self._utf8.decode(self._tokenizer.decode_bytes([token]))
        if self._put_space and text:
            text, self._put_space = text.removeprefix(" "), False
        return text

    def end(self) -> str:
        """What is left when the answer stops in the middle of a character."""
        return self._utf8.decode(b"", final=True)
