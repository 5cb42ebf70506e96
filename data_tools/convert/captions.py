"""Caption files that are no tables: COCO's, Karpathy's, Flickr8k's, Basic-VLM's two maps."""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.convert.entries import Entries
from data_tools.flickr8k_cn import read_lines
from nanovlm.data.tables import Row
from nanovlm.errors import NanoVLMError, quoted
from nanovlm.inputs.chat import IMAGE_MARKER
from nanovlm.inputs.json_stream import stream_json
from nanovlm.utils.files import open_regular

# `NAME.jpg#zhc#0 caption` (Flickr8k-CN), `NAME.jpg#0 caption` (Flickr8k, COCO-CN).
CAPTION_LINE = re.compile(r"([^\s#]+)(?:#[a-z]\w*)?#(\d+)\s+(.*\S)\s*")
# Captions cut into words with their kinds, `一:m 个:q 男人:n`, which COCO-CN has beside the others.
SEGMENTED = re.compile(r"(?:\S+:[a-z]{1,5}(?:\s+|$))+")
# One photo a line: `1000268201_693b08cb0e.jpg`, `COCO_train2014_000000123456`.
NAME_LINE = re.compile(r"[\w-]*\d[\w-]*(?:\.jpe?g)?\s*", re.IGNORECASE)
TRAINING = re.compile(r"train", re.IGNORECASE)
TRAINING_SPLITS = ("train", "restval")  # of Karpathy's
EXTRA_0 = "<|extra_0|>"  # where Basic-VLM has the image in a question
NOT_CAPTIONS = (
    "COCO annotations of objects (boxes, key points), without captions: take captions_….json"
)


def json_items(path: Path) -> Iterator[tuple[str | None, Any]]:
    """The items of a JSON list or object in a file."""
    with open_regular(path) as file:
        yield from stream_json(path, file)


def has_captions(path: Path) -> bool:
    """Whether the annotations of a COCO file are captions."""
    notes = (note for key, note in json_items(path) if key == "annotations")
    return "caption" in (next(notes, None) or {})


def coco_rows(path: Path) -> Iterator[Row]:
    """A row for each caption of a COCO file."""
    names: dict[Any, str] = {}
    for key, image in json_items(path):
        if key == "images" and isinstance(image, dict):
            names[image.get("id")] = image.get("file_name", "")
    number = 0
    for key, note in json_items(path):
        if key != "annotations":
            continue
        number += 1
        where, value = f"{path}: annotation {number}", note
        if isinstance(note, dict):
            name = names.get(note.get("image_id"))
            value = {"id": note.get("id"), "image": name, "caption": note.get("caption")}
            if not name:
                value = NanoVLMError(f"image {quoted(note.get('image_id'))} is not among `images`")
        yield Row(where, value, path.parent)


def is_split_image(key: str | None, item: Any) -> bool:
    """Whether an item of a JSON file is an image of Karpathy's splits."""
    return key == "images" and isinstance(item, dict) and {"sentences", "split"} <= set(item)


def split_rows(path: Path) -> Iterator[Row]:
    """A row for each image of Karpathy's splits, with its captions if it is for training.

    `{"images": [{"filepath": …, "filename": …, "split": …, "sentences": [{"raw": …}]}]}`, as
    published with Karpathy and Fei-Fei 2015; only COCO's images have a `filepath`.
    """
    images = (item for key, item in json_items(path) if key == "images")
    for number, image in enumerate(images, start=1):
        value = image
        if isinstance(image, dict):
            folder, name = image.get("filepath"), image.get("filename")
            if image.get("split") not in TRAINING_SPLITS:
                value = Entries([], [], "captions of photos that are not for training")
            elif folder and isinstance(name, str):
                value = image | {"filename": f"{folder}/{name}"}
        yield Row(f"{path}: image {number}", value, path.parent)


def line_rows(path: Path, names: list[Path]) -> Iterator[Row]:
    """A row for each line of a caption file, of the photos that the files `names` list, if any."""
    wanted = {_stem(line.strip()) for file in names for line in read_lines(file) if line.strip()}
    with open_regular(path) as binary:
        lines = io.TextIOWrapper(binary, encoding="utf-8-sig")
        try:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                match = CAPTION_LINE.fullmatch(line)
                if match is None:
                    value: Any = NanoVLMError(f"{quoted(line[:80])} is not 'NAME#NUMBER caption'")
                elif wanted and _stem(match[1]) not in wanted:
                    value = Entries([], [], "captions of photos that are not listed for training")
                else:
                    identity = line.split(maxsplit=1)[0]
                    value = {"id": identity, "image": match[1], "caption": match[3]}
                yield Row(f"{path}:{number}", value, path.parent)
        except UnicodeDecodeError:
            raise NanoVLMError(f"{path}: is not UTF-8 text; save it as UTF-8") from None


def are_segmented(lines: list[str]) -> bool:
    """Whether lines of captions are cut into words."""
    found = filter(None, map(CAPTION_LINE.fullmatch, lines))
    return all(SEGMENTED.fullmatch(match[3]) for match in found)


def _stem(name: str) -> str:
    return re.sub(r"\.jpe?g$", "", name, flags=re.IGNORECASE)


def is_image_map(item: Any) -> bool:
    """Whether an item is one of Basic-VLM's map of images."""
    return isinstance(item, dict) and "image_file" in item and "ID" in item


def is_question(item: Any) -> bool:
    """Whether an item is one of Basic-VLM's captions."""
    return isinstance(item, dict) and set(item) == {"q", "a"}


def basic_vlm_rows(image_map: Path, captions: Path) -> Iterator[Row]:
    """A row for each item of Basic-VLM's captions file, whose image the map names by its ID."""
    files = {}
    for _, item in json_items(image_map):
        if is_image_map(item):
            files[str(item["ID"])] = f"{item.get('path') or ''}{item['image_file']}"
    for key, item in json_items(captions):
        where = f"{captions}: {key}"
        if not is_question(item):
            value: Any = NanoVLMError("is not an object with q and a")
        elif key not in files:
            value = NanoVLMError("image is not in the map of images")
        else:
            value = _question(key, files[key], item["q"], item["a"])
        yield Row(where, value, captions.parent)


def _question(key: str | None, file: str, question: Any, answer: Any) -> Any:
    """The row of a question; of several answers, their program takes one at random."""
    if isinstance(answer, list):
        answer = answer[0] if answer else ""
    if isinstance(answer, dict):
        if str(answer.get("from")) == "human":
            return NanoVLMError("the last turn is not the assistant's")
        answer = answer.get("value")
    if not isinstance(question, str):
        return NanoVLMError(f"q is {quoted(question)}, expected text")
    question = question.replace(EXTRA_0, "").strip()
    turns = [
        {"role": "user", "content": f"{IMAGE_MARKER}\n{question}"},
        {"role": "assistant", "content": answer},
    ]
    return {"id": key, "images": [file], "messages": turns}
