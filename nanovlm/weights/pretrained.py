"""From a hub folder to a model whose weights are held once."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from nanovlm.errors import NanoVLMError
from nanovlm.files import read_json
from nanovlm.weights.loading import load_into, open_checkpoint
from nanovlm.weights.names import NameTable, translate


def load_pretrained(model_class: type[nn.Module], config_class: Any, folder: str | Path, table: NameTable,
                    dtype: torch.dtype | None = None) -> Any:
    """Build `model_class` from `folder`'s `config.json` and fill it with its tensors under the family's names.

    The module is laid out without memory, then each parameter becomes the file's own tensor, cast once if `dtype`
    differs: the weights are never held twice.
    """
    folder = Path(folder)
    try:
        config = config_class.from_hf(read_json(folder / "config.json"))
    except NanoVLMError as error:
        raise NanoVLMError(f"{folder}: {error}") from None
    with torch.device("meta"):
        model = model_class(config)
    load_into(model, open_checkpoint(folder), translate(table), dtype=dtype)
    return model.eval()
