"""Batches prepared ahead of the step by processes of their own, and what becomes of signals and of a process that dies."""

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
    """Items `first` to `last` - 1 in order, two ahead for each of `workers` processes (0: made here when asked for).

    The processes start at once. Raises NanoVLMError, where the next item is asked for, if one of them has died.
    """
    child_died = getattr(signal, "SIGCHLD", None)  # which Windows lacks
    handler, others = child_died and signal.getsignal(child_died), multiprocessing.active_children()
    # A generator of its own: a loader draws a number when it starts, and a resumed run starts one more loader.
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
        signal.signal(
            child_died, handler
        )  # the loader's own raises amid whatever runs when a worker dies
    for process in multiprocessing.active_children():
        if (
            process not in others
        ):  # at an exit amid the run, where Python would send SIGTERM and wait for ever
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
    """Ctrl-C reaches all processes of a terminal, and SIGTERM often all of a job. The parent's last step needs its
    batches to end well; it then ends its workers itself, and without it they end by themselves."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
