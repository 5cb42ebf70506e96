"""The arithmetic of a step against PyTorch's own count of it."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanovlm.hub.toy import toy_config
from nanovlm.inputs.chat import ChatConfig
from nanovlm.inputs.image_config import ImageConfig
from nanovlm.memory.measure import random_model
from nanovlm.memory.shapes import any_words, batch_shape, random_batch
from nanovlm.model.language_model import LanguageModelConfig
from nanovlm.model.projector import ProjectorConfig
from nanovlm.model.vision_encoder import VisionEncoderConfig
from nanovlm.model.vlm import VLMConfig
from nanovlm.training.building import planned_config
from nanovlm.training.monitor import flops
from nanovlm.training.monitor.walk import BatchShape, walk
from nanovlm.training.objectives.objective import objective_of
from nanovlm.training.precision import Precision
from nanovlm.training.presets import load_settings
from nanovlm.training.settings import Settings

CPU = torch.device("cpu")
CONFIG = VLMConfig(
    VisionEncoderConfig(48, 96, 2, 2, patch_size=8, image_size=32),
    LanguageModelConfig(300, 64, 128, 3, 4, 2, 16),
    ProjectorConfig("mlp"),
    ImageConfig(32, 32),
    ChatConfig(),
)
SCRATCH = VLMConfig(
    CONFIG.vision_encoder,
    LanguageModelConfig(
        300,
        64,
        128,
        3,
        4,
        4,
        16,
        tie_word_embeddings=False,
        norm="layer",
        positions="learned",
        mlp="gelu",
        embedding_size=96,
        reducer_size=48,
        num_experts=4,
        num_shared_experts=1,
        balance_loss=0.01,
    ),
    ProjectorConfig("resampler", num_queries=16, num_heads=4),
    ImageConfig(32, 32),
    ChatConfig(),
    bidirectional_images=True,
)
SHAPE = BatchShape(rows=2, length=40, images=2, targets=20)
VISION_ENCODERS = {  # of SigLIP, CLIP and Qwen-VL
    "no class token": dict(class_token=False, layer_scale=False, hidden_act="gelu_pytorch_tanh"),
    "no final norm": dict(
        layer_scale=False,
        patch_bias=False,
        embedding_norm=True,
        final_norm=False,
        hidden_act="quick_gelu",
    ),
    "resampler": dict(
        class_token=False,
        layer_scale=False,
        patch_bias=False,
        embedding_norm=True,
        final_norm=False,
        num_queries=4,
        output_size=64,
    ),
}


@pytest.mark.parametrize(
    "changes",
    [
        {"train": "projector"},
        {"train": "projector,language_model"},
        {"train": "language_model", "language_model_layers": 2},
        {"train": "vision_encoder"},
        {"train": "projector,language_model,vision_encoder"},
        {"train": "language_model", "lora_rank": 4},
        {"train": "projector,language_model", "lora_rank": 4, "lora_targets": "q_proj,gate_proj"},
        {"train": "projector,language_model", "lora_rank": 4, "quantize": "nf4"},
    ],
    ids=str,
)
def test_the_count_is_pytorchs(changes: dict):
    """In bf16, where attention is written out and every product of it is seen."""
    settings, precision = Settings(**changes), Precision(torch.bfloat16, CPU)
    model = random_model(CONFIG, settings, precision)
    batch = random_batch(model, SHAPE)
    with FlopCounterMode(display=False) as counter, precision.autocast():
        model(batch).backward()
    counted = flops.step_flops(model, SHAPE)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize(
    "changes",
    [
        {"train": "projector"},
        {"train": "vision_encoder"},
        {"train": "vision_encoder", "vision_encoder_layers": 1},
        {"train": "projector,language_model,vision_encoder"},
    ],
    ids=str,
)
@pytest.mark.parametrize("encoder", VISION_ENCODERS.values(), ids=VISION_ENCODERS)
def test_the_count_is_pytorchs_with_every_kind_of_vision_encoder(encoder: dict, changes: dict):
    config = replace(CONFIG, vision_encoder=replace(CONFIG.vision_encoder, **encoder))
    model = random_model(config, Settings(**changes), precision := Precision(torch.bfloat16, CPU))
    batch = random_batch(model, SHAPE)
    with FlopCounterMode(display=False) as counter, precision.autocast():
        model(batch).backward()
    counted = flops.step_flops(model, SHAPE)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize(
    "changes",
    [
        {"train": "projector"},
        {"train": "projector,language_model"},
        {"train": "language_model", "language_model_layers": 2, "language_model_embedding": True},
        {"train": "vision_encoder"},
        {"train": "projector,language_model", "lora_rank": 4},
        {"train": "projector,language_model", "lora_rank": 4, "quantize": "nf4"},
    ],
    ids=str,
)
def test_of_experts_reducer_and_resampler_too(changes: dict):
    precision = Precision(torch.bfloat16, CPU)
    model = random_model(SCRATCH, Settings(**changes), precision).eval()
    batch = random_batch(model, SHAPE)
    with FlopCounterMode(display=False) as counter, precision.autocast():
        model(batch).backward()
    counted = flops.step_flops(model, SHAPE)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize(
    ("preset", "stages"),
    [
        ("svlm", ("stage1", "stage2")),
        ("smolvlm-qwen3", ("stage1", "stage2", "stage3")),
        ("mary", ("stage1", "stage2")),
        ("basic-vlm", ("stage1", "stage2")),
        ("zero-qwen-vl", ("stage1", "stage2")),
    ],
)
def test_of_every_presets_stages(preset: str, stages: tuple[str, ...]):
    """At toy widths: images in tiles, merged and averaged patches, encoders with a resampler."""
    config = toy_config(
        planned_config(load_settings("stage1", ["--preset", preset])), vocab_size=300
    )
    for stage in stages:
        settings = load_settings(
            "stage2",
            ["--preset", preset, "--stage", stage, "--no-checkpointing", "--batch-size", "2"],
        )
        settings = replace(
            settings,
            language_model_layers=min(settings.language_model_layers, 2),
            lora_rank=min(settings.lora_rank, 8),
        )
        precision, shape = Precision(torch.bfloat16, CPU), batch_shape(config, settings)
        model = random_model(config, settings, precision)
        batch = random_batch(model, shape)
        with FlopCounterMode(display=False) as counter, precision.autocast():
            model(batch).backward()
        counted = flops.step_flops(model, shape)
        assert counted == pytest.approx(counter.get_total_flops(), rel=0.02), stage


@pytest.mark.parametrize("cached", [True, False])
def test_of_words_the_language_model_takes_none(cached: bool):
    settings = Settings(objective="words", batch_size=3, max_words=50, cache_features=cached)
    model = random_model(CONFIG, settings, Precision(torch.bfloat16, CPU))
    shape = batch_shape(CONFIG, settings)
    batch = random_batch(model, shape)
    objective = objective_of(settings, model, any_words(model, settings))
    with FlopCounterMode(display=False) as counter:
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = objective(model, batch)
        loss.backward()
    assert flops.step_flops(model, shape) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_without_images_or_with_cached_features_the_vision_encoder_takes_none():
    model = random_model(
        CONFIG, Settings(train="projector,language_model"), Precision(torch.bfloat16, CPU)
    )
    cached = flops.step_flops(model, replace(SHAPE, cached_features=True))
    projector = (
        3 * 2 * 2 * model.image_length * (48 * 64 + 64 * 64) - 2 * 2 * model.image_length * 48 * 64
    )
    assert cached - flops.step_flops(model, replace(SHAPE, images=0)) == projector
    inside = set(model.vision_encoder.modules())
    layers = [layer for layer in walk(model, SHAPE) if layer.module in inside]
    encoder = sum(map(flops.layer_flops, layers))
    assert flops.step_flops(model, SHAPE) - cached == encoder > 0
    assert not any(layer.backward for layer in layers)


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12),
        ("NVIDIA A100-SXM4-80GB", torch.float32, 19.5e12),
        ("NVIDIA A10", torch.float16, 125e12),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756e12),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2e12),
        ("Tesla T4", torch.float16, 65e12),
        ("Tesla T4", torch.bfloat16, None),
        ("Tesla V100-SXM2-32GB", torch.float16, 125e12),
        ("NVIDIA GeForce RTX 2080 Ti", torch.bfloat16, None),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", torch.float16, 88.2e12),
        ("NVIDIA GeForce RTX 4060 Laptop GPU", torch.float16, 29.1e12),
        ("NVIDIA GeForce RTX 4060 Ti", torch.float16, 44.1e12),
        ("NVIDIA GeForce RTX 4090 D", torch.float16, 147.1e12),
        ("NVIDIA GeForce RTX 5090", torch.bfloat16, 209.5e12),
        ("NVIDIA L40S", torch.bfloat16, 362e12),
        ("NVIDIA A800-SXM4-80GB", torch.bfloat16, 312e12),
        ("NVIDIA H20", torch.bfloat16, 148e12),
        ("NVIDIA GeForce RTX 5090 D", torch.float16, None),  # not listed
        ("NVIDIA A10G", torch.float16, None),
    ],
)
def test_the_peak_is_that_very_cards(
    name: str, dtype: torch.dtype, expected: float | None, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert flops.peak_flops(torch.device("cuda"), dtype) == expected


def test_fp32_products_in_tf32_run_at_half_of_the_speed_of_bf16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-40GB")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert flops.peak_flops(torch.device("cuda"), torch.float32) == 156e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert flops.peak_flops(torch.device("cuda"), torch.float32) == 8.1e12


def test_utilisation_is_of_the_batches_since_the_last_reading(monkeypatch):
    model = random_model(
        CONFIG, Settings(train="projector,language_model"), Precision(torch.bfloat16, CPU)
    )
    monkeypatch.setattr(flops, "peak_flops", lambda device, dtype: 1e9)
    utilisation, batch = flops.Utilisation(model, CPU, torch.bfloat16), random_batch(model, SHAPE)
    one = flops.step_flops(model, SHAPE)
    for _ in range(2):
        utilisation.add([batch, None, batch])
        assert utilisation.read(seconds=0.5) == {"mfu": round(2 * one / 0.5 / 1e9, 4)}
    assert utilisation.read(seconds=0.5) == {"mfu": 0}


def test_of_a_cpu_no_peak_is_known():
    assert flops.peak_flops(CPU, torch.float32) is None
