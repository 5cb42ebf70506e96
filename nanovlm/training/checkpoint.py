"""Checkpoints: what learns, the optimizer, the random states and the place in the data. No pickles.

    checkpoints/step_N/model.safetensors      the parameters that learn
    checkpoints/step_N/optimizer.safetensors  AdamW's moments, and the random states as bytes
    checkpoints/step_N/state.json             counters; the folder gets its name last, so a folder is whole
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nanovlm.errors import NanoVLMError, is_main
from nanovlm.files import read_json, write_atomically
from nanovlm.training.parallel import gather, scatter
from nanovlm.weights.loading import open_checkpoint
from nanovlm.weights.safetensors import save_file


def save_checkpoint(run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep: int) -> Path:
    """Write `run/checkpoints/step_N` (N is `state["step"]`) and remove all but the newest `keep`.

    Of several processes all have to call it and rank 0 writes. The files do not tell how many there were.
    """
    folder = run / "checkpoints" / f"step_{state['step']}"
    if folder.exists():
        return folder
    weights = {name: gather(parameter) for name, parameter in _trained(model).items()}
    moments = {name: gather(tensor) for name, tensor in _moments(model, optimizer).items()}
    if not is_main():
        return folder
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(weights, temporary / "model.safetensors")
    save_file({**moments, **_random_states()}, temporary / "optimizer.safetensors")
    write_atomically(temporary / "state.json", json.dumps(state, indent=2) + "\n")
    os.rename(temporary, folder)
    for old in list_checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return folder


def load_checkpoint(run: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore the newest checkpoint of `run` into `model` and `optimizer`; returns its state."""
    folders = list_checkpoints(run)
    if not folders:
        raise NanoVLMError(f"{run}: holds no checkpoint to resume from; start the run without --resume")
    folder = folders[-1]
    state = read_json(folder / "state.json")
    trained = _trained(model)
    weights, moments = open_checkpoint(folder / "model.safetensors"), open_checkpoint(folder / "optimizer.safetensors")
    for name, parameter in trained.items():
        if name not in weights.keys() or weights.shape(name) != tuple(parameter.shape):
            raise NanoVLMError(f"{folder}: has no {name} of shape {tuple(parameter.shape)}; resume with the settings of the run")
        parameter.data.copy_(scatter(weights.tensor(name), parameter))
        optimizer.state[parameter] = {
            kind: scatter(moments.tensor(f"{kind}/{name}"), parameter)
            for kind in ("step", "exp_avg", "exp_avg_sq") if f"{kind}/{name}" in moments.keys()}
    if extra := set(weights.keys()) - set(trained):
        raise NanoVLMError(f"{folder}: also trained {sorted(extra)[0]}; resume with the settings of the run")
    torch.set_rng_state(moments.tensor("random/cpu").clone())
    if torch.cuda.is_available() and "random/cuda" in moments.keys():
        torch.cuda.set_rng_state(moments.tensor("random/cuda").clone())
    return state


def list_checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step_*"), key=lambda folder: int(folder.name.removeprefix("step_")))


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {f"{kind}/{name}": tensor for name, parameter in _trained(model).items()
            for kind, tensor in optimizer.state[parameter].items()}


def _random_states() -> dict[str, torch.Tensor]:
    states = {"random/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random/cuda"] = torch.cuda.get_rng_state()
    return states
