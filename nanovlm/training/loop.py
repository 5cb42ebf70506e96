"""The training loop, in the order one would tell it: data, forward, backward, step, log, checkpoint."""

import math
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from nanovlm.data.dataset import Batches, Loaded
from nanovlm.data.records import check_skipped
from nanovlm.errors import NanoVLMError
from nanovlm.training.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from nanovlm.training.optimizer import build_optimizer, schedule, set_learning_rates
from nanovlm.training.parallel import Parallel
from nanovlm.training.precision import Precision
from nanovlm.training.report import RunLog
from nanovlm.training.settings import Settings
from nanovlm.vlm import VisionLanguageModel


@dataclass
class Progress:
    """How far a run is. `loss_sum` and `target_count` belong to the log line being gathered; they stay on the device
    between lines, so that no step waits for a number. Of several processes, all count for all, but each sums its own loss."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    target_count: int = 0
    loss_sum: float | Tensor = 0.0


def train(model: VisionLanguageModel, batches: Batches, validation: Batches | None, settings: Settings,
          precision: Precision, total_steps: int, run: Path, parallel: Parallel) -> None:
    """Train the parts of `model` that learn for `total_steps` optimizer steps, logging and saving into `run`.

    A step takes `settings.accumulate` batches. Their losses are summed over labelled tokens and divided by the
    number of labelled tokens of the whole step, so that k batches make the same step as one k times as large.
    Ctrl-C finishes the step, saves a checkpoint and raises KeyboardInterrupt.
    """
    optimizer, progress, scaler = build_optimizer(model, settings), Progress(), precision.scaler
    learning = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if settings.resume and not list_checkpoints(run):
        if parallel.is_main:
            print(f"{run}: stopped before its first checkpoint, so it starts again", file=sys.stderr)
    elif settings.resume:
        progress = _restore(run, model, optimizer, precision)
        progress.loss_sum = progress.loss_sum if parallel.is_main else 0.0
    parallel.seed(settings.seed, progress.step)
    log = RunLog(run, progress.step) if parallel.is_main else None
    noted: dict[str, list[str]] = {"skipped": [], "cut": []}
    loader = batches.loader(progress.step * settings.accumulate, total_steps * settings.accumulate, settings.workers,
                            pin_memory=precision.device.type == "cuda")
    bar = tqdm(total=total_steps, initial=progress.step, desc="training", unit="step", dynamic_ncols=True,
               disable=not parallel.is_main)
    model.train()
    with bar, _Interruption() as interruption:
        while progress.step < total_steps:
            loaded = [next(loader) for _ in range(settings.accumulate)]
            step_targets, samples, tokens, lost = parallel.total(*_count(loaded))
            if lost:
                _note_losses(loaded, noted, len(batches.records), bar, parallel)

            for batch in parallel.passes(loaded):
                with precision.autocast():
                    loss = model(batch.to(precision.device))  # summed over the batch's labelled tokens
                if loss.requires_grad:  # without images, a projector that learns alone has nothing to learn
                    precision.scaled(loss / max(step_targets, 1)).backward()
                progress.loss_sum = progress.loss_sum + loss.detach()

            parallel.reduce_gradients(learning)
            finite = scaler is None or scaler.unscale(learning, parallel.any)
            grad_norm = parallel.clip(learning, settings.clip)
            set_learning_rates(optimizer, schedule(progress.step, total_steps, settings.warmup, settings.min_lr))
            if finite and step_targets:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            progress.step += 1
            progress.samples += samples
            progress.tokens += tokens
            progress.target_count += step_targets
            bar.update()
            last = progress.step == total_steps
            stopping = parallel.any(interruption.asked) and not last
            validates = validation is not None and (last or settings.val_every and progress.step % settings.val_every == 0)
            logs = progress.step % settings.log_every == 0 or last or validates
            saves = progress.step % settings.save_every == 0 or last or stopping
            if logs or saves:
                progress.loss_sum = parallel.to_main(progress.loss_sum)
                _check_finite(progress, grad_norm, precision)
            if logs:
                val_loss = {"val_loss": validation_loss(model, validation, precision, parallel)} if validates else {}
                _log(log, progress, optimizer, grad_norm, val_loss, bar)
            if saves:
                _save(run, model, optimizer, progress, precision, settings.keep)
            if (last or stopping) and log is not None:
                log.draw()
            if stopping and parallel.is_main:
                tqdm.write(f"stopped after step {progress.step} of {total_steps}, all saved; go on with:  "
                           f"{parallel.launcher} {Path(sys.argv[0]).name} --resume --out {run}", file=sys.stderr)
            if stopping:
                raise KeyboardInterrupt
    for kind, reasons in noted.items():
        if reasons and parallel.is_main:
            print(f"{kind}: {len(reasons)} of {len(batches.records)} records, named above", file=sys.stderr)


@torch.no_grad()
def validation_loss(model: VisionLanguageModel, batches: Batches, precision: Precision, parallel: Parallel) -> float:
    """The mean loss per labelled token over all of `batches`, which several processes take in turn."""
    model.eval()
    loss_sum, count = 0.0, 0
    total = -(-len(batches.records) // batches.batch_size)
    for first in range(0, total, parallel.world):
        number = first + parallel.rank
        batch = parallel.complete(batches[number].batch if number < total else None)
        if batch is not None:
            with precision.autocast():
                loss_sum += float(model(batch.to(precision.device)))
            count += len(batch.targets)
    parallel.reshard()
    model.train()
    loss_sum, count = parallel.total(loss_sum, count)
    return loss_sum / max(count, 1)


def _check_finite(progress: Progress, grad_norm: Tensor, precision: Precision) -> None:
    """Stop before anything that is not finite is logged or saved. Under a loss scaler gradients may overflow: it drops
    the step."""
    for name, value in (("loss", progress.loss_sum), ("gradient norm", 0.0 if precision.scaler else grad_norm)):
        if not math.isfinite(value):
            raise NanoVLMError(f"the {name} is {float(value)} at step {progress.step}; lower --lr, or take --dtype fp32 to see "
                               "whether the number format is at fault. What was saved before is whole")


def _log(log: RunLog | None, progress: Progress, optimizer: torch.optim.Optimizer, grad_norm: Tensor, val_loss: dict[str, float],
         bar: tqdm) -> None:
    if log is None:  # rank 0 does it
        progress.loss_sum, progress.target_count = 0.0, 0
        return
    loss = float(progress.loss_sum) / max(progress.target_count, 1)
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:  # of a part with a layer-wise decay, the rate of its last block
        rates[f"lr_{group['part']}"] = max(group["lr"], rates.get(f"lr_{group['part']}", 0.0))
    line = {"step": progress.step, "loss": loss, "lr": max(rates.values()), **rates,
            "grad_norm": float(grad_norm) if math.isfinite(grad_norm) else None,  # JSON has no infinity
            "samples": progress.samples, "tokens": progress.tokens, **val_loss}
    speed = log.write(line)
    progress.loss_sum, progress.target_count = 0.0, 0
    bar.set_postfix_str(f"loss {loss:.3f}, lr {line['lr']:.1e}, {speed['samples']:.1f} samples/s, {speed['tokens']:,.0f} tokens/s")


def _save(run: Path, model: VisionLanguageModel, optimizer: torch.optim.Optimizer, progress: Progress,
          precision: Precision, keep: int) -> None:
    state = {**vars(progress), "loss_sum": float(progress.loss_sum)}
    if precision.scaler is not None:
        state["scaler"] = vars(precision.scaler)
    save_checkpoint(run, model, optimizer, state, keep)


def _restore(run: Path, model: VisionLanguageModel, optimizer: torch.optim.Optimizer, precision: Precision) -> Progress:
    state = load_checkpoint(run, model, optimizer)
    scaler = state.pop("scaler", None)
    if precision.scaler is not None and scaler is not None:
        vars(precision.scaler).update(scaler)
    return Progress(**state)


def _count(loaded: list[Loaded]) -> tuple[int, int, int, int]:
    """Labelled tokens, samples, tokens, and records that were skipped or cut."""
    return (sum(len(item.batch.targets) for item in loaded if item.batch is not None), sum(item.samples for item in loaded),
            sum(item.tokens for item in loaded), sum(len(item.skipped) + len(item.cut) for item in loaded))


def _note_losses(loaded: list[Loaded], noted: dict[str, list[str]], total: int, bar: tqdm, parallel: Parallel) -> None:
    """Name each record that was skipped or cut, once though epochs repeat; too many skipped ones stop the run."""
    for kind, reasons in noted.items():
        for reason in parallel.all_lines([reason for item in loaded for reason in getattr(item, kind)]):
            if reason not in reasons:
                reasons.append(reason)
                if parallel.is_main:
                    bar.write(f"{kind}: {reason}", file=sys.stderr)
    check_skipped(noted["skipped"], total)


class _Interruption:
    """Turns the first Ctrl-C into a request that the loop answers after the step; the second one stops at once."""

    def __enter__(self) -> "_Interruption":
        self.asked = False
        self._previous = signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, *_) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGINT, self._previous)
