"""Checkpoints: trainable parameters, the optimizer's state, and the place in the data. No pickles.

    checkpoints/step_N/model.safetensors      the trainable parameters
    checkpoints/step_N/optimizer.safetensors  the optimizer's state
    checkpoints/step_N/state.json             counters; with the seed, they determine which data and
                                              random numbers come next
    checkpoints/step_N/SHA256SUMS             a digest of each of them (`sha256sum -c` reads it)

A checkpoint is written under a hidden name and renamed last: whatever kills the process, a folder
`step_N` is whole.
"""

import errno
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanovlm.errors import NanoVLMError
from nanovlm.hub.loading import open_checkpoint
from nanovlm.hub.names import refuse_old_names
from nanovlm.hub.safetensors import save_file
from nanovlm.training.distributed.shares import gather, scatter, wait
from nanovlm.utils.console import say
from nanovlm.utils.files import flush_folder, read_json, write_atomically, write_json
from nanovlm.utils.processes import is_main

WEIGHTS, MOMENTS, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
SUMS = "SHA256SUMS"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class NoRoomError(NanoVLMError):
    """A checkpoint did not fit on the disk. Earlier ones are untouched."""


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

    A damaged one is reported and renamed to `damaged_step_N`, and the one before it is taken.
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
    return sorted(
        (run / "checkpoints").glob("step_*"),
        key=lambda folder: int(folder.name.removeprefix("step_")),
    )


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
    return ""


def _restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    trainable = _trainable(model)
    weights, moments = open_checkpoint(folder / WEIGHTS), open_checkpoint(folder / MOMENTS)
    refuse_old_names(weights.keys(), folder)
    kinds: dict[str, list[str]] = {}  # of each parameter's optimizer state
    for key in moments.keys():
        kind, name = key.split("/", 1)
        kinds.setdefault(name, []).append(kind)
    for name, parameter in trainable.items():
        if name not in weights.keys() or weights.shape(name) != tuple(parameter.shape):
            raise NanoVLMError(
                f"{folder}: has no {name} of shape {tuple(parameter.shape)}; "
                "resume with the settings of the run"
            )
        parameter.data.copy_(scatter(weights.tensor(name), parameter))
        optimizer.state[parameter] = {
            kind: scatter(moments.tensor(f"{kind}/{name}"), parameter)
            for kind in kinds.get(name, ())
        }
    if extra := set(weights.keys()) - set(trainable):
        raise NanoVLMError(
            f"{folder}: also trained {min(extra)}; resume with the settings of the run"
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
        shutil.rmtree(leftover)


def _val_loss(folder: Path) -> float | None:
    try:
        return read_json(folder / STATE).get("val_loss")
    except NanoVLMError:  # damaged; reported if a run ever has to resume from it
        return None


def _discard(folder: Path) -> None:
    """Remove a checkpoint, renamed first, so that half of one is never taken for a whole one."""
    if folder.exists():
        hidden = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(hidden, ignore_errors=True)
        os.rename(folder, hidden)
        shutil.rmtree(hidden)


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
