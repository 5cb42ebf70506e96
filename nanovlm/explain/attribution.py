"""How much each patch of an image moved the log-probability of each word of an answer.

Gradient times activation (Shrikumar et al. 2017; for images Selvaraju et al. 2017). The activation
is a patch's vector h, as it leaves the vision encoder's blocks. A blank image has the vector h₀ in
its place, and to the first order the patch has moved the word's log-probability by

    Σ_c  ∂ log p(word) / ∂h_c · (h_c − h₀_c),

one term for each of the C channels. A patch's part is the sum of the terms' absolute values: terms
of either sign cancel each other otherwise, and the sum then finds the patches that matter less
well (docs/en/training.md has the figures). The gradient passes through whatever projector there
is, so nothing has to be known about it.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from nanovlm.errors import NanoVLMError
from nanovlm.explain.places import join_tiles
from nanovlm.explain.words import Word, answer_words
from nanovlm.inputs.batch import Batch
from nanovlm.inputs.image import tile_grid
from nanovlm.model.vlm import VisionLanguageModel

MAX_WORDS = 200  # of an answer: a backward pass and a part of the picture each


@dataclass(frozen=True)
class ExplainedWord:
    """A word of an answer and where it came from."""

    text: str
    tokens: tuple[int, ...]  # their numbers in the answer
    probability: float  # of the word, after the question and the words before it
    blank: float  # the same where every image is blank
    maps: tuple[Tensor, ...]  # of each image, (rows, columns) of patches; together they sum to 1

    @property
    def from_images(self) -> float:
        """The share of its probability that is gone without the images, from 0 to 1."""
        return max(0.0, 1 - self.blank / max(self.probability, 1e-30))


class Answered:
    """An answer that is written already, to be read again with other images.

    One forward pass gives the log-probabilities of all its tokens.
    """

    def __init__(self, model: VisionLanguageModel, prompt: Batch, answer: Sequence[int]) -> None:
        """`prompt` is one conversation, as `prepare` gives it for `generate`, with its pixels."""
        if len(prompt.input_ids) != 1 or prompt.pixels is None:
            raise NanoVLMError(
                f"{len(prompt.input_ids)} conversations, or one without an image; "
                "an answer is explained by the images of its own conversation"
            )
        self.model, self.length = model, prompt.input_ids.shape[1]
        self.answer = prompt.input_ids.new_tensor(answer)  # (A,)
        ids = torch.cat((prompt.input_ids, self.answer[None]), dim=1)  # (1, T)
        # A token is predicted at the place before it.
        places = torch.arange(self.length - 1, ids.shape[1] - 1, device=ids.device)  # (A,)
        self.pixels = prompt.pixels
        self.batch = Batch(ids, None, prompt.image_positions, places, self.answer, prompt.pixels)

    def hidden_states(self, pixels: Tensor) -> Tensor:
        """The language model's last hidden states before each token, (A, C), for other images."""
        model, batch = self.model, self.batch
        batch.pixels = pixels
        return model.language_model.hidden_states(
            model.embed(batch),
            positions=batch.target_positions,
            groups=model.image_groups(batch),
            prompt_lengths=self.answer.new_tensor([self.length]),
        )

    def log_prob(self, hidden_states: Tensor, word: Word | ExplainedWord) -> Tensor:
        """The log-probability of a word, a scalar: the sum over its tokens."""
        tokens = list(word.tokens)
        logits = self.model.language_model.logits(hidden_states[tokens]).float()
        return logits.log_softmax(dim=-1).gather(1, self.answer[tokens, None]).sum()

    @torch.no_grad()
    def log_probs(self, pixels: Tensor, words: Sequence[Word | ExplainedWord]) -> Tensor:
        """The log-probability of each of W words with other images in place of its own: (W,)."""
        hidden_states = self.hidden_states(pixels)
        return torch.stack([self.log_prob(hidden_states, word) for word in words])


def explain(
    model: VisionLanguageModel,
    prompt: Batch,
    images: Sequence[Image.Image],
    answer: Sequence[int],
    at_most: int = MAX_WORDS,
) -> list[ExplainedWord]:
    """Where each word of an answer came from, the first `at_most` of them.

    prompt: the one conversation that was answered, as `prepare` gives it for `generate`; images:
    those of the conversation; answer: its token ids. Takes two passes over the text, and one
    backward pass for each word. No weight gets a gradient.
    Raises NanoVLMError for an answer without a word and a conversation without an image.
    """
    answered = Answered(model, prompt, answer)
    words = answer_words(model, answer)[:at_most]
    if not words:
        raise NanoVLMError("the answer has no word, so there is none to explain")
    blank = torch.zeros_like(answered.pixels)  # pixels are normalised, so zero is the mean colour
    with torch.inference_mode(False), _frozen(model):
        blank_probs = answered.log_probs(blank, words).exp().tolist()
        with _patch_vectors(model) as seen, torch.no_grad():
            model.vision_features(blank[:1])
        with _patch_vectors(model) as vectors, torch.enable_grad():
            hidden_states = answered.hidden_states(answered.pixels)
            log_probs = [answered.log_prob(hidden_states, word) for word in words]
        change = vectors[0].detach().float() - seen[0].float()  # (N, tokens, C)
        explained = []
        for word, log_prob, without in zip(words, log_probs, blank_probs):
            (gradient,) = torch.autograd.grad(log_prob, vectors, retain_graph=True)
            parts = (gradient.float() * change).abs().sum(dim=-1)  # (N, tokens)
            with_images = float(log_prob.detach().exp())
            maps = _maps(parts, model, images)
            explained.append(ExplainedWord(word.text, word.tokens, with_images, without, maps))
    return explained


def refuse_few_bits(quantize: str) -> None:
    """Refuse `--quantize`: the kernels of weights in few bits compute no gradients."""
    if quantize:
        raise NanoVLMError(
            f"--quantize {quantize} leaves no gradients, by which words are explained; leave it out"
        )


@contextlib.contextmanager
def _patch_vectors(model: VisionLanguageModel) -> Iterator[list[Tensor]]:
    """What leaves the last block that runs, (N, tokens, C), of the pass within; as a graph's leaf.

    Patches are in their places there, also in encoders with a resampler behind the blocks.
    """
    encoder, found = model.vision_encoder, []
    count = encoder.config.blocks_below(model.config.vision_layer)
    last = encoder.blocks[count - 1] if count else encoder.embedding_norm

    def take(module: torch.nn.Module, inputs: object, output: Tensor) -> Tensor:
        found.append(output.detach().requires_grad_(torch.is_grad_enabled()))
        return found[-1]

    handle = last.register_forward_hook(take)
    try:
        yield found
    finally:
        handle.remove()


@contextlib.contextmanager
def _frozen(model: VisionLanguageModel) -> Iterator[None]:
    """No parameter is trainable within."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _maps(
    parts: Tensor, model: VisionLanguageModel, images: Sequence[Image.Image]
) -> tuple[Tensor, ...]:
    """The parts of all tokens of the vision encoder, (N, tokens), laid out on each image."""
    config, maps = model.config.image, []
    grid = model.vision_encoder.config.grid(config.height, config.width)
    parts = parts[:, model.vision_encoder.config.num_prefix_tokens :].cpu().unflatten(1, grid)
    for image in images:
        rows, columns = tile_grid(*image.size, config)
        tiles, parts = parts.tensor_split([rows * columns + 1])
        maps.append(join_tiles(tiles, rows, columns))
    total = sum(float(each.sum()) for each in maps) or 1.0
    return tuple(each / total for each in maps)
