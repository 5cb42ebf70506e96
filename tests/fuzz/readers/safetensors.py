"""Folders of safetensors files, in one piece or in shards with an index."""

import json
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import nn

from nanovlm.hub.loading import load_into, open_checkpoint
from tests.fuzz.damage import damaged_bytes, damaged_file, damaged_json, damaged_value, to_json
from tests.fuzz.inputs import Content, Input, Kind

SHAPES = {"0.weight": [4, 3], "0.bias": [4], "1.weight": [4], "1.bias": [4]}
INDEX = "model.safetensors.index.json"


class Toy(nn.Sequential):
    """The module that the tensors are loaded into."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 4), nn.LayerNorm(4))


def make(rng: Random) -> Input:
    """Tensors of the module in one file or two, of which one file is damaged."""
    if rng.random() < 0.6:
        return Input({"model.safetensors": _damaged_weights(rng, list(SHAPES))})
    shards = {"a.safetensors": list(SHAPES)[:2], "b.safetensors": list(SHAPES)[2:]}
    index = {
        "metadata": {"total_size": 80},
        "weight_map": {name: shard for shard, names in shards.items() for name in names},
    }
    files: dict[str, Content] = {
        shard: _file(*_parts(rng, names)) for shard, names in shards.items()
    }
    files[INDEX] = to_json(index)
    spoiled = rng.choice((INDEX, INDEX, "a.safetensors"))
    if spoiled == INDEX:
        files[INDEX] = damaged_json(rng, index)
    else:
        files[spoiled] = _damaged_weights(rng, shards[spoiled])
    return Input(files)


def _parts(rng: Random, names: list[str]) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a whole file."""
    dtype, size = rng.choice((("F32", 4), ("F16", 2), ("BF16", 2), ("F64", 8)))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}} if rng.random() < 0.5 else {}
    position = 0
    for name in names:
        count = torch.Size(SHAPES[name]).numel() * size
        offsets = [position, position + count]
        header[name] = {"dtype": dtype, "shape": SHAPES[name], "data_offsets": offsets}
        position += count
    return header, rng.randbytes(position)


def _file(header: dict[str, Any] | bytes, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    return length.to_bytes(8, "little") + text + data


def _damaged_weights(rng: Random, names: list[str]) -> Content:
    header, data = _parts(rng, names)

    def structured() -> bytes:
        what = rng.randrange(8)
        if what == 0:
            lengths = (0, 1, len(json.dumps(header)) - 1, 2**31, 10**8, 2**62, 2**64 - 1)
            return _file(header, data, rng.choice(lengths))
        if what == 1:
            return _file(header, rng.choice((data[:-1], data + b"\0", b"", data * 2, bytes(90))))
        if what == 2:
            return _file(damaged_bytes(rng, json.dumps(header).encode()), data)
        if what == 3:
            text = json.dumps(header)
            return _file((text[:-1] + "," + text[1:]).encode(), data)  # every name twice
        return _file(to_json(damaged_value(rng, header)), data)

    return damaged_file(rng, _file(header, data), structured)


def read(_: Input) -> None:
    """Read every tensor, and load them all into the module."""
    checkpoint = open_checkpoint(Path())
    for name in checkpoint.keys():
        checkpoint.tensor(name).clone()
    with torch.device("meta"):
        module = Toy()
    load_into(module, checkpoint, lambda name: name)


KIND = Kind("safetensors", make, read, short=60, long=1600)
