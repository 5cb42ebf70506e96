"""Exactly the named parameters are trained, shown by one step; and the table that says so."""

import dataclasses
import itertools

import pytest
import torch

from nanovlm.errors import NanoVLMError
from nanovlm.hub.loading import open_checkpoint
from nanovlm.hub.models import load_model
from nanovlm.training.freezing import COLUMNS, describe, freeze
from nanovlm.training.optim.optimizer import build_optimizer, set_learning_rates, trainable_layers
from nanovlm.training.settings import Settings
from tests.reference.scratch import scratch_vlm

COMBINATIONS = [
    {
        "train": ",".join(parts),
        "language_model_layers": language_model_layers,
        "vision_encoder_layers": vision_encoder_layers,
        "language_model_embedding": embedding,
    }
    for size in (1, 2, 3)
    for parts in itertools.combinations(("projector", "language_model", "vision_encoder"), size)
    for language_model_layers in ((0, 1, 2) if "language_model" in parts else (0,))
    for vision_encoder_layers in ((0, 1) if "vision_encoder" in parts else (0,))
    for embedding in (False, True)
]


@pytest.fixture
def model(tiny):
    return load_model(tiny.model)


def expected_to_be_trained(name: str, settings: dict) -> bool:
    """The rule of `--help` for one parameter. The tiny model has two blocks in either part."""
    part, first, *rest = name.split(".")
    if part == "projector":
        return "projector" in settings["train"]
    if (
        part == "language_model"
        and first == "embed_tokens"
        and settings["language_model_embedding"]
    ):
        return True
    trained, layers = (
        ("language_model", settings["language_model_layers"])
        if part == "language_model"
        else ("vision_encoder", settings["vision_encoder_layers"])
    )
    if trained not in settings["train"]:
        return False
    return not layers or first == "norm" or (first == "blocks" and int(rest[0]) >= 2 - layers)


@pytest.mark.parametrize(
    "changes", COMBINATIONS, ids=lambda changes: "-".join(map(str, changes.values()))
)
def test_exactly_what_is_named_moves(tiny, tmp_path, changes):
    """One step through the command's own path; what moved is read from the two model folders."""
    run = tiny.train(
        tmp_path / "run", init=str(tiny.model), max_steps=1, lr=0.01, val_samples=1, **changes
    )
    before, after = open_checkpoint(tiny.model), open_checkpoint(run / "model")
    moved = {
        name for name in before.keys() if not torch.equal(before.tensor(name), after.tensor(name))
    }
    assert moved == {name for name in before.keys() if expected_to_be_trained(name, changes)}


def test_the_learning_rate_falls_with_the_distance_from_the_output(model):
    settings = Settings(
        train="projector,language_model", lr_projector=1e-3, lr_language_model=1e-4, layer_decay=0.5
    )
    freeze(model, settings)
    optimizer = build_optimizer(model, settings)
    set_learning_rates(optimizer, 1.0)
    rates = {
        parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]
    }
    named = dict(model.named_parameters())
    assert rates[named["projector.up.weight"]] == 1e-3
    assert (
        rates[named["language_model.norm.weight"]]
        == rates[named["language_model.blocks.1.mlp.up_proj.weight"]]
        == 1e-4
    )
    assert rates[named["language_model.blocks.0.mlp.up_proj.weight"]] == 5e-5
    assert rates[named["language_model.embed_tokens.weight"]] == 2.5e-5
    assert sum(len(layer.parameters) for layer in trainable_layers(model)) == len(rates)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"train": "projector,language_model", "language_model_layers": 3},
            "--language-model-layers is 3 and there are 2 blocks",
        ),
        (
            {"train": "projector", "language_model_layers": 1},
            "--train does not name language_model",
        ),
        (
            {"train": "projector", "vision_encoder_layers": 1},
            "--train does not name vision_encoder",
        ),
    ],
)
def test_a_depth_that_means_nothing_is_refused(model, changes, expected):
    with pytest.raises(NanoVLMError, match=expected):
        freeze(model, Settings(**changes))


@pytest.mark.parametrize(("layers", "trained"), [(0, {"rest", "blocks.0"}), (1, {"blocks.0"})])
def test_blocks_above_the_vision_layer_neither_count_nor_are_trained(model, layers, trained):
    """With the layer before the last, and without the norm, what stands above does not run."""
    model.config = dataclasses.replace(model.config, vision_layer=-2, vision_norm=False)
    settings = Settings(train="vision_encoder", vision_encoder_layers=layers, layer_decay=0.5)
    freeze(model, settings)
    found = {
        ".".join(name.split(".")[:2]) if name.startswith("blocks") else "rest"
        for name, parameter in model.vision_encoder.named_parameters()
        if parameter.requires_grad
    }
    assert found == trained
    groups = build_optimizer(model, settings).param_groups
    assert max(group["peak_lr"] for group in groups) == settings.lr  # the block that runs last
    pixels = torch.randn(1, 3, model.config.image.height, model.config.image.width)
    model.vision_features(pixels).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with pytest.raises(NanoVLMError, match="there are 1 blocks below --vision-layer"):
        freeze(model, Settings(train="vision_encoder", vision_encoder_layers=2))


def test_the_table_counts_parameters_and_bytes(model):
    settings = Settings(
        train="projector,language_model",
        language_model_layers=1,
        lr_projector=1e-3,
        lr_language_model=2e-5,
    )
    freeze(model, settings)
    header, projector, language_model, vision, total = describe(model, settings).splitlines()
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    trainable = sum(
        size
        for name, size in sizes.items()
        if name.startswith(("language_model.blocks.1", "language_model.norm"))
    )
    assert header.split() == [*COLUMNS]
    assert [row.split()[0] for row in (projector, language_model, vision, total)] == [
        "projector",
        "language_model",
        "vision_encoder",
        "total",
    ]
    assert "2e-05" in language_model and "1e-03" in projector and "—" in vision
    assert (
        language_model.split()[2] == f"{trainable / 1e6:.2f}M"
        and total.split()[1] == f"{sum(sizes.values()) / 1e6:.2f}M"
    )


def test_of_a_decoder_made_from_scratch_stage_1_is_the_way_in_and_the_way_out(tmp_path):
    """Resampler; word embeddings, reducer and positions; last blocks, norm and head; no more."""
    model = scratch_vlm(tmp_path)
    freeze(
        model,
        Settings(
            train="projector,language_model", language_model_layers=2, language_model_embedding=True
        ),
    )
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    ways_in = (
        "language_model.embed_tokens.",
        "language_model.reducer.",
        "language_model.position_embedding.",
    )
    ways_out = (
        "language_model.blocks.1.",
        "language_model.blocks.2.",
        "language_model.norm.",
        "language_model.lm_head.",
    )
    assert trainable == {
        name
        for name, _ in model.named_parameters()
        if name.startswith(("projector.", *ways_in, *ways_out))
    }
    freeze(model, Settings(train="projector,language_model", language_model_layers=3))
    assert not any(
        parameter.requires_grad for parameter in model.language_model.reducer.parameters()
    )


def test_of_a_decoder_made_from_scratch_every_depth_has_its_rate(tmp_path):
    model = scratch_vlm(tmp_path)
    settings = Settings(train="projector,language_model", lr=1e-3, layer_decay=0.5)
    freeze(model, settings)
    rates = {
        parameter: group["peak_lr"]
        for group in build_optimizer(model, settings).param_groups
        for parameter in group["params"]
    }
    named = dict(model.named_parameters())
    for name, rate in (
        ("language_model.lm_head.weight", 1e-3),
        ("language_model.blocks.2.mlp.experts.0.up_proj.weight", 1e-3),
        ("language_model.blocks.0.mlp.router.weight", 2.5e-4),
        ("language_model.reducer.up.weight", 1.25e-4),
        ("language_model.position_embedding.weight", 1.25e-4),
        ("projector.queries", 1e-3),
    ):
        assert rates[named[name]] == pytest.approx(rate), name
