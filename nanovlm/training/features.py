"""Features of a frozen vision encoder, computed once for each image (`--cache-features`)."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from nanovlm.data.records import Record, check_skipped, say_skipped
from nanovlm.data.workers import IN_THIS_PROCESS, Loading, prepare_ahead
from nanovlm.errors import NanoVLMError
from nanovlm.inputs.image import image_pixels, open_image
from nanovlm.inputs.image_config import ImageConfig
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.training.freezing import is_trainable
from nanovlm.training.precision import Precision
from nanovlm.utils.processes import is_main

# Images, and tiles, that are encoded at once when features are cached. On a CPU their activations
# fit its cache; a GPU is kept busy by more.
ENCODED_AT_ONCE = {"cpu": 8, "mps": 8, "cuda": 64}


class _Images(Dataset):
    """The pixels of each image's tiles (n, 3, H, W), or why an image cannot be read."""

    def __init__(self, paths: Sequence[Path], config: ImageConfig) -> None:
        self.paths, self.config = paths, config

    def __getitem__(self, number: int) -> Tensor | str:
        try:
            return image_pixels(open_image(self.paths[number]), self.config)
        except NanoVLMError as error:
            return str(error)


@torch.no_grad()
def compute_features(
    model: VisionLanguageModel,
    paths: Iterable[Path],
    precision: Precision,
    loading: Loading = IN_THIS_PROCESS,
) -> tuple[dict[Path, Tensor], dict[Path, str]]:
    """The patch vectors of each image's tiles, computed once.

    Returns path → (tiles, P, C_v) in the compute dtype, on the CPU; and path → reason for images
    that cannot be read.
    """
    unique = sorted(set(paths))
    at_once = ENCODED_AT_ONCE[precision.device.type]
    features: dict[Path, Tensor] = {}
    unreadable: dict[Path, str] = {}
    images = prepare_ahead(_Images(unique, model.config.image), 0, len(unique), loading)
    progress = tqdm(
        zip(images, unique),
        total=len(unique),
        desc="encoding images",
        unit="image",
        dynamic_ncols=True,
        disable=not is_main(),
    )
    remaining = iter(progress)
    while group := list(itertools.islice(remaining, at_once)):
        unreadable |= {path: reason for reason, path in group if isinstance(reason, str)}
        pixels = {path: tiles for tiles, path in group if not isinstance(tiles, str)}
        if pixels:
            on_device = [
                tiles.to(precision.device, non_blocking=loading.pin_memory)
                for tiles in pixels.values()
            ]
            parts = torch.cat(on_device).split(at_once)
            patches = torch.cat([model.vision_features(part) for part in parts]).cpu()
            features |= zip(pixels, patches.split([len(tiles) for tiles in on_device]))
    return features, unreadable


def cached_features(
    model: VisionLanguageModel, records: Sequence[Record], precision: Precision, loading: Loading
) -> tuple[dict[Path, Tensor], dict[Path, str]]:
    """`compute_features` of the images of `records`; refused if the vision encoder is trained."""
    if is_trainable(model.vision_encoder):
        raise NanoVLMError(
            "--cache-features keeps what a frozen vision encoder computes; take vision_encoder out "
            "of --train or use --no-cache-features"
        )
    precision.place(model.vision_encoder)
    paths = (path for record in records for path in record.images)
    return compute_features(model, paths, precision, loading)


def without_unreadable(
    records: list[Record], held_out: list[Record], unreadable: dict[Path, str]
) -> tuple[list[Record], list[Record]]:
    """The records whose images can be read; the others are named, and too many end the run."""
    skipped = {
        record.where: f"{record.where}: {unreadable[path]}"
        for record in (*records, *held_out)
        for path in record.images
        if path in unreadable
    }
    total = len({record.where for record in (*records, *held_out)})
    check_skipped(list(skipped.values()), total)
    say_skipped(list(skipped.values()), total)
    return (
        [record for record in records if record.where not in skipped],
        [record for record in held_out if record.where not in skipped],
    )
