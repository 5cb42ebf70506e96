"""From settings to a finished run folder: model, data, training, and what is shown at the end."""

import dataclasses
import math
import os
import random
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from nanovlm.data.batches import Batches, BatchOptions, Encoder, RecordEncoder
from nanovlm.data.preferences import PairEncoder, read_pairs
from nanovlm.data.records import Record, read_records
from nanovlm.errors import NanoVLMError
from nanovlm.hub.adapters import merged_tensors, save_adapter
from nanovlm.hub.models import save_model
from nanovlm.inputs.image import image_pixels, open_image
from nanovlm.model.lora import LoRAConfig
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.training.blocks import checkpoint_blocks, compile_blocks
from nanovlm.training.building import build_model, set_up
from nanovlm.training.distributed.parallel import Parallel
from nanovlm.training.freezing import describe, is_trainable
from nanovlm.training.loop import train
from nanovlm.training.monitor.samples import last_answers
from nanovlm.training.monitor.tracking import Tracker, build_tracker
from nanovlm.training.objectives import objective_of
from nanovlm.training.precision import Precision
from nanovlm.training.reference import reference_of
from nanovlm.training.settings import Settings, to_toml
from nanovlm.utils.console import say
from nanovlm.utils.device import DTYPES, choose_device, choose_dtype, give_back_freed_memory
from nanovlm.utils.files import write_atomically
from nanovlm.utils.processes import is_main

ENCODED_AT_ONCE = (
    8  # pictures, when features are cached: few enough that a block stays in the CPU cache
)


def run_stage(settings: Settings) -> Path:
    """Train as `settings` say and return the folder of the finished model."""
    run = Path(settings.out)
    if is_main():  # which is alone in writing there
        _check_run_folder(run, settings.resume)
    tracker = build_tracker(settings, run) if is_main() else Tracker()
    parallel = Parallel(settings, choose_device(settings.device))
    device = parallel.device
    dtype, why = choose_dtype(settings.dtype, device)
    say(
        f"device {device}, {str(dtype).removeprefix('torch.')}"
        + (f" ({why})" if why else "")
        + (f", {parallel.world} processes, {settings.parallel}" if parallel.world > 1 else "")
    )
    settings = dataclasses.replace(
        settings, dtype=next(name for name, known in DTYPES.items() if known == dtype)
    )
    precision = Precision(dtype, device, settings.stochastic_rounding)
    torch.manual_seed(settings.seed)
    model = build_model(settings)
    records, held_out = _read_data(settings)
    set_up(model, settings, device)
    say(f"{len(records)} records to learn from, {len(held_out)} held out")

    features = None
    if settings.cache_features:
        if is_trainable(model.vision_encoder):
            raise NanoVLMError(
                "--cache-features keeps what frozen eyes see; take vision out of --train or use --no-cache-features"
            )
        precision.place(model.vision_encoder)
        features = encode_images(
            model, (path for record in records + held_out for path in record.images), precision
        )
    parallel.place(model, precision)
    if settings.compile:
        compile_blocks(model, device)
    if settings.checkpointing:
        checkpoint_blocks(
            model, dropout=settings.lora_dropout > 0 or model.config.language_model.dropout > 0
        )
        if device.type == "cpu":
            give_back_freed_memory()
    say(describe(model, settings))
    options = BatchOptions(
        batch_size=settings.batch_size,
        max_length=min(settings.max_length, model.config.language_model.max_position_embeddings),
        share=settings.share,
        pack=settings.pack,
        bucket=settings.bucket,
        seed=settings.seed,
        rank=parallel.rank,
        world=parallel.world,
    )
    in_order = BatchOptions(
        batch_size=options.batch_size,
        max_length=options.max_length,
        share=options.share,
        shuffle=False,
    )
    objective, encoder = objective_of(settings), RecordEncoder.of(model)
    if settings.objective == "dpo":
        encoder = PairEncoder(encoder)
    held_out = _usable(held_out, encoder, in_order, features)
    batches = Batches(records, encoder, options, features)
    validation = Batches(held_out, encoder, in_order, features) if held_out else None
    per_step = settings.batch_size * settings.accumulate * parallel.world
    total_steps = settings.max_steps or math.ceil(settings.epochs * len(records) / per_step)

    for what, number in (
        ("records", len(records)),
        ("held-out records", len(held_out)),
        ("steps to take", total_steps),
    ):
        parallel.check_same(what, number)
    if is_main():
        run.mkdir(parents=True, exist_ok=True)
        write_atomically(
            run / "settings.toml",
            to_toml(dataclasses.replace(settings, resume=False, allow_changes=False)),
        )
    if isinstance(encoder, PairEncoder):
        parts = [part for part in (batches, validation) if part is not None]
        encoder.reference = reference_of(model, parts, settings, precision, parallel)
    train(
        model,
        objective,
        batches,
        validation,
        settings,
        precision,
        total_steps,
        run,
        parallel,
        tracker,
    )
    whole = parallel.whole(model)
    parallel.end()
    if whole is not None:
        if answers := last_answers(run):
            say(answers)
        if settings.lora_rank:
            save_adapter(whole, run / "adapter", LoRAConfig.from_settings(settings))
        _save_model(whole, run, dtype)  # last, because a run that has its model is finished
        say(f"the model is in {run / 'model'}")
    return run / "model"


@torch.no_grad()
def encode_images(
    model: VisionLanguageModel, paths: Iterable[Path], precision: Precision
) -> dict[Path, Tensor]:
    """The patch vectors of each image's pictures, once: path → (n, P, C_v) in the precision of the run, on the CPU.

    Images that cannot be read are missing from the result, and their records will be skipped by name.
    """
    unique = sorted(set(paths))
    features: dict[Path, Tensor] = {}
    for start in tqdm(
        range(0, len(unique), ENCODED_AT_ONCE),
        desc="encoding images",
        unit="batch",
        dynamic_ncols=True,
        disable=not is_main(),
    ):
        pixels = {}
        for path in unique[start : start + ENCODED_AT_ONCE]:
            try:
                pixels[path] = image_pixels(open_image(path), model.config.image)
            except NanoVLMError:
                continue
        if pixels:
            parts = torch.cat(list(pixels.values())).split(ENCODED_AT_ONCE)
            patches = torch.cat(
                [model.vision_features(part.to(precision.device)).cpu() for part in parts]
            )
            features |= zip(pixels, patches.split([len(pictures) for pictures in pixels.values()]))
    return features


def _check_run_folder(run: Path, resume: bool) -> None:
    if resume and (run / "model").exists():
        raise NanoVLMError(f"{run}: this run is finished, its model is in {run / 'model'}")
    if (
        not resume
        and run.exists()
        and (not run.is_dir() or any(not path.name.startswith(".") for path in run.iterdir()))
    ):
        raise NanoVLMError(
            f"{run}: holds another run; continue it with --resume, or name another folder with --out"
        )


def _read_data(settings: Settings) -> tuple[list[Record], list[Record]]:
    """Records to learn from and records held out; of a split, no image is on both sides."""
    if not settings.data:
        raise NanoVLMError("no records to learn from; give them with --data FILE.jsonl")
    read = read_pairs if settings.objective == "dpo" else read_records
    records, skipped = read(settings.data, settings.images or None)
    for record in records:
        if record.references:
            raise NanoVLMError(
                f"{record.where}: has references and no answer; it is for evaluation, not for training"
            )
    for reason in skipped:
        say(f"skipped: {reason}")
    generator = random.Random(settings.seed)
    if settings.val:
        held_out, skipped = read(settings.val, settings.images or None)
        for reason in skipped:
            say(f"skipped: {reason}")
    else:
        records, held_out = _split(records, settings.val_fraction, generator)
    if len(held_out) > settings.val_samples:
        held_out = [
            held_out[index]
            for index in sorted(generator.sample(range(len(held_out)), settings.val_samples))
        ]
    return records, held_out


def _split(
    records: list[Record], fraction: float, generator: random.Random
) -> tuple[list[Record], list[Record]]:
    """Hold out a share of the images with all their records. Images that a record shows together stay together."""
    parents: dict[Path, Path] = {}  # union-find over images; a record without any stands for itself

    def first_image(record: Record) -> Path:
        return record.images[0] if record.images else Path(record.where)

    def group(image: Path) -> Path:
        while parents.setdefault(image, image) != image:
            parents[image] = image = parents[parents[image]]
        return image

    for record in records:
        for image in record.images:
            parents[group(image)] = group(first_image(record))
    groups = sorted({group(first_image(record)) for record in records})
    chosen = set(generator.sample(groups, round(fraction * len(groups))))
    if len(chosen) == len(groups):
        raise NanoVLMError(
            f"--val-fraction {fraction} of {len(groups)} images leaves none to learn from; lower it"
        )
    return (
        [record for record in records if group(first_image(record)) not in chosen],
        [record for record in records if group(first_image(record)) in chosen],
    )


def _usable(
    records: list[Record],
    encoder: Encoder,
    options: BatchOptions,
    features: dict[Path, Tensor] | None,
) -> list[Record]:
    """The held-out records that make a sample; the others are named here, and not again at each
    validation."""
    usable = []
    for record in records:
        skipped = Batches([record], encoder, options, features)[0].skipped
        usable += [] if skipped else [record]
        for reason in skipped:
            say(f"skipped: {reason}")
    return usable


def _save_model(model: VisionLanguageModel, run: Path, dtype: torch.dtype) -> None:
    """Write the whole model, adapters merged, in the number format it was trained to compute in, under its name once it
    is complete."""
    temporary = run / ".model.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    save_model(model, temporary, merged_tensors(model, dtype))
    os.rename(temporary, run / "model")
