"""The training loop, in the order one would tell it: data, forward, backward, step, log, checkpoint."""

import math
import shlex
import sys
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from nanovlm.data.batches import Batches, LoadedBatch
from nanovlm.errors import NanoVLMError
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.training.checkpoint import NoRoom, list_checkpoints, load_checkpoint, save_checkpoint
from nanovlm.training.distributed.parallel import Parallel
from nanovlm.training.distributed.shares import total
from nanovlm.training.interruption import Interruption
from nanovlm.training.monitor.bad_steps import BadSteps
from nanovlm.training.monitor.flops import Utilisation
from nanovlm.training.monitor.log import RunLog
from nanovlm.training.monitor.samples import Samples
from nanovlm.training.monitor.skipped import Skipped
from nanovlm.training.monitor.tracking import Tracker
from nanovlm.training.objectives import Objective
from nanovlm.training.optim.optimizer import build_optimizer, schedule, set_learning_rates
from nanovlm.training.precision import Precision
from nanovlm.training.recipes import Recipe
from nanovlm.training.settings import Settings
from nanovlm.utils.console import say


@dataclass
class Progress:
    """How far a run is, all processes together; a checkpoint keeps all of it. `loss_sum`, `target_count` and `measures`
    belong to the log line being gathered."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    images: int = 0
    slots: int = 0  # places for tokens in the batches, padding included
    loss_sum: float = 0.0
    target_count: int = 0  # labelled tokens, or what else the objective counts
    measures: list[float] = field(
        default_factory=list
    )  # sums of what the objective tells beside the loss
    bad_in_a_row: int = 0
    best_val_loss: float | None = None


@dataclass
class Taken:
    """A step that all processes took; the records are this one's. Its numbers stay on the device until a line is logged,
    so that no step waits for them."""

    step: int
    numbers: Tensor  # gradient norm, summed loss and the objective's other sums, (2 + measures,)
    targets: int  # what the sums are over: labelled tokens, or what else the objective counts
    records: list[str]


def train(
    model: VisionLanguageModel,
    objective: Objective,
    batches: Batches,
    validation: Batches | None,
    settings: Settings,
    precision: Precision,
    total_steps: int,
    run: Path,
    parallel: Parallel,
    tracker: Tracker,
) -> None:
    """Train the parts of `model` that learn for `total_steps` optimizer steps, logging and saving into `run`.

    A step takes `settings.accumulate` batches. Their losses are summed over labelled tokens (or what else `objective`
    counts) and divided by their number in the whole step, so that k batches make the same step as one k times as large.
    A step whose loss or gradient is not finite changes nothing; its records are named in `bad_steps.jsonl`.
    Ctrl-C and SIGTERM finish the step, save a checkpoint and exit with 130 and 143.
    """
    optimizer = build_optimizer(model, settings)
    learning = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    facts = {
        "records to learn from": len(batches.records),
        "records a step takes": settings.batch_size * settings.accumulate * parallel.world,
    }
    progress = (
        _resume(run, model, optimizer, precision, facts, settings, parallel)
        if settings.resume
        else Progress()
    )
    log, bad_steps = (
        RunLog(run, progress.step, precision.device),
        BadSteps(run, progress.step, settings.max_bad_steps),
    )
    utilisation = Utilisation(model, precision.device, precision.dtype)
    samples = (
        Samples(run, validation.records, progress.step)
        if validation is not None and parallel.is_main
        else None
    )
    tracker.start(progress.step)
    skipped, taken = Skipped(len(batches.records), parallel), list[Taken]()
    loader = batches.loader(
        progress.step * settings.accumulate,
        total_steps * settings.accumulate,
        settings.workers,
        pin_memory=precision.device.type == "cuda",
    )
    bar = tqdm(
        total=total_steps,
        initial=progress.step,
        desc="training",
        unit="step",
        dynamic_ncols=True,
        disable=not parallel.is_main,
    )
    model.train()
    with bar, closing(tracker), Interruption() as interruption:
        while progress.step < total_steps:
            with log.waiting_for_data():
                loaded = [next(loader) for _ in range(settings.accumulate)]
            step_targets = _count(loaded, objective, progress, skipped)
            utilisation.add(item.batch for item in loaded)

            parallel.seed(progress.step)
            sums = torch.zeros(1 + len(objective.measures), device=precision.device)
            for batch in parallel.passes(loaded):
                with precision.autocast():
                    batch_sums = objective(
                        model, batch.to(precision.device)
                    )  # over the batch's labelled tokens
                if (
                    batch_sums.requires_grad
                ):  # without images, a projector that learns alone has nothing to learn
                    precision.scaled(batch_sums[0] / max(step_targets, 1)).backward()
                sums += batch_sums.detach()

            parallel.reduce_gradients(learning)
            sums = parallel.sum(sums)
            fits = precision.unscale(learning, parallel.largest)
            grad_norm = parallel.clip(learning, settings.clip).to(sums)
            set_learning_rates(
                optimizer, schedule(progress.step, total_steps, settings.warmup, settings.min_lr)
            )
            # Where it is 1, the step changes nothing. It stays on the device, as all else here, so that no step waits.
            optimizer.found_inf = (~torch.isfinite(sums[0] + grad_norm)).float()
            if fits and step_targets:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            progress.step += 1
            taken.append(
                Taken(
                    progress.step,
                    torch.cat((grad_norm[None], sums)),
                    step_targets,
                    [where for item in loaded for where in item.records],
                )
            )
            bar.update()
            last = progress.step == total_steps
            stopping = parallel.largest(0 if last else interruption.signal)
            validates = validation is not None and (
                last or settings.val_every and progress.step % settings.val_every == 0
            )
            logs = progress.step % settings.log_every == 0 or last or validates
            saves = progress.step % settings.save_every == 0 or last or stopping
            if logs or saves:
                grad_norm = _settle(
                    taken, progress, bad_steps, precision, parallel
                )  # waits until the device is done
            with log.clock_stopped():
                val = (
                    validate(model, objective, validation, precision, parallel) if validates else {}
                )
                if logs:
                    _log(
                        log,
                        progress,
                        objective,
                        optimizer,
                        grad_norm,
                        val | utilisation.read(log.trained_seconds),
                        bar,
                    )
                    tracker.log(log.lines[-1])
                if validates and (whole := parallel.whole(model)) is not None:
                    samples.answer(whole, progress.step, precision)
                    tracker.image("samples", run / "samples.png", progress.step)
                if _is_best(progress, val) or saves:
                    _save(run, model, optimizer, progress, precision, facts, val, settings)
                if last or stopping:
                    log.draw()
            if stopping:
                flags = shlex.join(
                    [*Recipe.of_command("stage1").flags, "--resume", "--out", str(run)]
                )
                say(
                    f"stopped after step {progress.step} of {total_steps}, all saved; go on with:  "
                    f"{parallel.launcher} {Path(sys.argv[0]).name} {flags}"
                )
                parallel.end()
                raise SystemExit(128 + stopping)
    skipped.summarise()


@torch.no_grad()
def validate(
    model: VisionLanguageModel,
    objective: Objective,
    batches: Batches,
    precision: Precision,
    parallel: Parallel,
) -> dict[str, float | None]:
    """The mean loss per labelled token over all of `batches`, which several processes take in turn, and what else the
    objective tells: of cross entropy its exponential, the perplexity."""
    model.eval()
    sums, count = [0.0] * (1 + len(objective.measures)), 0
    for first in range(0, len(batches), parallel.world):
        number = first + parallel.rank
        batch = parallel.complete(batches[number].batch if number < len(batches) else None)
        if batch is not None:
            with precision.autocast():
                sums = [
                    had + more
                    for had, more in zip(
                        sums, objective(model, batch.to(precision.device)).tolist()
                    )
                ]
            count += objective.count(batch)
    parallel.reshard()
    model.train()
    *sums, count = total(*sums, count)
    told = {"val_loss": sums[0] / max(count, 1)} | {
        f"val_{name}": value / max(count, 1) for name, value in zip(objective.measures, sums[1:])
    }
    if not objective.measures:
        told["val_perplexity"] = math.exp(
            min(told["val_loss"], 700.0)
        )  # beyond that a float has no room
    finite = all(map(math.isfinite, told.values()))  # for what is not, JSON has no word
    return told if finite else dict.fromkeys(told)


def _count(
    loaded: list[LoadedBatch], objective: Objective, progress: Progress, skipped: Skipped
) -> int:
    """Add what a step reads in all processes to `progress`, and note what they could not read; returns its labelled tokens,
    or what else the objective counts."""
    targets, samples, tokens, images, slots, lost = total(
        sum(objective.count(item.batch) for item in loaded if item.batch is not None),
        *(
            sum(getattr(item, name) for item in loaded)
            for name in ("samples", "tokens", "images", "slots")
        ),
        sum(len(item.skipped) + len(item.cut) for item in loaded),
    )
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


def _settle(
    taken: list[Taken],
    progress: Progress,
    bad_steps: BadSteps,
    precision: Precision,
    parallel: Parallel,
) -> float:
    """Read the numbers of the steps taken, all at once; name the bad ones. Returns the last gradient norm.

    Under a loss scaler gradients may overflow now and then: it drops the step by itself.
    """
    for one, (norm, loss, *measures) in zip(
        taken, torch.stack([one.numbers for one in taken]).tolist()
    ):
        if math.isfinite(loss) and (math.isfinite(norm) or precision.may_overflow):
            progress.loss_sum += loss
            progress.measures = [
                had + more
                for had, more in zip(progress.measures or [0.0] * len(measures), measures)
            ]
            progress.target_count += one.targets
            progress.bad_in_a_row = 0
        else:
            progress.bad_in_a_row += 1
            bad_steps.note(
                one.step, loss, norm, parallel.all_lines(one.records), progress.bad_in_a_row
            )
    taken.clear()
    return norm


def _log(
    log: RunLog,
    progress: Progress,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    grad_norm: float,
    more: dict[str, float | None],
    bar: tqdm,
) -> None:
    loss = progress.loss_sum / progress.target_count if progress.target_count else None
    told = dict(
        zip(
            objective.measures,
            (value / max(progress.target_count, 1) for value in progress.measures),
        )
    )
    rates: dict[str, float] = {}
    for (
        group
    ) in optimizer.param_groups:  # of a part with a layer-wise decay, the rate of its last block
        rates[f"lr_{group['part']}"] = max(group["lr"], rates.get(f"lr_{group['part']}", 0.0))
    line = {
        "step": progress.step,
        "loss": loss,
        **told,
        "lr": max(rates.values()),
        **rates,
        "grad_norm": grad_norm if math.isfinite(grad_norm) else None,  # JSON has no infinity
        "samples": progress.samples,
        "tokens": progress.tokens,
        "images": progress.images,
        "slots": progress.slots,
        **more,
    }
    speed = log.write(line)
    progress.loss_sum, progress.target_count, progress.measures = 0.0, 0, []
    shown = "—" if loss is None else f"{loss:.3f}"
    shown += "".join(f", {name.replace('_', ' ')} {value:.2f}" for name, value in told.items())
    bar.set_postfix_str(
        f"loss {shown}, lr {line['lr']:.1e}, {speed['samples']:.1f} samples/s, {speed['tokens']:,.0f} tokens/s"
    )


def _save(
    run: Path,
    model: VisionLanguageModel,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    precision: Precision,
    facts: dict[str, int],
    val: dict[str, float | None],
    settings: Settings,
) -> None:
    state = {"progress": asdict(progress), "val_loss": val.get("val_loss"), "facts": facts}
    if precision.scaler is not None:
        state["scaler"] = vars(precision.scaler)
    try:
        save_checkpoint(run, model, optimizer, state, settings.keep)
    except NoRoom as error:
        if settings.full_disk == "stop":
            raise
        say(f"{error}; training goes on")


def _resume(
    run: Path,
    model: VisionLanguageModel,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    facts: dict[str, int],
    settings: Settings,
    parallel: Parallel,
) -> Progress:
    """Go back to the newest whole checkpoint. `facts`, which no setting alone decides, have to be what they were."""
    if not parallel.largest(len(list_checkpoints(run))):
        say(f"{run}: stopped before its first checkpoint, so it starts again")
        return Progress()
    state = load_checkpoint(run, model, optimizer)
    for what, now in facts.items():
        if state["facts"][what] != now and not settings.allow_changes:
            raise NanoVLMError(
                f"{run}: {what} were {state['facts'][what]} and are {now} now; give the run what it had (its data; "
                "processes × --batch-size × --accumulate), or go on all the same with --allow-changes"
            )
    if precision.scaler is not None and "scaler" in state:
        vars(precision.scaler).update(state["scaler"])
    progress = Progress(**state["progress"])
    parallel.check_same("steps behind them", progress.step)
    return progress
