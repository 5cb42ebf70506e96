"""Training steps on the fake device, run in a process of its own; prints one JSON object a case.

python tests/fake_cuda/steps.py kinds|memory
"""

import dataclasses
import gc
import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

from device import CUDA, Watch, attention_kernels, on_cuda, pretend  # before torch

# isort: split

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nanovlm.hub.shapes import LANGUAGE_MODELS
from nanovlm.inputs.chat import ChatConfig
from nanovlm.inputs.image_config import ImageConfig
from nanovlm.memory.measure import take_step
from nanovlm.memory.predict import predict
from nanovlm.memory.shapes import prepared
from nanovlm.model import layers
from nanovlm.model.attention import SEGMENT
from nanovlm.model.language_model import LanguageModelConfig
from nanovlm.model.projector import ProjectorConfig
from nanovlm.model.vision_encoder import VisionEncoderConfig
from nanovlm.model.vlm import VLMConfig
from nanovlm.training.blocks import checkpoint_blocks
from nanovlm.training.monitor.walk import BatchShape
from nanovlm.training.optim.optimizer import build_optimizer
from nanovlm.training.precision import Precision
from nanovlm.training.settings import Settings

HALF, FULL = torch.bfloat16, torch.float32
TOY = LanguageModelConfig(97, 32, 64, 3, 4, 2, 8)
GPT2 = dict(norm="layer", positions="learned", mlp="gelu", dropout=0.1, num_key_value_heads=4)
KINDS = {  # name → dtype, changes of the language model's config, packed rows, settings
    "bf16": (HALF, {}, False, {}),
    "fp16": (torch.float16, {}, False, {}),
    "fp32": (FULL, {}, False, {}),
    "packed": (HALF, {}, True, {}),
    "packed, fp32": (FULL, {}, True, {}),
    "preferences": (HALF, {}, False, dict(objective="dpo")),
    "checkpointing": (HALF, {}, False, dict(checkpointing=True)),
    "vision encoder": (HALF, {}, False, dict(train="projector,language_model,vision_encoder")),
    "norms of queries and keys": (HALF, dict(qk_norm=True), False, {}),
    "GPT-2": (HALF, GPT2, False, {}),
    "8-bit moments": (HALF, {}, False, dict(optimizer="adamw8bit")),
    "stochastic rounding": (HALF, {}, False, dict(stochastic_rounding=True)),
    "LoRA": (HALF, {}, False, dict(lora_rank=4)),
    "NF4 and LoRA": (HALF, {}, False, dict(lora_rank=4, quantize="nf4")),
    "int8 and LoRA": (HALF, {}, False, dict(lora_rank=4, quantize="int8")),
}
QWEN = dataclasses.replace(LANGUAGE_MODELS["qwen2.5-0.5b"].language_model, num_hidden_layers=4)
SAVING = dict(optimizer="adamw8bit", checkpointing=True)
MEMORY = {  # name → rows, tokens, settings
    "512 tokens": (4, 512, {}),
    "2,048 tokens": (1, 2048, {}),
    "512 tokens, 8-bit moments, checkpointing": (4, 512, SAVING),
    "2,048 tokens, 8-bit moments, checkpointing": (1, 2048, dict(SAVING, accumulate=2)),
    "512 tokens, NF4, LoRA": (4, 512, dict(lora_rank=16, quantize="nf4", **SAVING)),
    "2,048 tokens, LoRA": (1, 2048, dict(lora_rank=16)),
}


def config(language_model: LanguageModelConfig, vision_encoder: VisionEncoderConfig) -> VLMConfig:
    side = vision_encoder.image_size if vision_encoder.hidden_size == 32 else 224
    projector = ProjectorConfig("bilinear", 2 if side == 28 else 8)
    return VLMConfig(
        vision_encoder, language_model, projector, ImageConfig(side, side), ChatConfig()
    )


def steps(
    model_config: VLMConfig, settings: Settings, shape: BatchShape, dtype: torch.dtype, packed: bool
) -> dict:
    """Two steps; the peak is that of the second one, when the optimizer has its state."""
    precision = Precision(dtype, CUDA, settings.stochastic_rounding)
    skeleton = prepared(model_config, settings, precision)
    attention_kernels.clear()
    watch, kinds = Watch(), set()
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.autograd.set_multithreading_enabled(False),
    ):
        model = on_cuda(skeleton)
        if settings.checkpointing:
            checkpoint_blocks(model)
        if packed:
            pack(model)
        model.train()
        for norm in (it for it in model.modules() if isinstance(it, layers.RMSNorm)):
            norm.register_forward_hook(lambda module, given, out: kinds.add(str(out.dtype)))
        watch.large = model.language_model.embed_tokens.weight.numel()
        for tensor in (*model.parameters(), *model.buffers()):
            watch.see(tensor)
        with watch:
            optimizer = build_optimizer(model, settings)
            for _ in range(2):
                watch.peak = watch.live
                take_step(model, optimizer, shape, settings, precision)
                gc.collect()
        state = [it for values in optimizer.state.values() for it in values.values()]
    return {
        "attention": dict(attention_kernels),
        "norms": sorted(kinds),
        "waits": dict(watch.waits),
        "mixed": dict(watch.mixed),
        "elsewhere": sum(tensor.device.type != "cuda" for tensor in state),
        "live": watch.peak,
    }


def pack(model) -> None:
    """Have a model take every row for two packed samples."""
    forward = model.forward

    def packed(batch, *rest):
        mask = batch.attention_mask.clone()
        mask[:, mask.shape[1] // 2 :] += SEGMENT
        return forward(dataclasses.replace(batch, attention_mask=mask, right_padded=False), *rest)

    model.forward = packed


def kinds() -> None:
    """Every kind of step, of a toy model."""
    pretend()
    encoder = VisionEncoderConfig(32, 64, 2, 2, image_size=28)
    for name, (dtype, changes, packed, settings) in KINDS.items():
        language_model = dataclasses.replace(TOY, **changes)
        pairs = 2 if settings.get("objective") == "dpo" else 0
        shape = BatchShape(2, 64, images=2, targets=16, pairs=pairs)
        chosen = Settings(**{"train": "projector,language_model", **settings})
        result = steps(config(language_model, encoder), chosen, shape, dtype, packed)
        print(json.dumps({"case": name, "dtype": str(dtype), **result}), flush=True)


def memory() -> None:
    """The peak of what lives on the device, and what was predicted before anything was replaced."""
    model = config(QWEN, VisionEncoderConfig(num_hidden_layers=2))
    cases = {}
    for name, (rows, length, changes) in MEMORY.items():
        settings = Settings(train="projector,language_model", **changes)
        shape = BatchShape(rows, length, images=rows, targets=rows * (length - 64) // 2)
        predicted = predict(model, settings, shape, Precision(HALF, CUDA), 0).peak
        cases[name] = settings, shape, predicted
    pretend()
    for name, (settings, shape, predicted) in cases.items():
        result = steps(model, settings, shape, HALF, packed=False)
        print(json.dumps({"case": name, "predicted": predicted, **result}), flush=True)


if __name__ == "__main__":
    {"kinds": kinds, "memory": memory}[sys.argv[1]]()
