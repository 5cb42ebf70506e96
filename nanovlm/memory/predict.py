"""The peak memory of a training step, term by term, without allocating it.

The step runs on a simulated device (`simulation.py`), and every tensor of it is counted from its
first use to its last (`trace.py`).
"""

import dataclasses
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nanovlm.memory.measure import take_step
from nanovlm.memory.shapes import prepared, random_batch
from nanovlm.memory.simulation import simulated
from nanovlm.memory.trace import CUDA_ROUNDS_TO, Storage, Trace
from nanovlm.model.vlm import VisionLanguageModel, VLMConfig
from nanovlm.training.blocks import checkpoint_blocks
from nanovlm.training.monitor.walk import BatchShape
from nanovlm.training.optim.optimizer import build_optimizer
from nanovlm.training.precision import Precision
from nanovlm.training.settings import Settings

TERMS: tuple[str, ...] = (
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
FORWARD = ("vision encoder", "language model", "output head")  # moments of the forward pass
MOMENTS = (*FORWARD, "backward", "update")


@dataclass(frozen=True)
class Prediction:
    """Bytes at the peak of each moment of a step, by term. The peak may be at any of these."""

    moments: dict[str, dict[str, float]]
    kept: float  # by the forward pass for the backward pass

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
    trace = trace_step(prepared(config, settings, precision), settings, batch, precision)
    moments = {
        moment: {"program": program, **terms_at(trace, event)}
        for moment, event in trace.peaks().items()
        if moment in MOMENTS
    }
    backward = next(event for event, moment in trace.moments if moment == "backward")
    forward = (storage for storage in trace.living() if storage.moment in FORWARD)
    kept = sum(storage.size for storage in forward if storage.born < backward <= storage.died)
    return Prediction(moments, kept)


def trace_step(
    model: VisionLanguageModel,
    settings: Settings,
    batch: BatchShape,
    precision: Precision,
    compiled: bool = False,
) -> Trace:
    """The second step of a run, of two batches at most: the others are like the second one.

    Its blocks run as they are written, or with `compiled` each pass of a block is a region.
    """
    settings = dataclasses.replace(settings, accumulate=min(settings.accumulate, 2))
    with _trace(precision) as trace, simulated(precision.device, trace.compiled):
        if compiled:
            _mark_blocks(model, trace)
        if settings.checkpointing:
            checkpoint_blocks(model)
        trace.hold((*model.parameters(), *model.buffers()), "weights")
        optimizer = build_optimizer(model.train(), settings)
        parameters = [it for group in optimizer.param_groups for it in group["params"]]
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
            parameter.register_post_accumulate_grad_hook(
                lambda updated: trace.hold([updated.grad], "gradients")
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state = [it for values in optimizer.state.values() for it in values.values()]
        trace.hold(state, "optimizer")
        trace.kernels.clear()
        _tell_moments(model, trace.begin)
        take_step(model, optimizer, batch, settings, precision, trace.begin)
    return trace


def trace_forward(model: VisionLanguageModel, batch: BatchShape, precision: Precision) -> Trace:
    """A forward pass up to the logits, without gradients."""
    trace = _trace(precision)
    with trace, simulated(precision.device, trace.compiled), torch.inference_mode():
        trace.hold((*model.parameters(), *model.buffers()), "weights")
        trace.begin("loading")
        random = random_batch(model, batch, precision.dtype).to(precision.device)
        trace.begin("forward")
        model(
            random, lambda hidden_states, head, targets: nn.functional.linear(hidden_states, head)
        )
    return trace


def _trace(precision: Precision) -> Trace:
    return Trace(CUDA_ROUNDS_TO if precision.device.type == "cuda" else 1)


def terms_at(trace: Trace, event: int) -> dict[str, float]:
    """What is held after an event of a trace, by term."""
    terms: dict[str, float] = dict.fromkeys(TERMS[1:], 0.0)
    backwards = [start for start, moment in trace.moments if moment == "backward"]
    for storage in trace.living():
        if storage.born <= event < storage.died:
            terms[_term(storage, event, backwards)] += storage.size
    return terms


def _term(storage: Storage, event: int, backwards: list[int]) -> str:
    """`backwards`: the events at which backward passes begin."""
    # The head's gradient, made in the forward pass, becomes that of the weight.
    early = storage.moment in FORWARD and not any(
        storage.born < start <= event for start in backwards
    )
    if storage.term and not (storage.term == "gradients" and early):
        return storage.term
    if storage.moment == "loading":
        return "images"
    kept = any(storage.born < start <= storage.died for start in backwards)
    if storage.moment not in FORWARD or not kept:
        return "working set"
    if storage.moment == "output head":
        return "output head"
    return "casts" if storage.cast else "activations"


def _tell_moments(model: VisionLanguageModel, begin: Callable[[str], None]) -> None:
    """Have the model say where its forward pass has come."""
    language_model = model.language_model
    language_model.embed_tokens.register_forward_pre_hook(lambda *_: begin("language model"))
    language_model.norm.register_forward_hook(lambda *_: begin("output head"))


def _mark_blocks(model: VisionLanguageModel, trace: Trace) -> None:
    """Make each forward and backward pass of a block a compiled region."""
    for block in (*model.vision_encoder.blocks, *model.language_model.blocks):
        block.forward = functools.partial(_within, trace.compiled, block.forward)
        block.register_full_backward_pre_hook(lambda *_: trace.open_region())
        block.register_full_backward_hook(lambda *_: trace.close_region())


def _within(
    context: Callable[[], AbstractContextManager], forward: Callable[..., Tensor], *inputs: Any
) -> Tensor:
    with context():
        return forward(*inputs)
