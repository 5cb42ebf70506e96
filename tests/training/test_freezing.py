"""What learns: exactly what the settings name, shown by one step of training; and the table that says so."""

import itertools

import pytest
import torch

from nanovlm.errors import NanoVLMError
from nanovlm.training.freezing import describe, freeze
from nanovlm.training.optimizer import build_optimizer, learning_layers, set_learning_rates
from nanovlm.training.settings import Settings
from nanovlm.vlm import VisionLanguageModel
from nanovlm.weights.loading import open_checkpoint
from tests.reference.scratch import scratch_vlm

COMBINATIONS = [
    {
        "train": ",".join(parts),
        "text_layers": text_layers,
        "vision_layers": vision_layers,
        "text_embedding": embedding,
    }
    for size in (1, 2, 3)
    for parts in itertools.combinations(("projector", "text", "vision"), size)
    for text_layers in ((0, 1, 2) if "text" in parts else (0,))
    for vision_layers in ((0, 1) if "vision" in parts else (0,))
    for embedding in (False, True)
]


@pytest.fixture
def model(tiny):
    return VisionLanguageModel.from_pretrained(tiny.model)


def expected_to_learn(name: str, settings: dict) -> bool:
    """The rule of `--help`, told from the parameter's side. The tiny model has two blocks in either tower."""
    part, first, *rest = name.split(".")
    if part == "projector":
        return "projector" in settings["train"]
    if part == "decoder" and first == "embed_tokens" and settings["text_embedding"]:
        return True
    trained, layers = (
        ("text", settings["text_layers"])
        if part == "decoder"
        else ("vision", settings["vision_layers"])
    )
    if trained not in settings["train"]:
        return False
    return not layers or first == "norm" or (first == "blocks" and int(rest[0]) >= 2 - layers)


@pytest.mark.parametrize(
    "changes", COMBINATIONS, ids=lambda changes: "-".join(map(str, changes.values()))
)
def test_exactly_what_is_named_moves(tiny, tmp_path, changes):
    """A run of one step, through the command's own path; what moved is read from the two model folders."""
    run = tiny.train(
        tmp_path / "run", init=str(tiny.model), max_steps=1, lr=0.01, val_samples=1, **changes
    )
    before, after = open_checkpoint(tiny.model), open_checkpoint(run / "model")
    moved = {
        name for name in before.keys() if not torch.equal(before.tensor(name), after.tensor(name))
    }
    assert moved == {name for name in before.keys() if expected_to_learn(name, changes)}


def test_the_learning_rate_falls_with_the_distance_from_the_output(model):
    settings = Settings(train="projector,text", lr_projector=1e-3, lr_text=1e-4, layer_decay=0.5)
    freeze(model, settings)
    optimizer = build_optimizer(model, settings)
    set_learning_rates(optimizer, 1.0)
    rates = {
        parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]
    }
    named = dict(model.named_parameters())
    assert rates[named["projector.up.weight"]] == 1e-3
    assert (
        rates[named["decoder.norm.weight"]]
        == rates[named["decoder.blocks.1.mlp.up_proj.weight"]]
        == 1e-4
    )
    assert rates[named["decoder.blocks.0.mlp.up_proj.weight"]] == 5e-5
    assert rates[named["decoder.embed_tokens.weight"]] == 2.5e-5
    assert sum(len(layer.parameters) for layer in learning_layers(model)) == len(rates)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"train": "projector,text", "text_layers": 3},
            "--text-layers is 3 and there are 2 blocks",
        ),
        ({"train": "projector", "text_layers": 1}, "--train does not name text"),
        ({"train": "projector", "vision_layers": 1}, "--train does not name vision"),
    ],
)
def test_a_depth_that_means_nothing_is_refused(model, changes, expected):
    with pytest.raises(NanoVLMError, match=expected):
        freeze(model, Settings(**changes))


def test_the_table_counts_parameters_and_bytes(model):
    settings = Settings(train="projector,text", text_layers=1, lr_projector=1e-3, lr_text=2e-5)
    freeze(model, settings)
    head, projector, text, vision, together = describe(model, settings).splitlines()
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    learning = sum(
        size
        for name, size in sizes.items()
        if name.startswith(("decoder.blocks.1", "decoder.norm"))
    )
    assert "2e-05" in text and "1e-03" in projector and "—" in vision
    assert (
        text.split()[2] == f"{learning / 1e6:.2f}M"
        and together.split()[1] == f"{sum(sizes.values()) / 1e6:.2f}M"
    )


def test_of_a_decoder_made_from_scratch_stage_1_is_the_way_in_and_the_way_out(tmp_path):
    """Resampler; word embeddings, reducer and positions; top blocks, norm and head. Nothing else gets a gradient."""
    model = scratch_vlm(tmp_path)
    freeze(model, Settings(train="projector,text", text_layers=2, text_embedding=True))
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    ways_in = ("decoder.embed_tokens.", "decoder.reducer.", "decoder.position_embedding.")
    ways_out = ("decoder.blocks.1.", "decoder.blocks.2.", "decoder.norm.", "decoder.lm_head.")
    assert learning == {
        name
        for name, _ in model.named_parameters()
        if name.startswith(("projector.", *ways_in, *ways_out))
    }
    freeze(model, Settings(train="projector,text", text_layers=3))
    assert not any(parameter.requires_grad for parameter in model.decoder.reducer.parameters())


def test_of_a_decoder_made_from_scratch_every_depth_has_its_rate(tmp_path):
    model = scratch_vlm(tmp_path)
    settings = Settings(train="projector,text", lr=1e-3, layer_decay=0.5)
    freeze(model, settings)
    rates = {
        parameter: group["peak_lr"]
        for group in build_optimizer(model, settings).param_groups
        for parameter in group["params"]
    }
    named = dict(model.named_parameters())
    for name, rate in (
        ("decoder.lm_head.weight", 1e-3),
        ("decoder.blocks.2.mlp.experts.0.up_proj.weight", 1e-3),
        ("decoder.blocks.0.mlp.router.weight", 2.5e-4),
        ("decoder.reducer.up.weight", 1.25e-4),
        ("decoder.position_embedding.weight", 1.25e-4),
        ("projector.queries", 1e-3),
    ):
        assert rates[named[name]] == pytest.approx(rate), name
