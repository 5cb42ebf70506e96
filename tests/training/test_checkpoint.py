"""Checkpoints: whole or absent, the newest few, and refused when they are not this run's."""

import errno
import hashlib
import math
import os
import shutil

import pytest
import torch
from torch import nn

from nanovlm.errors import NanoVLMError
from nanovlm.hub.loading import open_checkpoint
from nanovlm.hub.safetensors import save_file
from nanovlm.training.checkpoint import (
    NoRoomError,
    Progress,
    check_run_folder,
    list_checkpoints,
    load_checkpoint,
    parse_progress,
    save_checkpoint,
)
from nanovlm.training.optim.adamw import LeanAdamW
from nanovlm.training.settings import Settings, to_toml


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
    with pytest.raises(NanoVLMError, match="also trained '1.weight'"):
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


def test_copies_and_files_beside_the_checkpoints_are_left_alone(tmp_path, capsys):
    model, optimizer = trained()
    folder = save_checkpoint(tmp_path, model, optimizer, {"progress": {"step": 2}}, keep=1)
    copies = [
        "step_2.bak", "step_2 copy", "step_02", "step_２", "step_", "step_x", "step_-1",
        "step_" + "9" * 99, ".step_backup", "best",
    ]  # fmt: skip
    for name in copies:
        shutil.copytree(folder, folder.with_name(name))
    (folder.parent / "notes.txt").write_text("mine")
    (folder.parent / "step_5").write_text("mine")
    assert load_checkpoint(tmp_path, model, optimizer) == {"progress": {"step": 2}}
    for step in (4, 5):
        save_checkpoint(tmp_path, model, optimizer, {"progress": {"step": step}}, keep=1)
    kept = {*copies, "notes.txt", "step_5", f"step_5.{os.getpid()}"}
    assert {path.name for path in folder.parent.iterdir()} == kept
    assert (folder.parent / f"step_5.{os.getpid()}").read_text() == "mine"
    assert capsys.readouterr().err == ""


def test_a_copy_under_the_name_of_another_step_is_not_resumed_from(tmp_path, capsys):
    model, optimizer = trained()
    folder = save_checkpoint(tmp_path, model, optimizer, {"progress": {"step": 2}}, keep=1)
    shutil.copytree(folder, folder.with_name("step_9"))
    assert load_checkpoint(tmp_path, model, optimizer) == {"progress": {"step": 2}}
    assert "step_9: is not what its name says, since state.json has step 2" in (
        capsys.readouterr().err
    )
    assert (folder.with_name("damaged_step_9") / "state.json").exists()


def test_a_checkpoint_that_was_moved_elsewhere_and_linked_stays_where_it_is(tmp_path):
    model, optimizer = trained()
    folder = save_checkpoint(tmp_path, model, optimizer, {"progress": {"step": 1}}, keep=1)
    shutil.move(folder, tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert load_checkpoint(tmp_path, model, optimizer) == {"progress": {"step": 1}}
    save_checkpoint(tmp_path, model, optimizer, {"progress": {"step": 2}}, keep=1)
    assert [path.name for path in folder.parent.iterdir()] == ["step_2"]
    assert (tmp_path / "elsewhere" / "state.json").exists()


def sign(folder, name: str) -> None:
    """Write the digest of a changed file of a checkpoint."""
    sums = (folder / "SHA256SUMS").read_text().splitlines()
    digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    lines = [f"{digest}  {name}" if line.endswith(f"  {name}") else line for line in sums]
    (folder / "SHA256SUMS").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("eight_bit", [False, True])
def test_optimizer_state_of_another_form_is_refused_by_name(tmp_path, eight_bit):
    model, _ = trained()
    model[1].requires_grad_(True)
    optimizer = LeanAdamW(model[1].parameters(), eight_bit=eight_bit)
    model(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    for name, tensor, expected in (
        ("exp_avg/1.weight", None, "its tensors of 1.weight are not what this optimizer keeps"),
        ("exp_avg/1.weight", torch.zeros(2), "its tensors of 1.weight are not what"),
        ("exp_avg/1.bias", torch.zeros(3, dtype=torch.uint8), "its tensors of 1.bias are not what"),
        ("step/1.bias", torch.zeros(2), "its tensors of 1.bias are not what"),
        ("max_exp_avg_sq/1.bias", torch.zeros(3), "its tensors of 1.bias are not what"),
        ("exp_avg/9.bias", torch.zeros(3), "also trained '9.bias'"),
        ("loose", torch.zeros(3), "also trained ''"),
    ):
        folder = save_checkpoint(tmp_path, model, optimizer, {"progress": {"step": 1}}, keep=1)
        moments = open_checkpoint(folder / "optimizer.safetensors")
        tensors = {key: moments.tensor(key).clone() for key in moments.keys()}
        tensors = {**tensors, name: tensor}
        if tensor is None:
            del tensors[name]
        save_file(tensors, folder / "optimizer.safetensors")
        sign(folder, "optimizer.safetensors")
        with pytest.raises(NanoVLMError) as caught:
            load_checkpoint(tmp_path, model, optimizer)
        assert expected in str(caught.value) and "step_1" in str(caught.value)


def test_moments_in_fp32_may_go_on_in_eight_bits(tmp_path):
    model, optimizer = trained()
    save_checkpoint(tmp_path, model, optimizer, {"progress": {"step": 1}}, keep=1)
    other = LeanAdamW(model[1].parameters(), eight_bit=True)
    load_checkpoint(tmp_path, model, other)
    assert other.state[model[1].weight]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize(
    ("progress", "expected"),
    [
        ([], "state.json: progress: expected a table"),
        ({"step": 1, "steps": 2}, "unknown key 'steps'"),
        ({"step": 1, "samples": "4"}, "samples is '4', expected a whole number"),
        ({"step": 1, "tokens": True}, "tokens is True"),
        ({"step": 1, "measures": ["x"]}, "measures is ['x'], expected a list, each a number"),
        ({"step": 1, "measures": 3.5}, "measures is 3.5, expected a list, each a number"),
        ({"step": 1, "measures": {}}, "measures is {}, expected a list, each a number"),
        ({"step": 1, "best_val_loss": "low"}, "best_val_loss is 'low', expected a number or null"),
        ({"step": 1, "best_val_loss": math.nan}, "progress holds nan in place of a number"),
        ({"step": 1, "loss_sum": math.inf}, "progress holds inf in place of a number"),
        ({"step": 1, "loss_sum": 10**400}, "in place of a number"),
    ],
)
def test_a_state_with_other_keys_or_types_is_refused_by_name(progress, expected):
    with pytest.raises(NanoVLMError) as caught:
        parse_progress({"progress": progress}, "step_1/state.json")
    assert expected in str(caught.value) and str(caught.value).startswith("step_1/state.json: ")


def test_progress_comes_back_as_it_was():
    progress = Progress(step=7, samples=3, loss_sum=1.5, measures=[1.0, 2], best_val_loss=0.5)
    assert parse_progress({"progress": vars(progress)}, "") == progress
    assert parse_progress({"progress": {"step": 1}}, "") == Progress(step=1)


def prepared(run, **changes):
    """A run folder before its first step."""
    run.mkdir(parents=True)
    (run / "settings.toml").write_text(to_toml(Settings(out=str(run), **changes)))
    return run


def test_a_run_of_no_steps_is_replaced_and_everything_else_stays(tmp_path):
    check_run_folder(tmp_path, resume=False)
    run = prepared(tmp_path / "run", system="\x7f{assets}")
    check_run_folder(run, resume=False)
    for name in ("reference.jsonl", "metrics.jsonl", ".lock"):
        (run / name).write_text("")
    (run / "checkpoints" / ".step_2.tmp").mkdir(parents=True)
    (run / "tensorboard").mkdir()
    check_run_folder(run, resume=False)
    taken = "holds another run; continue it with --resume, or name another folder with --out"
    for number, (name, expected) in enumerate(
        (
            ("metrics.jsonl", taken),
            ("bad_steps.jsonl", taken),
            ("checkpoints/step_1/state.json", taken),
            ("checkpoints/step_1.bak/state.json", taken),
            ("notes.txt", taken),
            ("model/config.json", "holds another run, which is finished; name another folder"),
        )
    ):
        run = prepared(tmp_path / str(number))
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("{}\n")
        with pytest.raises(NanoVLMError, match=expected):
            check_run_folder(run, resume=False)
    with pytest.raises(NanoVLMError, match="this run is finished, its model is in"):
        check_run_folder(run, resume=True)
    for text in ("lr = 1e-3\n", "lr = [", to_toml(Settings()) + "# mine\n"):
        (tmp_path / "run" / "settings.toml").write_text(text)  # a user's own
        with pytest.raises(NanoVLMError, match=taken):
            check_run_folder(tmp_path / "run", resume=False)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("")
    with pytest.raises(NanoVLMError, match="photos: holds cat.jpg, which is of no run; name"):
        check_run_folder(tmp_path / "photos", resume=False)
