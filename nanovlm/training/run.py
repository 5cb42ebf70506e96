"""From settings to a finished run folder: model, data, training, and what is saved at the end."""

import dataclasses
import math
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from nanovlm.data.batches import CUDA_LENGTHS, Batches, BatchOptions, RecordEncoder
from nanovlm.data.preferences import PairEncoder, read_pairs
from nanovlm.data.records import Record, check_skipped, read_records, say_skipped
from nanovlm.data.split import split
from nanovlm.data.words import Vocabulary, WordEncoder, by_image, word_encoder
from nanovlm.data.workers import Loading, choose_loading
from nanovlm.errors import NanoVLMError
from nanovlm.hub.adapters import merged_tensors, save_adapter
from nanovlm.hub.models import save_model
from nanovlm.inputs.batch import Batch
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.training.blocks import checkpoint_blocks, compile_blocks
from nanovlm.training.building import build_model, lora_config, set_up
from nanovlm.training.checkpoint import check_run_folder
from nanovlm.training.distributed.parallel import Parallel, build_parallel
from nanovlm.training.features import cached_features, without_unreadable
from nanovlm.training.freezing import describe
from nanovlm.training.loop import Run, train
from nanovlm.training.monitor.samples import last_answers
from nanovlm.training.monitor.tracking import build_tracker
from nanovlm.training.objectives.objective import objective_of
from nanovlm.training.objectives.reference import reference_of
from nanovlm.training.objectives.words import Words, finish_words
from nanovlm.training.precision import Precision
from nanovlm.training.settings import Settings, to_toml
from nanovlm.utils.console import say
from nanovlm.utils.device import (
    DTYPES,
    allow_growing_segments,
    allow_tf32,
    choose_device,
    choose_dtype,
    make_deterministic,
    reuse_freed_memory,
)
from nanovlm.utils.files import write_atomically
from nanovlm.utils.outputs import check_no_input, only_writer
from nanovlm.utils.processes import is_main

MAX_COPIES = 100  # of each record in a step
MEASURED = 8  # batches whose visual tokens are measured after words were learned


def run_stage(settings: Settings) -> Path:
    """Train as `settings` say and return the folder of the finished model."""
    if settings.deterministic:
        make_deterministic()
    allow_growing_segments()
    reuse_freed_memory()
    folder = Path(settings.out)
    check_no_input(
        folder, "--out", (settings.init, settings.vision_encoder, settings.language_model)
    )
    with only_writer(folder, "--out"):
        if is_main():
            check_run_folder(folder, settings.resume)
        _run(settings, folder)
    return folder / "model"


def _run(settings: Settings, folder: Path) -> None:
    """Train and save in a folder that no other run writes to."""
    track = settings.track if is_main() else ""
    tracker = build_tracker(track, folder, dataclasses.asdict(settings))
    parallel = build_parallel(settings, choose_device(settings.device))
    settings = _with_dtype(settings, parallel)
    precision = Precision(DTYPES[settings.dtype], parallel.device, settings.stochastic_rounding)
    loading, how = choose_loading(settings.workers, parallel.device)
    if how:
        say(how)
    torch.manual_seed(settings.seed)
    model = build_model(settings)
    records, held_out = _read_data(settings)
    set_up(model, settings, parallel.device)
    features = None
    if settings.cache_features:
        features, unreadable = cached_features(model, [*records, *held_out], precision, loading)
        records, held_out = without_unreadable(records, held_out, unreadable)
    say(f"{len(records)} records to train on, {len(held_out)} held out")
    _place(model, settings, precision, parallel)
    say(*describe(model, settings).split("\n"))
    batches, validation = _make_batches(model, records, held_out, settings, parallel, features)
    if validation is not None:
        validation = _usable(validation, loading)
    per_step = settings.batch_size * settings.accumulate * parallel.world
    total_steps = settings.max_steps or math.ceil(settings.epochs * len(records) / per_step)
    parallel.check_same("records", len(records))
    parallel.check_same("held-out records", len(validation.records) if validation else 0)
    parallel.check_same("steps to take", total_steps)

    _write_settings(settings)
    if isinstance(batches.encoder, PairEncoder):
        parts = [part for part in (batches, validation) if part is not None]
        reference = reference_of(model, parts, settings, precision, parallel, loading)
        batches.encoder.reference = reference
    vocabulary = Vocabulary()
    if isinstance(batches.encoder, WordEncoder):
        vocabulary = batches.encoder.vocabulary
        say(f"{len(vocabulary)} words to learn, of {settings.word_images} images or more each")
    run = Run(
        settings=settings,
        model=model,
        objective=objective_of(settings, model, vocabulary),
        batches=batches,
        validation=validation,
        total_steps=total_steps,
        precision=precision,
        parallel=parallel,
        tracker=tracker,
        loading=loading,
    )
    train(run)
    _save_results(run)


def _with_dtype(settings: Settings, parallel: Parallel) -> Settings:
    """The settings with the compute dtype that the device has; says which, and why."""
    dtype, why = choose_dtype(settings.dtype, parallel.device)
    name = next(name for name, known in DTYPES.items() if known == dtype)
    processes = f"{parallel.world} processes, {settings.parallel}"
    say(
        f"device {parallel.device}, {name}"
        + (f" ({why})" if why else "")
        + (" with products in TF32" if allow_tf32(dtype, parallel.device) else "")
        + (", deterministic" if settings.deterministic else "")
        + (f", {processes}" if parallel.world > 1 else "")
    )
    return dataclasses.replace(settings, dtype=name)


def _place(
    model: VisionLanguageModel, settings: Settings, precision: Precision, parallel: Parallel
) -> None:
    """Bring the model to its device; compile and checkpoint its blocks where wanted."""
    parallel.place(model, precision, features=settings.cache_features)
    compile_blocks(model, parallel.device, settings.compile)
    if settings.checkpointing:
        dropout = settings.lora_dropout > 0 or model.config.language_model.dropout > 0
        checkpoint_blocks(model, dropout=dropout)


def _make_batches(
    model: VisionLanguageModel,
    records: Sequence[Record],
    held_out: Sequence[Record],
    settings: Settings,
    parallel: Parallel,
    features: dict[Path, Tensor] | None,
) -> tuple[Batches, Batches | None]:
    """The batches to train on, and those to validate with; both encode records alike.

    Of the latter, all processes together take `world` · `batch_size` records in order.
    """
    encoder = single = RecordEncoder.of(model)
    if settings.objective == "dpo":
        encoder = PairEncoder(single)
    if settings.objective == "words":
        limits = settings.word_images, settings.max_words
        encoder = word_encoder(single, records, held_out, *limits)
    options = BatchOptions(
        batch_size=settings.batch_size,
        max_length=min(settings.max_length, model.config.language_model.max_position_embeddings),
        share=settings.share,
        pack=settings.pack,
        bucket=settings.bucket,
        multiple=CUDA_LENGTHS if parallel.device.type == "cuda" else 1,
        seed=settings.seed,
        rank=parallel.rank,
        world=parallel.world,
    )
    in_order = BatchOptions(
        batch_size=options.batch_size,
        max_length=options.max_length,
        share=options.share,
        multiple=options.multiple,
        shuffle=False,
        rank=options.rank,
        world=options.world,
    )
    batches = Batches(records, encoder, options, features)
    return batches, Batches(held_out, encoder, in_order, features) if held_out else None


def _write_settings(settings: Settings) -> None:
    """Keep the settings in the run folder, for `--resume` and for comparisons."""
    if is_main():
        folder = Path(settings.out)
        folder.mkdir(parents=True, exist_ok=True)
        text = to_toml(dataclasses.replace(settings, resume=False, allow_changes=False))
        write_atomically(folder / "settings.toml", text)


def _read_data(settings: Settings) -> tuple[list[Record], list[Record]]:
    """Records to train on and records held out; if they are split, no image is on both sides."""
    if not settings.data:
        raise NanoVLMError("no records to train on; give them with --data FILE.jsonl")
    records = _read_answered(settings.data, settings)
    _check_records(records, settings)
    generator = random.Random(settings.seed)
    held_out = _read_answered(settings.val, settings) if settings.val else []
    if settings.objective == "words":
        blind = sum(not record.images for record in (*records, *held_out))
        records, held_out = by_image(records), by_image(held_out)
        if blind:
            say(f"{blind} records have no image whose words could be learned, and are left out")
    if not settings.val:
        records, held_out = split(records, settings.val_fraction, generator)
    if len(held_out) > settings.val_samples:
        chosen = sorted(generator.sample(range(len(held_out)), settings.val_samples))
        held_out = [held_out[index] for index in chosen]
    return records, held_out


def _read_answered(data: str, settings: Settings) -> list[Record]:
    """The records of `data` that can be used and have an answer; the others are named."""
    read = read_pairs if settings.objective == "dpo" else read_records
    records, skipped = read(data, settings.images or None)
    total = len(records) + len(skipped)
    skipped += [
        f"{record.where}: has references and no answer; it is for evaluation, not for training"
        for record in records
        if record.references
    ]
    check_skipped(skipped, total)
    say_skipped(skipped, total)
    return [record for record in records if not record.references]


def _check_records(records: Sequence[Record], settings: Settings) -> None:
    """Refuse to train what sees images without any, and steps of the same few records."""
    trained = [part for part in ("projector", "vision_encoder") if part in settings.trained_parts]
    if trained and not any(record.images for record in records):
        raise NanoVLMError(
            f"{settings.data}: none of the {len(records)} records has an image, and --train "
            f"{','.join(trained)} would learn nothing; name their images in 'image' or 'images', "
            "or use --train language_model"
        )
    if (per_step := settings.batch_size * settings.accumulate) > MAX_COPIES * len(records):
        raise NanoVLMError(
            f"--batch-size × --accumulate = {per_step} takes each of the {len(records)} records "
            f"more than {MAX_COPIES} times a step; lower them"
        )


def _usable(validation: Batches, loading: Loading) -> Batches | None:
    """Without the records that cannot be used; they are named here, not at each validation."""
    records, options = validation.records, validation.options
    one_by_one = dataclasses.replace(options, batch_size=1, rank=0, world=1)
    usable, skipped = [], []
    singles = Batches(records, validation.encoder, one_by_one, validation.features)
    for loaded, record in zip(singles.loader(0, len(singles), loading), records):
        usable += [] if loaded.skipped else [record]
        skipped += loaded.skipped
    say_skipped(skipped, len(records))
    return Batches(usable, validation.encoder, options, validation.features) if usable else None


def _save_results(run: Run) -> None:
    """Write the adapters and the model; the latter last, because it marks the run as finished."""
    whole = run.parallel.whole(run.model)
    run.parallel.end()
    if whole is None:
        return
    if isinstance(run.objective, Words):
        with run.precision.autocast():
            finish_words(whole, run.objective, _first_batches(run))
    if answers := last_answers(run.folder):
        say(*answers.split("\n"))
    if run.settings.lora_rank:
        with _whole_folder(run.folder / "adapter") as folder:
            save_adapter(whole, folder, lora_config(run.settings))
    with _whole_folder(run.folder / "model") as folder:  # in the compute dtype, adapters merged
        save_model(whole, folder, merged_tensors(whole, run.precision.dtype))
    say(f"the model is in {run.folder / 'model'}")


def _first_batches(run: Run) -> Iterator[Batch]:
    """The first batches of the run, the same for any number of processes."""
    given, options = run.batches, run.batches.options
    size = options.batch_size * options.world
    options = dataclasses.replace(options, batch_size=size, rank=0, world=1)
    batches = Batches(given.records, given.encoder, options, given.features)
    for loaded in batches.loader(0, min(MEASURED, len(batches)), run.loading):
        if loaded.batch is not None:
            yield loaded.batch


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a hidden name for a folder of the run, which becomes `folder` when it is complete.

    What a killed run left under either name is replaced.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    yield temporary
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(temporary, folder)
