"""Records to train on and records held out, with no image on both sides."""

import random
from pathlib import Path

from nanovlm.data.records import Record
from nanovlm.errors import NanoVLMError


def split(
    records: list[Record], fraction: float, generator: random.Random
) -> tuple[list[Record], list[Record]]:
    """Hold out a fraction of the images, with all their records.

    Images of one record stay on one side. Returns records to train on and records held out.
    """
    parents: dict[Path, Path] = {}  # union-find over images; a record without any is its own

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
            f"--val-fraction {fraction} of {len(groups)} images leaves none to train on; lower it"
        )
    return (
        [record for record in records if group(first_image(record)) not in chosen],
        [record for record in records if group(first_image(record)) in chosen],
    )
