"""The arithmetic of a training step, and what a GPU could do at most: together, the share of its peak that a run reaches.

A product of T vectors with a matrix of n numbers is T · n multiply-adds, 2 FLOPs each. So, for T tokens through it:

    forward                                       2 · T · n
    backward, gradient of its input               2 · T · n   where one flows: something below it learns
    backward, gradient of the matrix              2 · T · n   where the matrix learns

Attention of rows of T tokens by H heads of width D: scores and their sum over values 2 · 2 · T² · H · D forward, twice that
backward. The whole square is counted, as it is computed. Only labelled positions pass the output head, and the last
block's MLP. What checkpointing computes again is no progress and not counted; neither is anything but products.
"""

from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import nn

from nanovlm.inputs.batch import Batch
from nanovlm.model.attention import Attention
from nanovlm.model.lora import LoRALinear
from nanovlm.model.moe import MixtureOfExperts
from nanovlm.model.projector import ResamplerProjector
from nanovlm.model.quantization import QuantizedLinear
from nanovlm.model.resampler import CrossAttention, Resampler
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.training.freezing import is_trainable
from nanovlm.training.optim.optimizer import AFTER_BLOCKS

# Dense TFLOP/s of NVIDIA's data sheets and architecture white papers: half precision with sums in fp32, and fp32 without
# TF32. The names are `torch.cuda.get_device_name`'s; the first pattern that fits counts.
PEAKS = {
    "NVIDIA H200*": (989, 67),
    "NVIDIA H100 PCIe": (756, 51),
    "NVIDIA H100 NVL": (835, 60),
    "NVIDIA H100*": (989, 67),
    "NVIDIA A100*": (312, 19.5),
    "NVIDIA A10": (125, 31.2),
    "NVIDIA L4": (121, 30.3),
    "Tesla T4": (65, 8.1),
    "Tesla V100-PCIE*": (112, 14),
    "Tesla V100-SXM2*": (125, 15.7),
    "NVIDIA GeForce RTX 3060": (25.5, 12.7),
    "NVIDIA GeForce RTX 3090": (71, 35.6),
    "NVIDIA GeForce RTX 4060": (30.2, 15.1),
    "NVIDIA GeForce RTX 4070": (58.3, 29.1),
    "NVIDIA GeForce RTX 4080": (97.5, 48.7),
    "NVIDIA GeForce RTX 4090": (165.2, 82.6),
}
WITHOUT_BF16 = ("Tesla T4", "Tesla V100*")


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that `device` reaches at most in `dtype`; None where that is not known, as for anything but these GPUs."""
    if device.type != "cuda":
        return None
    return _peak(torch.cuda.get_device_name(device), dtype)


def _peak(name: str, dtype: torch.dtype) -> float | None:
    if dtype == torch.bfloat16 and any(fnmatchcase(name, pattern) for pattern in WITHOUT_BF16):
        return None
    for pattern, (half, single) in PEAKS.items():
        if fnmatchcase(name, pattern):
            return 1e12 * (single if dtype == torch.float32 else half)
    return None


class Utilisation:
    """What share of its peak arithmetic a GPU reaches (MFU of Chowdhery et al. 2022, with what is frozen counted as it is)."""

    def __init__(
        self, model: VisionLanguageModel, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._model, self._peak = model, peak_flops(device, dtype)
        self._shapes: list[dict[str, int]] = []

    def add(self, batches: Iterable[Batch | None]) -> None:
        """Note the shapes of what this process computes; nothing where the peak is not known. No arithmetic yet: it walks
        through the whole model, which takes milliseconds that a GPU would wait."""
        for batch in batches if self._peak else ():
            if batch is not None:
                rows, length = batch.input_ids.shape
                self._shapes.append(
                    dict(
                        rows=rows,
                        length=length,
                        targets=len(batch.targets),
                        images=len(batch.image_positions) // self._model.image_length,
                        looked=batch.patches is None,
                    )
                )

    def read(self, seconds: float) -> dict[str, float]:
        """`{"mfu": share}` of the work noted in `seconds`, or nothing; begins anew."""
        shapes, self._shapes = self._shapes, []
        flops = sum(step_flops(self._model, **shape) for shape in shapes)
        return {"mfu": round(flops / seconds / self._peak, 4)} if self._peak else {}


def step_flops(
    model: VisionLanguageModel,
    *,
    rows: int,
    length: int,
    targets: int,
    images: int,
    looked: bool = True,
) -> float:
    """FLOPs of the forward and backward pass of `rows` of `length` tokens, `targets` of them labelled, with `images`.

    What learns is what requires a gradient. `looked` is whether the eyes run (not with --cache-features). A step of several
    batches takes the sum of theirs.
    """
    flops, flows = (
        0.0,
        False,
    )  # `flows`: whether what comes next has an input that a gradient is wanted of
    if images:
        if looked:
            flops, flows = _vision_flops(model, images)
        projector, flows = _projector_flops(model, images, flows)
        flops += projector
    flows = flows or is_trainable(model.language_model.embed_tokens)
    tokens = rows * length
    for layer in model.language_model.reducer.children():
        flops += _matrix_flops(layer, tokens, flows) if isinstance(layer, nn.Linear) else 0
        flows = flows or is_trainable(layer)
    flows = (
        flows
        or model.config.language_model.positions == "learned"
        and is_trainable(model.language_model.position_embedding)
    )
    for block in model.language_model.blocks:
        flows = flows or is_trainable(block.attention_norm)
        flops += _attention_flops(block.attention, rows, length, flows)
        flows = flows or is_trainable(block.attention) or is_trainable(block.mlp_norm)
        passing = targets if block is model.language_model.blocks[-1] else tokens
        flops += _mlp_flops(block.mlp, passing, flows)
        flows = flows or is_trainable(block.mlp)
    head = model.language_model.head_weight
    flows = flows or is_trainable(model.language_model.norm)
    return flops + 2 * targets * head.numel() * (1 + flows + head.requires_grad)


def _vision_flops(model: VisionLanguageModel, images: int) -> tuple[float, bool]:
    """Of the eyes, up to the layer that is looked at; and whether a gradient flows out of them."""
    vision, image, layer = model.vision_encoder, model.config.image, model.config.vision_layer
    patches = vision.config.num_patches(image.height, image.width)
    tokens = vision.config.num_tokens(image.height, image.width)
    embedding = vision.patch_embedding.weight
    flops = 2.0 * images * patches * embedding.numel() * (1 + embedding.requires_grad)
    flows = any(
        parameter.requires_grad
        for name, parameter in vision.named_parameters()
        if name.split(".")[0] not in ("blocks", *AFTER_BLOCKS)
    )
    for block in vision.blocks[: vision.config.blocks_below(layer)]:
        flows = flows or is_trainable(block.attention_norm)
        flops += _attention_flops(block.attention, images, tokens, flows)
        flows = flows or is_trainable(block)
        flops += _matrix_flops(block.mlp.up_proj, images * tokens, flows)
        flops += _matrix_flops(block.mlp.down_proj, images * tokens, flows)
    if layer == -1:
        flows = flows or is_trainable(vision.norm)
        if vision.config.num_queries:
            flops += _resampler_flops(vision.resampler, images, patches, flows)
            flows = flows or is_trainable(vision.resampler)
    return flops, flows


def _resampler_flops(resampler: Resampler, images: int, patches: int, flows: bool) -> float:
    """Of its matrices, the scores and the sum over values. What learns is taken to be all of it or nothing."""
    attention, queries, learning = (
        resampler.attention,
        len(resampler.queries),
        is_trainable(resampler),
    )
    inside = flows or learning  # of the queries' side a gradient is wanted only for what learns
    flops = _matrix_flops(resampler.kv_proj, images * patches, flows)
    flops += _cross_attention_flops(attention, images, queries, patches, learning, inside)
    return flops + 2.0 * images * queries * resampler.projection.numel() * (1 + inside + learning)


def _cross_attention_flops(
    attention: CrossAttention, images: int, queries: int, patches: int, asks: bool, flows: bool
) -> float:
    """Of `queries`, the same for all images, that look at `patches` of each. `asks` and `flows` say whether gradients of
    the queries and of the patches are wanted."""
    inside = flows or asks or is_trainable(attention)
    flops = _matrix_flops(attention.q_proj, queries, asks) + _matrix_flops(
        attention.out_proj, images * queries, inside
    )
    flops += sum(
        _matrix_flops(layer, images * patches, flows)
        for layer in (attention.k_proj, attention.v_proj)
    )
    return flops + 4 * images * queries * patches * attention.num_heads * attention.head_dim * (
        1 + 2 * inside
    )


def _projector_flops(model: VisionLanguageModel, images: int, flows: bool) -> tuple[float, bool]:
    """Of the projector; and whether a gradient flows out of it."""
    projector, flops, tokens = model.projector, 0.0, images * model.image_length
    layers = [layer for layer in projector.modules() if isinstance(layer, nn.Linear)]
    if isinstance(projector, ResamplerProjector):
        image, asks = model.config.image, projector.queries.requires_grad
        patches = model.config.vision_encoder.num_features(
            image.height, image.width, model.config.vision_layer
        )
        flops += _cross_attention_flops(
            projector.attention, images, len(projector.queries), patches, asks, flows
        )
        flows = flows or asks or is_trainable(projector.attention)
        layers = [projector.mlp_up, projector.mlp_down, projector.head_up, projector.head_down]
    for layer in layers:
        flops += _matrix_flops(layer, tokens, flows)
        flows = flows or is_trainable(layer)
    return flops, flows


def _mlp_flops(mlp: nn.Module, tokens: int, flows: bool) -> float:
    """Of a decoder block's MLP; of experts, as if they were equally busy."""
    if isinstance(mlp, MixtureOfExperts):
        choices = tokens * mlp.per_token / len(mlp.experts)
        return (
            _matrix_flops(mlp.router, tokens, flows)
            + sum(_mlp_flops(expert, choices, flows) for expert in mlp.experts)
            + sum(_mlp_flops(expert, tokens, flows) for expert in mlp.shared_experts)
        )
    into = [mlp.gate_proj, mlp.up_proj] if hasattr(mlp, "gate_proj") else [mlp.up_proj]
    inside = flows or any(map(is_trainable, into))
    return sum(_matrix_flops(layer, tokens, flows) for layer in into) + _matrix_flops(
        mlp.down_proj, tokens, inside
    )


def _attention_flops(attention: Attention, rows: int, length: int, flows: bool) -> float:
    """Of the four matrices, the scores and the sum over values."""
    tokens, projections = rows * length, (attention.q_proj, attention.k_proj, attention.v_proj)
    flops = sum(_matrix_flops(layer, tokens, flows) for layer in projections)
    inside = flows or any(
        is_trainable(layer) for layer in (*projections, attention.q_norm, attention.k_norm)
    )
    flops += (
        4 * rows * length * length * attention.num_heads * attention.head_dim * (1 + 2 * inside)
    )
    return flops + _matrix_flops(attention.out_proj, tokens, inside)


def _matrix_flops(layer: nn.Module, tokens: int, flows: bool) -> float:
    """Of one matrix; `flows` says whether a gradient of its input is wanted. With an adapter, of three."""
    if isinstance(layer, LoRALinear):
        narrow, wide = layer.lora_A.numel(), layer.lora_B.numel()
        return _matrix_flops(layer.base, tokens, flows) + 2 * tokens * (
            narrow * (2 + flows) + wide * 3
        )
    learned = not isinstance(layer, QuantizedLinear) and layer.weight.requires_grad
    return 2.0 * tokens * layer.in_features * layer.out_features * (1 + flows + learned)
