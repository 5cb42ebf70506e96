"""Checkpointed and compiled blocks: the same numbers from less memory, and no trace in what is
saved."""

import copy
import shutil
import types

import pytest
import torch
from torch import Tensor, nn

from nanovlm.errors import NanoVLMError
from nanovlm.hub.loading import open_checkpoint
from nanovlm.hub.models import load_model, save_model
from nanovlm.inputs.batch import Batch
from nanovlm.model.attention import AttentionInputs
from nanovlm.model.language_model import DecoderBlock, LanguageModelConfig
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.training.blocks import checkpoint_blocks, compile_blocks
from nanovlm.training.freezing import freeze
from nanovlm.training.settings import Settings
from tests.reference.scratch import scratch_vlm

CPU = torch.device("cpu")


@pytest.fixture
def load(tiny):
    """A fresh copy of the tiny model in which `train` learns."""

    def load(
        train: str = "projector,language_model,vision_encoder", **depth
    ) -> VisionLanguageModel:
        model = load_model(tiny.model).train()
        freeze(model, Settings(train=train, **depth))
        return model

    return load


def make_batch(model: VisionLanguageModel) -> Batch:
    """Two images: a row with two branches behind a shared beginning, and one with padding."""
    generator = torch.Generator().manual_seed(0)
    length = model.image_length
    ids = torch.randint(6, 300, (2, length + 12), generator=generator)
    ids[:, 1 : 1 + length] = model.chat.image_token_id
    mask = torch.ones_like(ids)
    mask[0, -8:-4], mask[0, -4:], mask[1, -3:] = 2, 3, 0
    places = (ids == model.chat.image_token_id).flatten().nonzero()[:, 0]
    positions = torch.tensor([length + 5, length + 7, length + 10, 2 * length + 12 + 4])
    return Batch(
        ids,
        mask,
        places,
        positions,
        ids.flatten()[positions + 1],
        torch.randn(2, 3, 32, 32, generator=generator),
    )


def loss_and_gradients(model: VisionLanguageModel) -> dict[str, Tensor]:
    """Of one batch as training sees it, and of all positions of text without a mask."""
    batch = make_batch(model)
    loss = model(batch) + model.language_model(batch.input_ids).square().mean()
    model.zero_grad()
    if loss.requires_grad:
        loss.backward()
    return {
        "loss": loss.detach(),
        **{
            name: parameter.grad
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        },
    }


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "learning",
    [
        {},
        dict(train="projector"),
        dict(train="projector,vision_encoder", vision_encoder_layers=1),
        dict(train="language_model", language_model_layers=1),
    ],
    ids=str,
)
def test_checkpointing_gives_the_same_bits(load, learning):
    model = load(**learning)
    expected = loss_and_gradients(model)
    names = set(model.state_dict())
    checkpoint_blocks(model)
    assert_same(loss_and_gradients(model), expected)
    assert set(model.state_dict()) == names


def test_a_whole_run_gives_the_same_bits_and_the_same_folder(tiny, tmp_path):
    runs = [
        tiny.train(
            tmp_path / f"{checkpointing}",
            init=str(tiny.model),
            train="projector,language_model,vision_encoder",
            max_steps=2,
            val_samples=1,
            checkpointing=checkpointing,
        )
        for checkpointing in (False, True)
    ]
    one, two = (open_checkpoint(run / "model") for run in runs)
    assert set(one.keys()) == set(two.keys())
    assert all(torch.equal(one.tensor(name), two.tensor(name)) for name in one.keys())


def kept_bytes(model: VisionLanguageModel) -> int:
    """Memory held for the backward pass besides the parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(make_batch(model))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_less_is_kept_for_the_backward_pass(load):
    model = load()
    plain = kept_bytes(model)
    checkpoint_blocks(model)
    assert 0 < kept_bytes(model) < plain / 2


@pytest.mark.parametrize(
    ("learning", "expected"),
    [
        ({}, [2, 2, 2, 2]),
        (dict(train="projector"), [1, 1, 2, 2]),
        (dict(train="language_model", language_model_layers=1), [1, 1, 1, 2]),
        (dict(train="vision_encoder", vision_encoder_layers=1), [1, 2, 2, 2]),
    ],
    ids=str,
)
def test_only_blocks_that_a_gradient_passes_are_computed_twice(load, learning, expected):
    model = load(**learning)
    blocks = [*model.vision_encoder.blocks, *model.language_model.blocks]
    counts = [0] * len(blocks)
    for index, block in enumerate(blocks):

        def count(*_, index=index) -> None:
            counts[index] += 1

        block.attention_norm.register_forward_pre_hook(count)
    checkpoint_blocks(model)
    model(make_batch(model)).backward()
    assert counts == expected
    with torch.no_grad():
        model(make_batch(model))
    assert counts == [count + 1 for count in expected]


def test_the_cache_is_filled_once_whether_or_not_gradients_flow(load):
    model = load()
    ids = torch.arange(20, 30)[None]
    expected = model.language_model(ids)
    checkpoint_blocks(model)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            cache = model.language_model.new_cache(1, 10)
            logits = torch.cat(
                [
                    model.language_model(ids[:, :6], cache=cache),
                    model.language_model(ids[:, 6:], cache=cache),
                ],
                dim=1,
            )
        assert cache.length == 10
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_dropout_falls_alike_both_times(load):
    model = load()
    for block in model.language_model.blocks:
        block.attention_norm = nn.Sequential(block.attention_norm, nn.Dropout(0.5))
    torch.manual_seed(1)
    expected = loss_and_gradients(model)
    checkpoint_blocks(model, dropout=True)
    torch.manual_seed(1)
    assert_same(loss_and_gradients(model), expected)


def test_a_copy_of_the_model_runs_its_own_blocks(load):
    model = load()
    checkpoint_blocks(model)
    other = copy.deepcopy(model)
    nn.init.zeros_(model.language_model.blocks[0].mlp.down_proj.weight)
    ids = torch.arange(20, 30)[None]
    assert not torch.equal(other.language_model(ids), model.language_model(ids))


def test_blocks_of_a_kind_share_compiled_code_and_leave_no_trace(load, tmp_path, monkeypatch):
    """Captured by the compiler and run as captured, which needs no C++ compiler and changes no bit;
    checkpointed too."""
    from torch._dynamo.testing import CompileCounter

    compiler, compile = CompileCounter(), torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: compile(function, backend=compiler, **options)
    )
    model = load("projector,language_model")
    expected = loss_and_gradients(model)
    save_model(model, tmp_path / "plain")
    compile_blocks(model, CPU)
    checkpoint_blocks(model)
    assert_same(loss_and_gradients(model), expected)
    # The trial, the block of frozen eyes, and of the decoder with a mask and without, last or not.
    assert 4 <= compiler.frame_count <= 6
    save_model(model, tmp_path / "compiled")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (
            tmp_path / "compiled" / name
        ).read_bytes()


@pytest.mark.slow
def test_a_compiled_block_computes_the_same():
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        pytest.skip("no C++ compiler here")
    torch.manual_seed(0)
    block = DecoderBlock(
        LanguageModelConfig(
            hidden_size=16,
            intermediate_size=32,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
    )
    inputs = torch.randn(2, 5, 16)
    expected = torch.autograd.grad(
        block(inputs, AttentionInputs(is_causal=True)).square().sum(), block.parameters()
    )
    towers = types.SimpleNamespace(
        vision_encoder=types.SimpleNamespace(blocks=[]),
        language_model=types.SimpleNamespace(blocks=[block]),
    )
    compile_blocks(towers, CPU)
    ours = torch.autograd.grad(
        block(inputs, AttentionInputs(is_causal=True)).square().sum(), block.parameters()
    )
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_without_a_compiler_there_is_one_line(load, monkeypatch):
    def broken(function, **options):
        def run(*arguments):
            raise RuntimeError("InvalidCxxCompiler: no working compiler\nand a page of advice")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(
        NanoVLMError, match=r"--compile: .* \(InvalidCxxCompiler: no working compiler\); install"
    ) as error:
        compile_blocks(load(), CPU)
    assert "\n" not in str(error.value)


def scratch_loss(model: VisionLanguageModel) -> dict[str, Tensor]:
    """Loss and gradients of a batch under a seed, for dropout."""
    batch = make_batch(model)
    batch.pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    torch.manual_seed(3)
    loss = model(batch)
    loss.backward()
    return {
        "loss": loss.detach(),
        **{
            name: parameter.grad
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        },
    }


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_experts_and_dropout_checkpointed_give_the_same_bits(tmp_path, autocast):
    model = scratch_vlm(tmp_path, dropout=0.2).train()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast, cache_enabled=False):
        expected = scratch_loss(model)
        assert expected["language_model.blocks.0.mlp.router.weight"].any()
        checkpoint_blocks(model, dropout=True)
        assert_same(scratch_loss(model), expected)


def test_experts_are_left_alone_by_the_compiler_and_their_loads_make_no_new_code(
    tmp_path, monkeypatch
):
    from torch._dynamo.testing import CompileCounter

    compiler, compile = CompileCounter(), torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: compile(function, backend=compiler, **options)
    )
    model = scratch_vlm(tmp_path, dropout=0.2).train()
    expected = scratch_loss(model)
    compile_blocks(model, CPU)
    checkpoint_blocks(model, dropout=True)
    assert_same(scratch_loss(model), expected)
    captured = compiler.frame_count
    for seed in range(4):  # every time other tokens go to other experts
        with torch.no_grad():
            model.language_model.embed_tokens.weight.normal_(
                generator=torch.Generator().manual_seed(seed)
            )
        scratch_loss(model)
    assert compiler.frame_count == captured
