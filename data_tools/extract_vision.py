"""Take a vision tower out of a larger checkpoint, into a folder of its own.

    python data_tools/extract_vision.py SOURCE --out VISION_ENCODERS

SOURCE is the folder of a SmolVLM2 or Idefics3, a Qwen-VL, a LLaVA-1.5, a CLIP or a SigLIP, as published: `config.json` and
the weights, whole or in shards, of which only those with a part of the tower have to be there. VISION_ENCODERS gets `config.json`,
`preprocessor_config.json` and `model.safetensors`, and is then what --vision-encoder takes:

    python train_stage1.py --vision-encoder VISION_ENCODERS …

Numbers and their format stay as they are. Qwen-VL is published as pickles: of these only plain tensors are read.
"""

import argparse
import pickle
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # the repository, so that a plain clone works

from nanovlm.errors import NanoVLMError
from nanovlm.hub.image_configs import read_processor  # noqa: E402
from nanovlm.hub.models import load_vision_encoder
from nanovlm.hub.safetensors import SafetensorsFile, save_file  # noqa: E402
from nanovlm.hub.shapes import VISION_ENCODERS
from nanovlm.hub.vision_configs import parse_vision_encoder_config
from nanovlm.utils.console import first_line, run_command, say  # noqa: E402
from nanovlm.utils.files import read_json, write_json  # noqa: E402
from nanovlm.utils.parser import CommandParser


@dataclass(frozen=True)
class Tower:
    """Where a published model keeps its eyes: the table of their settings in `config.json`, how their tensors' names begin
    (a pattern), and what model_type they have on their own, where the table does not say it rightly."""

    settings: str
    prefix: str
    model_type: str | None


TOWERS = {  # by the whole model's model_type
    "siglip": Tower("vision_config", r"vision_model\.", "siglip_vision_model"),
    "clip": Tower("vision_config", r"vision_model\.", "clip_vision_model"),
    "smolvlm": Tower("vision_config", r"model\.vision_model\.", "smolvlm_vision"),
    "idefics3": Tower("vision_config", r"model\.vision_model\.", "idefics3_vision"),
    "llava": Tower("vision_config", r"(model\.)?vision_tower\.(vision_model\.)?", None),
    "qwen": Tower("visual", r"transformer\.visual\.", "qwen_vl_vision"),
}
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
PREPROCESSOR = "preprocessor_config.json"


def extract(source: Path, out: Path) -> None:
    """Write the folder `out` and check it by loading it; say what was taken and what was left."""
    config = read_json(source / "config.json")
    tower = TOWERS.get(str(config.get("model_type")))
    if tower is None:
        raise NanoVLMError(
            f"{source}: model_type is {config.get('model_type')!r}; towers are taken out of {', '.join(TOWERS)}"
        )
    settings = tower_settings(source, config, tower)
    taken, left = read_tower(source, re.compile(tower.prefix))
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", settings)
    write_preprocessor(source, out, settings)
    weights = out / "model.safetensors"
    save_file(taken, weights, metadata={"format": "pt"})  # last, so a folder that has it is whole
    try:
        load_vision_encoder(out)
    except NanoVLMError:
        weights.unlink()
        raise
    size = sum(tensor.nbytes for tensor in taken.values()) / 1e6
    say(f"{out}: {settings['model_type']}, {len(taken)} tensors, {size:,.1f} MB")
    parts = sorted({re.match(r"((model|transformer)\.)?[^.]+", name)[0] for name in left})
    say(f"left in {source}: {len(left)} tensors" + (f" ({', '.join(parts)})" if parts else ""))


def tower_settings(source: Path, config: dict[str, Any], tower: Tower) -> dict[str, Any]:
    """The `config.json` of the tower alone, which has been read once."""
    table = config.get(tower.settings)
    if not isinstance(table, dict):
        raise NanoVLMError(
            f"{source}: its config.json has no table {tower.settings!r}, so there is no vision tower in it"
        )
    settings = table | (
        config.get("vision_config_dict") or {}
    )  # older CLIP files repeat the settings that count
    settings |= {"model_type": tower.model_type or settings.get("model_type")}
    try:
        parse_vision_encoder_config(settings)
    except NanoVLMError as error:
        raise NanoVLMError(f"{source}: {error}") from None
    return settings


def read_tower(source: Path, prefix: re.Pattern) -> tuple[dict[str, Tensor], list[str]]:
    """The tower's tensors, mapped, under their names without `prefix`; and the names of all others."""
    places = find_tensors(source)
    wanted = {name: prefix.match(name) for name in places}
    left = [name for name, begin in wanted.items() if not begin]
    files: dict[Path, list[str]] = {}
    for name in wanted.keys() - set(left):
        files.setdefault(places[name], []).append(name)
    if not files:
        raise NanoVLMError(
            f"{source}: none of its {len(places)} tensors belongs to a vision tower; are they another model's?"
        )
    taken = {}
    for path, names in sorted(files.items()):
        if not path.is_file():
            raise NanoVLMError(
                f"{path}: is missing, and the index places {len(names)} tensors of the tower there; fetch it"
            )
        shard = read_file(path)
        for name in names:
            if name not in shard:
                raise NanoVLMError(
                    f"{path}: lacks {name}, which its index places there; fetch both again"
                )
            taken[name[wanted[name].end() :]] = shard[name]
    return taken, left


def find_tensors(source: Path) -> dict[str, Path]:
    """In which file each tensor of a folder is."""
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
            f"{found}: weight_map does not give each tensor the name of a file beside it; fetch the index again"
        )
    return {name: source / shard for name, shard in places.items()}


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, mapped: what is not used is not read."""
    if path.suffix == ".safetensors":
        file = SafetensorsFile(path)
        return {name: file.tensor(name) for name in file.keys()}
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        tensors = None
    except (RuntimeError, ValueError, EOFError, OSError) as error:
        raise NanoVLMError(
            f"{path}: cannot be read ({first_line(error)}); fetch it again"
        ) from None
    if not isinstance(tensors, dict) or not all(
        isinstance(tensor, Tensor) for tensor in tensors.values()
    ):
        raise NanoVLMError(
            f"{path}: holds more than plain tensors, and reading that could run its code; take another file"
        )
    return tensors


def write_preprocessor(source: Path, out: Path, settings: dict[str, Any]) -> None:
    """How the eyes want their images: as the source's file says, or as Qwen-VL's code does, which has no file."""
    if settings["model_type"] == "qwen_vl_vision":
        side = settings.get("image_size", 448)
        write_json(
            out / PREPROCESSOR,
            VISION_ENCODERS["qwen-vl"].processor | {"size": {"height": side, "width": side}},
        )
    elif (processor := read_processor(source)) is not None:
        write_json(out / PREPROCESSOR, processor)
    else:
        say(
            f"{source}: holds no {PREPROCESSOR}, so {out} gets none; put one there, or images are prepared as for DINOv2"
        )


def parse_arguments() -> argparse.Namespace:
    """Read the flags."""
    parser = CommandParser(
        description="Take a vision tower out of a larger checkpoint, into a folder of its own."
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
    """Check the flags and take the tower out."""
    arguments = parse_arguments()
    if (arguments.out / "model.safetensors").exists():
        raise NanoVLMError(
            f"{arguments.out}: holds a model already; delete it or choose another --out"
        )
    extract(arguments.source, arguments.out)


if __name__ == "__main__":
    run_command(main)
