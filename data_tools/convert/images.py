"""The images of records: where they are, whether they can be opened, and what they are called.

An image that lies in a file, or in a plain tar file, stays where it is. One that lies in a zip
archive, in a table or in the record itself is stored by its content: `images/3f/3f29….jpg`.
"""

import hashlib
import os
import re
import threading
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

from data_tools.pack_tar import read_image_file
from nanovlm.data.records import image_path
from nanovlm.errors import NanoVLMError, quoted
from nanovlm.inputs import archive, data_uri
from nanovlm.inputs.image import open_image
from nanovlm.utils.files import open_regular
from nanovlm.utils.sniff import FIRST_BYTES, what_is

MAX_IMAGE = 2**26  # bytes of an image in an archive or a table; a photo has a few million
MAX_KNOWN = 2**16  # images that have been opened and need not be again
MAX_SHOWN = 3  # candidates that a message lists
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".jfif",
            ".avif")  # fmt: skip
EXTENSIONS = {
    "a JPEG image": "jpg",
    "a PNG image": "png",
    "a WebP image": "webp",
    "a GIF image": "gif",
    "a BMP image": "bmp",
    "a TIFF image": "tif",
}
# The same photos of COCO have names with and without this.
_COCO = re.compile(r"COCO_(?:train|val|test)20\d\d_(?=\d{12})")
NOT_WHOLE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError)


@dataclass(frozen=True, slots=True)
class Image:
    """An image of a record: a file that stays where it is, or bytes to be stored."""

    name: str  # as the record names it, relative to the folder that is written
    data: bytes | None = None


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a zip archive. Its name is only looked up, and never becomes a path."""

    archive: zipfile.ZipFile
    info: zipfile.ZipInfo

    def read(self) -> bytes:
        """Its bytes, at most MAX_IMAGE. Raises NanoVLMError with the bare reason."""
        try:
            with self.archive.open(self.info) as file:
                data = file.read(MAX_IMAGE + 1)
        except NOT_WHOLE as error:
            reason = str(error) or type(error).__name__
            raise NanoVLMError(f"cannot be unpacked ({reason})") from None
        _check_size(data)
        return data


def walk(folder: Path) -> Iterator[Path]:
    """All files in a folder and its folders, sorted, without hidden ones; links are followed."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else sorted(f for f in folders if not f.startswith("."))
        if real not in seen:
            yield from (Path(place, name) for name in sorted(names) if not name.startswith("."))
        seen.add(real)


class ImageFinder:
    """Finds images by the names that records give them, in a folder and its zip and tar archives.

    A path that leads there counts first. Failing that, the one image counts whose path ends with
    the name, or is the end of it: `coco/train2017/1.jpg` is `train2017/1.jpg` in `train2017.zip`.
    """

    def __init__(self, root: Path, *, is_given: bool = False) -> None:
        self.root, self._is_given = root, is_given  # by a flag: before the records' own folder
        self.damage: NanoVLMError | None = None  # of an archive: no single record's fault
        self._index: dict[str, list[Path | Member]] | None = None
        self._lock = threading.Lock()

    def find(self, name: str, near: Path) -> Path | Member:
        """The image that a record in the folder `near` names. Raises NanoVLMError."""
        first = None
        places = (self.root, near) if self._is_given else (near, self.root)
        for folder in dict.fromkeys(places):
            try:
                return image_path(name, folder)
            except NanoVLMError as error:
                first = first or error
        assert first is not None
        if "://" in name or "\0" in name or data_uri.is_data_uri(name):
            raise first
        found = self._ends_like(name.replace("\\", "/"))
        if len(found) > 1:
            shown = ", ".join(map(self._path_of, found[:MAX_SHOWN]))
            raise NanoVLMError(f"image {quoted(name)} may be any of {len(found)}: {shown}")
        if not found:
            hint = "" if self._is_given else "; is it elsewhere? --images says where"
            raise NanoVLMError(f"image {quoted(name)} does not exist in {self.root}{hint}")
        return found[0]

    def _ends_like(self, name: str) -> list[Path | Member]:
        with self._lock:
            if self._index is None:
                try:
                    self._index = self._read_index()
                except NanoVLMError as error:
                    self.damage = error
                    raise
        wanted, suffix = _parts(name), PurePosixPath(name).suffix.lower()
        found = self._index.get(_key(name), [])
        if suffix in SUFFIXES:
            found = [place for place in found if self._path_of(place).lower().endswith(suffix)]
        found = [place for place in found if _share_an_end(wanted, _parts(self._path_of(place)))]
        file = PurePosixPath(name).name
        same = [place for place in found if PurePosixPath(self._path_of(place)).name == file]
        return same or found  # of COCO's photos, those of the same year first

    def _path_of(self, place: Path | Member) -> str:
        if isinstance(place, Member):
            return place.info.filename.replace("\\", "/")
        path = str(place)
        if archive.is_member(path):
            return path.partition(archive.MARK)[2]
        return place.relative_to(self.root).as_posix()

    def _read_index(self) -> dict[str, list[Path | Member]]:
        index: dict[str, list[Path | Member]] = {}
        for path in walk(self.root) if self.root.is_dir() else [self.root]:
            if path.suffix.lower() in SUFFIXES:
                index.setdefault(_key(path.name), []).append(path)
                continue
            if not path.is_file():  # a pipe, a socket, or a link to what is gone
                continue
            with open_regular(path) as file:
                what = what_is(file.read(FIRST_BYTES)) or ""
            if what.startswith("a zip archive"):
                members: Iterator[tuple[str, Path | Member]] = _zip_members(path)
            elif what == "a tar archive" and path.suffix == ".tar":
                members = ((name, Path(f"{path}::{name}")) for name in archive.members(path))
            else:
                continue
            for name, place in members:
                if PurePosixPath(name).suffix.lower() in SUFFIXES:
                    index.setdefault(_key(name), []).append(place)
        return index


def _zip_members(path: Path) -> Iterator[tuple[str, Member]]:
    try:
        # The file stays open, and threads read from it: a ZipFile does not close one it was given.
        opened = zipfile.ZipFile(open_regular(path))
    except NOT_WHOLE as error:
        raise NanoVLMError(f"{path}: is no whole zip archive ({error}); fetch it again") from None
    for info in opened.infolist():
        if not info.is_dir():
            yield info.filename, Member(opened, info)


def _key(name: str) -> str:
    return _COCO.sub("", PurePosixPath(name.replace("\\", "/")).stem)


def _parts(path: str) -> tuple[str, ...]:
    """The folders of a path and its key, from its end."""
    return (_key(path), *reversed([part for part in path.split("/")[:-1] if part not in ("", ".")]))


def _share_an_end(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    return all(one == other for one, other in zip(a, b))


class ImageReader:
    """Opens the images of records, each once, and gives each its name in the output."""

    def __init__(self, out: Path, *, pack: bool) -> None:
        self._out, self._pack = Path(os.path.realpath(out)), pack
        self._reason = lru_cache(MAX_KNOWN)(_reason_of)
        self._bytes_seen: dict[str, str] = {}  # name -> why it cannot be opened, or ""

    def read(self, place: Path | Member | bytes) -> Image:
        """The image, checked. Raises NanoVLMError with the image and the reason."""
        if isinstance(place, Path) and not data_uri.is_data_uri(place):
            if reason := self._reason(place):
                raise NanoVLMError(f"image {reason}")
            if not self._pack:
                return Image(_relative(place, self._out))
        shown = "in bytes" if isinstance(place, bytes) else quoted(_shown(place))
        try:
            return self._stored(_read(place))
        except NanoVLMError as error:
            reason = str(error).removeprefix("image in memory: ").removeprefix(f"{place}: ")
            raise NanoVLMError(f"image {shown}: {reason}") from None

    def _stored(self, data: bytes) -> Image:
        _check_size(data)
        extension = EXTENSIONS.get((what_is(data[:FIRST_BYTES]) or "").partition(":")[0], "image")
        name = f"{hashlib.sha256(data).hexdigest()[:24]}.{extension}"
        reason = self._bytes_seen.get(name)
        if reason is None:
            if len(self._bytes_seen) > MAX_KNOWN:
                self._bytes_seen.clear()
            reason = self._bytes_seen[name] = _reason_of(data)
        if reason:
            raise NanoVLMError(reason)
        return Image(name, data)


def _read(place: Path | Member | bytes) -> bytes:
    if isinstance(place, bytes):
        return place
    if isinstance(place, Member):
        return place.read()
    return read_image_file(place, MAX_IMAGE)


def _check_size(data: bytes) -> None:
    if len(data) > MAX_IMAGE:
        raise NanoVLMError(f"has more than the limit of {MAX_IMAGE:,} bytes")


def _shown(place: Path | Member) -> str:
    if isinstance(place, Member):
        return f"{place.archive.filename}: {place.info.filename}"
    return str(place)[:60]


def _reason_of(source: Path | bytes) -> str:
    """Why an image cannot be opened, or ""."""
    try:
        open_image(source)
        return ""
    except NanoVLMError as error:
        return str(error)


def _relative(path: Path, out: Path) -> str:
    """The path of a file from the folder `out`, with slashes on every system."""
    container, mark, member = str(path).partition(archive.MARK)
    folder, file = os.path.split(f"{container}.tar" if mark else container)
    real = os.path.join(os.path.realpath(folder), file)  # a link to a file keeps its own name
    try:
        name = os.path.relpath(real, out)
    except ValueError:  # on another drive of Windows
        name = real
    return name.replace(os.sep, "/") + (f"::{member}" if mark else "")
