"""The training loop, in the order one would tell it: data, forward, backward, step, log, checkpoint."""

import math
import sys
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from nanovlm.data.dataset import Batches, Loaded
from nanovlm.errors import NanoVLMError, say
from nanovlm.training.badsteps import BadSteps
from nanovlm.training.checkpoint import NoRoom, list_checkpoints, load_checkpoint, save_checkpoint
from nanovlm.training.flops import Utilisation
from nanovlm.training.interruption import Interruption
from nanovlm.training.optimizer import build_optimizer, schedule, set_learning_rates
from nanovlm.training.parallel import Parallel
from nanovlm.training.precision import Precision
from nanovlm.training.report import RunLog
from nanovlm.training.samples import Samples
from nanovlm.training.settings import Settings
from nanovlm.training.shares import total
from nanovlm.training.skipped import Skipped
from nanovlm.training.tracking import Tracker
from nanovlm.vlm import VisionLanguageModel


@dataclass
class Progress:
    """How far a run is, all processes together; a checkpoint keeps all of it. `loss_sum` and `target_count` belong to the
    log line being gathered."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    images: int = 0
    slots: int = 0  # places for tokens in the batches, padding included
    loss_sum: float = 0.0
    target_count: int = 0
    bad_in_a_row: int = 0
    best_val_loss: float | None = None


@dataclass
class Taken:
    """A step that all processes took; the records are this one's. Its numbers stay on the device until a line is logged,
    so that no step waits for them."""

    step: int
    numbers: Tensor  # summed loss and gradient norm, (2,)
    targets: int  # labelled tokens
    records: list[str]


def train(model: VisionLanguageModel, batches: Batches, validation: Batches | None, settings: Settings,
          precision: Precision, total_steps: int, run: Path, parallel: Parallel, tracker: Tracker) -> None:
    """Train the parts of `model` that learn for `total_steps` optimizer steps, logging and saving into `run`.

    A step takes `settings.accumulate` batches. Their losses are summed over labelled tokens and divided by the
    number of labelled tokens of the whole step, so that k batches make the same step as one k times as large.
    A step whose loss or gradient is not finite changes nothing; its records are named in `bad_steps.jsonl`.
    Ctrl-C and SIGTERM finish the step, save a checkpoint and exit with 130 and 143.
    """
    optimizer = build_optimizer(model, settings)
    learning = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    facts = {"records to learn from": len(batches.records),
             "records a step takes": settings.batch_size * settings.accumulate * parallel.world}
    progress = _resume(run, model, optimizer, precision, facts, settings, parallel) if settings.resume else Progress()
    log, bad_steps = RunLog(run, progress.step, precision.device), BadSteps(run, progress.step, settings.max_bad_steps)
    utilisation = Utilisation(model, precision.device, precision.dtype)
    samples = Samples(run, validation.records, progress.step) if validation is not None and parallel.is_main else None
    tracker.start(progress.step)
    skipped, taken = Skipped(len(batches.records), parallel), list[Taken]()
    loader = batches.loader(progress.step * settings.accumulate, total_steps * settings.accumulate, settings.workers,
                            pin_memory=precision.device.type == "cuda")
    bar = tqdm(total=total_steps, initial=progress.step, desc="training", unit="step", dynamic_ncols=True,
               disable=not parallel.is_main)
    model.train()
    with bar, closing(tracker), Interruption() as interruption:
        while progress.step < total_steps:
            with log.waiting_for_data():
                loaded = [next(loader) for _ in range(settings.accumulate)]
            step_targets = _count(loaded, progress, skipped)
            utilisation.add(item.batch for item in loaded)

            parallel.seed(progress.step)
            loss_sum = torch.zeros((), device=precision.device)
            for batch in parallel.passes(loaded):
                with precision.autocast():
                    loss = model(batch.to(precision.device))  # summed over the batch's labelled tokens
                if loss.requires_grad:  # without images, a projector that learns alone has nothing to learn
                    precision.scaled(loss / max(step_targets, 1)).backward()
                loss_sum += loss.detach()

            parallel.reduce_gradients(learning)
            loss_sum = parallel.sum(loss_sum)
            fits = precision.unscale(learning, parallel.largest)
            grad_norm = parallel.clip(learning, settings.clip).to(loss_sum)
            set_learning_rates(optimizer, schedule(progress.step, total_steps, settings.warmup, settings.min_lr))
            # Where it is 1, the step changes nothing. It stays on the device, as all else here, so that no step waits.
            optimizer.found_inf = (~torch.isfinite(loss_sum + grad_norm)).float()
            if fits and step_targets:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            progress.step += 1
            taken.append(Taken(progress.step, torch.stack((loss_sum, grad_norm)), step_targets,
                               [where for item in loaded for where in item.records]))
            bar.update()
            last = progress.step == total_steps
            stopping = parallel.largest(0 if last else interruption.signal)
            validates = validation is not None and (last or settings.val_every and progress.step % settings.val_every == 0)
            logs = progress.step % settings.log_every == 0 or last or validates
            saves = progress.step % settings.save_every == 0 or last or stopping
            if logs or saves:
                grad_norm = _settle(taken, progress, bad_steps, precision, parallel)  # waits until the device is done
            with log.clock_stopped():
                val = validate(model, validation, precision, parallel) if validates else {}
                if logs:
                    _log(log, progress, optimizer, grad_norm, val | utilisation.read(log.trained_seconds), bar)
                    tracker.log(log.lines[-1])
                if validates and (whole := parallel.whole(model)) is not None:
                    samples.answer(whole, progress.step, precision)
                    tracker.image("samples", run / "samples.png", progress.step)
                if _is_best(progress, val) or saves:
                    _save(run, model, optimizer, progress, precision, facts, val, settings)
                if last or stopping:
                    log.draw()
            if stopping:
                say(f"stopped after step {progress.step} of {total_steps}, all saved; go on with:  "
                    f"{parallel.launcher} {Path(sys.argv[0]).name} --resume --out {run}")
                parallel.end()
                raise SystemExit(128 + stopping)
    skipped.summarise()


@torch.no_grad()
def validate(model: VisionLanguageModel, batches: Batches, precision: Precision, parallel: Parallel) -> dict[str, float | None]:
    """The mean loss per labelled token over all of `batches`, which several processes take in turn, and its exponential,
    the perplexity."""
    model.eval()
    loss_sum, count = 0.0, 0
    for first in range(0, len(batches), parallel.world):
        number = first + parallel.rank
        batch = parallel.complete(batches[number].batch if number < len(batches) else None)
        if batch is not None:
            with precision.autocast():
                loss_sum += float(model(batch.to(precision.device)))
            count += len(batch.targets)
    parallel.reshard()
    model.train()
    loss_sum, count = total(loss_sum, count)
    loss = loss_sum / max(count, 1)
    if not math.isfinite(loss):  # JSON has no word for it
        return {"val_loss": None, "val_perplexity": None}
    return {"val_loss": loss, "val_perplexity": math.exp(min(loss, 700.0))}  # beyond that a float has no room


def _count(loaded: list[Loaded], progress: Progress, skipped: Skipped) -> int:
    """Add what a step reads in all processes to `progress`, and note what they could not read; returns its labelled tokens."""
    targets, samples, tokens, images, slots, lost = total(
        sum(len(item.batch.targets) for item in loaded if item.batch is not None),
        *(sum(getattr(item, name) for item in loaded) for name in ("samples", "tokens", "images", "slots")),
        sum(len(item.skipped) + len(item.cut) for item in loaded))
    progress.samples += samples
    progress.tokens += tokens
    progress.images += images
    progress.slots += slots
    if lost:
        skipped.note(loaded)
    return targets


def _is_best(progress: Progress, val: dict[str, float]) -> bool:
    """Whether the validation just done is the best so far; its checkpoint is worth keeping then."""
    loss = val.get("val_loss")
    if loss is None or progress.best_val_loss is not None and loss >= progress.best_val_loss:
        return False
    progress.best_val_loss = loss
    return True


def _settle(taken: list[Taken], progress: Progress, bad_steps: BadSteps, precision: Precision, parallel: Parallel) -> float:
    """Read the numbers of the steps taken, all at once; name the bad ones. Returns the last gradient norm.

    Under a loss scaler gradients may overflow now and then: it drops the step by itself.
    """
    losses, norms = zip(*torch.stack([one.numbers for one in taken]).tolist())
    for one, loss, norm in zip(taken, losses, norms):
        if math.isfinite(loss) and (math.isfinite(norm) or precision.may_overflow):
            progress.loss_sum += loss
            progress.target_count += one.targets
            progress.bad_in_a_row = 0
        else:
            progress.bad_in_a_row += 1
            bad_steps.note(one.step, loss, norm, parallel.all_lines(one.records), progress.bad_in_a_row)
    taken.clear()
    return norms[-1]


def _log(log: RunLog, progress: Progress, optimizer: torch.optim.Optimizer, grad_norm: float, more: dict[str, float | None],
         bar: tqdm) -> None:
    loss = progress.loss_sum / progress.target_count if progress.target_count else None
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:  # of a part with a layer-wise decay, the rate of its last block
        rates[f"lr_{group['part']}"] = max(group["lr"], rates.get(f"lr_{group['part']}", 0.0))
    line = {"step": progress.step, "loss": loss, "lr": max(rates.values()), **rates,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,  # JSON has no infinity
            "samples": progress.samples, "tokens": progress.tokens, "images": progress.images,
            "slots": progress.slots, **more}
    speed = log.write(line)
    progress.loss_sum, progress.target_count = 0.0, 0
    shown = "—" if loss is None else f"{loss:.3f}"
    bar.set_postfix_str(f"loss {shown}, lr {line['lr']:.1e}, {speed['samples']:.1f} samples/s, {speed['tokens']:,.0f} tokens/s")


def _save(run: Path, model: VisionLanguageModel, optimizer: torch.optim.Optimizer, progress: Progress, precision: Precision,
          facts: dict[str, int], val: dict[str, float | None], settings: Settings) -> None:
    state = {"progress": asdict(progress), "val_loss": val.get("val_loss"), "facts": facts}
    if precision.scaler is not None:
        state["scaler"] = vars(precision.scaler)
    try:
        save_checkpoint(run, model, optimizer, state, settings.keep)
    except NoRoom as error:
        if settings.full_disk == "stop":
            raise
        say(f"{error}; training goes on")


def _resume(run: Path, model: VisionLanguageModel, optimizer: torch.optim.Optimizer, precision: Precision,
            facts: dict[str, int], settings: Settings, parallel: Parallel) -> Progress:
    """Go back to the newest whole checkpoint. `facts`, which no setting alone decides, have to be what they were."""
    if not parallel.largest(len(list_checkpoints(run))):
        say(f"{run}: stopped before its first checkpoint, so it starts again")
        return Progress()
    state = load_checkpoint(run, model, optimizer)
    for what, now in facts.items():
        if state["facts"][what] != now and not settings.allow_changes:
            raise NanoVLMError(f"{run}: {what} were {state['facts'][what]} and are {now} now; give the run what it had (its data; "
                               "processes × --batch-size × --accumulate), or go on all the same with --allow-changes")
    if precision.scaler is not None and "scaler" in state:
        vars(precision.scaler).update(state["scaler"])
    progress = Progress(**state["progress"])
    parallel.check_same("steps behind them", progress.step)
    return progress
