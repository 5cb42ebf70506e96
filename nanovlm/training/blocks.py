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

from nanovlm.model.attention import NO_INPUTS, AttentionInputs
from nanovlm.model.moe import MixtureOfExperts
from nanovlm.model.quantization import hide_from_compiler
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.training.freezing import is_trainable
from nanovlm.utils.compiler import Compiler, compiler_problem, require_compiler
from nanovlm.utils.console import say

Forward = Callable[..., Tensor]


def checkpoint_blocks(model: VisionLanguageModel, dropout: bool = False) -> None:
    """Keep only the input of each block; the backward pass computes its activations again.

    Chen et al. 2016. With `dropout` inside the blocks the random state is kept too. Call it after
    `compile_blocks`.
    """
    for block in _blocks(model):
        checkpointed = functools.partial(_checkpointed, block, block.forward, dropout)
        block.forward = functools.partial(_unless_cached, block.forward, checkpointed)


def compile_blocks(
    model: VisionLanguageModel, device: torch.device, wanted: bool | str = True
) -> None:
    """Compile each block with torch.compile, for batches of any number of rows and any length.

    `wanted` may be "auto": on CUDA, where a compiler is found. What was decided there goes to the
    log. If it is True and no compiler works, that is an error of one line.
    """
    if not wanted or (wanted == "auto" and device.type != "cuda"):
        return
    if wanted == "auto":
        if problem := compiler_problem(device):
            say(f"blocks are not compiled: {problem}, or give --no-compile")
            return
    else:
        require_compiler(device)  # here, and not in the first step
    say("blocks are compiled with torch.compile when they first run; --no-compile switches it off")
    hide_from_compiler(model)
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):  # its shapes depend on what the router chooses
            hidden = torch.compiler.disable(module.mix)
            module.mix = hidden  # pyright: ignore[reportAttributeAccessIssue]
    compiler = Compiler("blocks", dynamic=True)
    for block in _blocks(model):
        compiled = functools.partial(_of_any_size, compiler.compile(block.forward))
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


def _of_any_size(
    compiled: Forward,
    hidden_states: Tensor,
    inputs: AttentionInputs = NO_INPUTS,
    positions: Tensor | None = None,
) -> Tensor:
    """Run a compiled block, telling the compiler which sizes vary and which do not.

    Even with dynamic=True it takes a size of 1 for a constant, and would compile once more for
    batches of one row; an unbacked size is one that it knows nothing about. And it takes sizes that
    are equal at first for the same one, so it has to know that a width is no length.
    """
    mark_unbacked = torch._dynamo.decorators.mark_unbacked
    if hidden_states._is_view():  # the first block's, whose base has a size of its own: B · T
        hidden_states = hidden_states.clone()
    batch, tables = len(hidden_states), inputs.rotary or ()
    for tensor in (hidden_states, inputs.mask, *tables, inputs.query_scale):
        if tensor is not None and len(tensor) == batch:
            mark_unbacked(tensor, 0, shape_id="batch")
    for tensor in (hidden_states, *tables):
        torch._dynamo.mark_static(tensor, tensor.dim() - 1)
    if inputs is NO_INPUTS:
        return compiled(hidden_states)
    if positions is not None:
        positions = positions.clone()  # the compiler also looks at where a view begins
        mark_unbacked(positions, 0)
    return compiled(hidden_states, inputs, positions)


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
