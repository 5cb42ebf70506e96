"""The floating-point operations (FLOPs) of a training step, and their share of a GPU's peak.

Multiplying T vectors by a matrix of n numbers takes T · n multiply-adds of 2 FLOPs each:

    forward                            2 · T · n
    backward, gradient of its input    2 · T · n   if a layer before it is trainable
    backward, gradient of the matrix   2 · T · n   if the matrix is trainable

Attention over rows of T tokens with H heads of width D takes 2 · 2 · T² · H · D forward, for the
scores and for the weighted sum of values, and twice that backward. The whole square is counted,
since all of it is computed. Only labelled positions pass the output head and the last block's MLP.
Nothing but matrix products is counted, and activations that checkpointing computes a second time
are not counted again.
"""

from collections.abc import Iterable

import torch
from torch import nn

from nanovlm.inputs.batch import Batch
from nanovlm.model.attention import Attention
from nanovlm.model.language_model import DecoderBlock
from nanovlm.model.lora import LoRALinear
from nanovlm.model.moe import MixtureOfExperts
from nanovlm.model.projector import ResamplerProjector
from nanovlm.model.quantization import QuantizedLinear
from nanovlm.model.resampler import CrossAttention, Resampler
from nanovlm.model.vision_encoder import VisionBlock
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.training.freezing import is_trainable
from nanovlm.training.monitor.walk import BatchShape, Layer, input_matrices, walk
from nanovlm.utils.gpus import find_gpu


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The peak of `device` in `dtype`, in FLOP/s; None for every device not in GPUS."""
    if device.type != "cuda":
        return None
    gpu = find_gpu(torch.cuda.get_device_name(device))
    return gpu and gpu.peak(dtype, tf32=torch.get_float32_matmul_precision() != "highest")


class Utilisation:
    """The share of a GPU's peak that a run reaches: model FLOPs utilisation (MFU).

    Chowdhery et al. 2022. Gradients that frozen layers do not need are not counted.
    """

    def __init__(
        self, model: VisionLanguageModel, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._model, self._peak = model, peak_flops(device, dtype)
        self._shapes: list[BatchShape] = []

    def add(self, batches: Iterable[Batch | None]) -> None:
        """Note the shapes of the batches that this process computes, if the peak is known.

        The FLOPs are counted in `read`: walking through the model takes milliseconds, for which the
        GPU would have to wait here.
        """
        if self._peak:
            length = self._model.image_length
            self._shapes += [BatchShape.of(batch, length) for batch in batches if batch is not None]

    def read(self, seconds: float) -> dict[str, float]:
        """`{"mfu": share}` of the batches noted since the last call, which took `seconds`.

        {} if the peak is not known.
        """
        shapes, self._shapes = self._shapes, []
        flops = sum(step_flops(self._model, shape) for shape in shapes)
        return {"mfu": round(flops / seconds / self._peak, 4)} if self._peak else {}


def step_flops(model: VisionLanguageModel, batch: BatchShape) -> float:
    """FLOPs of the forward and backward pass of one batch; a step may take several."""
    layers = list(walk(model, batch))
    head = model.language_model.head_weight
    gradients = layers[-1].backward + head.requires_grad
    if batch.words:  # similarities with visual tokens, and the gradients of these
        width = model.config.language_model.input_size
        return sum(map(layer_flops, layers)) + 4.0 * batch.tokens * width * batch.words
    head_flops = 2.0 * batch.targets * head.numel() * (1 + gradients)
    return sum(map(layer_flops, layers)) + head_flops


def layer_flops(layer: Layer) -> float:
    """FLOPs of one layer, forward and backward."""
    module = layer.module
    if isinstance(module, DecoderBlock | VisionBlock):
        return _block_flops(module, layer)
    if isinstance(module, Resampler):
        return _resampler_flops(module, layer)
    if isinstance(module, ResamplerProjector):
        return _resampler_projector_flops(module, layer)
    matrices = [part for part in module.modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    return _chain_flops(matrices, layer.outputs, layer.input_gradient)


def _block_flops(block: DecoderBlock | VisionBlock, layer: Layer) -> float:
    gradient = layer.input_gradient or is_trainable(block.attention_norm)
    flops = _attention_flops(block.attention, layer, gradient)
    gradient = gradient or is_trainable(block.attention) or is_trainable(block.mlp_norm)
    return flops + _mlp_flops(block.mlp, layer.outputs, gradient)


def _attention_flops(attention: Attention, layer: Layer, gradient: bool) -> float:
    """Of the four matrices, the scores and the weighted sum of values."""
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    flops = sum(_matrix_flops(matrix, layer.vectors, gradient) for matrix in projections)
    inside = gradient or any(map(is_trainable, (*projections, attention.q_norm, attention.k_norm)))
    pairs, width = layer.rows * layer.length**2, attention.num_heads * attention.head_dim
    flops += 4 * pairs * width * (1 + 2 * inside)
    return flops + _matrix_flops(attention.out_proj, layer.vectors, inside)


def _mlp_flops(mlp: nn.Module, vectors: float, gradient: bool) -> float:
    """Of a block's MLP; of experts, as if the router chose each of them equally often."""
    if isinstance(mlp, MixtureOfExperts):
        chosen = vectors * mlp.per_token / len(mlp.experts)
        return (
            _matrix_flops(mlp.router, vectors, gradient)
            + sum(_mlp_flops(expert, chosen, gradient) for expert in mlp.experts)
            + sum(_mlp_flops(expert, vectors, gradient) for expert in mlp.shared_experts)
        )
    matrices = input_matrices(mlp)
    inside = gradient or any(map(is_trainable, matrices))
    flops = sum(_matrix_flops(matrix, vectors, gradient) for matrix in matrices)
    return flops + _matrix_flops(mlp.get_submodule("down_proj"), vectors, inside)


def _resampler_flops(resampler: Resampler, layer: Layer) -> float:
    """Of its matrices, the scores and the weighted sum of values.

    It is taken to be trainable as a whole or not at all.
    """
    trainable, inside = is_trainable(resampler), layer.backward
    flops = _matrix_flops(resampler.kv_proj, layer.vectors, layer.input_gradient)
    flops += _cross_attention_flops(resampler.attention, layer, trainable, inside)
    projected = 2.0 * layer.outputs * resampler.projection.numel()
    return flops + projected * (1 + inside + trainable)


def _resampler_projector_flops(projector: ResamplerProjector, layer: Layer) -> float:
    patches, queries = layer.input_gradient, projector.queries.requires_grad
    flops = _cross_attention_flops(projector.attention, layer, queries, patches)
    gradient = patches or queries or is_trainable(projector.attention)
    matrices = (projector.mlp_up, projector.mlp_down, projector.head_up, projector.head_down)
    return flops + _chain_flops(matrices, layer.outputs, gradient)


def _cross_attention_flops(
    attention: CrossAttention, layer: Layer, queries: bool, patches: bool
) -> float:
    """Of queries, the same for all images, that attend to the patches of each image.

    `queries` and `patches` say whether their gradients are needed.
    """
    inside = queries or patches or is_trainable(attention)
    width = attention.num_heads * attention.head_dim
    return (
        _matrix_flops(attention.q_proj, layer.outputs // layer.rows, queries)
        + _matrix_flops(attention.k_proj, layer.vectors, patches)
        + _matrix_flops(attention.v_proj, layer.vectors, patches)
        + 4 * layer.outputs * layer.length * width * (1 + 2 * inside)
        + _matrix_flops(attention.out_proj, layer.outputs, inside)
    )


def _chain_flops(matrices: Iterable[nn.Module], vectors: int, gradient: bool) -> float:
    """Of matrices one after the other."""
    flops = 0.0
    for matrix in matrices:
        flops += _matrix_flops(matrix, vectors, gradient)
        gradient = gradient or is_trainable(matrix)
    return flops


def _matrix_flops(matrix: nn.Module, vectors: float, gradient: bool) -> float:
    """Of `vectors` multiplied by a matrix, or with a LoRA adapter by three.

    `gradient` says whether the gradient of its input is needed.
    """
    if isinstance(matrix, LoRALinear):
        down, up = matrix.lora_A.numel(), matrix.lora_B.numel()
        adapter = 2 * vectors * (down * (2 + gradient) + up * 3)
        return _matrix_flops(matrix.base, vectors, gradient) + adapter
    if isinstance(matrix, QuantizedLinear):  # which is frozen
        return 2.0 * vectors * matrix.in_features * matrix.out_features * (1 + gradient)
    weight = matrix.get_parameter("weight")
    return 2.0 * vectors * weight.numel() * (1 + gradient + weight.requires_grad)
