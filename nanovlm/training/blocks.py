"""What training does to the blocks of both towers: their activations are computed twice, or their code compiled.

Only a block's `forward` is replaced, so the names of parameters and what is saved stay the same, and the model files
know nothing of it. Generation, which brings a cache, runs the block as it was written.
"""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanovlm.errors import NanoVLMError
from nanovlm.model.attention import KVCache
from nanovlm.model.moe import MixtureOfExperts
from nanovlm.model.quantization import hide_from_compiler
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.training.freezing import is_trainable
from nanovlm.utils.console import first_line


def checkpoint_blocks(model: VisionLanguageModel, dropout: bool = False) -> None:
    """Of each block keep the input alone and compute the rest again in the backward pass (Chen et al. 2016).

    With `dropout` inside the blocks the random state is kept too. Call it after `compile_blocks`.
    """
    for block in _blocks(model):
        checkpointed = functools.partial(_checkpointed, block, block.forward, dropout)
        block.forward = functools.partial(_without_cache, block.forward, checkpointed)


def compile_blocks(model: VisionLanguageModel, device: torch.device) -> None:
    """Compile each block with torch.compile, for batches of any shape. One line of error where no compiler works."""
    try:  # here, and not in the first step
        torch.compile(lambda values: values.sin() + 1)(torch.ones(3, device=device))
    except Exception as error:  # of many kinds: no C++ compiler, no Triton, an unknown device
        raise NanoVLMError(
            f"--compile: torch.compile does not work on {device} here ({first_line(error)}); install a C++ compiler, "
            "on CUDA also Triton, or leave --compile out"
        ) from None
    hide_from_compiler(model)
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):  # whose shapes are what the router says
            module.mix = torch.compiler.disable(module.mix)
    for block in _blocks(model):
        block.forward = functools.partial(
            _without_cache, block.forward, torch.compile(block.forward, dynamic=True)
        )


def _blocks(model: VisionLanguageModel) -> Iterator[nn.Module]:
    yield from model.vision_encoder.blocks
    yield from model.language_model.blocks


def _without_cache(
    forward: Callable[..., Tensor],
    replacement: Callable[..., Tensor],
    hidden_states: Tensor,
    *arguments,
    cache: KVCache | None = None,
    layer: int = 0,
    **options,
) -> Tensor:
    """`replacement` wherever there is no cache. Only a cache asks for the block's number, and to compiled code each
    number would be a new case."""
    if cache is None:
        return replacement(hidden_states, *arguments, **options)
    return forward(hidden_states, *arguments, cache=cache, layer=layer, **options)


def _checkpointed(
    block: nn.Module,
    forward: Callable[..., Tensor],
    dropout: bool,
    hidden_states: Tensor,
    *arguments,
    **options,
) -> Tensor:
    if not (
        torch.is_grad_enabled() and (hidden_states.requires_grad or is_trainable(block))
    ):  # nothing is kept
        return forward(hidden_states, *arguments, **options)
    return checkpoint(
        forward,
        hidden_states,
        *arguments,
        use_reentrant=False,
        preserve_rng_state=dropout,
        **options,
    )
