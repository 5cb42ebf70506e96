"""Images beside files of the same name: a folder of `1.jpg` and `1.txt`, or a webdataset tar."""

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

from data_tools.convert.images import SUFFIXES, walk
from nanovlm.data.tables import Row
from nanovlm.errors import NanoVLMError
from nanovlm.inputs import archive
from nanovlm.utils.files import read_bytes

TEXTS = (".txt", ".json", ".caption", ".text", ".cls")
MAX_TEXT = 2**20  # bytes of a caption or a conversation


def folder_rows(folder: Path) -> Iterator[Row]:
    """A row for each image of a folder that has a text of its name beside it."""
    for place, paths in groupby(walk(folder), key=attrgetter("parent")):
        yield from _rows(place, place.joinpath, [path.name for path in paths])


def tar_rows(path: Path) -> Iterator[Row]:
    """A row for each sample of a webdataset tar: members whose names are equal up to the dot."""
    yield from _rows(path.parent, lambda name: Path(f"{path}::{name}"), archive.members(path))


def has_samples(names: Iterable[str]) -> bool:
    """Whether at least half of the texts among `names` stand beside an image."""
    samples = _samples(names)
    texts = [parts for parts in samples.values() if any(part in TEXTS for part in parts)]
    both = [parts for parts in texts if any(part in SUFFIXES for part in parts)]
    return bool(both) and 2 * len(both) >= len(texts)


def _samples(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Key of a sample → suffix → name, in the order of the names."""
    samples: dict[str, dict[str, str]] = {}
    for name in names:
        folder, slash, file = name.rpartition("/")
        stem, dot, suffix = file.rpartition(".")
        samples.setdefault(f"{folder}{slash}{stem}", {})[f"{dot}{suffix}".lower()] = name
    return samples


def _rows(folder: Path, place_of: Callable[[str], Path], names: list[str]) -> Iterator[Row]:
    for key, parts in _samples(names).items():
        image = next((parts[suffix] for suffix in SUFFIXES if suffix in parts), None)
        texts = [suffix for suffix in TEXTS if suffix in parts]
        if image is None and not texts:
            continue
        try:
            if image is None:
                raise NanoVLMError(f"image {key} is missing: there is {parts[texts[0]]} alone")
            if not texts:
                raise NanoVLMError("has no caption: there is no text beside the image")
            found = {suffix: _text(place_of(parts[suffix])) for suffix in texts}
            value: Any = _sample(place_of(image).absolute(), found)
        except NanoVLMError as error:
            value = error
        yield Row(str(place_of(key)), value, folder)


def _sample(image: Path, texts: dict[str, str]) -> dict[str, Any]:
    """The row of an image: what its JSON says, or its caption."""
    value: Any = {}
    if ".json" in texts:
        try:
            value = json.loads(texts[".json"])
        except (ValueError, RecursionError):
            raise NanoVLMError("its .json is not valid JSON") from None
        value = {"conversations": value} if isinstance(value, list) else value
        if not isinstance(value, dict):
            raise NanoVLMError("its .json is neither an object nor a list of turns")
    caption = next((texts[s].strip() for s in (".txt", ".caption", ".text") if s in texts), "")
    label = texts.get(".cls", "").strip()
    if caption:
        value.setdefault("caption", caption)
    elif label and "caption" not in value:
        if label.isdigit():
            raise NanoVLMError("has no caption: its .cls is the number of a class, not a text")
        value["caption"] = label
    others = ("image", "images", "image_path", "file_name", "filename", "key")
    return {**{k: v for k, v in value.items() if k not in others}, "image": str(image)}


def _text(path: Path) -> str:
    """A text as UTF-8. Raises NanoVLMError with the bare reason."""
    try:
        is_member = archive.is_member(path)
        data = archive.read_member(path) if is_member else read_bytes(path, MAX_TEXT)
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise NanoVLMError("its text is not UTF-8; save it as UTF-8") from None
