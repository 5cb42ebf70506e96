"""`--track`: sends log lines and samples to TensorBoard, Weights & Biases or SwanLab as well.

Their packages are needed for that alone. The record of a run is `metrics.jsonl`: a service that
fails is reported and no longer used.
"""

import importlib
import secrets
import string
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from nanovlm.errors import NanoVLMError
from nanovlm.inputs.image import open_image
from nanovlm.utils.console import say
from nanovlm.utils.files import write_atomically

MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "swanlab": "swanlab"}
PROJECT = "nanovlm"


class Tracker:
    """Sends what it is given to the service that `connect` opens, until that one fails.

    Without `connect` it does nothing.
    """

    def __init__(self, name: str = "", connect: Callable[[int], Any] | None = None) -> None:
        self._name, self._connect, self._service = name, connect, None

    def start(self, step: int) -> None:
        """Open the service for a run at `step`: 0, or the step it is resumed from."""
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
        """Send an image file, if it has been written."""
        if self._service is not None and path.exists():
            self._guarded(self._service.image, name, path, step)

    def close(self) -> None:
        """Send what is left and disconnect."""
        if self._service is not None:
            self._guarded(self._service.close)
            self._service = None

    def _guarded(self, call: Callable, *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except Exception as error:  # of any kind: the package is not ours
            reason = " ".join(str(error).split())
            say(
                f"--track {self._name} failed ({type(error).__name__}: {reason}) and is left alone;"
                " the training goes on, and metrics.jsonl has every line"
            )
            self._service = None
            return None


def build_tracker(name: str, run: Path, settings: Mapping[str, Any]) -> Tracker:
    """A tracker for the service `name`, not opened yet; "" is none.

    settings: what the service is to show of the run. Raises NanoVLMError if its package is missing.
    """
    if not name:
        return Tracker()
    try:
        module = importlib.import_module(MODULES[name])
    except Exception as error:  # missing, or broken inside
        raise NanoVLMError(
            f"--track {name}: its package cannot be imported ({' '.join(str(error).split())}); "
            f"python -m pip install {name}"
        ) from None
    shown = {key: value for key, value in settings.items() if key != "resume"}
    service = {"tensorboard": _TensorBoard, "wandb": _WandB, "swanlab": _SwanLab}[name]
    return Tracker(name, lambda step: service(module, shown, run, step))


class _TensorBoard:
    """Event files in `run/tensorboard`; a resumed run hides those of steps that it repeats."""

    def __init__(self, module: ModuleType, settings: dict, run: Path, step: int) -> None:
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
    """One run of a service for one run folder, however often that is resumed.

    _run: what has `log` and `finish`.
    """

    _module: ModuleType
    _run: Any

    def log(self, numbers: dict[str, float], step: int) -> None:
        self._run.log(numbers, step=step)

    def image(self, name: str, path: Path, step: int) -> None:
        self._run.log({name: self._module.Image(str(path))}, step=step)

    def close(self) -> None:
        self._run.finish()


class _WandB(_Online):
    """Weights & Biases; `WANDB_MODE=offline` works as always."""

    def __init__(self, module: ModuleType, settings: dict, run: Path, step: int) -> None:
        self._module = module
        self._run = module.init(
            project=PROJECT,
            name=run.resolve().name,
            id=_service_id(run),
            resume="allow",
            dir=str(run),
            config=settings,
            allow_val_change=True,
        )


class _SwanLab(_Online):
    """SwanLab; `SWANLAB_MODE` works as always. The module itself logs to the run it has opened."""

    def __init__(self, module: ModuleType, settings: dict, run: Path, step: int) -> None:
        self._module = self._run = module
        module.init(
            project=PROJECT,
            experiment_name=run.resolve().name,
            id=_service_id(run),
            resume="allow",
            logdir=str(run / "swanlab"),
            config=settings,
        )


def _service_id(run: Path) -> str:
    """The id of a run folder at the services, kept in it: 21 small letters and digits (SwanLab)."""
    path = run / "track_id"
    if not path.exists():
        alphabet = string.ascii_lowercase + string.digits
        write_atomically(path, "".join(secrets.choice(alphabet) for _ in range(21)) + "\n")
    return path.read_text(encoding="utf-8").strip()
