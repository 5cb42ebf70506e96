"""What one forward pass takes.

Lesson: lessons/source/09_splice.py.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass
class Batch:
    """The tensors of one forward pass.

    Positions are flat indices into (B, T), computed where the batch is made, so that nothing has to
    be counted on the accelerator.
    """

    input_ids: Tensor  # (B, T); at `image_positions` the placeholder, whose embedding is not used
    attention_mask: Tensor | None  # (B, T): 0 padding, 1 a token, more for branches; None: all 1
    image_positions: Tensor  # (N · K,) where the visual tokens go, in the order of the tiles
    target_positions: Tensor  # (M,) positions whose next token is labelled
    targets: Tensor  # (M,) the labelled tokens
    pixels: Tensor | None = None  # (N, 3, H, W): all tiles of all images
    patches: Tensor | None = None  # (N, P, C_v) in place of pixels, where features are cached
    right_padded: bool = False  # rows of one sample each: `attention_mask` is 1 … 1 0 … 0

    def to(self, device: torch.device | str) -> Self:
        """The batch on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """The batch in pinned memory, from which a copy to a GPU runs asynchronously."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        tensors = {
            field.name: function(value)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **tensors)
