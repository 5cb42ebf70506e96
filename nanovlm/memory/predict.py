"""The peak memory of a training step, term by term, from shapes alone."""

from dataclasses import dataclass

import torch

from nanovlm.memory.activations import (
    FP32,
    Computing,
    Kept,
    cast_bytes,
    decoder_block,
    looking,
    projecting,
    reducing,
    resampling,
    vision_block,
)
from nanovlm.memory.shapes import Work, prepared
from nanovlm.model.loss import CHUNK
from nanovlm.model.vlm import VisionLanguageModel, VLMConfig
from nanovlm.training.freezing import is_trainable
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
    """Bytes by moment of a step, then by term. A moment is where memory may be at its largest."""

    moments: dict[str, dict[str, float]]

    @property
    def totals(self) -> dict[str, float]:
        return {moment: sum(terms.values()) for moment, terms in self.moments.items()}

    @property
    def peak(self) -> float:
        return max(self.totals.values())


def predict(
    config: VLMConfig, settings: Settings, work: Work, precision: Precision, program: float
) -> Prediction:
    """The bytes of a step of `work`, from the second step on, when the optimizer's state is there.

    `precision` says how and on which device a run computes. `program` is what the process holds without a model: nothing
    on a GPU, whose context is not the allocator's.
    """
    model = prepared(config, settings, precision)
    computing = Computing(precision.dtype, precision.device.type)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    always = {
        "program": program,
        "weights": sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
        "optimizer": sum(state_bytes(parameter, settings) for parameter in learning),
        "images": 0
        if settings.cache_features
        else work.images * 3 * config.image.height * config.image.width * FP32,
    }
    gradients = sum(parameter.nbytes for parameter in learning)
    earlier = (
        gradients if settings.accumulate > 1 else 0
    )  # those of the batches before are there all along
    blocks, head = _blocks(model, work, computing), _head(model, work, computing, earlier > 0)
    largest = max(
        blocks, key=lambda block: block.activations + block.working, default=Kept(0, 0, 0, 0)
    )
    activations = _around_blocks(model, work, computing) + sum(
        block.input if settings.checkpointing else block.activations for block in blocks
    )
    casts = largest.casts if settings.checkpointing else sum(block.casts for block in blocks)
    again = (
        largest.activations if settings.checkpointing else 0
    )  # one block is computed anew at a time
    return Prediction(
        {
            "eyes": {
                **always,
                "gradients": earlier,
                "working set": _looking(model, work, computing, settings),
            },
            "head": {
                **always,
                "gradients": earlier,
                "activations": activations,
                "casts": 0 if settings.checkpointing else casts,
                "output head": head.forward,
            },
            "backward": {
                **always,
                "gradients": earlier,
                "activations": activations,
                "casts": casts,
                "output head": head.gradient,
                "working set": max(largest.working + again, head.backward),
            },
            "its end": {
                **always,
                "gradients": gradients,
                "output head": head.waiting,
                "working set": max(largest.activations + largest.working, head.embedding_gradient),
            },
            "update": {
                **always,
                "gradients": gradients,
                "working set": 0
                if settings.optimizer == "adamw" and not settings.stochastic_rounding
                else TEMPORARIES
                * FP32
                * min(SLICE, max(parameter.numel() for parameter in learning)),
            },
        }
    )


@dataclass(frozen=True)
class _Head:
    """Bytes of the output head (`loss.py`) in the forward pass, and of its gradient; what its backward pass takes for a
    moment. At the end of the whole one: its gradient that is `waiting` to be added to another, and that of the embedding."""

    forward: float
    gradient: float
    backward: float
    waiting: float
    embedding_gradient: float


def _head(model: VisionLanguageModel, work: Work, computing: Computing, added: bool) -> _Head:
    """`added` says whether gradients are added to those of batches before."""
    weight, size, embedding = (
        model.language_model.head_weight,
        computing.size,
        model.language_model.embed_tokens.weight,
    )
    learned, tied = weight.requires_grad, embedding is weight
    logits = min(CHUNK, work.targets) * len(weight)
    hidden = work.targets * weight.shape[1] * size
    cast = weight.numel() * size if weight.dtype != computing.dtype else 0
    if work.pairs:  # the backward pass makes logits anew, in two copies beside the softmax, and the gradient with them
        forward = logits * (2 * FP32 + size) + 2 * hidden + cast
        backward = (
            logits * (2 * FP32 + size) + cast + (learned * weight.numel() * size if cast else 0)
        )
    else:  # the gradient is made with the logits
        forward = (
            logits * (FP32 + (0 if size == FP32 else size))
            + 2 * hidden
            + cast
            + learned * weight.numel() * size
        )
        backward = learned * cast
    return _Head(
        forward,
        hidden + learned * weight.nbytes,
        backward,
        waiting=learned * weight.nbytes * (tied and added),
        embedding_gradient=embedding.nbytes * embedding.requires_grad * (tied or added),
    )


def _blocks(model: VisionLanguageModel, work: Work, computing: Computing) -> list[Kept]:
    """The blocks of both towers that a gradient flows through: those that learn, and all above one that does."""
    vision, text, kept = model.config.vision_encoder, model.config.language_model, []
    sees = work.images > 0
    looked = vision.blocks_below(model.config.vision_layer) if sees else 0
    flows = is_trainable(model.vision_encoder.patch_embedding)
    for block in model.vision_encoder.blocks[:looked]:
        flows = flows or is_trainable(block)
        if flows:
            stream = (
                FP32
                if model.vision_encoder.position_embedding.dtype == torch.float32
                else computing.size
            )
            kept.append(
                vision_block(block, vision, work.images, tokens_in_eyes(model), computing, stream)
            )
    flows = _flows_into_decoder(model, work)
    for block in model.language_model.blocks:
        flows = flows or is_trainable(block)
        if flows:
            positions = (
                work.targets
                if block is model.language_model.blocks[-1]
                else work.rows * work.length
            )
            kept.append(decoder_block(block, text, work.rows, work.length, positions, computing))
    return kept


def _flows_into_decoder(model: VisionLanguageModel, work: Work) -> bool:
    """Whether a gradient is wanted of what enters the decoder's first block."""
    below = [
        getattr(model.language_model, name)
        for name in ("embed_tokens", "reducer", "position_embedding")
        if hasattr(model.language_model, name)
    ]
    return any(
        map(is_trainable, [*below, *[model.vision_encoder, model.projector] * (work.images > 0)])
    )


def _around_blocks(model: VisionLanguageModel, work: Work, computing: Computing) -> float:
    """Kept before, between and after the blocks: the pixels and the last norm of eyes that learn, what the projector and
    the reducer keep, rotary tables, and the input of the decoder's last norm."""
    config, size, tokens = model.config, computing.size, work.rows * work.length
    kept = work.targets * (config.language_model.hidden_size * size + FP32)
    if config.language_model.positions == "rotary":
        kept += 2 * tokens * config.language_model.head_dim * size
    if _flows_into_decoder(model, work):
        kept += computing.dropout(
            tokens * config.language_model.hidden_size, config.language_model.dropout
        )
        if config.language_model.embedding_size:
            kept += reducing(model.language_model.reducer, tokens, computing)
    return kept + _around_eyes(model, work, computing) if work.images else kept


def _around_eyes(model: VisionLanguageModel, work: Work, computing: Computing) -> float:
    """Of that, what images need."""
    config, size, vision = model.config, computing.size, model.vision_encoder
    height, width = config.image.height, config.image.width
    kept = (
        work.images
        * tokens_in_eyes(model)
        * config.vision_encoder.hidden_size
        * FP32
        * (is_trainable(vision.embedding_norm) + is_trainable(vision.norm))
    )
    if is_trainable(vision.patch_embedding):
        kept += work.images * 3 * height * width * (size if size < FP32 else 0)
        kept += cast_bytes(vision.patch_embedding, computing)
    if (
        config.vision_encoder.num_queries
        and config.vision_layer == -1
        and is_trainable(vision.resampler)
    ):
        kept += resampling(
            vision.resampler,
            work.images,
            config.vision_encoder.num_patches(height, width),
            computing,
        )
    if is_trainable(model.projector) or is_trainable(vision):
        features = config.vision_encoder.num_features(height, width, config.vision_layer)
        kept += projecting(
            model.projector,
            work.images,
            features,
            model.image_length,
            is_trainable(vision),
            computing,
        )
    return kept


def _looking(
    model: VisionLanguageModel, work: Work, computing: Computing, settings: Settings
) -> float:
    if settings.cache_features or is_trainable(model.vision_encoder):
        return 0
    return looking(model.config.vision_encoder, work.images, tokens_in_eyes(model), computing)


def tokens_in_eyes(model: VisionLanguageModel) -> int:
    """Tokens of an image in the eyes: patches, CLS and registers."""
    return model.config.vision_encoder.num_tokens(
        model.config.image.height, model.config.image.width
    )
