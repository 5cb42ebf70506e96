"""What form a source has, by its content, and how its rows are read."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path

from data_tools.convert import captions, llama_factory, samples
from data_tools.convert.entries import CAPTIONS, MIXED, PAIRS, TURNS, kind_of, read_row
from data_tools.convert.images import SUFFIXES, walk
from data_tools.flickr8k_cn import split_lines
from nanovlm.data.tables import Row, is_csv, rows
from nanovlm.errors import NanoVLMError, quoted
from nanovlm.inputs import archive
from nanovlm.inputs.parquet import count_rows
from nanovlm.utils.files import open_regular
from nanovlm.utils.sniff import FIRST_BYTES, what_is

COCO, KARPATHY, LINES, BASIC_VLM = "coco", "karpathy", "caption-lines", "basic-vlm"
LLAMA_FACTORY, WEBDATASET, FOLDER = "llama-factory", "webdataset", "folder"
FORMS = {
    TURNS: "JSON, CSV or parquet with turns, or a question and its answer: LLaVA, ALLaVA, "
    "ShareGPT, OpenAI, ms-swift, the_cauldron, FineVision, minimind-v",
    PAIRS: "the same with a chosen and a rejected answer: RLHF-V, TRL, ms-swift",
    CAPTIONS: "JSON, CSV or parquet with an image and its captions: AI Challenger",
    COCO: "COCO's captions_….json",
    KARPATHY: "Karpathy's splits: dataset_coco.json, dataset_flickr8k.json, dataset_flickr30k.json",
    LINES: "lines of `NAME.jpg#0 caption`: Flickr8k, Flickr8k-CN, COCO-CN",
    BASIC_VLM: "Basic-VLM's map of images and its captions file",
    LLAMA_FACTORY: "a folder with LLaMA-Factory's dataset_info.json",
    WEBDATASET: "tar files of 1.jpg with 1.txt or 1.json",
    FOLDER: "a folder of 1.jpg with 1.txt or 1.json",
}
TABLES = (TURNS, PAIRS, CAPTIONS)
# Of a folder that has several, the first.
PRIORITY = (TURNS, PAIRS, BASIC_VLM, COCO, KARPATHY, LINES, CAPTIONS, WEBDATASET)
SAMPLE = 8  # rows that are looked at
_HELD_OUT = re.compile(
    r"(?:^|[^a-z])(?:val|valid|validation|dev|test|eval)\d*(?:[^a-z]|$)", re.IGNORECASE
)
_DATA = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".token", ".parquet", ".tar", "")
_NO_DATA = re.compile(r"readme|licen[cs]e|requirements", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """A recognised source."""

    path: Path
    form: str
    kind: str  # what its rows hold: TURNS, PAIRS, CAPTIONS or MIXED
    read: Callable[[int], Iterator[Row]]  # the rows from a number on
    files: list[Path] = field(default_factory=list)  # that are read
    left_out: dict[str, str] = field(default_factory=dict)  # files that are not, with the reason
    total: int | None = None  # number of rows, where it is known

    @property
    def folder(self) -> Path:
        """Where its images are looked for."""
        return self.path if self.path.is_dir() else self.path.parent


def recognise(path: Path, form: str | None = None) -> Source:
    """The source at `path`, in `form` if one is given. Raises NanoVLMError with what it is."""
    if not path.is_dir():
        if form in (None, LLAMA_FACTORY) and llama_factory.has_info(path.parent):
            found, _ = llama_factory.read_info(path.parent)
            if own := [data_set for data_set in found if path.samefile(data_set.path)]:
                return _llama_factory(path, own, {})
        return _source(path, _forced(path, *form_of(path), form), [path], {})
    if form in (None, LLAMA_FACTORY) and llama_factory.has_info(path):
        return _llama_factory(path, *llama_factory.read_info(path))
    files = list(walk(path))
    names = [file.relative_to(path).as_posix() for file in files]
    if form == FOLDER or (form is None and samples.has_samples(names)):
        if not samples.has_samples(names):
            raise NanoVLMError(f"{path}: has no images with texts of the same name beside them")
        taken = [file for file in files if file.suffix.lower() in (*SUFFIXES, *samples.TEXTS)]
        kind = _kind_of_samples(samples.folder_rows(path))
        return Source(path, FOLDER, kind, _from(lambda: samples.folder_rows(path)), taken)
    return _folder(path, files, form)


def form_of(path: Path) -> tuple[str | None, str]:
    """The form of a file, or None; and what the file is, in words."""
    with open_regular(path) as file:
        head = file.read(FIRST_BYTES)
    what = what_is(head) or ""
    if what.startswith("a parquet table"):
        sample = [row.value for row in islice(rows(path), SAMPLE)]
        columns = ", ".join(sample[0]) if sample else "no rows"
        return _first_kind(sample), f"a parquet table with {columns}"
    if what == "a tar archive":
        is_data = samples.has_samples(archive.members(path))
        return (WEBDATASET if is_data else None), what + ("" if is_data else " without texts")
    if what == "JSON":
        return _form_of_json(path, head)
    if what and what not in ("YAML", "TOML"):
        return None, what
    lines = _first_lines(head)
    if lines and sum(map(bool, map(captions.CAPTION_LINE.fullmatch, lines))) * 2 > len(lines):
        if captions.are_segmented(lines):
            return None, "captions cut into words; the file that is not is converted"
        return LINES, "lines of captions"
    if is_csv(path):
        header = lines[0] if lines else ""
        try:
            sample = [row.value for row in islice(rows(path), SAMPLE)]
        except NanoVLMError as error:
            return None, _bare(error, path)
        return _first_kind(sample), f"a table with the first line {quoted(header)}"
    return None, what or "text"


def _form_of_json(path: Path, head: bytes) -> tuple[str | None, str]:
    try:
        items = list(islice(captions.json_items(path), SAMPLE))
    except NanoVLMError:  # a line that is damaged, among others that may not be
        items = []
    if items and items[0][0] is not None:
        if any(captions.is_split_image(*item) for item in items):
            return KARPATHY, "Karpathy's splits"
        values = [value for _, value in items]
        if any(key == "images" and isinstance(v, dict) and "file_name" in v for key, v in items):
            is_captions = captions.has_captions(path)
            return (COCO if is_captions else None), "" if is_captions else captions.NOT_CAPTIONS
        if all(map(captions.is_image_map, values)):
            return BASIC_VLM, "Basic-VLM's map of images"
        if all(map(captions.is_question, values)):
            return BASIC_VLM, "Basic-VLM's captions"
    try:
        sample = [row.value for row in islice(rows(path), SAMPLE)]
    except NanoVLMError as error:
        return None, _bare(error, path)
    keys = next((", ".join(value) for value in sample if isinstance(value, dict)), "")
    return _first_kind(sample), f"JSON with {keys or 'no records'}"


def _bare(error: NanoVLMError, path: Path) -> str:
    """What an error says that a file is."""
    return str(error).removeprefix(f"{path}: ").removeprefix("is ")


def _first_kind(sample: list) -> str | None:
    return next(filter(None, map(kind_of, sample)), None)


def _kind_of_samples(found: Iterator[Row]) -> str:
    first = _first_kind([row.value for row in islice(found, SAMPLE)])
    return PAIRS if first == PAIRS else MIXED


def _forced(path: Path, found: str | None, what: str, form: str | None) -> str:
    """The form of a file, if it is the one that is asked for, or can be read as it."""
    known = ", ".join(FORMS)
    if form in (None, found) and found is not None:
        return found
    if form in TABLES and (found in TABLES or found is None):
        for row in islice(rows(path), SAMPLE):
            try:
                read_row(row.value, form)
                return form
            except NanoVLMError:
                continue
    if form is None:
        raise NanoVLMError(f"{path}: is {what}; that is none of the forms: {known}")
    looks = f"looks like {found} ({what})" if found else f"is {what}"
    raise NanoVLMError(f"{path}: {looks}, not {form}")


def _folder(path: Path, files: list[Path], form: str | None) -> Source:
    """The source of a folder of files, of which one form is taken."""
    by_form: dict[str, list[Path]] = {}
    left_out: dict[str, str] = {}
    lists = []
    for file in files:
        suffix = file.suffix.lower()
        if suffix not in _DATA or _NO_DATA.search(file.name):
            continue
        found, what = form_of(file)
        name = file.relative_to(path).as_posix()
        if found:
            by_form.setdefault(found, []).append(file)
        elif suffix == ".txt" and _lists_photos(file):
            lists.append(file)
        elif what != "a tar archive without texts":
            left_out[name] = f"is {what}"
    chosen = next((each for each in PRIORITY if each in by_form), None) if form is None else form
    if chosen not in by_form:
        if not left_out:  # what it holds instead
            left_out = {file.name: f"is {form_of(file)[1]}" for file in files[:3]}
        looked = "; ".join(f"{name} {reason}" for name, reason in list(left_out.items())[:3])
        has = ", ".join(f"{len(files)} × {each}" for each, files in by_form.items())
        raise NanoVLMError(
            f"{path}: "
            + (f"looks like {has}, not {form}" if has else "holds nothing in a known form")
            + (f" ({looked})" if looked else "")
            + ("" if has else f"; the forms are {', '.join(FORMS)}")
        )
    taken = by_form.pop(chosen)
    for each, others in by_form.items():
        for file in others:
            name = file.relative_to(path).as_posix()
            left_out[name] = f"is of another form: --as {each} converts it"
    training = [file for file in taken if not _HELD_OUT.search(file.relative_to(path).as_posix())]
    if training:
        for file in taken:
            if file not in training:
                name = file.relative_to(path).as_posix()
                left_out[name] = "is not for training, by its name: convert it by itself"
        taken = training
    return _source(path, chosen, taken, left_out, lists)


def _source(
    path: Path, form: str, files: list[Path], left_out: dict[str, str], lists: Sequence[Path] = ()
) -> Source:
    if form == BASIC_VLM:
        return _basic_vlm(path, files, left_out)
    training = [file for file in lists if captions.TRAINING.search(file.name)]
    readers: dict[str, Callable[[Path], Iterator[Row]]] = {
        COCO: captions.coco_rows,
        KARPATHY: captions.split_rows,
        LINES: lambda file: captions.line_rows(file, training),
        WEBDATASET: samples.tar_rows,
    }
    if form in readers:
        read = readers[form]
        kind = _kind_of_samples(read(files[0])) if form == WEBDATASET else CAPTIONS
        read_all = _from(lambda: chain.from_iterable(map(read, files)))
        return Source(path, form, kind, read_all, [*files, *training], left_out)
    counts = [_count(file) for file in files]
    total = None if None in counts else sum(filter(None, counts))
    read_tables = partial(_table_rows, files, counts)
    return Source(path, form, form, read_tables, files, left_out, total)


def _from(read: Callable[[], Iterator[Row]]) -> Callable[[int], Iterator[Row]]:
    """What reads rows from a number on, by passing over the others."""
    return lambda start: islice(read(), start, None)


def _count(file: Path) -> int | None:
    with open_regular(file) as opened:
        is_parquet = opened.read(4) == b"PAR1"
    return count_rows(file) if is_parquet else None


def _table_rows(files: list[Path], counts: list[int | None], start: int) -> Iterator[Row]:
    for file, count in zip(files, counts):
        if count is not None and start >= count:
            start -= count
        elif count is not None or not start:
            yield from rows(file, start)
            start = 0
        else:
            for row in rows(file):
                if start:
                    start -= 1
                else:
                    yield row


def _basic_vlm(path: Path, files: list[Path], left_out: dict[str, str]) -> Source:
    if path.is_file():
        files = sorted(file for file in path.parent.glob("*.json") if form_of(file)[0] == BASIC_VLM)
    by_what = {form_of(file)[1]: file for file in files}
    if len(files) != 2 or len(by_what) != 2:
        raise NanoVLMError(
            f"{path}: one map of images and one captions file of Basic-VLM belong together, and "
            f"there are {', '.join(file.name for file in files)}"
        )
    captions_file, image_map = (by_what[what] for what in sorted(by_what))
    read = _from(lambda: captions.basic_vlm_rows(image_map, captions_file))
    return Source(path, BASIC_VLM, TURNS, read, [image_map, captions_file], left_out)


def _llama_factory(
    path: Path, found: list[llama_factory.DataSet], left_out: dict[str, str]
) -> Source:
    ranking = [data_set for data_set in found if data_set.is_ranking]
    taken = [data_set for data_set in found if not data_set.is_ranking] or ranking
    if not taken:
        reasons = "; ".join(f"{name} {reason}" for name, reason in list(left_out.items())[:3])
        raise NanoVLMError(f"{path}: {llama_factory.INFO} names no file that is there ({reasons})")
    if taken is not ranking:
        for data_set in ranking:
            left_out[data_set.path.name] = "holds pairs: convert it by itself"
    kind = PAIRS if taken is ranking else TURNS
    read = _from(lambda: chain.from_iterable(each.rows() for each in taken))
    files = [taken[0].folder / llama_factory.INFO, *(each.path for each in taken)]
    return Source(path, LLAMA_FACTORY, kind, read, files, left_out)


def _lists_photos(path: Path) -> bool:
    """Whether a text file lists photos, one a line."""
    with open_regular(path) as file:
        lines = _first_lines(file.read(FIRST_BYTES))
    return bool(lines) and all(map(captions.NAME_LINE.fullmatch, lines))


def _first_lines(head: bytes) -> list[str]:
    """The lines that a file begins with, without empty ones and one that may be cut off."""
    lines = split_lines(head.decode("utf-8-sig", errors="ignore"))
    lines = lines[:-1] if len(head) == FIRST_BYTES else lines
    return [line for line in lines if line.strip()]
