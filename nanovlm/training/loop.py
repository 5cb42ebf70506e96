"""The training loop, in the order one would tell it: data, forward, backward, step, log, checkpoint."""

import contextlib
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
from nanovlm.training.precision import Precision
from nanovlm.training.report import RunLog
from nanovlm.training.samples import Samples
from nanovlm.training.settings import Settings
from nanovlm.training.tracking import Tracker
from nanovlm.vlm import VisionLanguageModel


@dataclass
class Progress:
    """How far a run is. `loss_sum` and `target_count` belong to the log line being gathered; they stay on the device
    between lines, so that no step waits for a number."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    target_count: int = 0
    loss_sum: float | Tensor = 0.0


def train(model: VisionLanguageModel, batches: Batches, validation: Batches | None, settings: Settings,
          precision: Precision, total_steps: int, run: Path, tracker: Tracker) -> None:
    """Train the parts of `model` that learn for `total_steps` optimizer steps, logging and saving into `run`.

    A step takes `settings.accumulate` batches. Their losses are summed over labelled tokens and divided by the
    number of labelled tokens of the whole step, so that k batches make the same step as one k times as large.
    Ctrl-C finishes the step, saves a checkpoint and raises KeyboardInterrupt.
    """
    optimizer, progress, scaler = build_optimizer(model, settings), Progress(), precision.scaler
    learning = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if settings.resume and not list_checkpoints(run):
        print(f"{run}: stopped before its first checkpoint, so it starts again", file=sys.stderr)
    elif settings.resume:
        progress = _restore(run, model, optimizer, precision)
    log = RunLog(run, progress.step)
    samples = Samples(run, validation.records, progress.step) if validation is not None else None
    tracker.start(progress.step)
    noted: dict[str, list[str]] = {"skipped": [], "cut": []}
    loader = batches.loader(progress.step * settings.accumulate, total_steps * settings.accumulate, settings.workers,
                            pin_memory=precision.device.type == "cuda")
    bar = tqdm(total=total_steps, initial=progress.step, desc="training", unit="step", dynamic_ncols=True)
    model.train()
    with bar, contextlib.closing(tracker), _Interruption() as interruption:
        while progress.step < total_steps:
            loaded = [next(loader) for _ in range(settings.accumulate)]
            _note_losses(loaded, noted, len(batches.records), bar)
            step_batches = [item.batch for item in loaded if item.batch is not None]
            step_targets = sum(len(batch.targets) for batch in step_batches)

            for batch in step_batches:
                with precision.autocast():
                    loss = model(batch.to(precision.device))  # summed over the batch's labelled tokens
                if loss.requires_grad:  # without images, a projector that learns alone has nothing to learn
                    precision.scaled(loss / step_targets).backward()
                progress.loss_sum = progress.loss_sum + loss.detach()

            finite = scaler is None or scaler.unscale(learning)
            grad_norm = torch.nn.utils.clip_grad_norm_(learning, settings.clip)
            set_learning_rates(optimizer, schedule(progress.step, total_steps, settings.warmup, settings.min_lr))
            if finite and step_batches:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            progress.step += 1
            progress.samples += sum(item.samples for item in loaded)
            progress.tokens += sum(item.tokens for item in loaded)
            progress.target_count += step_targets
            bar.update()
            last = progress.step == total_steps
            stopping = interruption.asked and not last
            validates = validation is not None and (last or settings.val_every and progress.step % settings.val_every == 0)
            logs = progress.step % settings.log_every == 0 or last or validates
            saves = progress.step % settings.save_every == 0 or last or stopping
            if logs or saves:
                _check_finite(progress, grad_norm, precision)
            if logs:
                val = validate(model, validation, precision) if validates else {}
                _log(log, progress, optimizer, grad_norm, val, bar)
                tracker.log(log.lines[-1])
            if validates:
                samples.answer(model, progress.step, precision)
                tracker.image("samples", run / "samples.png", progress.step)
            if saves:
                _save(run, model, optimizer, progress, precision, settings.keep)
            if last or stopping:
                log.draw()
            if stopping:
                tqdm.write(f"stopped after step {progress.step} of {total_steps}, all saved; go on with:  "
                           f"python {Path(sys.argv[0]).name} --resume --out {run}", file=sys.stderr)
                raise KeyboardInterrupt
    for kind, reasons in noted.items():
        if reasons:
            print(f"{kind}: {len(reasons)} of {len(batches.records)} records, named above", file=sys.stderr)


@torch.no_grad()
def validate(model: VisionLanguageModel, batches: Batches, precision: Precision) -> dict[str, float]:
    """The mean loss per labelled token over all of `batches`, and its exponential, the perplexity."""
    model.eval()
    loss_sum, count = 0.0, 0
    for number in range(-(-len(batches.records) // batches.batch_size)):
        if (batch := batches[number].batch) is not None:
            with precision.autocast():
                loss_sum += float(model(batch.to(precision.device)))
            count += len(batch.targets)
    model.train()
    loss = loss_sum / max(count, 1)
    return {"val_loss": loss, "val_perplexity": math.exp(min(loss, 700.0))}  # beyond that a float has no room


def _check_finite(progress: Progress, grad_norm: Tensor, precision: Precision) -> None:
    """Stop before anything that is not finite is logged or saved. Under a loss scaler gradients may overflow: it drops
    the step."""
    for name, value in (("loss", progress.loss_sum), ("gradient norm", 0.0 if precision.scaler else grad_norm)):
        if not math.isfinite(value):
            raise NanoVLMError(f"the {name} is {float(value)} at step {progress.step}; lower --lr, or take --dtype fp32 to see "
                               "whether the number format is at fault. What was saved before is whole")


def _log(log: RunLog, progress: Progress, optimizer: torch.optim.Optimizer, grad_norm: Tensor, val: dict[str, float],
         bar: tqdm) -> None:
    loss = float(progress.loss_sum) / max(progress.target_count, 1)
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:  # of a part with a layer-wise decay, the rate of its last block
        rates[f"lr_{group['part']}"] = max(group["lr"], rates.get(f"lr_{group['part']}", 0.0))
    line = {"step": progress.step, "loss": loss, "lr": max(rates.values()), **rates,
            "grad_norm": float(grad_norm) if math.isfinite(grad_norm) else None,  # JSON has no infinity
            "samples": progress.samples, "tokens": progress.tokens, **val}
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


def _note_losses(loaded: list[Loaded], noted: dict[str, list[str]], total: int, bar: tqdm) -> None:
    """Name each record that was skipped or cut, once though epochs repeat; too many skipped ones stop the run."""
    for kind, reasons in noted.items():
        for reason in (reason for item in loaded for reason in getattr(item, kind) if reason not in reasons):
            reasons.append(reason)
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
