"""The walk against the layers that a real forward pass calls, and the tensors it gives them."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from nanovlm.inputs.chat import ChatConfig
from nanovlm.inputs.image_config import ImageConfig
from nanovlm.memory.measure import random_model
from nanovlm.memory.shapes import random_batch
from nanovlm.model.language_model import LanguageModelConfig
from nanovlm.model.projector import ProjectorConfig
from nanovlm.model.vision_encoder import VisionEncoderConfig
from nanovlm.model.vlm import VisionLanguageModel, VLMConfig
from nanovlm.training.monitor.walk import BatchShape, Layer, walk
from nanovlm.training.precision import Precision
from nanovlm.training.settings import Settings

PLAIN = VLMConfig(
    VisionEncoderConfig(48, 96, 3, 2, patch_size=8, image_size=32),
    LanguageModelConfig(300, 64, 128, 3, 4, 2, 16),
    ProjectorConfig("mlp"),
    ImageConfig(32, 32),
    ChatConfig(),
)
CONFIGS = {
    "plain": PLAIN,
    "a lower layer": replace(PLAIN, vision_layer=-2, vision_norm=False),
    "before the final norm": replace(PLAIN, vision_norm=False),
    "merged patches": replace(PLAIN, projector=ProjectorConfig("pixel_shuffle", scale=2)),
    "resamplers": replace(
        PLAIN,
        vision_encoder=replace(
            PLAIN.vision_encoder,
            class_token=False,
            embedding_norm=True,
            final_norm=False,
            num_queries=9,
            output_size=64,
        ),
        projector=ProjectorConfig("resampler", num_queries=4, num_heads=4),
    ),
    "from scratch": replace(
        PLAIN,
        language_model=replace(
            PLAIN.language_model,
            tie_word_embeddings=False,
            positions="learned",
            dropout=0.1,
            embedding_size=96,
            reducer_size=48,
            num_experts=4,
        ),
    ),
}
SHAPE = BatchShape(rows=2, length=40, images=2, targets=20)


def vectors(tensor: Tensor) -> int:
    """How many: (…, C), or of feature maps (N, C, H, W)."""
    return tensor.numel() // tensor.shape[1 if tensor.dim() == 4 else -1]


def called(model: VisionLanguageModel, shape: BatchShape) -> dict[nn.Module, tuple]:
    """Each module that a pass calls, in order: vectors in, vectors out, the input's gradient."""
    calls: dict[nn.Module, tuple] = {}

    def note(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
        output = output[0] if isinstance(output, tuple) else output
        calls[module] = vectors(inputs[0]), vectors(output), inputs[0].requires_grad

    for module in model.modules():
        if module is not model:
            module.register_forward_hook(note)
    model(random_batch(model, shape))
    return calls


@pytest.mark.parametrize(
    "changes",
    [
        {"train": "projector"},
        {"train": "language_model", "language_model_layers": 2},
        {"train": "vision_encoder", "vision_encoder_layers": 1},
        {"train": "projector,language_model,vision_encoder"},
        {"train": "language_model", "lora_rank": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_layers_vectors_and_gradients_are_those_of_a_forward_pass(config: VLMConfig, changes: dict):
    model = random_model(config, Settings(**changes), Precision(torch.float32, torch.device("cpu")))
    calls, layers = called(model, SHAPE), list(walk(model, SHAPE))
    layers = [layer for layer in layers if not isinstance(layer.module, nn.ParameterList)]
    for layer in layers:
        entering, leaving, gradient = calls[layer.module]
        assert leaving == layer.outputs or isinstance(layer.module, nn.Identity), layer.module
        # Of pixels and token ids there is no gradient, and they are no vectors.
        if not isinstance(layer.module, nn.Conv2d | nn.Embedding):
            assert (entering, gradient) == (layer.vectors, layer.input_gradient), layer.module
    walked = [layer.module for layer in layers]
    inside = {part for module in walked for part in module.modules()}
    assert all(module in inside for module in calls if module is not model.vision_encoder)
    embedding = model.language_model.embed_tokens  # called first, before the images are encoded
    order = [module for module in calls if module in walked and module is not embedding]
    assert order == [module for module in walked if module is not embedding]


def test_without_images_or_with_cached_features_the_vision_encoder_does_not_run():
    model = random_model(
        PLAIN, Settings(train="projector"), Precision(torch.float32, torch.device("cpu"))
    )
    encoder = set(model.vision_encoder.modules())
    for shape, first in (
        (replace(SHAPE, images=0), model.language_model.embed_tokens),
        (replace(SHAPE, cached_features=True), model.projector),
    ):
        layers = list(walk(model, shape))
        assert layers[0].module is first and not any(layer.module in encoder for layer in layers)
        assert set(called(model, shape)).isdisjoint(encoder)


def test_the_shape_of_a_batch_is_that_which_made_it():
    model = random_model(PLAIN, Settings(), Precision(torch.float32, torch.device("cpu")))
    for shape in (SHAPE, replace(SHAPE, cached_features=True), replace(SHAPE, images=0)):
        assert BatchShape.of(random_batch(model, shape), model.image_length) == shape


def test_the_backward_pass_reaches_what_is_trainable_and_all_behind_it():
    layer = Layer(nn.Linear(2, 2), rows=3, length=4, outputs=12, input_gradient=False)
    assert layer.vectors == 12 and layer.backward
    layer.module.requires_grad_(False)
    assert not layer.backward and replace(layer, input_gradient=True).backward
