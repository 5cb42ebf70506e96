"""One forward pass of the whole model at full size, in a process of its own: what it needs, and what was predicted."""

import json
import sys
import time

import torch

from nanovlm.memory.activations import FP32, Computing, looking, reading
from nanovlm.memory.measure import filled, measured_apart, program_bytes
from nanovlm.memory.predict import tokens_in_eyes
from nanovlm.memory.shapes import TEXT_TOKENS, Work, skeleton
from nanovlm.memory.summary import parameters, visual_tokens
from nanovlm.model.quantization import quantize_
from nanovlm.model.vlm import VisionLanguageModel, VLMConfig
from nanovlm.training.precision import Precision
from nanovlm.training.settings import Settings
from nanovlm.utils.device import give_back_freed_memory, peak_memory


def forward_report(config: VLMConfig, settings: Settings, precision: Precision) -> str:
    """Predict the pass, take it in another process, and compare."""
    model = _model(config, settings, precision)
    counted = skeleton(config)
    predicted = predict_forward(model, precision, program_bytes(precision))
    measured, seconds, building = measured_apart([*sys.argv[1:], "--take-forward"])
    parts = ", ".join(
        f"{name} {parameters(part) / 1e6:.1f}M"
        for name, part in (
            ("eyes", counted.vision_encoder),
            ("projector", counted.projector),
            ("voice", counted.language_model),
        )
    )
    return (
        f"{parameters(counted) / 1e6:.1f}M parameters: {parts}; {settings.quantize or str(precision.dtype)[6:]} on "
        f"{precision.device.type}\n{visual_tokens(counted)}\n"
        f"read the largest with {TEXT_TOKENS} words in {seconds:.1f} s; the weights were made in {building:.1f} s\n"
        f"predicted {predicted / 1e9:.3f} GB, measured {measured / 1e9:.3f} GB: {predicted / measured - 1:+.1%}"
    )


def predict_forward(model: VisionLanguageModel, precision: Precision, program: float) -> float:
    """Bytes at most: of the weights, the pixels, and what either tower needs at a time to read one image and a question."""
    config, work = model.config, _work(model)
    computing = Computing(precision.dtype, precision.device.type)
    pixels = work.images * 3 * config.image.height * config.image.width
    eyes = looking(config.vision_encoder, work.images, tokens_in_eyes(model), computing)
    eyes += pixels * computing.size * (computing.size < FP32)  # cast
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return (
        program
        + weights
        + pixels * FP32
        + max(eyes, reading(model.language_model, work.length, computing))
    )


@torch.inference_mode()
def take_forward(config: VLMConfig, settings: Settings, precision: Precision) -> str:
    """The peak of this process, the seconds of the pass and those it took to make the weights."""
    give_back_freed_memory()
    began = time.perf_counter()
    model = filled(_model(config, settings, precision), precision.device)
    batch = _work(model).batch(config, model.image_length).to(precision.device)
    built = time.perf_counter()
    hidden_states = model.language_model.hidden_states(
        model.embed(batch),
        batch.attention_mask,
        positions=batch.target_positions,
        groups=model.image_groups(batch),
    )
    model.language_model.logits(hidden_states).float().sum().item()  # waits for the device
    return json.dumps([peak_memory(precision.device), time.perf_counter() - built, built - began])


def _model(config: VLMConfig, settings: Settings, precision: Precision) -> VisionLanguageModel:
    """The model without memory, as it is held to be asked: all of it in one dtype, or the decoder's matrices quantised."""
    model, meta = skeleton(config).requires_grad_(False), torch.device("meta")
    if settings.quantize:
        quantize_(model.language_model.blocks, settings.quantize, meta)
    Precision(precision.dtype, meta).place(model)
    return model.eval()


def _work(model: VisionLanguageModel) -> Work:
    """The largest image and a question, of which the last token tells the next one."""
    return Work(1, model.max_image_length + TEXT_TOKENS, model.config.image.max_tiles_per_image, 1)
