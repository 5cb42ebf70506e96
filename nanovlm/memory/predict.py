"""The peak memory of a training step, term by term, computed from shapes alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from nanovlm.memory.activations import (
    FP32,
    BlockMemory,
    Computing,
    block_memory,
    kept_outside_blocks,
)
from nanovlm.memory.inference import encoding_memory
from nanovlm.memory.shapes import prepared
from nanovlm.model.language_model import DecoderBlock
from nanovlm.model.loss import CPU_SLICE, GPU_SLICE, chunk_rows
from nanovlm.model.vision_encoder import VisionBlock
from nanovlm.model.vlm import VisionLanguageModel, VLMConfig
from nanovlm.training.freezing import is_trainable
from nanovlm.training.monitor.walk import BatchShape, walk
from nanovlm.training.optim.adamw import SLICE
from nanovlm.training.optim.optimizer import state_bytes
from nanovlm.training.precision import Precision
from nanovlm.training.settings import Settings

TERMS = (
    "program",
    "weights",
    "gradients",
    "optimizer",
    "images",
    "activations",
    "casts",
    "output head",
    "working set",
)
TEMPORARIES = 10  # fp32 tensors of a slice that LeanAdamW holds at a time, at most


@dataclass(frozen=True)
class Prediction:
    """Bytes by moment of a step, then by term. The peak may be at any of these moments."""

    moments: dict[str, dict[str, float]]

    @property
    def totals(self) -> dict[str, float]:
        return {moment: sum(terms.values()) for moment, terms in self.moments.items()}

    @property
    def peak(self) -> float:
        return max(self.totals.values())


def predict(
    config: VLMConfig, settings: Settings, batch: BatchShape, precision: Precision, program: float
) -> Prediction:
    """The bytes of a step, from the second step on, when the optimizer has its state.

    `batch` is the shape of each of the step's batches, `precision` the run's compute dtype and
    device. `program` is what the process holds without a model: nothing on a GPU, whose context
    lies outside the allocator.
    """
    model = prepared(config, settings, precision)
    computing = Computing(precision.dtype, precision.device.type)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = sum(parameter.nbytes for parameter in trainable)
    accumulates = settings.accumulate > 1
    always = {
        "program": program,
        "weights": sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
        "gradients": gradients if accumulates else 0,  # those of the step's earlier batches
        "optimizer": sum(state_bytes(parameter, settings) for parameter in trainable),
        "images": _pixels(config, batch),
    }
    layers = _layers(model, batch, computing, settings.checkpointing)
    head = _head(model, batch, computing, accumulates)
    moments = {
        "vision encoder": {"working set": _frozen_encoder(model, batch, computing)},
        "output head": {
            "activations": layers.activations,
            "casts": layers.casts,
            "output head": head.forward,
        },
        "backward": {
            "activations": layers.activations,
            "casts": layers.casts or layers.largest.casts,
            "output head": head.gradient,
            "working set": max(layers.working, head.backward),
        },
        "end of backward": {
            "gradients": gradients,
            "output head": head.waiting,
            "working set": max(
                layers.largest.activations + layers.largest.working, head.embedding_gradient
            ),
        },
        "update": {"gradients": gradients, "working set": _update(trainable, settings)},
    }
    return Prediction({name: {**always, **terms} for name, terms in moments.items()})


def _pixels(config: VLMConfig, batch: BatchShape) -> int:
    if batch.cached_features:
        return 0
    return batch.images * 3 * config.image.height * config.image.width * FP32


def _frozen_encoder(model: VisionLanguageModel, batch: BatchShape, computing: Computing) -> float:
    if batch.cached_features or is_trainable(model.vision_encoder):
        return 0
    return encoding_memory(model, batch.images, computing)


def _update(trainable: Sequence[nn.Parameter], settings: Settings) -> float:
    """The temporaries of the optimizer's step. PyTorch's fused AdamW has none."""
    if settings.optimizer == "adamw" and not settings.stochastic_rounding:
        return 0
    return TEMPORARIES * FP32 * min(SLICE, max(parameter.numel() for parameter in trainable))


@dataclass(frozen=True)
class _Layers:
    """Bytes of all layers below the output head."""

    activations: float  # that the forward pass keeps
    casts: float  # of weights, that it keeps
    working: float  # what the backward pass needs besides
    largest: BlockMemory  # the block that needs most in the backward pass


def _layers(
    model: VisionLanguageModel, batch: BatchShape, computing: Computing, checkpointing: bool
) -> _Layers:
    """With checkpointing, blocks keep their input alone and are computed again one at a time."""
    blocks, activations = [], 0.0
    if model.config.language_model.positions == "rotary":  # the tables of sines and cosines
        width = model.config.language_model.head_dim
        activations += 2 * batch.tokens * width * computing.size
    if batch.pairs:  # which share their prompts; other rows need no mask
        activations += batch.tokens * batch.length * computing.size
    for layer in walk(model, batch):
        if layer.backward and isinstance(layer.module, DecoderBlock | VisionBlock):
            blocks.append(block_memory(layer, model, computing))
        elif layer.backward:
            activations += kept_outside_blocks(layer, model, computing)
    largest = max(
        blocks, key=lambda block: block.activations + block.working, default=BlockMemory()
    )
    if checkpointing:
        activations += sum(block.input for block in blocks)
        return _Layers(activations, 0, largest.activations + largest.working, largest)
    activations += sum(block.activations for block in blocks)
    return _Layers(activations, sum(block.casts for block in blocks), largest.working, largest)


@dataclass(frozen=True)
class _Head:
    """Bytes of the output head (`loss.py`)."""

    forward: float  # in its forward pass
    gradient: float
    backward: float  # in its backward pass, for a moment
    waiting: float  # its gradient at the end of the whole backward pass, to be added to another
    embedding_gradient: float  # of the embedding table, at that moment


def _head(
    model: VisionLanguageModel, batch: BatchShape, computing: Computing, accumulates: bool
) -> _Head:
    weight, embedding = model.language_model.head_weight, model.language_model.embed_tokens.weight
    size, trainable, tied = computing.size, weight.requires_grad, embedding is weight
    rows = chunk_rows(len(weight), computing.dtype, torch.device(computing.device))
    logits = min(rows, batch.targets) * len(weight) * (FP32 + (0 if size == FP32 else size))
    hidden = batch.targets * weight.shape[1] * size
    cast = weight.numel() * size if weight.dtype != computing.dtype else 0
    gradient = trainable * weight.numel() * FP32
    if size != FP32:  # a slice of it in the compute dtype, to be added
        slice_size = CPU_SLICE if computing.device == "cpu" else GPU_SLICE
        gradient += trainable * min(slice_size, weight.numel()) * size
    rounded = gradient if weight.dtype != torch.float32 else 0  # beside the gradient it gets
    if batch.pairs:  # the backward pass computes the logits again, and the gradient with them
        forward = logits + 2 * hidden + cast
        backward = logits + hidden + cast + rounded
    else:  # the gradient is computed with the logits
        forward = logits + 2 * hidden + cast + gradient
        backward = rounded
    return _Head(
        forward,
        hidden + trainable * weight.nbytes,
        backward,
        waiting=trainable * weight.nbytes * (tied and accumulates),
        embedding_gradient=embedding.nbytes * embedding.requires_grad * (tied or accumulates),
    )
