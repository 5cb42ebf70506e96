"""Batches prepared by worker processes ahead of the step; signals, and workers that die."""

import atexit
import multiprocessing
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from nanovlm.errors import NanoVLMError
from nanovlm.utils.console import first_line


def prepare_ahead(
    dataset: Dataset, first: int, last: int, workers: int, pin_memory: bool = False
) -> Iterator[Any]:
    """Items `first` to `last` - 1 in order, prepared by `workers` processes, two ahead each.

    With 0 workers, this process prepares an item when it is asked for. The processes start at once.
    If one of them dies, asking for the next item raises NanoVLMError.
    """
    child_died = getattr(signal, "SIGCHLD", None)  # missing on Windows
    handler = signal.getsignal(child_died) if child_died else None
    others = multiprocessing.active_children()
    # A random generator of its own, because a loader draws a number when it starts, and a resumed
    # run starts one loader more.
    loader = iter(
        DataLoader(
            dataset,
            batch_size=None,
            sampler=range(first, last),
            num_workers=workers,
            pin_memory=pin_memory,
            worker_init_fn=_leave_signals_to_the_parent,
            generator=torch.Generator(),
        )
    )
    if child_died and threading.current_thread() is threading.main_thread():
        # The loader's own handler would raise in the middle of whatever runs when a worker dies.
        signal.signal(child_died, handler)
    for process in multiprocessing.active_children():
        if process not in others:
            # If the run exits early, Python would send SIGTERM, which workers ignore, and wait.
            atexit.register(process.kill)
    return _watched(loader)


def _watched(loader: Iterator[Any]) -> Iterator[Any]:
    while True:
        try:
            item = next(loader)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader worker (pid" not in str(error):
                raise
            raise NanoVLMError(
                f"a process that prepares batches died ({first_line(error)}); if memory ran out, "
                "lower --workers; if not, --workers 0 shows what happened"
            ) from None
        yield item


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C reaches all processes of a terminal, and SIGTERM often all of a job.

    The parent still needs batches to finish its last step, and ends its workers itself; if it is
    gone, they end by themselves.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
