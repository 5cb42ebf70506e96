"""Checkpoints: whole or absent, the newest few, and refused when they are not this run's."""

import errno
import hashlib
import os

import pytest
import torch
from torch import nn

from nanovlm.errors import NanoVLMError
from nanovlm.training.checkpoint import (
    NoRoomError,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)


def trained(steps: int = 1, width: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A trainable layer behind a frozen one, after some steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, width))
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model[1].parameters(), lr=0.1)
    for _ in range(steps):
        model(torch.randn(2, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_what_is_saved_comes_back(tmp_path):
    model, optimizer = trained(3)
    save_checkpoint(tmp_path, model, optimizer, {"progress": {"step": 3}, "samples": 12}, keep=2)
    other, fresh = trained(0)
    assert load_checkpoint(tmp_path, other, fresh) == {"progress": {"step": 3}, "samples": 12}
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two) or not one.requires_grad
    for one, two in zip(model[1].parameters(), other[1].parameters(), strict=True):
        assert (
            optimizer.state[one].keys()
            == fresh.state[two].keys()
            == {"step", "exp_avg", "exp_avg_sq"}
        )
        assert all(
            torch.equal(optimizer.state[one][kind], fresh.state[two][kind])
            for kind in optimizer.state[one]
        )
    torch.testing.assert_close(list(other.parameters()), list(model.parameters()))


def test_a_checkpoint_holds_what_learns_and_no_pickle(tmp_path):
    folder = save_checkpoint(tmp_path, *trained(), {"progress": {"step": 1}}, keep=2)
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
        "SHA256SUMS",
    }
    safetensors = pytest.importorskip("safetensors.torch")
    assert safetensors.load_file(folder / "model.safetensors").keys() == {"1.weight", "1.bias"}


def test_the_newest_are_kept_by_number_and_half_written_ones_do_not_count(tmp_path):
    model, optimizer = trained()
    (tmp_path / "checkpoints" / ".step_99.tmp").mkdir(parents=True)
    for step in (8, 9, 10, 11):
        save_checkpoint(tmp_path, model, optimizer, {"progress": {"step": step}}, keep=2)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step_10", "step_11"]
    assert load_checkpoint(tmp_path, model, optimizer) == {"progress": {"step": 11}}


def test_another_run_is_refused(tmp_path):
    model, optimizer = trained()
    with pytest.raises(NanoVLMError, match="holds no whole checkpoint"):
        load_checkpoint(tmp_path, model, optimizer)
    save_checkpoint(tmp_path, model, optimizer, {"progress": {"step": 1}}, keep=1)
    with pytest.raises(NanoVLMError, match=r"has no 1.weight of shape \(5, 3\)"):
        load_checkpoint(tmp_path, *trained(width=5))
    model[1].weight.requires_grad_(False)
    with pytest.raises(NanoVLMError, match="also trained 1.weight"):
        load_checkpoint(tmp_path, model, optimizer)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "state.json", "SHA256SUMS"]
)
@pytest.mark.parametrize(
    "damage",
    [lambda data: data[: len(data) // 2], lambda data: data[:-1] + bytes([data[-1] ^ 2]), None],
)
def test_a_damaged_checkpoint_is_named_set_aside_and_the_one_before_it_taken(
    tmp_path, capsys, name, damage
):
    model, optimizer = trained()
    before = model[1].weight.detach().clone()
    save_checkpoint(tmp_path, model, optimizer, {"progress": {"step": 1}}, keep=3)
    model[1].weight.data.add_(1)
    folder = save_checkpoint(tmp_path, model, optimizer, {"progress": {"step": 2}}, keep=3)
    if damage is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(damage((folder / name).read_bytes()))
    assert load_checkpoint(tmp_path, model, optimizer) == {"progress": {"step": 1}}
    assert torch.equal(model[1].weight, before)
    printed = capsys.readouterr().err
    assert str(folder) in printed and name in printed and printed.count("\n") == 1
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == [
        "damaged_step_2",
        "step_1",
    ]
    save_checkpoint(tmp_path, model, optimizer, {"progress": {"step": 2}}, keep=3)
    assert load_checkpoint(tmp_path, model, optimizer) == {"progress": {"step": 2}}


def test_when_none_is_whole_the_run_cannot_go_on(tmp_path):
    folder = save_checkpoint(tmp_path, *trained(), {"progress": {"step": 1}}, keep=1)
    (folder / "state.json").write_text("{}")
    with pytest.raises(NanoVLMError, match="holds no whole checkpoint"):
        load_checkpoint(tmp_path, *trained())


def test_the_digests_are_in_the_form_that_sha256sum_reads(tmp_path):
    folder = save_checkpoint(tmp_path, *trained(), {"progress": {"step": 1}}, keep=1)
    lines = dict(
        reversed(line.split("  ")) for line in (folder / "SHA256SUMS").read_text().splitlines()
    )
    assert lines == {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("model.safetensors", "optimizer.safetensors", "state.json")
    }


def test_the_best_stays_beside_the_newest(tmp_path):
    model, optimizer = trained()
    for step, val_loss in enumerate([3.0, 1.0, None, 2.0, None, None, 4.0], start=1):
        save_checkpoint(
            tmp_path, model, optimizer, {"progress": {"step": step}, "val_loss": val_loss}, keep=2
        )
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step_2", "step_6", "step_7"]


@pytest.mark.parametrize("broken", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_full_disk_leaves_the_checkpoint_before_as_it_was(tmp_path, monkeypatch, broken):
    model, optimizer = trained()
    save_checkpoint(tmp_path, model, optimizer, {"progress": {"step": 1}}, keep=1)
    replace = os.replace

    def full(source, target):
        if str(target).endswith(broken):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(
        NoRoomError,
        match="step_2: no room for this checkpoint, which takes 0.0 MB where .* MB are free; "
        "step_1 stays",
    ):
        save_checkpoint(tmp_path, model, optimizer, {"progress": {"step": 2}}, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_1"]
    assert load_checkpoint(tmp_path, model, optimizer) == {"progress": {"step": 1}}


@pytest.mark.parametrize("part", ["decoder", "vision"])
def test_a_checkpoint_under_old_names_is_refused_in_one_line(tmp_path, part):
    """Written before version 0.2, when parts had other names."""
    old, new = (
        nn.ModuleDict({part: trained()[0][1]}),
        nn.ModuleDict({"language_model": nn.Linear(3, 3)}),
    )
    optimizer = torch.optim.AdamW(old.parameters())
    save_checkpoint(tmp_path, old, optimizer, {"progress": {"step": 1}}, keep=2)
    with pytest.raises(NanoVLMError, match="step_1: tensor .* saved before version 0.2") as caught:
        load_checkpoint(tmp_path, new, torch.optim.AdamW(new.parameters()))
    assert "\n" not in str(caught.value)
