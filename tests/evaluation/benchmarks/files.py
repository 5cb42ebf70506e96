"""Files of benchmarks in their published forms, with images of one colour."""

import base64
import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow
from PIL import Image
from pyarrow import parquet

COLOURS = ("red", "green", "blue", "white", "black", "yellow")


def jpeg(colour: str) -> bytes:
    """A small photo of one colour."""
    data = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(data, "JPEG")
    return data.getvalue()


def base64_of(colour: str) -> str:
    """The same, as tables hold it."""
    return base64.b64encode(jpeg(colour)).decode()


def put_pope(folder: Path, split: str, labels: Sequence[str], images: int = 3) -> Path:
    """`coco_pope_SPLIT.json` with a question for each label, about photos in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, label in enumerate(labels):
        name = f"COCO_val2014_{number % images:012}.jpg"
        (folder / name).write_bytes(jpeg(COLOURS[number % images]))
        text = f"Is there a thing {number} in the image?"
        lines.append({"question_id": number + 1, "image": name, "text": text, "label": label})
    path = folder / f"coco_pope_{split}.json"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def put_tsv(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    """A table with tabs, quoted as pandas writes it."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def put_parquet(path: Path, rows: Sequence[dict]) -> Path:
    """A parquet table."""
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def mmbench_rows(number: int = 3) -> list[dict]:
    """Questions with four options, three, and so on, each with an image of its own."""
    rows = []
    for n in range(number):
        options = ("a red cup", "a green hat", "one blue car", "the white sea")[: 4 - n % 3]
        padded = dict(zip("ABCD", (*options, "", "")))
        rows.append(
            {
                "index": n + 7,
                "question": f"What is shown in image {n}?",
                "hint": "Look,\nthen answer." if n == 0 else "",
                **padded,
                "answer": "ABCD"[n % len(options)],
                "category": f"kind {n % 2}",
                "l2-category": "perception",
                "split": "dev",
                "image": base64_of(COLOURS[n]),
            }
        )
    return rows


def rotated_rows(rows: Sequence[dict]) -> list[dict]:
    """The same as VLMEvalKit publishes it: rotations as rows, with the index of the image."""
    more = []
    for row in rows:
        options = [row[letter] for letter in "ABCD" if row[letter]]
        right = "ABCD".index(row["answer"])
        for shift in range(1, len(options)):
            turned = options[shift:] + options[:shift]
            answer = "ABCD"[(right - shift) % len(options)]
            new = {**row, **dict(zip("ABCD", turned)), "answer": answer}
            more.append({**new, "index": row["index"] + shift * 10**6, "image": row["index"]})
    return [*rows, *more]


def mmstar_rows(number: int = 4) -> list[dict]:
    """Questions as `mmstar.parquet` has them, with the options in the text."""
    return [
        {
            "index": n,
            "question": f"Which option fits {n}?\nOptions: A: red., B: green., C: blue., D: white.",
            "image": jpeg(COLOURS[n]),
            "answer": "ABCD"[n % 4],
            "category": ("coarse perception", "math")[n % 2],
            "l2_category": "geometry",
            "meta_info": {"source": "MMMU", "split": "val", "image_path": f"images/{n}.jpg"},
        }
        for n in range(number)
    ]
