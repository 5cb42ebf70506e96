"""The prediction against what PyTorch holds: counts exactly, activations up to the smallest
tensors."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nanovlm.hub.toy import toy_config
from nanovlm.inputs.chat import ChatConfig
from nanovlm.inputs.image_config import ImageConfig
from nanovlm.memory.measure import random_model, take_steps
from nanovlm.memory.predict import Prediction, predict
from nanovlm.memory.shapes import any_words, batch_shape, random_batch
from nanovlm.model.language_model import LanguageModelConfig
from nanovlm.model.projector import ProjectorConfig
from nanovlm.model.vision_encoder import VisionEncoderConfig
from nanovlm.model.vlm import VLMConfig
from nanovlm.training.building import planned_config
from nanovlm.training.monitor.walk import BatchShape
from nanovlm.training.objectives.objective import objective_of
from nanovlm.training.optim import optimizer
from nanovlm.training.precision import Precision
from nanovlm.training.presets import load_settings
from nanovlm.training.settings import Settings

CPU = torch.device("cpu")
SHAPE = BatchShape(rows=2, length=128, images=2, targets=32)
CHANGES = [
    {"train": "projector"},
    {"train": "projector,language_model"},
    {"train": "language_model", "language_model_layers": 1},
    {"train": "vision_encoder"},
    {"train": "projector,language_model,vision_encoder"},
    {"train": "projector,language_model", "stochastic_rounding": True},
    {"train": "projector,language_model", "lora_rank": 8},
    {"train": "projector,language_model", "lora_rank": 8, "quantize": "nf4"},
]
PRESETS = {
    "svlm": ("stage1", "stage2"),
    "smolvlm-qwen3": ("stage1", "stage2", "stage3"),
    "mary": ("stage1", "stage2", "dpo"),
    "basic-vlm": ("stage1", "stage2"),
    "zero-qwen-vl": ("stage1", "stage2"),
}


def config(projector: str = "mlp", qk_norm: bool = False, tied: bool = True) -> VLMConfig:
    return VLMConfig(
        VisionEncoderConfig(96, 384, 2, 4, image_size=112),
        LanguageModelConfig(
            1000,
            128,
            384,
            2,
            4,
            2,
            32,
            qkv_bias=not qk_norm,
            qk_norm=qk_norm,
            tie_word_embeddings=tied,
        ),
        ProjectorConfig(projector, grid=4),
        ImageConfig(112, 112),
        ChatConfig(),
    )


def prediction(model: VLMConfig, settings: Settings, precision: Precision) -> Prediction:
    shape = replace(SHAPE, cached_features=settings.cache_features)
    return predict(model, settings, shape, precision, program=0)


def kept_bytes(
    model: VLMConfig, settings: Settings, precision: Precision, shape: BatchShape = SHAPE
) -> int:
    """Bytes that a real forward pass leaves for the backward pass, weights not counted."""
    real = random_model(model, settings, precision)
    batch = random_batch(real, shape)
    weights = {
        tensor.untyped_storage().data_ptr() for tensor in (*real.parameters(), *real.buffers())
    }
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        if (address := tensor.untyped_storage().data_ptr()) not in weights:
            kept[address] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        precision.autocast(),
    ):
        objective_of(settings, real, any_words(real, settings))(real, batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def predicted_bytes(
    model: VLMConfig, settings: Settings, precision: Precision, shape: BatchShape = SHAPE
) -> float:
    """The same according to the prediction."""
    predicted = predict(model, settings, shape, precision, program=0)
    whole_encoder = (
        "vision_encoder" in settings.trained_parts and not settings.vision_encoder_layers
    )
    if whole_encoder and precision.dtype == torch.float32:  # keeps the pixels themselves
        return predicted.kept + predicted.moments["backward"]["images"]
    return predicted.kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_what_is_kept_for_the_backward_pass(changes: dict, dtype: torch.dtype):
    settings = Settings(**changes)
    if settings.stochastic_rounding and dtype == torch.float32:
        pytest.skip("keeps bf16 weights only")
    precision = Precision(dtype, CPU, settings.stochastic_rounding)
    for model in (config(), config("bilinear", qk_norm=True, tied=False)):
        predicted = predicted_bytes(model, settings, precision)
        assert predicted == pytest.approx(kept_bytes(model, settings, precision), rel=0.02), model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("projector", ["mlp", "bilinear", "resampler"])
def test_what_is_kept_to_learn_words(projector: str, dtype: torch.dtype):
    model, precision = config(projector), Precision(dtype, CPU)
    settings = Settings(objective="words", batch_size=4, max_words=300)
    shape = batch_shape(model, settings)
    predicted = predicted_bytes(model, settings, precision, shape)
    given = 4 * 300 * model.language_model.input_size  # the words' embeddings, made before the run
    kept = kept_bytes(model, settings, precision, shape) - given
    assert predicted == pytest.approx(kept, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "changes",
    [
        {"train": "projector"},
        {"train": "vision_encoder", "vision_encoder_layers": 1},
        {"train": "projector,language_model,vision_encoder"},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "encoder",
    [
        dict(class_token=False, layer_scale=False, hidden_act="gelu_pytorch_tanh"),
        dict(
            layer_scale=False,
            patch_bias=False,
            embedding_norm=True,
            final_norm=False,
            hidden_act="quick_gelu",
        ),
        dict(
            class_token=False,
            layer_scale=False,
            embedding_norm=True,
            final_norm=False,
            num_queries=16,
            output_size=128,
        ),
    ],
    ids=["no class token", "no final norm", "resampler"],
)
def test_what_every_kind_of_vision_encoder_keeps(encoder: dict, changes: dict, dtype: torch.dtype):
    model = replace(config(), vision_encoder=replace(config().vision_encoder, **encoder))
    settings, precision = Settings(**changes), Precision(dtype, CPU)
    predicted = predicted_bytes(model, settings, precision)
    assert predicted == pytest.approx(kept_bytes(model, settings, precision), rel=0.03)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    ("preset", "stage"), [(preset, stage) for preset, stages in PRESETS.items() for stage in stages]
)
def test_what_every_preset_keeps(preset: str, stage: str, dtype: torch.dtype):
    """At toy widths: experts, reducers, resamplers, tiles, pairs of answers and all else."""
    model = toy_config(
        planned_config(load_settings("stage1", ["--preset", preset])), vocab_size=1000
    )
    settings = load_settings(
        "stage2", ["--preset", preset, "--stage", stage, "--no-checkpointing", "--batch-size", "2"]
    )
    settings = replace(
        settings,
        language_model_layers=min(settings.language_model_layers, 2),
        lora_rank=min(settings.lora_rank, 8),
    )
    shape, precision = batch_shape(model, settings), Precision(dtype, CPU)
    predicted = predicted_bytes(model, settings, precision, shape)
    assert predicted == pytest.approx(kept_bytes(model, settings, precision, shape), rel=0.02)


@pytest.mark.parametrize(
    "changes", [*CHANGES, {"train": "projector,language_model", "optimizer": "adamw8bit"}], ids=str
)
def test_weights_gradients_and_moments_are_counted_exactly(changes: dict, monkeypatch):
    """Against the tensors of a real model and its optimizer, after a step."""
    settings = Settings(**changes)
    precision = Precision(torch.bfloat16, CPU, settings.stochastic_rounding)
    made = []
    build = optimizer.build_optimizer
    monkeypatch.setattr(
        "nanovlm.memory.measure.build_optimizer",
        lambda *given: made.append(build(*given)) or made[0],
    )
    model = random_model(config(), settings, precision)
    take_steps(model, SHAPE, settings, precision, steps=1)
    update = prediction(config(), settings, precision).moments["update"]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert update["weights"] == sum(
        tensor.nbytes for tensor in (*model.parameters(), *model.buffers())
    )
    assert update["gradients"] == sum(parameter.nbytes for parameter in trainable)
    assert update["optimizer"] == sum(
        tensor.nbytes for state in made[0].state.values() for tensor in state.values()
    )


def test_each_way_to_save_memory_saves_what_it_says():
    def at(moment: str, **changes) -> dict[str, float]:
        settings = Settings(train="projector,language_model", **changes)
        return prediction(
            config(), settings, Precision(torch.bfloat16, CPU, settings.stochastic_rounding)
        ).moments[moment]

    plain, rounded = at("update"), at("update", stochastic_rounding=True)
    assert rounded["gradients"] * 2 == plain["gradients"] and rounded["weights"] < plain["weights"]
    assert at("update", optimizer="adamw8bit")["optimizer"] < 0.27 * plain["optimizer"]
    assert at("backward", checkpointing=True)["activations"] < 0.5 * at("backward")["activations"]
    assert (
        at("output head", accumulate=2)["gradients"] == plain["gradients"]
        and at("output head")["gradients"] == 0
    )
    cached, encoded = at("vision encoder", cache_features=True), at("vision encoder")
    assert cached["images"] < encoded["images"]  # features in place of pixels
    assert cached["working set"] < 0.5 * encoded["working set"]
