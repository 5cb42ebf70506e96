"""Checkpoints: whole or absent, the newest few, and refused when they are not this run's."""

import pytest
import torch
from torch import nn

from nanovlm.errors import NanoVLMError
from nanovlm.training.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint


def trained(steps: int = 1, width: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A layer that learns behind one that does not, after some steps."""
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
    save_checkpoint(tmp_path, model, optimizer, {"step": 3, "samples": 12}, keep=2)
    expected = torch.randn(4)
    other, fresh = trained(0)
    torch.manual_seed(99)
    assert load_checkpoint(tmp_path, other, fresh) == {"step": 3, "samples": 12}
    assert torch.equal(torch.randn(4), expected)  # the random state is the saved one
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two) or not one.requires_grad
    for one, two in zip(model[1].parameters(), other[1].parameters(), strict=True):
        assert optimizer.state[one].keys() == fresh.state[two].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(optimizer.state[one][kind], fresh.state[two][kind]) for kind in optimizer.state[one])
    torch.testing.assert_close(list(other.parameters()), list(model.parameters()))


def test_a_checkpoint_holds_what_learns_and_no_pickle(tmp_path):
    folder = save_checkpoint(tmp_path, *trained(), {"step": 1}, keep=2)
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "optimizer.safetensors", "state.json"}
    safetensors = pytest.importorskip("safetensors.torch")
    assert safetensors.load_file(folder / "model.safetensors").keys() == {"1.weight", "1.bias"}


def test_the_newest_are_kept_by_number_and_half_written_ones_do_not_count(tmp_path):
    model, optimizer = trained()
    (tmp_path / "checkpoints" / ".step_99.tmp").mkdir(parents=True)
    for step in (8, 9, 10, 11):
        save_checkpoint(tmp_path, model, optimizer, {"step": step}, keep=2)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step_10", "step_11"]
    assert load_checkpoint(tmp_path, model, optimizer) == {"step": 11}


def test_another_run_is_refused(tmp_path):
    model, optimizer = trained()
    with pytest.raises(NanoVLMError, match="holds no checkpoint"):
        load_checkpoint(tmp_path, model, optimizer)
    save_checkpoint(tmp_path, model, optimizer, {"step": 1}, keep=1)
    with pytest.raises(NanoVLMError, match=r"has no 1.weight of shape \(5, 3\)"):
        load_checkpoint(tmp_path, *trained(width=5))
    model[1].weight.requires_grad_(False)
    with pytest.raises(NanoVLMError, match="also trained 1.weight"):
        load_checkpoint(tmp_path, model, optimizer)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_an_error_that_names_the_file(tmp_path, name):
    folder = save_checkpoint(tmp_path, *trained(), {"step": 1}, keep=1)
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(NanoVLMError, match=name):
        load_checkpoint(tmp_path, *trained())
