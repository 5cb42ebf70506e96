"""A row of any table → entries in a published form of records (`nanovlm.data.forms`).

A row holds turns (or a question and its answer), a pair of answers, or an image and its captions.
Columns are taken by their names, in any table: JSON, CSV or parquet.
"""

import json
import re
from typing import Any, NamedTuple

from data_tools.flickr8k_cn import DESCRIBE, tidy_english, user_turn
from nanovlm.data.forms import ANSWERS, IMAGE_KEY, IMAGES, QUESTIONS, TURN_LISTS, present
from nanovlm.data.preferences import ANSWERS as PAIR
from nanovlm.data.preferences import REJECTED
from nanovlm.errors import NanoVLMError, quoted
from nanovlm.inputs.chat import IMAGE_MARKER
from nanovlm.inputs.image import image_size, open_image

TURNS, PAIRS, CAPTIONS = "turns", "pairs", "captions"
MIXED = "turns or captions"  # row by row
# Other names of columns. Those of images count where there is neither `image` nor `images`.
IMAGE_COLUMNS = (
    "image_path", "image_file", "image_name", "image_bytes", "image_id", "img", "img_path",
    "file_name", "filename", "picture", "photo", "jpg", "jpeg", "png", "webp", "图片", "图像",
)  # fmt: skip
CAPTION_COLUMNS = (
    "caption", "captions", "description", "sentence", "sentences", "comment", "text", "描述",
)  # fmt: skip
RENAMED = {"问题": "question", "提问": "question", "答案": "answer", "回答": "answer"}
IN_BYTES = "image in bytes "  # name of an image that the row itself holds, before its number
# Columns that a record keeps, where they are a text or a number.
KEPT = ("id", "kind", "type", "task", "category", "source", "language", "split")
CHINESE = re.compile(r"[\u3400-\u9fff]")
_JSON_LIST = re.compile(r"\s*\[\s*[\[{]")  # of turns, or of questions with their answers
_IMAGE_FILE = re.compile(r"[^\n]{1,999}\.(?:jpe?g|png|webp|gif|bmp|tiff?)", re.IGNORECASE)
PLACEHOLDER_SIZE = (8, 8)  # a black image that minimind-v gives to conversations without one


class Entries(NamedTuple):
    """What a row becomes: records as they are published, and the images that the row holds."""

    entries: list[dict[str, Any]]
    images: list[bytes]
    note: str = ""  # what was left out of it, and is no loss


def kind_of(row: Any) -> str | None:
    """What a row holds: TURNS, PAIRS or CAPTIONS; None for what is no record."""
    if not isinstance(row, dict):
        return None
    try:
        row = _tidy(row)
    except NanoVLMError:
        return None
    if REJECTED in row or all(key in row for key in PAIR):
        return PAIRS
    is_asked = any(key in row for key in QUESTIONS)
    if any(key in row for key in TURN_LISTS) or (
        is_asked and any(key in row for key in (*ANSWERS, "references"))
    ):
        return TURNS
    if _caption_column(row) and (_image_column(row) or any(key in row for key in IMAGES)):
        return CAPTIONS
    return None


def read_row(row: Any, kind: str) -> Entries:
    """The entries of a row. Raises NanoVLMError with the bare reason."""
    if isinstance(row, NanoVLMError):  # the reason why there is none
        raise row
    if isinstance(row, Entries):
        return row
    if not isinstance(row, dict):
        raise NanoVLMError(f"is a JSON {type(row).__name__}, expected an object")
    if kind == MIXED:
        kind = kind_of(row) or CAPTIONS
    row, images = _take_images(_tidy(row))
    if kind == CAPTIONS:
        return Entries(_captions(row), images)
    column = _image_column(row)
    if column and _IMAGE_FILE.fullmatch(row[column].strip()):
        row["image"] = row.pop(column)
    if _is_placeholder(row, images):
        rest = {key: value for key, value in row.items() if key not in IMAGES}
        return Entries([rest], [], "black images of 8 × 8 pixels, in place of none")
    return Entries([row], images)


def _tidy(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the names of columns that are read, and JSON that is written as text parsed."""
    row = {RENAMED.get(key, key): value for key, value in present(row).items()}
    for key in (*TURN_LISTS, *PAIR, "history"):
        if isinstance(row.get(key), str) and _JSON_LIST.match(row[key]):
            row[key] = _parse(row[key], key)
    several = row["image"].split(",") if isinstance(row.get("image"), str) else []
    if len(several) > 1 and all(map(_IMAGE_FILE.fullmatch, several)):  # minimind-v of 2024
        row["image"] = [name.strip() for name in several]
    text = row.get("text")
    if isinstance(text, str) and text.lstrip().startswith("{") and '"chosen"' in text:  # RLHF-V
        inner = _parse(row.pop("text"), "text")
        row |= {key: inner.get(key) for key in ("question", *PAIR)}
    return row


def _parse(text: str, key: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise NanoVLMError(f"{key} is not valid JSON") from None


def _take_images(row: dict[str, Any]) -> tuple[dict[str, Any], list[bytes]]:
    """The row with names in place of images in bytes, and those images."""
    columns = [key for key, value in row.items() if _has_bytes(value)]
    if not columns:
        return dict(row), []
    if len(columns) > 1:
        raise NanoVLMError(f"has images in {quoted(', '.join(columns))}; which come first?")
    column, images, names = columns[0], [], []
    for value in row[column] if isinstance(row[column], list) else [row[column]]:
        value = present(value) if isinstance(value, dict) else value
        data = value.get("bytes") if isinstance(value, dict) else value
        if isinstance(data, bytes):
            names.append(f"{IN_BYTES}{len(images)}")
            images.append(data)
        elif value is not None:
            names.append(value)
    # Other columns say where the image once was.
    rest = {key: value for key, value in row.items() if key != column}
    rest = {key: value for key, value in rest.items() if not IMAGE_KEY.fullmatch(key)}
    return {**rest, "images": names}, images


def _has_bytes(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_has_bytes, value))
    return isinstance(value.get("bytes") if isinstance(value, dict) else value, bytes)


def _image_column(row: dict[str, Any]) -> str:
    """The one column of another name that names an image, or ""."""
    if any(key in row for key in IMAGES):
        return ""
    return next((key for key in IMAGE_COLUMNS if isinstance(row.get(key), (str, bytes))), "")


def _caption_column(row: dict[str, Any]) -> str:
    return next((key for key in CAPTION_COLUMNS if isinstance(row.get(key), (str, list))), "")


def _captions(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A record a caption: the question in the caption's language, and the caption."""
    key, column = _caption_column(row), _image_column(row)
    given = next((row[name] for name in (*IMAGES, column) if name in row), None)
    if not key or given is None:
        raise NanoVLMError(f"has no caption or no image; it has {quoted(', '.join(row))}")
    texts: list[Any] = row[key] if isinstance(row[key], list) else [row[key]]
    texts = [_text_of(text) for text in texts]
    if not all(isinstance(text, str) for text in texts):
        raise NanoVLMError(f"{key} is {quoted(row[key])}, expected text or a list of texts")
    kept = {name: row[name] for name in KEPT if name in row}
    entries = []
    for text in filter(None, map(str.strip, texts)):
        language = "zh" if CHINESE.search(text) else "en"
        if language == "en" and "\n" not in text:
            text = tidy_english(text)
        turns = [user_turn(DESCRIBE[language]), {"role": "assistant", "content": text}]
        entries.append({**kept, "images": given, "messages": turns})
    if not entries:
        raise NanoVLMError(f"has no text in {key!r}")
    return entries


def _text_of(caption: Any) -> Any:
    """The text of a caption, which may be an object (Karpathy's splits)."""
    return caption.get("raw") or caption.get("caption") if isinstance(caption, dict) else caption


def _is_placeholder(row: dict[str, Any], images: list[bytes]) -> bool:
    """Whether the only image is minimind-v's black one, which no turn mentions."""
    if len(images) != 1 or len(images[0]) > 2000:
        return False
    turns = next((row[key] for key in TURN_LISTS if key in row), None)
    if not isinstance(turns, list) or IMAGE_MARKER in json.dumps(turns, ensure_ascii=False):
        return False
    try:
        is_small = image_size(images[0]) == PLACEHOLDER_SIZE
        return (
            is_small and max(open_image(images[0]).tobytes()) < 8
        )  # a JPEG's black is not quite 0
    except NanoVLMError:
        return False
