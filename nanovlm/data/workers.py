"""Batches prepared by worker processes ahead of the step; signals, and workers that die."""

import atexit
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from nanovlm.errors import NanoVLMError, see
from nanovlm.utils.console import first_line
from nanovlm.utils.processes import processes_here

MOST_WORKERS = 8  # that are started without being asked for
SHARED_MEMORY = "/dev/shm"  # through which they hand over tensors; a container may have 64 MB of it
LEAST_SHARED_MEMORY = 2**30


class Loading(NamedTuple):
    """How batches are loaded: by how many worker processes, and whether they go on to a GPU."""

    workers: int = 0
    pin_memory: bool = False


IN_THIS_PROCESS = Loading()


def choose_loading(workers: int | str, device: torch.device) -> tuple[Loading, str]:
    """The loading for a device, and what to say about it ("": nothing).

    `workers` may be "auto": where a GPU waits for batches, a process per core, 8 at most, shared by
    the processes of torchrun on this machine; elsewhere none.
    """
    pin_memory = device.type == "cuda"
    if not isinstance(workers, str):
        return Loading(workers, pin_memory), ""
    if not pin_memory:
        return IN_THIS_PROCESS, ""
    none = "no processes prepare batches in advance: "
    if sys.platform != "linux":
        why = "on this system each would load PyTorch anew; --workers 2 starts two"
        return Loading(0, pin_memory), none + why
    if (free := shutil.disk_usage(SHARED_MEMORY).free) < LEAST_SHARED_MEMORY:
        room = f"{SHARED_MEMORY} has {free / 1e6:.0f} MB free"
        why = f"{room}; docker run --shm-size 8g gives more; {see('workers')}"
        return Loading(0, pin_memory), none + why
    cores = len(os.sched_getaffinity(0)) // processes_here()
    workers = max(1, min(MOST_WORKERS, cores))
    return Loading(workers, pin_memory), f"{workers} processes prepare batches in advance"


def prepare_ahead(
    dataset: Dataset, first: int, last: int, loading: Loading = IN_THIS_PROCESS
) -> Iterator[Any]:
    """Items `first` to `last` - 1 in order, prepared by worker processes, two ahead each.

    With 0 workers, this process prepares an item when it is asked for. The processes start at once.
    If one of them dies, asking for the next item raises NanoVLMError.
    """
    child_died = getattr(signal, "SIGCHLD", None)  # missing on Windows
    handler = signal.getsignal(child_died) if child_died else None
    others = multiprocessing.active_children()
    workers = min(loading.workers, max(last - first, 0))
    # Python 3.14 would start interpreters that each load PyTorch anew, which takes seconds.
    context = "fork" if workers and sys.platform == "linux" else None
    # A random generator of its own, because a loader draws a number when it starts, and a resumed
    # run starts one loader more.
    loader = iter(
        DataLoader(
            dataset,
            batch_size=None,
            sampler=range(first, last),
            num_workers=workers,
            multiprocessing_context=context,
            pin_memory=loading.pin_memory,
            worker_init_fn=_follow_the_parent,
            generator=torch.Generator(),
        )
    )
    if child_died and threading.current_thread() is threading.main_thread():
        # The loader's own handler would raise in the middle of whatever runs when a worker dies.
        signal.signal(child_died, handler)
    started = [process for process in multiprocessing.active_children() if process not in others]
    for process in started:
        # If the run exits early, Python would send SIGTERM, which workers ignore, and wait.
        atexit.register(process.kill)
    return _watched(loader, started)


# What PyTorch says where a worker is gone: itself, or by the thread that pins what it sent.
_DEATHS = ("DataLoader worker (pid", "Pin memory thread exited")

# Loaders that were not read to their end, kept so that PyTorch does not shut them down: it would
# wait for the batches that workers are at, and for ever for a lock that a killed one held.
_given_up: list[Iterator[Any]] = []


def _watched(loader: Iterator[Any], started: Sequence[BaseProcess]) -> Iterator[Any]:
    is_done = False
    try:
        yield from loader
        is_done = True
    except RuntimeError as error:
        if not str(error).startswith(_DEATHS):
            raise
        raise NanoVLMError(
            f"a process that prepares batches died ({first_line(error)}); if memory ran out, "
            f"or {SHARED_MEMORY}, lower --workers; if not, --workers 0 shows what happened; "
            f"{see('workers')}"
        ) from None
    finally:
        for process in started:
            atexit.unregister(process.kill)
        if not is_done:
            _given_up.append(loader)
            for process in started:
                process.kill()
                process.join()


def _follow_the_parent(worker: int) -> None:
    """Leave signals to the parent, and say nothing of it where it stops reading.

    Ctrl-C reaches all processes of a terminal, and SIGTERM often all of a job. The parent still
    needs batches to finish its last step, and ends its workers itself; if it is gone, they end by
    themselves. Either may happen in the middle of a batch, whose tensors a thread of the worker
    hands over; multiprocessing would print a traceback for it.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = _print_unless_the_parent_stopped_reading


def _print_unless_the_parent_stopped_reading(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)
