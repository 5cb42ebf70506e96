"""How much each patch of an image moved the log-probability of each word of an answer.

Gradient times activation (Shrikumar et al. 2017). The activation is a patch's vector h where it
enters the vision encoder's blocks: there it holds the patch's own pixels and nothing else. A blank
image has the vector h₀ in its place, and to the first order the patch has moved the word's
log-probability by

    Σ_c  ∂ log p(word) / ∂h_c · (h_c − h₀_c),

one term for each of the C channels. A patch's part is the sum of the terms' absolute values: added
with their signs they cancel each other. (On 20 toy scenes the tenth of the patches that is found in
this way takes 4.8 nats from a word, and 2.2 with signs; the gradient's norm alone takes 4.7, and
puts a third less inside the objects' outlines.) The gradient passes through the vision encoder and
whatever projector there is, so nothing has to be known about either.

Lesson: lessons/source/09_splice.py.
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
        """`prompt` is one conversation, as `prepare` gives it for `generate`."""
        self.model, self.length = model, prompt.input_ids.shape[1]
        self.answer = prompt.input_ids.new_tensor(answer)  # (A,)
        ids = torch.cat((prompt.input_ids, self.answer[None]), dim=1)  # (1, T)
        # A token is predicted at the place before it.
        places = torch.arange(self.length - 1, ids.shape[1] - 1, device=ids.device)  # (A,)
        self.batch = Batch(ids, None, prompt.image_positions, places, self.answer)

    def hidden_states(self, visual_tokens: Tensor) -> Tensor:
        """The last hidden states before each token of the answer: (N, K, C_t) → (A, C)."""
        model, batch = self.model, self.batch
        return model.language_model.hidden_states(
            model.splice(batch, visual_tokens),
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
        """The log-probability of each of W words with these images: (N, 3, H, W) → (W,)."""
        hidden_states = self.hidden_states(_encode(self.model, pixels))
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
    if len(prompt.input_ids) != 1 or prompt.pixels is None:
        raise NanoVLMError(
            f"{len(prompt.input_ids)} conversations, or one without an image; "
            "an answer is explained by the images of its own conversation"
        )
    words = answer_words(model, answer)[:at_most]
    if not words:
        raise NanoVLMError("the answer has no word, so there is none to explain")
    with torch.inference_mode(False), _frozen(model):
        answered, pixels = Answered(model, prompt, answer), prompt.pixels
        # Pixels are normalised, so zero is the mean colour.
        without = answered.log_probs(torch.zeros_like(pixels), words).exp().tolist()
        with torch.no_grad():
            visual_tokens = _encode(model, pixels).requires_grad_()  # (N, K, C_t)
        with torch.enable_grad():
            hidden_states = answered.hidden_states(visual_tokens)
            log_probs = [answered.log_prob(hidden_states, word) for word in words]
        gradients = [
            torch.autograd.grad(log_prob, visual_tokens, retain_graph=True)[0]
            for log_prob in log_probs
        ]
        # One tile after another: a large image's are too many for the activations of all of them.
        parts = torch.stack(
            [
                _tile_parts(model, tile[None], [gradient[number, None] for gradient in gradients])
                for number, tile in enumerate(pixels)
            ],
            dim=1,
        )  # (words, N, P)
    return [
        ExplainedWord(
            word.text,
            word.tokens,
            float(log_prob.detach().exp()),
            blank,
            _lay_out(of_word, model, images),
        )
        for word, log_prob, blank, of_word in zip(words, log_probs, without, parts)
    ]


def refuse_few_bits(quantize: str) -> None:
    """Refuse `--quantize`: the kernels of weights in few bits compute no gradients."""
    if quantize:
        raise NanoVLMError(
            f"--quantize {quantize} leaves no gradients, by which words are explained; leave it out"
        )


def _encode(model: VisionLanguageModel, pixels: Tensor) -> Tensor:
    """(N, 3, H, W) → visual tokens (N, K, C_t)."""
    return model.projector(model.vision_features(pixels))


def _tile_parts(model: VisionLanguageModel, tile: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    """The patches' parts of one tile, (1, 3, H, W), in each word: (words, P).

    gradients: of each word, with respect to the tile's visual tokens, (1, K, C_t).
    """
    with _patch_vectors(model) as blank, torch.no_grad():
        _encode(model, torch.zeros_like(tile))
    with _patch_vectors(model) as own, torch.enable_grad():
        visual_tokens = _encode(model, tile)
    change = own[0].detach().float() - blank[0].float()  # (1, tokens, C)
    parts = []
    for gradient in gradients:
        (slope,) = torch.autograd.grad(visual_tokens, own, gradient, retain_graph=True)
        parts.append((slope.float() * change).abs().sum(dim=-1))  # (1, tokens)
    return torch.cat(parts)[:, model.vision_encoder.config.num_prefix_tokens :]


@contextlib.contextmanager
def _patch_vectors(model: VisionLanguageModel) -> Iterator[list[Tensor]]:
    """The vectors that enter the first block, (N, tokens, C), in each pass within: graph leaves."""
    found: list[Tensor] = []

    def take(module: torch.nn.Module, inputs: object, output: Tensor) -> Tensor:
        found.append(output.detach().requires_grad_(torch.is_grad_enabled()))
        return found[-1]

    handle = model.vision_encoder.embedding_norm.register_forward_hook(take)
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


def _lay_out(
    parts: Tensor, model: VisionLanguageModel, images: Sequence[Image.Image]
) -> tuple[Tensor, ...]:
    """The parts of all tiles' patches, (N, P), where they are on each image; their sum is 1."""
    config, maps = model.config.image, []
    grid = model.vision_encoder.config.grid(config.height, config.width)
    tiles = parts.cpu().unflatten(1, grid)  # (N, h, w)
    for image in images:
        rows, columns = tile_grid(*image.size, config)
        of_image, tiles = tiles.tensor_split([rows * columns + 1])
        maps.append(join_tiles(of_image, rows, columns))
    total = sum(float(each.sum()) for each in maps) or 1.0
    return tuple(each / total for each in maps)
