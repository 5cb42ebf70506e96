"""Checkpoints: trainable parameters, the optimizer's state, and the place in the data. No pickles.

    checkpoints/step_N/model.safetensors      the trainable parameters
    checkpoints/step_N/optimizer.safetensors  the optimizer's state
    checkpoints/step_N/state.json             counters; with the seed, they determine which data and
                                              random numbers come next
    checkpoints/step_N/SHA256SUMS             a digest of each of them (`sha256sum -c` reads it)

A checkpoint is written under a hidden name and renamed last: whatever kills the process, a folder
`step_N` is whole. Whatever else lies beside them, such as a copy of one, is left alone.
"""

import errno
import hashlib
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanovlm.errors import NanoVLMError, quoted
from nanovlm.hub.loading import open_checkpoint
from nanovlm.hub.names import refuse_old_names
from nanovlm.hub.safetensors import save_file
from nanovlm.training.distributed.shares import gather, scatter, wait
from nanovlm.training.monitor.log import is_finite
from nanovlm.training.optim.adamw import moment_forms
from nanovlm.training.presets import read_tables
from nanovlm.training.settings import Settings, to_toml
from nanovlm.utils.config import from_dict
from nanovlm.utils.console import say
from nanovlm.utils.files import flush_folder, read_json, read_text, write_atomically, write_json
from nanovlm.utils.processes import is_main

WEIGHTS, MOMENTS, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
SUMS = "SHA256SUMS"
LOGS = {"metrics.jsonl", "samples.jsonl", "bad_steps.jsonl"}
# What a run folder holds before the first step.
PREPARED = {"settings.toml", "reference.jsonl", "track_id", "tensorboard", "wandb", "swanlab"}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class NoRoomError(NanoVLMError):
    """A checkpoint did not fit on the disk. Earlier ones are untouched."""


@dataclass
class Progress:
    """How far a run is, all processes together. A checkpoint keeps all of it."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    images: int = 0
    slots: int = 0  # positions of the batches, padding included
    loss_sum: float = 0.0  # this and the next two: of the steps since the last log line
    target_count: int = 0  # labelled tokens, or pairs
    measures: list[float] = field(default_factory=list)  # sums of the objective's metrics
    bad_in_a_row: int = 0
    best_val_loss: float | None = None


def check_run_folder(run: Path, resume: bool) -> None:
    """Refuse to write over another run or anything else, and to continue a run that is finished.

    A run that has taken no step, stopped perhaps by its data, has learned nothing that could be
    lost: another one may take its place.
    """
    model, names = run / "model", {path.name for path in run.iterdir() if path.name[0] != "."}
    if model.exists() and resume:
        raise NanoVLMError(f"{run}: this run is finished, its model is in {model}")
    if resume or not names or _took_no_step(run, names):
        return
    if not names & {"settings.toml", "metrics.jsonl", "checkpoints"}:
        raise NanoVLMError(
            f"{run}: holds {min(names)}, which is of no run; name another folder with --out"
        )
    if model.exists():
        raise NanoVLMError(
            f"{run}: holds another run, which is finished; name another folder with --out"
        )
    raise NanoVLMError(
        f"{run}: holds another run; continue it with --resume, or name another folder with --out"
    )


def _took_no_step(run: Path, names: set[str]) -> bool:
    """Whether `names`, all that is in the folder `run`, are of a run before its first step."""
    checkpoints, settings = run / "checkpoints", run / "settings.toml"
    if not names <= PREPARED | LOGS | {checkpoints.name} or any(
        (run / name).stat().st_size for name in names & LOGS
    ):
        return False
    if checkpoints.exists() and any(path.name[0] != "." for path in checkpoints.iterdir()):
        return False
    try:  # what a user wrote by hand stays
        written = to_toml(from_dict(Settings, read_tables(settings), where=str(settings)))
        return read_text(settings) == written
    except NanoVLMError:
        return False


def save_checkpoint(
    run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep: int
) -> Path:
    """Write `run/checkpoints/step_N`, N being `state["progress"]["step"]`; replaces an older one.

    Afterwards the newest `keep` remain, and the one with the smallest `state["val_loss"]`. Raises
    NoRoomError when the disk is full. Of several processes all have to call it and rank 0 writes;
    the files do not depend on how many there are.
    """
    folder = run / "checkpoints" / f"step_{state['progress']['step']}"
    temporary = folder.with_name(f".{folder.name}.tmp")
    weights, moments = _gathered(_trainable(model)), _gathered(_moments(model, optimizer))
    if not is_main():
        return folder
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_file(weights, temporary / WEIGHTS)
        save_file(moments, temporary / MOMENTS)
        write_json(temporary / STATE, state)
        files = (WEIGHTS, MOMENTS, STATE)
        sums = "".join(f"{_digest(temporary / name)}  {name}\n" for name in files)
        write_atomically(temporary / SUMS, sums)
    except (OSError, NanoVLMError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if getattr(error.__cause__ or error, "errno", None) not in FULL:
            raise
        size = sum(tensor.nbytes for tensor in (*weights.values(), *moments.values()))
        raise _no_room(folder, size) from None
    _discard(folder)
    os.rename(temporary, folder)
    flush_folder(folder.parent)
    _prune(run, keep)
    return folder


def load_checkpoint(
    run: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Restore the newest whole checkpoint of `run` into `model` and `optimizer`; returns its state.

    A damaged one is reported and renamed to `damaged_step_N`, and the one before it is taken. What
    is whole and yet not of this run, or of another version, is refused by name.
    """
    if is_main():
        _set_damaged_aside(run)
    wait()
    if not (whole := list_checkpoints(run)):
        raise NanoVLMError(
            f"{run}: holds no whole checkpoint to resume from; "
            "start the run without --resume in another folder"
        )
    _restore(whole[-1], model, optimizer)
    return read_json(whole[-1] / STATE)


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = {
        int(name[1]): folder
        for folder in (run / "checkpoints").glob("step_*")
        if (name := re.fullmatch("step_(0|[1-9][0-9]{0,17})", folder.name)) and folder.is_dir()
    }
    return [found[step] for step in sorted(found)]


def dict_at(state: dict[str, Any], key: str, where: Path | str) -> dict[str, Any]:
    """The object under `key` in the state of a checkpoint; an older one may lack it."""
    if not isinstance(found := state.get(key, {}), dict):
        raise NanoVLMError(f"{where}: {key} is {quoted(found)}, expected an object")
    return found


def parse_progress(state: dict[str, Any], where: Path | str) -> Progress:
    """The progress in the state of a checkpoint; `where` begins the message of a NanoVLMError."""
    progress = from_dict(Progress, state["progress"], where=f"{where}: progress")
    numbers = vars(progress) | {"best_val_loss": progress.best_val_loss or 0.0}
    measures = numbers.pop("measures")
    if not isinstance(measures, tuple | list):
        measures = [measures]
    for number in [*numbers.values(), *measures]:
        if not is_finite(number):
            raise NanoVLMError(f"{where}: progress holds {quoted(number)} in place of a number")
    progress.measures = list(measures)
    return progress


def _no_room(folder: Path, size: int) -> NoRoomError:
    run = folder.parents[1]
    whole = list_checkpoints(run)
    free = shutil.disk_usage(run).free
    advice = f"{whole[-1].name} stays and --resume goes on from it" if whole else ""
    return NoRoomError(
        f"{folder}: no room for this checkpoint, which takes {size / 1e6:,.1f} MB where "
        f"{free / 1e6:,.1f} MB are free; {advice or 'there is none before it'} once there is room"
    )


def _set_damaged_aside(run: Path) -> None:
    for folder in reversed(list_checkpoints(run)):
        if not (damage := _damage(folder)):
            return
        aside = folder.with_name(f"damaged_{folder.name}")
        _discard(aside)
        os.rename(folder, aside)
        say(f"{folder}: {damage}; set aside as {aside.name}, resuming from the one before it")


def _damage(folder: Path) -> str:
    """What is wrong with a checkpoint; empty if nothing is."""
    for name in (SUMS, WEIGHTS, MOMENTS, STATE):
        if not (folder / name).is_file():
            return f"{name} is missing"
    lines = (folder / SUMS).read_text(errors="replace").splitlines()
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    for name in (WEIGHTS, MOMENTS, STATE):
        if name not in sums:
            return f"{SUMS} is damaged: it has no line for {name}"
        if sums[name] != _digest(folder / name):
            return f"{name} is damaged: its SHA-256 is not the one in {SUMS}"
    try:
        progress = read_json(folder / STATE).get("progress")
    except NanoVLMError as error:
        return str(error)
    step = progress.get("step") if isinstance(progress, dict) else None
    if folder.name != f"step_{step}":
        return f"is not what its name says, since {STATE} has step {quoted(step)}"
    return ""


def _restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    trainable = _trainable(model)
    weights, moments = open_checkpoint(folder / WEIGHTS), open_checkpoint(folder / MOMENTS)
    refuse_old_names(weights.keys(), folder)
    kinds: dict[str, set[str]] = {}  # of each parameter's optimizer state
    for key in moments.keys():
        kind, _, name = key.partition("/")
        kinds.setdefault(name, set()).add(kind)
    if extra := (set(weights.keys()) | set(kinds)) - set(trainable):
        raise NanoVLMError(
            f"{folder}: also trained {quoted(min(extra))}; resume with the settings of the run"
        )
    for name, parameter in trainable.items():
        if name not in weights.keys() or weights.shape(name) != tuple(parameter.shape):
            raise NanoVLMError(
                f"{folder}: has no {name} of shape {tuple(parameter.shape)}; "
                "resume with the settings of the run"
            )
        parameter.data.copy_(scatter(weights.tensor(name), parameter))
        state = {kind: moments.tensor(f"{kind}/{name}") for kind in kinds.get(name, ())}
        _check_moments(state, name, parameter, optimizer, folder / MOMENTS)
        optimizer.state[parameter] = {
            kind: scatter(tensor, parameter) for kind, tensor in state.items()
        }


def _check_moments(
    state: dict[str, Tensor],
    name: str,
    parameter: Tensor,
    optimizer: torch.optim.Optimizer,
    path: Path,
) -> None:
    """Refuse what the optimizer would not have kept for a parameter; nothing, if it had no step."""
    eight_bit = getattr(optimizer, "eight_bit", False)  # which may go on from moments in fp32
    found = {kind: (tensor.dtype, tuple(tensor.shape)) for kind, tensor in state.items()}
    if state and found not in (moment_forms(parameter, eight_bit), moment_forms(parameter, False)):
        raise NanoVLMError(
            f"{path}: its tensors of {name} are not what this optimizer keeps; "
            "resume with the settings of the run"
        )


def _prune(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` and the best, and what a killed process left unfinished."""
    whole = list_checkpoints(run)
    losses = {folder: loss for folder in whole if (loss := _val_loss(folder)) is not None}
    best = min(losses, key=lambda folder: losses[folder], default=None)
    for old in whole[:-keep]:
        if old != best:
            _discard(old)
    for leftover in (run / "checkpoints").glob(".step_*"):
        if re.fullmatch(r"[.]step_[0-9]+[.](tmp|old)", leftover.name):
            shutil.rmtree(leftover, ignore_errors=True)


def _val_loss(folder: Path) -> float | None:
    try:
        loss = read_json(folder / STATE).get("val_loss")
    except NanoVLMError:  # damaged; reported if a run ever has to resume from it
        return None
    return loss if is_finite(loss) else None


def _discard(folder: Path) -> None:
    """Remove a checkpoint, renamed first, so that half of one is never taken for a whole one."""
    if folder.is_dir():
        hidden = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(hidden, ignore_errors=True)
        os.rename(folder, hidden)
        if hidden.is_symlink():  # to where the user has moved it, which stays
            hidden.unlink()
        else:
            shutil.rmtree(hidden)
    elif os.path.lexists(folder):  # no checkpoint, and in its place
        os.rename(folder, folder.with_name(f"{folder.name}.{os.getpid()}"))


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters()
    return {name: parameter for name, parameter in named if parameter.requires_grad}


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{kind}/{name}": tensor
        for name, parameter in _trainable(model).items()
        for kind, tensor in optimizer.state[parameter].items()
    }


def _gathered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The whole of each tensor, in rank 0."""
    whole = {name: gather(tensor) for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in whole.items() if tensor is not None}
