"""The reference model's log-probabilities for preference training, computed once before it.

    run/reference.jsonl   a line that says what they were computed from,
                          then one per pair: where, chosen, rejected

The reference model is the one that the run starts from, so no second model is held in memory. A
resumed run, whose model has changed since, reads them from the file.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from nanovlm.data.batches import Batches, BatchOptions
from nanovlm.data.preferences import PairBatch
from nanovlm.data.records import record_files
from nanovlm.data.workers import Loading
from nanovlm.errors import NanoVLMError
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.training.checkpoint import list_checkpoints
from nanovlm.training.distributed.parallel import Parallel
from nanovlm.training.monitor.log import is_finite
from nanovlm.training.objectives.preferences import answer_log_probabilities
from nanovlm.training.precision import Precision
from nanovlm.training.settings import Settings
from nanovlm.utils.files import read_jsonl, to_jsonl, write_atomically
from nanovlm.utils.parser import flag
from nanovlm.utils.processes import is_main

FILE = "reference.jsonl"
# Settings that they depend on, besides the files.
MATTERS = ("val_fraction", "val_samples", "seed", "max_length", "pack", "dtype", "quantize")

# A record's name → log-probabilities of its chosen and its rejected answer.
Reference = dict[str, tuple[float, float]]


def reference_of(
    model: VisionLanguageModel,
    parts: Sequence[Batches],
    settings: Settings,
    precision: Precision,
    parallel: Parallel,
    loading: Loading,
) -> Reference:
    """The log-probabilities of all pairs of `parts` under `model`, which is not trained yet.

    Those of a resumed run are read from its file; raises if that was made from other data, another
    model or other settings. Pairs that cannot be read are missing.
    """
    path, made_from = Path(settings.out) / FILE, fingerprint(settings)
    if settings.resume and (path.exists() or list_checkpoints(path.parent)):
        return _read(path, made_from)
    reference: Reference = {}
    for batches in parts:
        reference |= compute(model, batches, precision, parallel, loading)
    if is_main():
        lines = [
            {"where": where, "chosen": chosen, "rejected": rejected}
            for where, (chosen, rejected) in reference.items()
        ]
        write_atomically(path, to_jsonl([{**made_from, "pairs": len(lines)}, *lines]))
    return reference


@torch.no_grad()
def compute(
    model: VisionLanguageModel,
    batches: Batches,
    precision: Precision,
    parallel: Parallel,
    loading: Loading,
) -> Reference:
    """The log-probabilities of the pairs of `batches`, which several processes share out."""
    place = {record.where: number for number, record in enumerate(batches.records)}
    # Chosen, rejected, and 1 if the pair could be read.
    found = torch.zeros(len(place), 3, device=precision.device)
    options = BatchOptions(
        batch_size=batches.options.batch_size,
        max_length=batches.options.max_length,
        shuffle=False,
        rank=parallel.rank,
        world=parallel.world,
    )
    in_order = Batches(batches.records, batches.encoder, options, batches.features)
    model.eval()
    for loaded in tqdm(
        in_order.loader(0, len(in_order), loading),
        total=len(in_order),
        desc="reference",
        unit="batch",
        dynamic_ncols=True,
        disable=not is_main(),
    ):
        if (batch := parallel.complete(loaded.batch)) is None:
            continue
        with precision.autocast():
            values = answer_log_probabilities(model, PairBatch.of(batch.to(precision.device)))
        lines = [place[where] for where in loaded.records]
        found[lines, :2], found[lines, 2] = values, 1.0
    parallel.reshard()
    model.train()
    values = parallel.sum(found).tolist()
    for where, numbers in zip(place, values):
        if not all(map(math.isfinite, numbers)):
            raise NanoVLMError(
                f"{where}: the starting model gives this pair no finite log-probability; "
                "take --dtype float32 to see whether the compute dtype is at fault"
            )
    pairs = zip(place, values)
    return {where: (chosen, rejected) for where, (chosen, rejected, read) in pairs if read}


def fingerprint(settings: Settings) -> dict[str, str | int | float]:
    """What the log-probabilities depend on: digests of records and model folder, and settings."""
    model_files = [path for path in sorted(Path(settings.init).iterdir()) if path.is_file()]
    return {
        "data": _digest(record_files(settings.data)) if settings.data else "",
        "val": _digest(record_files(settings.val)) if settings.val else "",
        "images": settings.images,
        "init": _digest(model_files),
        **{name: getattr(settings, name) for name in MATTERS},
    }


def _read(path: Path, made_from: dict[str, str | int | float]) -> Reference:
    try:
        was, *lines = read_jsonl(path)
        different = [flag(name) for name in made_from if was.get(name) != made_from[name]]
        reference = {line["where"]: (line["chosen"], line["rejected"]) for line in lines}
        numbers = [number for pair in reference.values() for number in pair]
        if len(lines) != was.get("pairs") or not all(map(is_finite, numbers)):
            raise ValueError(path)
    except (NanoVLMError, ValueError, KeyError, TypeError, AttributeError):
        raise NanoVLMError(
            f"{path}: is missing or damaged, and the run has moved on from the model it was "
            "computed with; start the run again in another folder"
        ) from None
    if different:
        raise NanoVLMError(
            f"{path}: was computed with another {', '.join(different)} than the run has now; "
            "give it what it had, or start it again in another folder"
        )
    return reference


def _digest(files: Sequence[Path]) -> str:
    """One digest of the bytes of all files in order."""
    sums = []
    for path in files:
        with open(path, "rb") as file:
            sums.append(hashlib.file_digest(file, "sha256").hexdigest())
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()
