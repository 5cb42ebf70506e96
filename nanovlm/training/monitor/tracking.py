"""`--track`: the numbers of metrics.jsonl and the strip of samples, also sent to TensorBoard, Weights & Biases or SwanLab.

None of the packages is needed otherwise. `metrics.jsonl` is the record; a tracker that fails is reported and left alone.
"""

import dataclasses
import importlib
import secrets
import string
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from nanovlm.errors import NanoVLMError
from nanovlm.inputs.image import open_image
from nanovlm.training.settings import Settings
from nanovlm.utils.console import say
from nanovlm.utils.files import write_atomically

MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "swanlab": "swanlab"}
PROJECT = "nanovlm"


class Tracker:
    """Passes on what it is given to the service that `connect` opens, until that fails; without one, does nothing."""

    def __init__(self, name: str = "", connect: Callable[[int], Any] | None = None) -> None:
        self._name, self._connect, self._service = name, connect, None

    def start(self, step: int) -> None:
        """Open the service for a run that is at `step`: 0, or that of the checkpoint it resumes from."""
        if self._connect is not None:
            self._service = self._guarded(self._connect, step)

    def log(self, line: dict[str, Any]) -> None:
        """The numbers of one line of metrics.jsonl."""
        numbers = {
            key: value
            for key, value in line.items()
            if key != "step" and isinstance(value, int | float)
        }
        if self._service is not None:
            self._guarded(self._service.log, numbers, line["step"])

    def image(self, name: str, path: Path, step: int) -> None:
        """A picture, if it has been drawn."""
        if self._service is not None and path.exists():
            self._guarded(self._service.image, name, path, step)

    def close(self) -> None:
        """Send what is left."""
        if self._service is not None:
            self._guarded(self._service.close)
            self._service = None

    def _guarded(self, call: Callable, *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except Exception as error:  # whatever a foreign package may raise
            reason = " ".join(str(error).split())
            say(
                f"--track {self._name} failed ({type(error).__name__}: {reason}) and is left alone; "
                "the training goes on, and metrics.jsonl has every line"
            )
            self._service = None
            return None


def build_tracker(settings: Settings, run: Path) -> Tracker:
    """The tracker that `settings.track` names, imported and not yet opened; NanoVLMError if its package is missing."""
    if not settings.track:
        return Tracker()
    try:
        module = importlib.import_module(MODULES[settings.track])
    except Exception as error:  # missing, or broken inside
        raise NanoVLMError(
            f"--track {settings.track}: its package cannot be imported ({' '.join(str(error).split())}); "
            f"python -m pip install {settings.track}"
        ) from None
    service = {"tensorboard": _TensorBoard, "wandb": _WandB, "swanlab": _SwanLab}[settings.track]
    return Tracker(settings.track, lambda step: service(module, settings, run, step))


class _TensorBoard:
    """Event files in `run/tensorboard`; those of steps that a resumed run takes again are hidden."""

    def __init__(self, module: ModuleType, settings: Settings, run: Path, step: int) -> None:
        self._writer = module.SummaryWriter(
            str(run / "tensorboard"), purge_step=step + 1 if step else None
        )

    def log(self, numbers: dict[str, float], step: int) -> None:
        for key, value in numbers.items():
            self._writer.add_scalar(key, value, step)

    def image(self, name: str, path: Path, step: int) -> None:
        self._writer.add_image(name, np.asarray(open_image(path)), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class _Online:
    """One run of a service for one run folder, however often it is resumed. `_run` is what the service logs to."""

    _module: ModuleType
    _run: Any

    def log(self, numbers: dict[str, float], step: int) -> None:
        self._run.log(numbers, step=step)

    def image(self, name: str, path: Path, step: int) -> None:
        self._run.log({name: self._module.Image(str(path))}, step=step)

    def close(self) -> None:
        self._run.finish()


class _WandB(_Online):
    """`WANDB_MODE=offline` works as always."""

    def __init__(self, module: ModuleType, settings: Settings, run: Path, step: int) -> None:
        self._module = module
        self._run = module.init(
            project=PROJECT,
            name=run.resolve().name,
            id=_service_id(run),
            resume="allow",
            dir=str(run),
            config=_config(settings),
            allow_val_change=True,
        )


class _SwanLab(_Online):
    """`SWANLAB_MODE` works as always. The package itself logs to the run it has opened."""

    def __init__(self, module: ModuleType, settings: Settings, run: Path, step: int) -> None:
        self._module = self._run = module
        module.init(
            project=PROJECT,
            experiment_name=run.resolve().name,
            id=_service_id(run),
            resume="allow",
            logdir=str(run / "swanlab"),
            config=_config(settings),
        )


def _service_id(run: Path) -> str:
    """The id under which the services know this run folder, kept in it: 21 small letters and digits, as SwanLab wants."""
    path = run / "track_id"
    if not path.exists():
        alphabet = string.ascii_lowercase + string.digits
        write_atomically(path, "".join(secrets.choice(alphabet) for _ in range(21)) + "\n")
    return path.read_text(encoding="utf-8").strip()


def _config(settings: Settings) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(settings).items() if name != "resume"}
