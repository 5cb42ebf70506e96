"""The training loop: data, forward, backward, step; then log, validate, save.

Lessons: lessons/source/13_accumulation.py, lessons/source/14_training_loop.py.
"""

import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from nanovlm.data.batches import Batches, LoadedBatch
from nanovlm.data.workers import Loading
from nanovlm.errors import NanoVLMError, quoted
from nanovlm.evaluation.loss import perplexity, sums_over
from nanovlm.inputs.batch import Batch
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.training.checkpoint import (
    STATE,
    NoRoomError,
    Progress,
    dict_at,
    list_checkpoints,
    load_checkpoint,
    parse_progress,
    save_checkpoint,
)
from nanovlm.training.distributed.parallel import Parallel
from nanovlm.training.distributed.shares import total
from nanovlm.training.monitor.bad_steps import BadSteps
from nanovlm.training.monitor.flops import Utilisation
from nanovlm.training.monitor.hints import Hints
from nanovlm.training.monitor.log import RunLog
from nanovlm.training.monitor.samples import Samples
from nanovlm.training.monitor.skipped import Skipped
from nanovlm.training.monitor.tracking import Tracker
from nanovlm.training.monitor.words import WordSamples
from nanovlm.training.objectives.objective import Objective
from nanovlm.training.objectives.words import Words
from nanovlm.training.optim.optimizer import build_optimizer, schedule, set_learning_rates
from nanovlm.training.precision import Precision
from nanovlm.training.recipes import Recipe
from nanovlm.training.settings import Settings, deciding
from nanovlm.utils.console import say
from nanovlm.utils.interruption import Interrupted, Interruption
from nanovlm.utils.parser import flag


@dataclass(frozen=True)
class Run:
    """What a run trains, on what and how; all that is ready before its first step."""

    settings: Settings
    model: VisionLanguageModel
    objective: Objective
    batches: Batches
    validation: Batches | None
    total_steps: int
    precision: Precision
    parallel: Parallel
    tracker: Tracker
    loading: Loading

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.settings.out)

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the result, and so has to stay the same when the run is resumed."""
        per_step = self.settings.batch_size * self.settings.accumulate * self.parallel.world
        counts = {"records to train on": len(self.batches.records), "records per step": per_step}
        return counts | {flag(name): value for name, value in deciding(self.settings).items()}


@dataclass
class StepResult:
    """A step of all processes, until its numbers are read back from the device."""

    step: int
    numbers: Tensor  # (2 + metrics,) on the device: gradient norm, summed loss, summed metrics
    target_count: int  # what the sums are over
    records: list[str]  # of this process


def train(run: Run) -> None:
    """Train the trainable parameters of `run.model` for `run.total_steps` optimizer steps.

    The loss of a step is summed over the targets of its batches and divided by their number, so
    that k batches make the same step as one that is k times as large. A step whose loss or gradient
    is not finite changes nothing; its records are named in `bad_steps.jsonl`. Ctrl-C and SIGTERM
    finish the step, or end the wait for data, save a checkpoint and exit with 130 and 143.
    """
    settings, model, precision, parallel = run.settings, run.model, run.precision, run.parallel
    optimizer = build_optimizer(model, settings)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    progress = resume(run, optimizer) if settings.resume else Progress()
    monitor = Monitor(run, optimizer, progress)
    first, last = (step * settings.accumulate for step in (progress.step, run.total_steps))
    loader = run.batches.loader(first, last, run.loading)
    model.train()
    with monitor.bar, closing(run.tracker), Interruption() as interruption:
        while progress.step < run.total_steps:
            with monitor.waiting_for_data(interruption):
                loaded = [next(loader) for _ in range(settings.accumulate)]
            target_count = monitor.count(loaded)  # in the whole step, all processes together

            parallel.seed(progress.step)
            sums = torch.zeros(1 + len(run.objective.metric_names), device=precision.device)
            for batch in parallel.micro_batches(loaded):  # gradient accumulation
                with precision.autocast():
                    loss, metrics = run.objective(model, batch.to(precision.device))  # summed
                if loss.requires_grad:  # not if the projector alone is trained and has no image
                    precision.scaled(loss / max(target_count, 1)).backward()
                sums += torch.cat((loss.detach()[None], metrics))

            parallel.reduce_gradients(parameters)
            sums = parallel.sum(sums)
            no_overflow = precision.unscale(parameters, parallel.largest)
            grad_norm = parallel.clip(parameters, settings.clip).to(sums)
            rate = schedule(progress.step, run.total_steps, settings.warmup, settings.min_lr)
            set_learning_rates(optimizer, rate)
            # Where it is 1 the step changes nothing. It is on the device, so that no step waits.
            optimizer.found_inf = (~torch.isfinite(sums[0] + grad_norm)).float()
            if no_overflow and target_count:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            progress.step += 1
            monitor.after_step(grad_norm, sums, target_count, loaded, interruption.signal)
    monitor.skipped.summarise()


class Monitor:
    """What a run shows and writes down: counts, log lines, validations, samples, checkpoints."""

    def __init__(self, run: Run, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        self.run, self.optimizer, self.progress = run, optimizer, progress
        step, device, is_main = progress.step, run.precision.device, run.parallel.is_main
        self.log = RunLog(run.folder, step, device)
        self.bad_steps = BadSteps(run.folder, step, run.settings.max_bad_steps)
        self.utilisation = Utilisation(run.model, device, run.precision.dtype)
        self.skipped = Skipped(run.batches.records, run.parallel)
        vocab_size = run.model.config.language_model.vocab_size
        self.hints = Hints(run.settings, vocab_size, run.total_steps)
        self.samples: Samples | None = None
        if run.validation is not None and is_main:
            self.samples = samples_of(run, run.validation, step)
        self.bar = tqdm(
            total=run.total_steps,
            initial=step,
            desc="training",
            unit="step",
            dynamic_ncols=True,
            disable=not is_main,
        )
        run.tracker.start(step)
        self._unread: list[StepResult] = []  # steps since the last one that was read back

    @contextmanager
    def waiting_for_data(self, interruption: Interruption) -> Iterator[None]:
        """Measure the wait for data, which a signal ends at once, and the run with it.

        Not if there are other processes: they may be in the middle of the step.
        """
        if self.run.parallel.world > 1:
            with self.log.waiting_for_data():
                yield
            return
        try:
            with self.log.waiting_for_data(), interruption.while_waiting():
                yield
        except Interrupted:
            step, saved = self.progress.step, list_checkpoints(self.run.folder)
            if step and not (saved and saved[-1].name == f"step_{step}"):
                if self._unread:
                    self._read_back()
                save(self.run, self.optimizer, self.progress, None)
                self.log.draw()
            self._stop(interruption.signal)

    def count(self, loaded: Sequence[LoadedBatch]) -> int:
        """Count what all processes have loaded for a step, and name the records that they skipped.

        Its FLOPs are counted when a line is logged. Returns the number of its targets: labelled
        tokens, or pairs.
        """
        objective, progress = self.run.objective, self.progress
        targets, samples, tokens, images, slots, skipped = total(
            sum(objective.count_targets(item.batch) for item in loaded if item.batch is not None),
            sum(item.samples for item in loaded),
            sum(item.tokens for item in loaded),
            sum(item.images for item in loaded),
            sum(item.slots for item in loaded),
            sum(len(item.skipped) + len(item.cut) for item in loaded),
        )
        progress.samples += samples
        progress.tokens += tokens
        progress.images += images
        progress.slots += slots
        if skipped:
            self.skipped.note(loaded)
        self.utilisation.add(item.batch for item in loaded)
        return targets

    def after_step(
        self,
        grad_norm: Tensor,
        sums: Tensor,
        target_count: int,
        loaded: Sequence[LoadedBatch],
        signal: int,
    ) -> None:
        """Log, validate and save where that is due. A `signal` other than 0 ends the run."""
        run, progress, settings = self.run, self.progress, self.run.settings
        numbers = torch.cat((grad_norm[None], sums))
        records = [record for item in loaded for record in item.records]
        self._unread.append(StepResult(progress.step, numbers, target_count, records))
        self.bar.update()
        last = progress.step == run.total_steps
        signal = run.parallel.largest(0 if last else signal)
        validation = run.validation if self._is_due(settings.val_every) else None
        logs = self._is_due(settings.log_every) or validation is not None
        saves = self._is_due(settings.save_every) or signal > 0
        last_norm = self._read_back() if logs or saves else math.nan
        with self.log.clock_stopped():
            val = validate(run, validation) if validation is not None else {}
            if logs:
                self._log_line(last_norm, val)
            if validation is not None:
                self._answer_samples()
            if self._is_best(val) or saves:
                save(run, self.optimizer, progress, val.get("val_loss"))
            if last or signal:
                self.log.draw()
        if signal:
            self._stop(signal)

    def _is_due(self, every: int) -> bool:
        """Whether the step is one of every so many (0: none), or the last one."""
        step = self.progress.step
        return step == self.run.total_steps or (every > 0 and step % every == 0)

    def _read_back(self) -> float:
        """Read the numbers of the steps so far, which waits for the device; report bad steps.

        Returns the gradient norm of the last one. Under a loss scaler gradients overflow now and
        then: it drops the step by itself.
        """
        progress, precision = self.progress, self.run.precision
        results, self._unread = self._unread, []
        norm = math.nan
        read = torch.stack([result.numbers for result in results]).tolist()
        for result, (norm, loss, *metrics) in zip(results, read):
            if math.isfinite(loss) and (math.isfinite(norm) or precision.may_overflow):
                progress.loss_sum += loss
                sums = progress.measures or [0.0] * len(metrics)
                progress.measures = [before + new for before, new in zip(sums, metrics)]
                progress.target_count += result.target_count
                progress.bad_in_a_row = 0
            else:
                progress.bad_in_a_row += 1
                records = self.run.parallel.all_lines(result.records)
                self.bad_steps.note(result.step, loss, norm, records, progress.bad_in_a_row)
        return norm

    def _log_line(self, grad_norm: float, val: dict[str, float | None]) -> None:
        """Append a line to metrics.jsonl, and begin to gather the next one."""
        progress, count = self.progress, max(self.progress.target_count, 1)
        loss = progress.loss_sum / count if progress.target_count else None
        means = (value / count for value in progress.measures)
        metrics = dict(zip(self.run.objective.metric_names, means))
        rates: dict[str, float] = {}
        for group in self.optimizer.param_groups:  # with layer_decay: the rate of the last block
            name = f"lr_{group['part']}"
            rates[name] = max(group["lr"], rates.get(name, 0.0))
        line = {
            "step": progress.step,
            "loss": loss,
            **metrics,
            "lr": max(rates.values()),
            **rates,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,  # JSON has no infinity
            "samples": progress.samples,
            "tokens": progress.tokens,
            "images": progress.images,
            "slots": progress.slots,
            **val,
            **self.utilisation.read(self.log.trained_seconds),
        }
        speed = self.log.write(line)
        self.hints.look_at_loss(progress.step, loss)
        self.run.tracker.log(self.log.lines[-1])
        progress.loss_sum, progress.target_count, progress.measures = 0.0, 0, []
        shown = ["loss —" if loss is None else f"loss {loss:.3f}"]
        shown += [f"{name.replace('_', ' ')} {value:.2f}" for name, value in metrics.items()]
        shown += [f"lr {line['lr']:.1e}", f"{speed['samples']:.1f} samples/s"]
        self.bar.set_postfix_str(", ".join([*shown, f"{speed['tokens']:,.0f} tokens/s"]))

    def _answer_samples(self) -> None:
        """Have the model answer a few questions; rank 0 does it, all processes have to call it."""
        run, step = self.run, self.progress.step
        whole = run.parallel.whole(run.model)
        if whole is not None and self.samples is not None:
            self.hints.look_at_answers(self.samples.answer(whole, step, run.precision))
            run.tracker.image("samples", run.folder / "samples.png", step)

    def _is_best(self, val: dict[str, float | None]) -> bool:
        """Whether the validation just done is the best so far; its checkpoint is worth keeping."""
        loss, best = val.get("val_loss"), self.progress.best_val_loss
        if loss is None or (best is not None and loss >= best):
            return False
        self.progress.best_val_loss = loss
        return True

    def _stop(self, signal: int) -> None:
        """Say how to continue, and exit as a process does that the signal ends."""
        run, recipe = self.run, Recipe.of_command("stage1")
        flags = shlex.join([*recipe.flags, "--resume", "--out", str(run.folder)])
        say(
            f"stopped after step {self.progress.step} of {run.total_steps}, all saved; "
            f"go on with:  {run.parallel.launcher} {Path(sys.argv[0]).name} {flags}"
        )
        run.parallel.end()
        raise SystemExit(128 + signal)


def samples_of(run: Run, validation: Batches, step: int) -> Samples:
    """What is shown at every validation: answers, or words where these are learned."""
    if isinstance(run.objective, Words):
        return WordSamples(run.folder, validation, run.objective, step)
    return Samples(run.folder, validation.records, step)


@torch.no_grad()
def validate(run: Run, batches: Batches) -> dict[str, float | None]:
    """The mean loss per target over all of `batches`, and the objective's metrics.

    Of cross entropy, which has none, the perplexity. Each process takes its part of the records.
    """
    model, objective, parallel = run.model, run.objective, run.parallel
    count = 0

    def measure(batch: Batch) -> tuple[Tensor, Tensor]:
        nonlocal count
        count += objective.count_targets(batch)
        with run.precision.autocast():
            return objective(model, batch.to(run.precision.device))

    model.eval()
    loaded = batches.loader(0, len(batches), run.loading)
    whole = (parallel.complete(item.batch) for item in loaded)
    present = (batch for batch in whole if batch is not None)
    sums = sums_over(present, measure, len(objective.metric_names))
    parallel.reshard()
    model.train()
    *sums, count = total(*sums, count)
    loss, *metrics = (value / max(count, 1) for value in sums)
    val = {"val_loss": loss}
    val |= {f"val_{name}": value for name, value in zip(objective.metric_names, metrics)}
    if not objective.metric_names:
        val["val_perplexity"] = perplexity(loss)
    finite = all(map(math.isfinite, val.values()))
    return dict(val) if finite else dict.fromkeys(val)  # JSON has no word for infinity


def save(
    run: Run, optimizer: torch.optim.Optimizer, progress: Progress, val_loss: float | None
) -> None:
    """Write a checkpoint. If it finds no room, the run ends or goes on, as `full_disk` says."""
    state = {"progress": asdict(progress), "val_loss": val_loss, "facts": run.facts}
    if run.precision.scaler is not None:
        state["scaler"] = vars(run.precision.scaler)
    try:
        save_checkpoint(run.folder, run.model, optimizer, state, run.settings.keep)
    except NoRoomError as error:
        if run.settings.full_disk == "stop":
            raise
        say(f"{error}; training goes on")


def resume(run: Run, optimizer: torch.optim.Optimizer) -> Progress:
    """Go back to the newest whole checkpoint; refused if `run.facts` were others."""
    folder, parallel, scaler = run.folder, run.parallel, run.precision.scaler
    if not parallel.largest(len(list_checkpoints(folder))):
        say(f"{folder}: stopped before its first checkpoint, so it starts again")
        return Progress()
    state = load_checkpoint(folder, run.model, optimizer)
    where = list_checkpoints(folder)[-1] / STATE
    progress = parse_progress(state, where)
    facts = dict_at(state, "facts", where)
    changed = [
        f"{what} {quoted(now)} (was {quoted(facts[what])})"
        for what, now in run.facts.items()
        if facts.get(what, now) != now
    ]
    if changed and not run.settings.allow_changes:
        raise NanoVLMError(
            f"{where}: was saved with other data or settings: {', '.join(changed[:5])}; give the "
            "run what it had (records per step are processes × --batch-size × --accumulate), or go "
            "on all the same with --allow-changes"
        )
    if scaler is not None and "scaler" in state:
        scaler.restore(state["scaler"], f"{where}: scaler")
    parallel.check_same("finished steps", progress.step)
    return progress
