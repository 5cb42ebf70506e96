"""Checkpoints of one or several files, and strict loading of a module built on the meta device."""

import json
import os
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from nanovlm.errors import NanoVLMError
from nanovlm.hub.loading import load_into, open_checkpoint
from nanovlm.hub.names import Split, translate
from nanovlm.hub.safetensors import save_file


class Toy(nn.Module):
    """An embedding tied to the head, a layer, a persistent and a non-persistent buffer."""

    def __init__(self, tied: bool = True):
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 11, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.register_buffer("steps", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("rotary", torch.zeros(2), persistent=False)


def toy_tensors() -> dict[str, torch.Tensor]:
    return {
        "embedding.weight": torch.randn(11, 4),
        "layer.weight": torch.randn(4, 4),
        "layer.bias": torch.randn(4),
        "steps": torch.arange(3),
    }


def toy_on_meta(tied: bool = True) -> Toy:
    with torch.device("meta"):
        return Toy(tied)


def saved(folder: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> Path:
    save_file(tensors, folder / "model.safetensors", metadata)
    return folder


def shard(
    folder: Path, shards: dict[str, dict[str, torch.Tensor]], weight_map: object = None
) -> Path:
    for name, tensors in shards.items():
        save_file(tensors, folder / name, {"format": "pt"})
    if weight_map is None:
        weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def same_name(name: str) -> str:
    return name


def problem(module: nn.Module, folder: Path, name_map=same_name, **options) -> str:
    """The report of a load that must fail, and must leave the module as it was."""
    before = {name: id(value) for name, value in module.state_dict(keep_vars=True).items()}
    with pytest.raises(NanoVLMError) as caught:
        load_into(module, open_checkpoint(folder), name_map, **options)
    assert before == {name: id(value) for name, value in module.state_dict(keep_vars=True).items()}
    return str(caught.value)


def test_parameters_are_the_mapped_file(tmp_path):
    tensors = toy_tensors()
    checkpoint = open_checkpoint(saved(tmp_path, tensors, format="pt"))
    assert checkpoint.metadata == {"format": "pt"}
    module = toy_on_meta()
    module.layer.bias.requires_grad_(False)
    load_into(module, checkpoint, same_name)
    for name, value in module.state_dict(keep_vars=True).items():
        stored = "embedding.weight" if name == "head.weight" else name
        assert torch.equal(value, tensors[stored])
        assert value.data_ptr() == checkpoint.tensor(stored).data_ptr()
    assert module.layer.weight.requires_grad and not module.layer.bias.requires_grad
    assert isinstance(module.steps, torch.Tensor) and not isinstance(module.steps, nn.Parameter)


def test_training_a_loaded_module_leaves_the_file_alone(tmp_path):
    before = (saved(tmp_path, toy_tensors()) / "model.safetensors").read_bytes()
    module = toy_on_meta()
    load_into(module, open_checkpoint(tmp_path), same_name)
    start = module.layer.weight.detach().clone()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    module.head(module.layer(module.embedding(torch.tensor([1, 2])))).sum().backward()
    optimizer.step()
    assert not torch.equal(module.layer.weight, start)
    assert module.head.weight is module.embedding.weight
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_cast_tensor_is_not_held_in_the_mapping_too(tmp_path):
    checkpoint = open_checkpoint(saved(tmp_path, toy_tensors()))
    forgotten = []
    checkpoint.forget = forgotten.append
    load_into(toy_on_meta(), checkpoint, same_name, dtype=torch.bfloat16)
    assert sorted(forgotten) == sorted(
        name for name in toy_tensors() if checkpoint.dtype(name).is_floating_point
    )


def test_casts_floating_point_tensors_only(tmp_path):
    tensors = toy_tensors()
    module = toy_on_meta()
    load_into(module, open_checkpoint(saved(tmp_path, tensors)), same_name, dtype=torch.bfloat16)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert torch.equal(module.layer.weight, tensors["layer.weight"].bfloat16())
    assert module.steps.dtype == torch.int64


def test_file_dtype_is_kept_without_a_cast(tmp_path):
    tensors = {
        name: value.half() if value.is_floating_point() else value
        for name, value in toy_tensors().items()
    }
    module = toy_on_meta()
    load_into(module, open_checkpoint(saved(tmp_path, tensors)), same_name)
    assert {p.dtype for p in module.parameters()} == {torch.float16}


def test_name_map_renames_and_leaves_out(tmp_path):
    tensors = {f"model.{name}": value for name, value in toy_tensors().items()}
    saved(
        tmp_path,
        tensors | {"model.mask_token": torch.ones(4), "model.blocks.0.inv_freq": torch.ones(2)},
    )
    module = toy_on_meta()

    def name_map(name: str) -> str | None:
        return None if name == "model.mask_token" else name.removeprefix("model.")

    assert "model.blocks.0.inv_freq → blocks.0.inv_freq (2,)" in problem(module, tmp_path, name_map)
    load_into(module, open_checkpoint(tmp_path), name_map, ignore=["*.inv_freq"])
    assert torch.equal(module.layer.bias, tensors["model.layer.bias"])


def test_tied_weights_under_either_or_both_names(tmp_path):
    tensors = toy_tensors()
    weight = tensors.pop("embedding.weight")
    for stored in (
        {"head.weight": weight},
        {"head.weight": weight, "embedding.weight": weight.clone()},
    ):
        module = toy_on_meta()
        load_into(module, open_checkpoint(saved(tmp_path, tensors | stored)), same_name)
        assert module.head.weight is module.embedding.weight
        assert torch.equal(module.head.weight, weight)
    saved(tmp_path, tensors | {"head.weight": weight, "embedding.weight": weight + 1})
    assert "tied but stored with different values" in problem(toy_on_meta(), tmp_path)
    module = toy_on_meta(tied=False)
    load_into(module, open_checkpoint(tmp_path), same_name)
    assert torch.equal(module.embedding.weight, module.head.weight + 1)


def test_one_report_lists_every_problem(tmp_path):
    tensors = toy_tensors()
    del tensors["embedding.weight"], tensors["steps"]
    tensors["layer.weight"] = torch.ones(4, 5)
    tensors["layer.bias.copy"] = torch.ones(4)
    tensors["rotary"] = torch.ones(2)  # the module computes it: there is no place for a stored one
    report = problem(
        toy_on_meta(), saved(tmp_path, tensors), lambda name: name.removesuffix(".copy")
    )
    first, *rest = report.splitlines()
    assert (
        str(tmp_path) in first
        and "Toy (2 missing, 1 unexpected, 1 mapped twice, 1 mis-shaped)" in first
    )
    lines = [line.strip() for line in rest]
    assert "embedding.weight = head.weight (11, 4)" in lines
    assert "steps (3,)" in lines
    assert "rotary (2,)" in lines
    assert "layer.weight: file (4, 5), model (4, 4)" in lines
    assert any(line.startswith("layer.bias: from layer.bias") for line in lines)


def test_long_reports_are_cut(tmp_path):
    saved(tmp_path, toy_tensors() | {f"extra.{i}": torch.ones(1) for i in range(25)})
    report = problem(toy_on_meta(), tmp_path)
    assert report.count("extra.") == 10 and "… and 15 more" in report


def test_integers_do_not_stand_in_for_floats(tmp_path):
    tensors = toy_tensors()
    saved(
        tmp_path,
        tensors | {"layer.weight": torch.ones(4, 4, dtype=torch.int8), "steps": torch.ones(3)},
    )
    report = problem(toy_on_meta(), tmp_path)
    assert "layer.weight: file torch.int8, model torch.float32" in report
    assert "steps: file torch.float32, model torch.int64" in report


def test_shards_are_one_checkpoint(tmp_path):
    tensors = toy_tensors()
    first, second = dict(list(tensors.items())[:2]), dict(list(tensors.items())[2:])
    shard(
        tmp_path,
        {"model-00001-of-00002.safetensors": first, "model-00002-of-00002.safetensors": second},
    )
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        checkpoint = open_checkpoint(path)
        assert checkpoint.keys() == tensors.keys()
        assert checkpoint.metadata == {"format": "pt"}
        module = toy_on_meta()
        load_into(module, checkpoint, same_name)
        assert all(torch.equal(module.state_dict()[name], value) for name, value in tensors.items())


def test_a_single_file_is_a_checkpoint(tmp_path):
    tensors = toy_tensors()
    save_file(tensors, tmp_path / "adapter.safetensors")
    checkpoint = open_checkpoint(tmp_path / "adapter.safetensors")
    assert checkpoint.keys() == tensors.keys()
    assert checkpoint.shape("steps") == (3,) and checkpoint.dtype("steps") == torch.int64
    with pytest.raises(NanoVLMError, match="no tensor 'absent'"):
        checkpoint.tensor("absent")


@pytest.mark.parametrize(
    "name", ["../a.safetensors", "/etc/a", "sub/a.safetensors", "..", ".", "", "sub\\a", "C:a"]
)
def test_shards_stay_in_their_folder(tmp_path, name):
    (tmp_path / "model").mkdir()
    save_file({"w": torch.ones(1)}, tmp_path / "a.safetensors")
    shard(tmp_path / "model", {}, {"w": name})
    with pytest.raises(NanoVLMError, match="own folder"):
        open_checkpoint(tmp_path / "model")


def test_shards_must_hold_what_the_index_says(tmp_path):
    shards = {"a.safetensors": {"w": torch.ones(1)}, "b.safetensors": {"v": torch.ones(1)}}
    expectations = {
        r"names c\.safetensors, which the folder lacks": {
            "w": "a.safetensors",
            "v": "c.safetensors",
        },
        r"a\.safetensors: lacks v, which": {"w": "a.safetensors", "v": "a.safetensors"},
        r"b\.safetensors: holds v, which its index does not name": {
            "w": "a.safetensors",
            "u": "b.safetensors",
        },
        "weight_map does not give": ["w", "v"],
        "weight_map does not give each": {"w": 3},
    }
    shards["b.safetensors"]["u"] = torch.ones(1)
    for message, weight_map in expectations.items():
        with pytest.raises(NanoVLMError, match=message):
            open_checkpoint(shard(tmp_path, shards, weight_map))


def test_folders_without_a_checkpoint(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(NanoVLMError, match="holds neither"):
        open_checkpoint(tmp_path)
    with pytest.raises(NanoVLMError, match="cannot be read"):
        open_checkpoint(tmp_path / "absent")
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 8)
    with pytest.raises(NanoVLMError, match="claims a header"):
        open_checkpoint(tmp_path)


@pytest.mark.slow
def test_half_a_billion_parameters_load_quickly():
    folder = Path(os.environ.get("NANOVLM_REAL", "")) / "qwen2.5-0.5b"
    if not (folder / "model.safetensors").exists():
        pytest.skip("NANOVLM_REAL is not set to a folder with qwen2.5-0.5b/model.safetensors")
    shapes = {name: open_checkpoint(folder).shape(name) for name in open_checkpoint(folder).keys()}
    with torch.device("meta"):
        module = nn.Module()
        for name, shape in shapes.items():
            module.register_parameter(name.replace(".", "_"), nn.Parameter(torch.empty(shape)))
    start = time.perf_counter()
    load_into(module, open_checkpoint(folder), lambda name: name.replace(".", "_"))
    seconds = time.perf_counter() - start
    print(f"{sum(p.numel() for p in module.parameters()):,} parameters mapped in {seconds:.3f} s")
    assert seconds < 5
    assert all(torch.isfinite(p).all() for p in module.parameters())


@pytest.mark.parametrize("groups", [1, 2])
def test_one_tensor_may_hold_several_of_ours(tmp_path: Path, groups: int):
    fused = torch.arange(48.0).view(
        12, 4
    )  # two heads of width 2, whose queries, keys and values follow each other
    save_file({"fused": fused}, tmp_path / "model.safetensors")
    module = nn.ModuleDict({name: nn.Linear(4, 4, bias=False, device="meta") for name in "qkv"})
    load_into(
        module,
        open_checkpoint(tmp_path),
        translate({"fused": Split(("q.weight", "k.weight", "v.weight"), groups)}),
    )
    rows = {
        1: {"q": range(4), "k": range(4, 8), "v": range(8, 12)},
        2: {"q": [0, 1, 6, 7], "k": [2, 3, 8, 9], "v": [4, 5, 10, 11]},
    }[groups]
    for name, chosen in rows.items():
        assert torch.equal(module[name].weight, fused[list(chosen)])


def test_a_tensor_that_cannot_be_split_is_reported(tmp_path: Path):
    save_file({"fused": torch.zeros(7, 4)}, tmp_path / "model.safetensors")
    module = nn.ModuleDict({name: nn.Linear(4, 3, bias=False, device="meta") for name in "kv"})
    with pytest.raises(NanoVLMError, match=r"fused → k.weight: file \(7, 4\), model \(3, 4\)"):
        load_into(
            module, open_checkpoint(tmp_path), translate({"fused": Split(("k.weight", "v.weight"))})
        )


def test_a_file_that_ends_in_zeros_is_named(tmp_path: Path):
    torch.manual_seed(0)
    weights = {"a.weight": torch.randn(64, 64), "b.weight": torch.randn(64, 64)}
    whole = saved(tmp_path, weights) / "model.safetensors"
    data = whole.read_bytes()
    for zeros in (600, 5_000, 64 * 64 * 4, 20_000):
        whole.write_bytes(data[:-zeros] + bytes(zeros))
        with pytest.raises(NanoVLMError, match=r"ends in [\d,]+ bytes of zeros, from tensor '[ab]"):
            open_checkpoint(tmp_path)
    whole.write_bytes(bytes(len(data)))
    with pytest.raises(NanoVLMError, match="a file of zeros"):
        open_checkpoint(tmp_path)


def test_zeros_that_a_model_may_have_at_its_end_are_read(tmp_path: Path):
    table = torch.randn(64, 64)
    table[-9:] = 0  # rows of words that do not exist
    for last in (table, torch.zeros(512), torch.ones(1, 1, 8)):
        open_checkpoint(saved(tmp_path, {"a": torch.randn(3), "b": last}))
    open_checkpoint(saved(tmp_path, {"a": torch.randn(3), "b.lora_B": torch.zeros(64, 64)}))


@pytest.mark.parametrize("name", ["w.qweight", "w.SCB", "w.weight_scale_inv", "w.weight_packed"])
def test_quantised_weights_are_named_by_their_tensors(tmp_path: Path, name: str):
    with pytest.raises(NanoVLMError, match=f"weights are quantised .it holds '{name}'.*full weig"):
        open_checkpoint(saved(tmp_path, {"w.weight": torch.ones(3), name: torch.ones(3)}))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n",
            "a Git LFS pointer",
        ),
        (b"<!DOCTYPE html><html><body>404</body></html>", "an HTML page"),
        (b"GGUF\x03\x00\x00\x00\x00\x00", "a GGUF file"),
        (b"PK\x03\x04" + bytes(26) + b"archive/data.pkl", "a PyTorch file"),
        (b"\x80\x02}q\x00.....", "a Python pickle"),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path: Path, data: bytes, message: str):
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(NanoVLMError, match=f"is not a safetensors file but {message}"):
        open_checkpoint(tmp_path)


def test_any_length_of_a_header_is_read(tmp_path: Path):
    """Also one whose bytes are another format's signature, as 35,615 is gzip's."""
    file = tmp_path / "model.safetensors"
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    for length in (0x8B1F, 0x4D42, 0x4B50):
        data = length.to_bytes(8, "little") + header.ljust(length) + torch.ones(1).numpy().tobytes()
        file.write_bytes(data)
        assert open_checkpoint(tmp_path).tensor("a").item() == 1
