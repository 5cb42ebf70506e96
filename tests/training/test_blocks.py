"""Checkpointed and compiled blocks: the same numbers, less memory, and the same saved files."""

import copy
import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from nanovlm.errors import NanoVLMError
from nanovlm.hub.loading import open_checkpoint
from nanovlm.hub.models import load_model, save_model
from nanovlm.inputs.batch import Batch
from nanovlm.model.attention import AttentionInputs
from nanovlm.model.language_model import DecoderBlock, LanguageModelConfig
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.training import blocks
from nanovlm.training.blocks import checkpoint_blocks, compile_blocks
from nanovlm.training.freezing import freeze
from nanovlm.training.settings import Settings
from tests.reference.scratch import scratch_vlm

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def load(tiny):
    """A function that loads the tiny model with the parts named by `train` trainable."""

    def load(train="projector,language_model,vision_encoder", **depth) -> VisionLanguageModel:
        model = load_model(tiny.model).train()
        freeze(model, Settings(train=train, **depth))
        return model

    return load


def make_batch(model: VisionLanguageModel) -> Batch:
    """Two rows with an image each: one with two branches after a prefix, one with padding."""
    generator = torch.Generator().manual_seed(0)
    length = model.image_length
    ids = torch.randint(6, 300, (2, length + 12), generator=generator)
    ids[:, 1 : 1 + length] = model.chat.image_token_id
    mask = torch.ones_like(ids)
    mask[0, -8:-4], mask[0, -4:], mask[1, -3:] = 2, 3, 0
    image_positions = (ids == model.chat.image_token_id).flatten().nonzero()[:, 0]
    positions = torch.tensor([length + 5, length + 7, length + 10, 2 * length + 12 + 4])
    targets = ids.flatten()[positions + 1]
    pixels = torch.randn(2, 3, 32, 32, generator=generator)
    return Batch(ids, mask, image_positions, positions, targets, pixels)


def loss_and_gradients(model: VisionLanguageModel) -> dict[str, Tensor]:
    """Loss and gradients of a batch as in training, plus a term of the text alone, without a
    mask."""
    batch = make_batch(model)
    loss = model(batch) + model.language_model(batch.input_ids).square().mean()
    model.zero_grad()
    if loss.requires_grad:
        loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


def gradients(model: VisionLanguageModel) -> dict[str, Tensor]:
    parameters = model.named_parameters()
    return {name: parameter.grad for name, parameter in parameters if parameter.grad is not None}


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.fixture
def capturing_compiler(monkeypatch) -> CompileCounter:
    """Replaces the backend of torch.compile by one that counts the captured graphs and runs them as
    they are, which needs no C++ compiler and gives the same bits."""
    compiler, compile = CompileCounter(), torch.compile
    torch.compiler.reset()

    def capture(function, **options):
        if hasattr(compiler, "limit"):
            options["recompile_limit"] = compiler.limit
        return compile(function, backend=compiler, **options)

    monkeypatch.setattr(torch, "compile", capture)
    return compiler


@pytest.mark.parametrize(
    "trainable",
    [
        {},
        dict(train="projector"),
        dict(train="projector,vision_encoder", vision_encoder_layers=1),
        dict(train="language_model", language_model_layers=1),
    ],
    ids=str,
)
def test_checkpointing_gives_the_same_bits(load, trainable):
    model = load(**trainable)
    expected = loss_and_gradients(model)
    names = set(model.state_dict())
    checkpoint_blocks(model)
    assert_same(loss_and_gradients(model), expected)
    assert set(model.state_dict()) == names


def test_a_run_with_checkpointing_saves_the_same_weights(tiny, tmp_path):
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
    plain, ours = (open_checkpoint(run / "model") for run in runs)
    assert set(plain.keys()) == set(ours.keys())
    assert all(torch.equal(plain.tensor(name), ours.tensor(name)) for name in plain.keys())


def saved_bytes(model: VisionLanguageModel) -> int:
    """Memory of the tensors saved for the backward pass, without the parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, Tensor] = {}

    def save(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        model(make_batch(model))
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def test_checkpointing_saves_less_than_half_for_the_backward_pass(load):
    model = load()
    plain = saved_bytes(model)
    checkpoint_blocks(model)
    assert 0 < saved_bytes(model) < plain / 2


@pytest.mark.parametrize(
    ("trainable", "expected"),
    [
        ({}, [2, 2, 2, 2]),
        (dict(train="projector"), [1, 1, 2, 2]),
        (dict(train="language_model", language_model_layers=1), [1, 1, 1, 2]),
        (dict(train="vision_encoder", vision_encoder_layers=1), [1, 2, 2, 2]),
    ],
    ids=str,
)
def test_only_blocks_with_a_backward_pass_are_computed_twice(load, trainable, expected):
    model = load(**trainable)
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


def test_the_cache_is_filled_once_with_and_without_gradients(load):
    model = load()
    ids = torch.arange(20, 30)[None]
    expected = model.language_model(ids)
    checkpoint_blocks(model)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            cache = model.language_model.new_cache(1, 10)
            logits = [model.language_model(part, cache=cache) for part in ids.split(6, dim=1)]
        assert cache.length == 10
        torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=1e-5, rtol=1e-5)


def test_dropout_is_the_same_in_the_recomputation(load):
    model = load()
    for block in model.language_model.blocks:
        block.attention_norm = nn.Sequential(block.attention_norm, nn.Dropout(0.5))
    torch.manual_seed(1)
    expected = loss_and_gradients(model)
    checkpoint_blocks(model, dropout=True)
    torch.manual_seed(1)
    assert_same(loss_and_gradients(model), expected)


def test_a_copy_of_a_checkpointed_model_runs_its_own_blocks(load):
    model = load()
    checkpoint_blocks(model)
    other = copy.deepcopy(model)
    nn.init.zeros_(model.language_model.blocks[0].mlp.down_proj.weight)
    ids = torch.arange(20, 30)[None]
    assert not torch.equal(other.language_model(ids), model.language_model(ids))


def test_equal_blocks_share_compiled_code_and_saved_files_stay_the_same(
    load, tmp_path, capturing_compiler
):
    """With checkpointing as well."""
    model = load("projector,language_model")
    expected = loss_and_gradients(model)
    save_model(model, tmp_path / "plain")
    compile_blocks(model, CPU)
    checkpoint_blocks(model)
    assert_same(loss_and_gradients(model), expected)
    # The trial of the compiler, the block of the frozen vision encoder, and that of the language
    # model with and without a mask, the last or not.
    assert 4 <= capturing_compiler.frame_count <= 6
    save_model(model, tmp_path / "compiled")
    for name in ("config.json", "model.safetensors"):
        plain, compiled = (tmp_path / folder / name for folder in ("plain", "compiled"))
        assert plain.read_bytes() == compiled.read_bytes()


def rows_and_lengths(model: VisionLanguageModel) -> Iterator[Batch]:
    """Batches of one row and of several, of three lengths, with padding on the right or without."""
    length = model.image_length
    for rows, words in ((1, 12), (2, 20), (3, 32), (1, 44)):
        ids = torch.randint(6, 300, (rows, length + words))
        ids[:, :length] = model.chat.image_token_id
        mask = torch.ones_like(ids)
        mask[:, length + words - rows + 1 :] = 0
        image_positions = (ids == model.chat.image_token_id).flatten().nonzero()[:, 0]
        positions = torch.arange(rows) * (length + words) + length + 2
        targets = ids.flatten()[positions + 1]
        yield Batch(ids, mask, image_positions, positions, targets, torch.randn(rows, 3, 32, 32))


@pytest.mark.parametrize(
    ("trainable", "checkpointing", "kinds"),
    [
        (dict(train="projector"), False, 3),
        (dict(train="projector,language_model"), True, 3),
        (dict(train="projector,language_model", language_model_layers=1), False, 4),
    ],
    ids=str,
)
def test_other_rows_and_lengths_cause_no_recompilation(
    load, capturing_compiler, trainable, checkpointing, kinds
):
    """In training, and in validation after its first batch."""
    model = load(**trainable)
    compile_blocks(model, CPU)
    if checkpointing:
        checkpoint_blocks(model)
    capturing_compiler.frame_count = 0  # without the trial
    counts = []
    for batch in rows_and_lengths(model):
        model(batch).backward()
        counts.append(capturing_compiler.frame_count)
    model.eval()
    with torch.no_grad():
        for batch in rows_and_lengths(model):
            model(batch)
            counts.append(capturing_compiler.frame_count)
    assert len(set(counts[:4])) == len(set(counts[4:])) == 1
    assert counts[0] <= kinds and counts[4] <= 2 * kinds


def test_too_many_kinds_of_calls_are_said_and_run_uncompiled(load, capturing_compiler, capsys):
    model = load("projector,language_model")
    expected = loss_and_gradients(model)
    capturing_compiler.limit = 1
    compile_blocks(model, CPU)
    capsys.readouterr()
    assert_same(loss_and_gradients(model), expected)
    said = capsys.readouterr().err.splitlines()
    assert len([line for line in said if line.startswith("blocks: not compiled from here")]) == 1


def test_by_default_blocks_are_compiled_on_cuda_alone_and_where_a_compiler_works(
    load, capturing_compiler, capsys, monkeypatch
):
    model = load()
    compile_blocks(model, CPU, "auto")
    compile_blocks(model, CUDA, False)
    assert capturing_compiler.frame_count == 0 and not capsys.readouterr().err
    monkeypatch.setattr(blocks, "compiler_problem", lambda device: f"no compiler for {device}")
    compile_blocks(model, CUDA, "auto")
    assert (
        "blocks are not compiled: no compiler for cuda, or give --no-compile\n"
        in capsys.readouterr().err
    )
    assert all("forward" not in vars(block) for block in model.language_model.blocks)
    monkeypatch.setattr(blocks, "compiler_problem", lambda device: "")
    compile_blocks(model, CUDA, "auto")
    assert "blocks are compiled with torch.compile" in capsys.readouterr().err
    assert all("forward" in vars(block) for block in model.language_model.blocks)


@pytest.mark.gpu
def test_compiled_blocks_give_the_gradients_of_the_cpu_on_a_gpu(load, capsys):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    model, on_gpu = load("projector,language_model"), load("projector,language_model").cuda()
    compile_blocks(on_gpu, CUDA)
    for batch in rows_and_lengths(model):
        model.zero_grad()
        on_gpu.zero_grad()
        model(batch).backward()
        on_gpu(batch.to(CUDA)).backward()
        for name, gradient in gradients(model).items():
            ours = gradients(on_gpu)[name].cpu()
            torch.testing.assert_close(ours, gradient, atol=1e-3, rtol=1e-3)
    assert "not compiled" not in capsys.readouterr().err


@pytest.mark.slow
def test_a_compiled_block_computes_the_same():
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        pytest.skip("no C++ compiler here")
    torch.manual_seed(0)
    config = LanguageModelConfig(
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    block, inputs = DecoderBlock(config), torch.randn(2, 5, 16)
    causal = AttentionInputs(is_causal=True)
    expected = torch.autograd.grad(block(inputs, causal).square().sum(), block.parameters())
    model = nn.Module()
    model.vision_encoder, model.language_model = nn.Module(), nn.Module()
    model.vision_encoder.blocks = nn.ModuleList()
    model.language_model.blocks = nn.ModuleList([block])
    compile_blocks(model, CPU)
    ours = torch.autograd.grad(block(inputs, causal).square().sum(), block.parameters())
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_without_a_compiler_the_error_is_one_line(load, monkeypatch):
    def broken(function, **options):
        def run(*arguments):
            raise RuntimeError("InvalidCxxCompiler: no working compiler\nand a page of advice")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    message = r"--compile: .* \(InvalidCxxCompiler: no working compiler\); install"
    with pytest.raises(NanoVLMError, match=message) as error:
        compile_blocks(load(), CPU)
    assert "\n" not in str(error.value)


def scratch_loss(model: VisionLanguageModel) -> dict[str, Tensor]:
    """Loss and gradients of a batch, with a fixed seed for dropout."""
    batch = make_batch(model)
    batch.pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    torch.manual_seed(3)
    loss = model(batch)
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_checkpointed_experts_and_dropout_give_the_same_bits(tmp_path, autocast):
    model = scratch_vlm(tmp_path, dropout=0.2).train()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast, cache_enabled=False):
        expected = scratch_loss(model)
        assert expected["language_model.blocks.0.mlp.router.weight"].any()
        checkpoint_blocks(model, dropout=True)
        assert_same(scratch_loss(model), expected)


def test_experts_are_not_compiled_and_their_loads_cause_no_recompilation(
    tmp_path, capturing_compiler
):
    model = scratch_vlm(tmp_path, dropout=0.2).train()
    expected = scratch_loss(model)
    compile_blocks(model, CPU)
    checkpoint_blocks(model, dropout=True)
    assert_same(scratch_loss(model), expected)
    captured = capturing_compiler.frame_count
    for seed in range(4):  # other embeddings, so that the router sends tokens to other experts
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(model.language_model.embed_tokens.weight, generator=generator)
        scratch_loss(model)
    assert capturing_compiler.frame_count == captured
