"""The peak memory of a training step, term by term, from shapes alone."""

from dataclasses import dataclass

import torch

from nanovlm.attention import WRITTEN_OUT_LIMIT
from nanovlm.loss import CHUNK
from nanovlm.memory.activations import FP32, Computing, Kept, cast_bytes, decoder_block, looking, resampling, vision_block
from nanovlm.memory.shapes import Work, feature_shape, prepared
from nanovlm.training.adamw import SLICE
from nanovlm.training.freezing import learns
from nanovlm.training.optimizer import state_bytes
from nanovlm.training.precision import Precision
from nanovlm.training.settings import Settings
from nanovlm.vlm import VisionLanguageModel, VLMConfig

TERMS = ("program", "weights", "gradients", "optimizer", "images", "activations", "casts", "output head", "working set")
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


def predict(config: VLMConfig, settings: Settings, work: Work, precision: Precision, program: float) -> Prediction:
    """The bytes of a step of `work`, from the second step on, when the optimizer's state is there.

    `precision` says how and on which device a run computes. `program` is what the process holds without a model: nothing
    on a GPU, whose context is not the allocator's.
    """
    model = prepared(config, settings, precision)
    computing = Computing(precision.dtype, written_out=precision.device.type == "cpu" and precision.dtype != torch.float32
                          and work.length ** 2 <= WRITTEN_OUT_LIMIT)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    always = {
        "program": program,
        "weights": sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
        "optimizer": sum(state_bytes(parameter, settings) for parameter in learning),
        "images": 0 if settings.cache_features else work.images * 3 * config.image.height * config.image.width * FP32,
    }
    gradients = sum(parameter.nbytes for parameter in learning)
    earlier = gradients if settings.accumulate > 1 else 0  # those of the batches before are there all along
    blocks, head = _blocks(model, work, computing), _head(model, work, computing)
    largest = max(blocks, key=lambda block: block.activations + block.working, default=Kept(0, 0, 0, 0))
    activations = _around_blocks(model, work, computing) + sum(
        block.input if settings.checkpointing else block.activations for block in blocks)
    casts = largest.casts if settings.checkpointing else sum(block.casts for block in blocks)
    again = largest.activations if settings.checkpointing else 0  # one block is computed anew at a time
    return Prediction({
        "eyes": {**always, "gradients": earlier, "working set": _looking(model, work, computing, settings)},
        "head": {**always, "gradients": earlier, "activations": activations,
                 "casts": 0 if settings.checkpointing else casts, "output head": head.forward},
        "backward": {**always, "gradients": earlier, "activations": activations, "casts": casts,
                     "output head": head.gradient, "working set": max(largest.working + again, head.converted)},
        "its end": {**always, "gradients": gradients, "output head": head.gradient if earlier else 0,
                    "working set": max(largest.activations + largest.working, head.embedding_gradient)},
        "update": {**always, "gradients": gradients,
                   "working set": 0 if settings.optimizer == "adamw" and not settings.stochastic_rounding
                   else TEMPORARIES * FP32 * min(SLICE, max(parameter.numel() for parameter in learning))},
    })


@dataclass(frozen=True)
class _Head:
    """Bytes of the output head (`loss.py`) in the forward pass, of the gradients it leaves, and what joins them for a
    moment: the copy that is cast, and, of a tied head, the gradient that comes through the embedding."""

    forward: float
    gradient: float
    converted: float
    embedding_gradient: float


def _head(model: VisionLanguageModel, work: Work, computing: Computing) -> _Head:
    weight, size = model.decoder.head_weight, computing.size
    buffers = min(CHUNK, work.targets) * len(weight) * (FP32 + (0 if size == FP32 else size))
    hidden = work.targets * weight.shape[1] * size
    cast = weight.numel() * size if weight.dtype != computing.dtype else 0
    learned = weight.requires_grad
    embedding = model.decoder.embed_tokens.weight
    return _Head(forward=buffers + 2 * hidden + cast + learned * weight.numel() * size,
                 gradient=hidden + learned * weight.nbytes, converted=learned * cast,
                 embedding_gradient=embedding.nbytes if embedding is weight and learned else 0)


def _blocks(model: VisionLanguageModel, work: Work, computing: Computing) -> list[Kept]:
    """The blocks of both towers that a gradient flows through: those that learn, and all above one that does."""
    vision, text, kept = model.config.vision, model.config.text, []
    sees = work.images > 0
    looked = vision.blocks_below(model.config.vision_layer) if sees else 0
    flows = learns(model.vision.patch_embedding)
    for block in model.vision.blocks[:looked]:
        flows = flows or learns(block)
        if flows:
            stream = FP32 if model.vision.position_embedding.dtype == torch.float32 else computing.size
            kept.append(vision_block(block, vision, work.images, _image_tokens(model), computing, stream))
    flows = sees and (flows or learns(model.projector)) or learns(model.decoder.embed_tokens)
    for block in model.decoder.blocks:
        flows = flows or learns(block)
        if flows:
            positions = work.targets if block is model.decoder.blocks[-1] else work.rows * work.length
            kept.append(decoder_block(block, text, work.rows, work.length, positions, computing))
    return kept


def _around_blocks(model: VisionLanguageModel, work: Work, computing: Computing) -> float:
    """Kept before, between and after the blocks: the pixels and the last norm of eyes that learn, the projector's vectors
    and casts, rotary tables, and the input of the decoder's last norm."""
    config, size, width = model.config, computing.size, model.config.text.hidden_size
    kept = 2 * work.rows * work.length * config.text.head_dim * size + work.targets * (width * size + FP32)
    seen = work.images * _image_tokens(model) * config.vision.hidden_size
    if work.images and learns(model.vision.patch_embedding):
        kept += work.images * 3 * config.image.height * config.image.width * (size if size < FP32 else 0)
        kept += cast_bytes(model.vision.patch_embedding, computing)
    if work.images:
        kept += seen * FP32 * (learns(model.vision.embedding_norm) + learns(model.vision.norm))
        if config.vision.num_queries and config.vision_layer == -1 and learns(model.vision.resampler):
            patches = config.vision.num_patches(config.image.height, config.image.width)
            kept += resampling(model.vision.resampler, work.images, patches, computing)
    projector_learns, tokens = learns(model.projector), work.images * model.image_length
    if projector_learns:
        first = next(layer for layer in model.projector.modules() if isinstance(layer, torch.nn.Linear))
        kept += tokens * first.in_features * size + cast_bytes(model.projector, computing)
    if projector_learns or learns(model.vision):
        # The visual tokens; before them a GELU keeps its input, its matrix its own.
        kept += tokens * width * size * (1 + (1 + projector_learns) * hasattr(model.projector, "up"))
    return kept


def _looking(model: VisionLanguageModel, work: Work, computing: Computing, settings: Settings) -> float:
    if settings.cache_features or learns(model.vision):
        return 0
    return looking(model.config.vision, work.images, _image_tokens(model), computing)


def _image_tokens(model: VisionLanguageModel) -> int:
    """Tokens of an image in the eyes: patches, CLS and registers."""
    return model.config.vision.num_tokens(model.config.image.height, model.config.image.width)
