"""LoRA adapters: their output and gradients against the formula, what a run with them trains and
saves, and merging, which does not change the output."""

import json
import re
import shutil

import pytest
import torch
from torch import nn

from nanovlm.errors import NanoVLMError
from nanovlm.generate import generate
from nanovlm.hub.adapters import load_adapter, merged_tensors
from nanovlm.hub.models import load_model
from nanovlm.hub.safetensors import save_file
from nanovlm.inputs.batch import Batch
from nanovlm.model.lora import LoRAConfig, LoRALinear, add_adapters, merge_adapters, plain_weight
from nanovlm.model.moe import Router
from nanovlm.model.quantization import KINDS, QuantizedLinear, quantize_
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.training.building import lora_config
from nanovlm.training.freezing import describe, freeze
from nanovlm.training.optim.optimizer import build_optimizer
from nanovlm.training.run import run_stage
from nanovlm.training.settings import Settings
from tests.reference.scratch import scratch_vlm
from tests.training.test_loop import interrupt_at, metrics, tensors

ALL = "*_proj"
TRAINED = dict(
    train="projector,language_model",
    lora_rank=4,
    lora_alpha=16.0,
    quantize="nf4",
    lr=0.02,
    max_steps=3,
    val_samples=1,
)
EVERYTHING = dict(TRAINED, lora_dropout=0.1, language_model_embedding=True)


@pytest.fixture
def model(tiny):
    return load_model(tiny.model)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A run with adapters on a quantised language model, dropout and trainable embeddings."""
    return tiny.train(tmp_path_factory.mktemp("runs") / "lora", init=str(tiny.model), **EVERYTHING)


def adapted(kind: str, bias: bool = True, dropout: float = 0.0) -> LoRALinear:
    torch.manual_seed(0)
    base = nn.Linear(70, 9, bias=bias)
    config = LoRAConfig(rank=3, alpha=12.0, targets=ALL, dropout=dropout)
    layer = LoRALinear(KINDS[kind](base) if kind else base, config)
    nn.init.normal_(layer.lora_B)
    return layer


def prompt(model: VisionLanguageModel) -> Batch:
    """A few text tokens around an image of noise."""
    count, image = model.image_length, model.config.image
    ids = torch.tensor([[30, 31, *[model.chat.image_token_id] * count, 32, 33, 34]])
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(1, 3, image.height, image.width, generator=generator)
    image_positions, empty = torch.arange(2, 2 + count), torch.empty(0)
    return Batch(ids, torch.ones_like(ids), image_positions, empty, empty, pixels)


@torch.no_grad()
def logits(model: VisionLanguageModel) -> torch.Tensor:
    batch = prompt(model)
    hidden_states = model.language_model.hidden_states(model.embed(batch), batch.attention_mask)
    return model.language_model.logits(hidden_states)


# ---- the layer


def test_new_adapters_do_not_change_the_output(model):
    before = logits(model)
    add_adapters(model.language_model, LoRAConfig(4, 8.0, ALL))
    assert sum(isinstance(module, LoRALinear) for module in model.modules()) == 14
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("kind", ["", *KINDS])
def test_output_and_gradients_equal_those_of_the_formula(kind):
    layer, inputs, grad = adapted(kind), torch.randn(5, 70, requires_grad=True), torch.randn(5, 9)
    weight, a, b = plain_weight(layer.base), layer.lora_A.detach(), layer.lora_B.detach()
    output = layer(inputs)
    output.backward(grad)
    x = inputs.detach()
    expected = x @ weight.T + layer.base.bias + 4 * x @ a.T @ b.T
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.lora_B.grad, 4 * grad.T @ (x @ a.T), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(layer.lora_A.grad, 4 * (grad @ b).T @ x, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(inputs.grad, grad @ weight + 4 * grad @ b @ a, atol=1e-4, rtol=1e-5)
    assert all(parameter.grad is None for parameter in layer.base.parameters())


def test_dropout_applies_to_the_input_of_the_adapter_and_in_training_only():
    layer, inputs = adapted("", dropout=0.5), torch.randn(5, 70)
    torch.manual_seed(3)
    dropped = layer(inputs)
    torch.manual_seed(3)
    kept = nn.functional.dropout(inputs, 0.5)
    expected = layer.base(inputs) + 4 * kept @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(dropped, expected)
    expected = nn.functional.linear(inputs, plain_weight(layer), layer.base.bias)
    torch.testing.assert_close(layer.eval()(inputs), expected, atol=1e-5, rtol=1e-5)


# ---- which layers


@pytest.mark.parametrize(
    ("targets", "layers", "expected"),
    [
        ("q_proj", 0, {"blocks.0.attention.q_proj", "blocks.1.attention.q_proj"}),
        ("q_proj, mlp.up_proj", 1, {"blocks.1.attention.q_proj", "blocks.1.mlp.up_proj"}),
        ("blocks.*.mlp.*", 1, {f"blocks.1.mlp.{name}_proj" for name in ("gate", "up", "down")}),
        (
            "blocks.0.attention.?_proj,blocks.0.*.k_proj",
            0,
            {f"blocks.0.attention.{name}_proj" for name in "qkv"},
        ),
    ],
)
def test_targets_are_suffixes_or_patterns_of_layer_names(model, targets, layers, expected):
    add_adapters(model.language_model, LoRAConfig(2, 4.0, targets, layers=layers))
    modules = model.language_model.named_modules()
    assert {name for name, module in modules if isinstance(module, LoRALinear)} == expected


@pytest.mark.parametrize(
    ("targets", "layers", "expected"),
    [
        (
            "q_proj,o_proj",
            0,
            "no layer of the language model is 'o_proj'; the nearest is 'out_proj'",
        ),
        ("proj", 0, "no layer of the language model is 'proj'"),
        ("blocks.0.*", 1, "no layer of the language model is 'blocks.0.*'"),
        ("lm_head", 0, "no layer of the language model is 'lm_head'"),
        (" , ", 0, "names no layer"),
    ],
)
def test_a_target_that_names_no_linear_layer_is_refused(model, targets, layers, expected):
    with pytest.raises(NanoVLMError, match=expected.replace("*", r"\*")):
        add_adapters(model.language_model, LoRAConfig(2, 4.0, targets, layers=layers))


def test_adding_adapters_twice_is_refused(model):
    add_adapters(model.language_model, LoRAConfig(2, 4.0, ALL))
    with pytest.raises(NanoVLMError, match="has LoRA adapters already"):
        add_adapters(model.language_model, LoRAConfig(2, 4.0, ALL))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"lora_rank": 8},
            "--lora-rank 8 adapts the language model, but --train does not name language_model",
        ),
        (
            {"quantize": "nf4", "train": "projector,language_model"},
            "--quantize nf4 freezes the language model, and --train names language_model",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, expected):
    with pytest.raises(NanoVLMError, match=expected):
        Settings(**changes)


# ---- trainable parameters


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"train": "language_model"}, {"lora"}),
        ({"train": "projector,language_model"}, {"projector", "lora"}),
        (
            {"train": "projector,language_model,vision_encoder", "language_model_embedding": True},
            {"projector", "lora", "vision_encoder", "embed_tokens"},
        ),
        ({"train": "language_model", "language_model_layers": 1}, {"lora"}),
    ],
)
def test_adapters_are_trained_in_place_of_the_language_model(model, changes, parts):
    settings = Settings(lora_rank=2, lr_language_model=1e-3, layer_decay=0.5, **changes)
    quantize_(model.language_model.blocks, "nf4")
    add_adapters(model.language_model, lora_config(settings))
    freeze(model, settings)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {next((part for part in parts if part in name), name) for name in trainable} == parts
    all_layers = settings.language_model_layers == 0
    assert sum(".lora_" in name for name in trainable) == (28 if all_layers else 14)
    rates = {
        group["peak_lr"]
        for group in build_optimizer(model, settings).param_groups
        if group["part"] == "language_model"
    }
    assert {1e-3} <= rates <= {1e-3, 5e-4, 2.5e-4} and (5e-4 in rates) == all_layers


def test_the_parameter_table_counts_quantised_parameters_and_their_bytes(model):
    settings = Settings()
    freeze(model, settings)
    before = describe(model, settings).splitlines()[2].split()
    blocks = model.language_model.blocks
    layers = [module for module in blocks.modules() if isinstance(module, nn.Linear)]
    size = sum(layer.weight.numel() for layer in layers)
    quantize_(blocks, "int8")
    after = describe(model, settings).splitlines()[2].split()
    assert after[:3] == before[:3]
    assert float(before[4]) - float(after[4]) == pytest.approx(3 * size / 1e6, abs=0.11)


# ---- a run


def test_a_quantised_run_changes_only_the_adapters_and_the_projector(tiny, tmp_path):
    run = tiny.train(tmp_path / "run", init=str(tiny.model), **TRAINED, save_every=1)
    first, last = (
        tensors(run / "checkpoints" / f"step_{step}" / "model.safetensors") for step in (1, 3)
    )
    assert {name.split(".")[0] for name in first} == {"projector", "language_model"}
    assert all(".lora_" in name for name in first if name.startswith("language_model"))
    assert all(not torch.equal(first[name], last[name]) for name in first)

    base = load_model(tiny.model)
    quantize_(base.language_model.blocks, "nf4")
    before, after = merged_tensors(base, torch.float32), tensors(run / "model")
    assert before.keys() == after.keys()
    changed = {
        name for name, tensor in before.items() if not torch.equal(tensor.make(), after[name])
    }
    pattern = re.compile(r"projector|language_model.*_proj\.")
    assert changed == {name for name in after if pattern.match(name)}


def test_the_base_with_the_saved_adapter_equals_the_merged_model(tiny, finished):
    assert json.loads((finished / "adapter" / "adapter.json").read_text()) == {
        "rank": 4,
        "alpha": 16.0,
        "targets": ALL,
        "dropout": 0.1,
        "layers": 0,
        "base_model": str(tiny.model),
    }
    stored = tensors(finished / "adapter" / "adapter.safetensors")
    assert {name for name in stored if ".lora_" not in name} == {
        "language_model.embed_tokens.weight",
        *(f"projector.{layer}.{kind}" for layer in ("up", "down") for kind in ("weight", "bias")),
    }
    exported = load_model(finished / "model")
    unmerged = load_model(tiny.model)
    quantize_(unmerged.language_model.blocks, "nf4")  # as in the run
    load_adapter(unmerged, finished / "adapter")
    expected = logits(unmerged)
    assert (expected - logits(load_model(tiny.model))).abs().max() > 0.1  # an effect of training
    torch.testing.assert_close(logits(exported), expected, atol=1e-5, rtol=1e-5)
    assert generate(exported, prompt(exported), 20) == generate(unmerged, prompt(unmerged), 20)
    merge_adapters(unmerged)
    replaced = (LoRALinear, QuantizedLinear)
    assert not any(isinstance(module, replaced) for module in unmerged.modules())
    torch.testing.assert_close(logits(unmerged), expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_is_loaded_into_a_model_in_bfloat16(tiny, finished):
    model = load_model(tiny.model, torch.bfloat16)
    load_adapter(model, finished / "adapter")
    unmerged = logits(model)
    merge_adapters(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(model), unmerged, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda tensors: tensors.pop("projector.up.bias"),
            "lacks projector.up.bias; the adapter belongs to ",
        ),
        (
            lambda tensors: tensors.update({"language_model.blocks.9.x": torch.zeros(1)}),
            "holds language_model.blocks.9.x, for which the model has no place",
        ),
        (
            lambda tensors: tensors.update({"projector.up.bias": torch.zeros(3)}),
            r"projector.up.bias has shape \(3,\), in the model \(16,\)",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(tiny, finished, tmp_path, model, change, expected):
    folder = tmp_path / "adapter"
    shutil.copytree(finished / "adapter", folder)
    file = folder / "adapter.safetensors"
    stored = {name: tensor.clone() for name, tensor in tensors(file).items()}
    change(stored)
    save_file(stored, file)
    with pytest.raises(NanoVLMError, match=expected):
        load_adapter(model, folder)
    with pytest.raises(NanoVLMError, match="the folder of a run; give its adapter, .*/adapter$"):
        load_adapter(model, tmp_path)
    (tmp_path / "adapter" / "adapter.json").rename(tmp_path / "adapter_config.json")
    with pytest.raises(NanoVLMError, match="an adapter folder of PEFT"):
        load_adapter(model, tmp_path)


def test_an_interrupted_run_with_adapters_continues_to_the_same_bits(
    tiny, tmp_path, monkeypatch, finished
):
    changes = dict(init=str(tiny.model), **EVERYTHING)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupt_at(patch, 1)
        run_stage(tiny.settings(tmp_path / "stopped", **changes))
    stopped = tiny.train(tmp_path / "stopped", **changes, resume=True)
    assert metrics(stopped) == metrics(finished)
    for name in (
        "model/model.safetensors",
        "adapter/adapter.safetensors",
        "checkpoints/step_3/optimizer.safetensors",
        "samples.jsonl",
    ):
        assert (stopped / name).read_bytes() == (finished / name).read_bytes(), name


def test_by_default_experts_are_quantised_and_adapted_and_their_router_is_not(tmp_path):
    language_model = scratch_vlm(tmp_path).language_model
    quantize_(language_model.blocks, "int8")
    settings = Settings(train="language_model", lora_rank=2, language_model_layers=1)
    add_adapters(language_model, lora_config(settings))
    frozen, adapted = language_model.blocks[1].mlp, language_model.blocks[2].mlp
    expert, shared_expert = adapted.experts[3], adapted.shared_experts[0]
    assert type(expert.up_proj) is type(shared_expert.down_proj) is LoRALinear
    assert isinstance(expert.up_proj.base, QuantizedLinear)
    assert type(adapted.router) is Router and type(frozen.experts[3].up_proj) is KINDS["int8"]
    merge_adapters(language_model)
    assert language_model(torch.arange(9)[None]).isfinite().all()


def test_a_router_gets_no_adapter_from_any_pattern(tmp_path):
    language_model = scratch_vlm(tmp_path).language_model.eval()
    before = language_model(torch.arange(9)[None])
    settings = Settings(train="language_model", lora_rank=2, lora_targets="*")
    add_adapters(language_model, lora_config(settings))
    merge_adapters(language_model)
    assert all(type(block.mlp.router) is Router for block in language_model.blocks)
    torch.testing.assert_close(language_model(torch.arange(9)[None]), before)
