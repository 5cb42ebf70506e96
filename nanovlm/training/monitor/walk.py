"""The layers that a training step runs through, in order.

How many vectors pass each of them, and which of them the backward pass reaches: `flops.py` and
`nanovlm.memory` count with it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from nanovlm.data.words import WordBatch
from nanovlm.inputs.batch import Batch
from nanovlm.model.vision_encoder import VisionEncoder
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.training.freezing import is_trainable


@dataclass(frozen=True)
class BatchShape:
    """A batch without its contents."""

    rows: int
    length: int  # tokens of a row
    images: int  # in all rows; one cut into tiles counts once a tile, the whole image included
    targets: int  # labelled tokens in all rows
    pairs: int = 0  # of answers, in preference training
    cached_features: bool = False  # the batch brings patch vectors: the vision encoder does not run
    words: int = 0  # that are compared with visual tokens; the language model does not run

    @classmethod
    def of(cls, batch: Batch, image_length: int) -> "BatchShape":
        """The shape of a real batch, whose images take `image_length` tokens each."""
        rows, length = batch.input_ids.shape
        images, targets = len(batch.image_positions) // image_length, len(batch.targets)
        words = batch.counts.shape[1] if isinstance(batch, WordBatch) else 0
        cached = batch.patches is not None
        return cls(rows, length, images, targets, cached_features=cached, words=words)

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return self.rows * self.length


@dataclass(frozen=True)
class Layer:
    """A layer of the forward pass."""

    module: nn.Module
    rows: int
    length: int  # vectors of a row that enter it
    outputs: int  # vectors that leave it, in all; of a block those that pass its MLP
    input_gradient: bool  # whether the backward pass needs the gradient of its input

    @property
    def vectors(self) -> int:
        """Vectors that enter the layer, in all."""
        return self.rows * self.length

    @property
    def backward(self) -> bool:
        """Whether the backward pass reaches this layer."""
        return self.input_gradient or is_trainable(self.module)


def walk(model: VisionLanguageModel, batch: BatchShape) -> Iterator[Layer]:
    """The layers from the pixels to the final norm.

    A gradient flows through everything behind the first trainable layer. The output head
    (`loss.py`) is not among them.
    """
    gradient = False
    for module, rows, length, outputs in _in_order(model, batch):
        layer = Layer(module, rows, length, outputs, gradient)
        yield layer
        gradient = layer.backward


def _in_order(
    model: VisionLanguageModel, batch: BatchShape
) -> Iterator[tuple[nn.Module, int, int, int]]:
    """(module, rows, length, outputs) as in `Layer`."""
    if batch.images:
        if not batch.cached_features:
            yield from _vision_encoder(model, batch.images)
        features, _ = model.config.feature_shape
        yield model.projector, batch.images, features, batch.images * model.image_length
    if batch.words:
        return
    language_model, tokens = model.language_model, (batch.rows, batch.length, batch.tokens)
    yield language_model.embed_tokens, *tokens
    yield language_model.reducer, *tokens
    if model.config.language_model.positions == "learned":
        yield language_model.position_embedding, *tokens
    yield language_model.dropout, *tokens
    for block in language_model.blocks[:-1]:
        yield block, *tokens
    # Behind the attention of the last block, only the positions that predict a label are computed.
    yield language_model.blocks[-1], batch.rows, batch.length, batch.targets
    yield language_model.norm, 1, batch.targets, batch.targets


def _vision_encoder(
    model: VisionLanguageModel, images: int
) -> Iterator[tuple[nn.Module, int, int, int]]:
    """Up to the layer whose patch vectors are used."""
    encoder: VisionEncoder = model.vision_encoder
    size = model.config.image.height, model.config.image.width
    patches, tokens = encoder.config.num_patches(*size), encoder.config.num_tokens(*size)
    everything = images, tokens, images * tokens
    yield encoder.patch_embedding, images, patches, images * patches
    # The class token, the registers and the position table, which are the encoder's own.
    yield nn.ParameterList(encoder.parameters(recurse=False)), *everything
    yield encoder.embedding_norm, *everything
    for block in encoder.blocks[: model.config.vision_depth]:
        yield block, *everything
    if model.config.vision_norm:
        yield encoder.norm, *everything
        if encoder.config.num_queries:
            yield encoder.resampler, images, patches, images * encoder.config.num_queries


def input_matrices(mlp: nn.Module) -> list[nn.Module]:
    """The matrices that multiply an MLP's input: the gate, if there is one, and up projection."""
    return [getattr(mlp, name) for name in ("gate_proj", "up_proj") if hasattr(mlp, name)]
