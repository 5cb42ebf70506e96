"""A forward pass of the model at full size, in its own process: memory predicted and measured."""

import json
import sys
import time

import torch
import torch.nn.functional as F

from nanovlm.memory.measure import filled, program_bytes
from nanovlm.memory.predict import trace_forward
from nanovlm.memory.shapes import TEXT_TOKENS, random_batch, skeleton
from nanovlm.memory.summary import parameters, visual_tokens
from nanovlm.model.quantization import quantize_
from nanovlm.model.vlm import VisionLanguageModel, VLMConfig
from nanovlm.training.monitor.walk import BatchShape
from nanovlm.training.precision import Precision
from nanovlm.training.settings import Settings
from nanovlm.utils.device import give_back_freed_memory, peak_memory
from nanovlm.utils.processes import output_of


def forward_report(config: VLMConfig, settings: Settings, precision: Precision) -> str:
    """Predict the memory of the pass, measure it in another process, and compare."""
    model, counted = _model(config, settings, precision), skeleton(config)
    predicted = predict_forward(model, precision, program_bytes(precision))
    flags = [*sys.argv[1:], "--take-forward"]
    measured, seconds, building = output_of("nanovlm.memory", flags, "measures")
    parts = {
        "vision encoder": counted.vision_encoder,
        "projector": counted.projector,
        "language model": counted.language_model,
    }
    listed = ", ".join(f"{name} {parameters(part) / 1e6:.1f}M" for name, part in parts.items())
    dtype = settings.quantize or str(precision.dtype).removeprefix("torch.")
    return (
        f"{parameters(counted) / 1e6:.1f}M parameters: {listed}; "
        f"{dtype} on {precision.device.type}\n"
        f"{visual_tokens(counted)}\n"
        f"a forward pass of the largest image and {TEXT_TOKENS} text tokens took {seconds:.1f} s, "
        f"making the weights {building:.1f} s\n"
        f"predicted {predicted / 1e9:.3f} GB, measured {measured / 1e9:.3f} GB: "
        f"{predicted / measured - 1:+.1%}"
    )


def predict_forward(model: VisionLanguageModel, precision: Precision, program: float) -> float:
    """The peak in bytes: the program, and what is held when most is."""
    trace = trace_forward(model, _shape(model), precision)
    return program + trace.bytes_at(trace.peaks()["forward"])


@torch.inference_mode()
def take_forward(config: VLMConfig, settings: Settings, precision: Precision) -> str:
    """JSON: this process's peak memory, the seconds of the pass and of making the weights."""
    give_back_freed_memory()
    began = time.perf_counter()
    model = filled(_model(config, settings, precision), precision.device)
    batch = random_batch(model, _shape(model)).to(precision.device)
    built = time.perf_counter()
    logits = model(batch, lambda hidden_states, head, targets: F.linear(hidden_states, head))
    logits.float().sum().item()  # waits for the device
    return json.dumps([peak_memory(precision.device), time.perf_counter() - built, built - began])


def _model(config: VLMConfig, settings: Settings, precision: Precision) -> VisionLanguageModel:
    """The model on the meta device, in the form that answers questions.

    All of it is in one dtype, or the matrices of the language model are quantised.
    """
    model, meta = skeleton(config).requires_grad_(False), torch.device("meta")
    if settings.quantize:
        quantize_(model.language_model.blocks, settings.quantize, meta)
    Precision(precision.dtype, meta).place(model)
    return model.eval()


def _shape(model: VisionLanguageModel) -> BatchShape:
    """The largest image and a question, whose last token predicts the next one."""
    tiles = model.config.image.max_tiles_per_image
    return BatchShape(1, model.max_image_length + TEXT_TOKENS, images=tiles, targets=1)
