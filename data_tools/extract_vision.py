"""Extract the vision encoder of a larger checkpoint into a folder of its own.

    python data_tools/extract_vision.py SOURCE --out DIR

SOURCE is the folder of a SmolVLM2 or Idefics3, a Qwen-VL, a LLaVA-1.5, a CLIP or a SigLIP, as
published: `config.json` and the weights, in one file or in shards. Shards without a tensor of the
vision encoder may be absent. DIR gets `config.json`, `preprocessor_config.json` and
`model.safetensors`, and can be used as

    python train_stage1.py --vision-encoder DIR …

Values and dtypes stay as they are. Qwen-VL is published as pickles, of which only plain tensors are
read.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a plain clone

# First, because Ctrl-C is one line from here on, also during the slow imports below.
from nanovlm.utils.console import first_line, run_command, say

# isort: split
import argparse
import pickle
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanovlm.errors import NanoVLMError
from nanovlm.hub.image_configs import read_processor
from nanovlm.hub.models import load_vision_encoder
from nanovlm.hub.safetensors import SafetensorsFile, save_file
from nanovlm.hub.shapes import VISION_ENCODERS
from nanovlm.hub.vision_configs import parse_vision_encoder_config
from nanovlm.utils.files import open_regular, read_json, write_json
from nanovlm.utils.outputs import new_folder
from nanovlm.utils.parser import CommandParser
from nanovlm.utils.sniff import FIRST_BYTES, what_is


@dataclass(frozen=True)
class Layout:
    """Where a published model keeps its vision encoder.

    `settings` is the table of its settings in `config.json`, `prefix` a pattern of how its tensors'
    names begin, and `model_type` its type on its own, where the table lacks it or says otherwise.
    """

    settings: str
    prefix: str
    model_type: str | None


LAYOUTS = {  # by the whole model's model_type
    "siglip": Layout("vision_config", r"vision_model\.", "siglip_vision_model"),
    "clip": Layout("vision_config", r"vision_model\.", "clip_vision_model"),
    "smolvlm": Layout("vision_config", r"model\.vision_model\.", "smolvlm_vision"),
    "idefics3": Layout("vision_config", r"model\.vision_model\.", "idefics3_vision"),
    "llava": Layout("vision_config", r"(model\.)?vision_tower\.(vision_model\.)?", None),
    "qwen": Layout("visual", r"transformer\.visual\.", "qwen_vl_vision"),
}
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
PREPROCESSOR = "preprocessor_config.json"
PICKLES = ("a PyTorch file", "a Python pickle", "a zip archive")  # as `what_is` names .bin files


def extract(source: Path, out: Path) -> None:
    """Write the folder `out` and check it by loading it; print what was extracted."""
    config = read_json(source / "config.json")
    layout = LAYOUTS.get(str(config.get("model_type")))
    if layout is None:
        raise NanoVLMError(
            f"{source}: model_type is {config.get('model_type')!r}; vision encoders are extracted "
            f"from {', '.join(LAYOUTS)}"
        )
    settings = read_settings(source, config, layout)
    tensors, others = read_tensors(source, re.compile(layout.prefix))
    with new_folder(out, "--out") as folder:
        write_json(folder / "config.json", settings)
        write_preprocessor(source, folder, settings)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        try:
            load_vision_encoder(folder)
        except NanoVLMError as error:  # names a file that is gone
            lines = error.args
            for written in (folder / "model.safetensors", folder):
                lines = [line.replace(str(written), str(source)) for line in lines]
            raise NanoVLMError(*lines) from None
    size = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
    say(f"{out}: {settings['model_type']}, {len(tensors)} tensors, {size:,.1f} MB")
    parts = sorted({_part_of(name) for name in others})
    say(f"left in {source}: {len(others)} tensors" + (f" ({', '.join(parts)})" if parts else ""))


def _part_of(name: str) -> str:
    """`model.text_model` of `model.text_model.layers.0…`, `lm_head` of `lm_head.weight`."""
    words = name.split(".")
    return ".".join(words[: 2 if words[0] in ("model", "transformer") else 1])


def read_settings(source: Path, config: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """The `config.json` of the vision encoder alone, checked by parsing it."""
    table = config.get(layout.settings)
    if not isinstance(table, dict):
        raise NanoVLMError(
            f"{source}: its config.json has no table {layout.settings!r}, so it has no vision "
            "encoder"
        )
    # Older CLIP files repeat the settings that count in a second table.
    repeated = config.get("vision_config_dict")
    settings = table | (repeated if isinstance(repeated, dict) else {})
    settings |= {"model_type": layout.model_type or settings.get("model_type")}
    try:
        parse_vision_encoder_config(settings)
    except NanoVLMError as error:
        raise NanoVLMError(f"{source}: {error}") from None
    return settings


def read_tensors(source: Path, prefix: re.Pattern[str]) -> tuple[dict[str, Tensor], list[str]]:
    """The vision encoder's tensors, memory-mapped, without `prefix`; and the others' names."""
    places = find_tensors(source)
    files: dict[Path, list[str]] = {}
    others = []
    for name, path in places.items():
        if prefix.match(name):
            files.setdefault(path, []).append(name)
        else:
            others.append(name)
    if not files:
        raise NanoVLMError(
            f"{source}: none of its {len(places)} tensors belongs to a vision encoder; are they "
            "another model's?"
        )
    tensors = {}
    for path, names in sorted(files.items()):
        if not path.is_file():
            raise NanoVLMError(
                f"{path}: is missing, and the index places {len(names)} tensors of the vision "
                "encoder there; fetch it"
            )
        shard = read_file(path)
        for name in names:
            if name not in shard:
                raise NanoVLMError(
                    f"{path}: lacks {name}, which its index places there; fetch both again"
                )
            tensors[prefix.sub("", name, count=1)] = shard[name]
    return tensors, others


def find_tensors(source: Path) -> dict[str, Path]:
    """The file of each tensor of a folder."""
    found = next((source / name for name in WEIGHTS if (source / name).exists()), None)
    if found is None:
        raise NanoVLMError(f"{source}: holds none of {', '.join(WEIGHTS)}")
    if found.suffix != ".json":
        return dict.fromkeys(read_file(found), found)
    places = read_json(found).get("weight_map")
    if not isinstance(places, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in places.values()
    ):
        raise NanoVLMError(
            f"{found}: weight_map does not give each tensor the name of a file beside it; "
            "fetch the index again"
        )
    return {name: source / shard for name, shard in places.items()}


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, memory-mapped, so that unused ones are not read."""
    if path.suffix == ".safetensors":
        file = SafetensorsFile(path)
        return {name: file.tensor(name) for name in file.keys()}
    with open_regular(path) as file:
        what = what_is(file.read(FIRST_BYTES))
    if what and not what.startswith(PICKLES):
        raise NanoVLMError(f"{path}: is no PyTorch file but {what}")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        tensors = None
    except Exception as error:  # of any kind: a damaged pickle is read by its own instructions
        raise NanoVLMError(
            f"{path}: cannot be read ({first_line(error)}); fetch it again"
        ) from None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise NanoVLMError(
            f"{path}: holds more than plain tensors, and reading that could run its code; "
            "take another file"
        )
    return tensors


def write_preprocessor(source: Path, out: Path, settings: dict[str, Any]) -> None:
    """Write how images are prepared: as the source's file says, or Qwen-VL's code."""
    if settings["model_type"] == "qwen_vl_vision":
        side = settings.get("image_size", 448)
        size = {"size": {"height": side, "width": side}}
        write_json(out / PREPROCESSOR, VISION_ENCODERS["qwen-vl"].processor | size)
    elif (processor := read_processor(source)) is not None:
        write_json(out / PREPROCESSOR, processor)
    else:
        say(
            f"{source}: holds no {PREPROCESSOR}, so --out gets none; put one there, or images are "
            "prepared as for its family"
        )


def parse_arguments() -> argparse.Namespace:
    """Read the flags."""
    parser = CommandParser(
        description="Extract the vision encoder of a larger checkpoint into a folder of its own."
    )
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="folder of a SmolVLM2, Qwen-VL, LLaVA, CLIP or SigLIP",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    return parser.parse_args()


def main() -> None:
    """Extract the vision encoder."""
    arguments = parse_arguments()
    extract(arguments.source, arguments.out)


if __name__ == "__main__":
    run_command(main)
