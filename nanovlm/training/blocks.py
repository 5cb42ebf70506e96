"""Training options of transformer blocks: activation checkpointing and torch.compile.

Only a block's `forward` is replaced, so that the names of parameters and saved files stay the same
and the model's code knows nothing of it. Generation, which brings a cache, runs the block as it is
written.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanovlm.errors import NanoVLMError
from nanovlm.model.attention import AttentionInputs
from nanovlm.model.moe import MixtureOfExperts
from nanovlm.model.quantization import hide_from_compiler
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.training.freezing import is_trainable
from nanovlm.utils.console import first_line

Forward = Callable[..., Tensor]


def checkpoint_blocks(model: VisionLanguageModel, dropout: bool = False) -> None:
    """Keep only the input of each block; the backward pass computes its activations again.

    Chen et al. 2016. With `dropout` inside the blocks the random state is kept too. Call it after
    `compile_blocks`.
    """
    for block in _blocks(model):
        checkpointed = functools.partial(_checkpointed, block, block.forward, dropout)
        block.forward = functools.partial(_unless_cached, block.forward, checkpointed)


def compile_blocks(model: VisionLanguageModel, device: torch.device) -> None:
    """Compile each block with torch.compile, for batches of any shape.

    One line of error where no compiler works.
    """
    try:  # here, and not in the first step
        torch.compile(lambda values: values.sin() + 1)(torch.ones(3, device=device))
    except Exception as error:  # of many kinds: no C++ compiler, no Triton, an unknown device
        raise NanoVLMError(
            f"--compile: torch.compile does not work on {device} here ({first_line(error)}); "
            "install a C++ compiler, on CUDA also Triton, or leave --compile out"
        ) from None
    hide_from_compiler(model)
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):  # its shapes depend on what the router chooses
            hidden = torch.compiler.disable(module.mix)
            module.mix = hidden  # pyright: ignore[reportAttributeAccessIssue]
    for block in _blocks(model):
        compiled = torch.compile(block.forward, dynamic=True)
        block.forward = functools.partial(_unless_cached, block.forward, compiled)


def _blocks(model: VisionLanguageModel) -> Iterator[nn.Module]:
    yield from model.vision_encoder.blocks
    yield from model.language_model.blocks


def _unless_cached(
    forward: Forward,
    replacement: Forward,
    hidden_states: Tensor,
    *rest: AttentionInputs | Tensor | None,
) -> Tensor:
    """Run `replacement`, or, in generation with a cache, the block as it is written."""
    cached = any(isinstance(it, AttentionInputs) and it.cache is not None for it in rest)
    return (forward if cached else replacement)(hidden_states, *rest)


def _checkpointed(
    block: nn.Module, forward: Forward, dropout: bool, hidden_states: Tensor, *rest
) -> Tensor:
    """`forward` under `checkpoint` where a backward pass will come by."""
    trains = hidden_states.requires_grad or is_trainable(block)
    if not (torch.is_grad_enabled() and trains):  # nothing is kept
        return forward(hidden_states, *rest)
    return checkpoint(
        forward,
        hidden_states,
        *rest,
        use_reentrant=False,
        preserve_rng_state=dropout,
        context_fn=lambda: (contextlib.nullcontext(), _forget_balance_loss(block)),
    )


@contextlib.contextmanager
def _forget_balance_loss(block: nn.Module) -> Iterator[None]:
    """Drop the balance loss of a block's second forward pass, which keeps its graph alive."""
    try:
        yield
    finally:
        for module in block.modules():
            if isinstance(module, MixtureOfExperts):
                module.balance_loss = None
