"""Making data in parallel and fitting, shared by the pretraining of both tiny parts."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nanovlm.training.optim.optimizer import schedule
from nanovlm.utils.interruption import kept_from_children

T = TypeVar("T")


def make_all(make: Callable[[int], T], count: int, name: str) -> Iterator[T]:
    """Yield make(0), make(1), … make(count - 1), in parallel if there are many.

    `make` has to be picklable.
    """
    if count < 2000:  # starting a process would take longer
        yield from map(make, range(count))
        return
    context = multiprocessing.get_context("spawn")
    ignore_interrupts = signal.signal, (signal.SIGINT, signal.SIG_IGN)
    with ProcessPoolExecutor(os.cpu_count(), context, *ignore_interrupts) as pool:
        with kept_from_children():
            made = pool.map(make, range(count), chunksize=64)
        yield from tqdm(made, total=count, desc=name, dynamic_ncols=True)


def fit(
    parameters: list[nn.Parameter],
    loss_of_step: Callable[[int], Tensor],
    steps: int,
    peak_lr: float,
    name: str,
) -> None:
    """Minimize with AdamW: linear warm-up over a twentieth of the steps, then cosine to zero."""
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.02)
    with tqdm(range(steps), desc=name, unit="step", dynamic_ncols=True) as bar:
        for step in bar:
            loss = loss_of_step(step)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            factor = schedule(step, steps, warmup=0.05, min_lr=0.0)
            optimizer.param_groups[0]["lr"] = peak_lr * factor
            optimizer.step()
            optimizer.zero_grad()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
