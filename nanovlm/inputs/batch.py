"""What one forward pass takes."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Batch:
    """What one forward pass takes. Positions are flat indices into (B, T), made where the batch is made, so that
    nothing has to be counted on the accelerator."""

    input_ids: Tensor  # (B, T); at `image_positions` the placeholder, which needs no row of the embedding table
    attention_mask: (
        Tensor  # (B, T): 0 padding, 1 a token, more for branches and packed samples (`causal_mask`)
    )
    image_positions: Tensor  # (N · K,) where the visual tokens go, in the pictures' order
    target_positions: Tensor  # (M,) the positions that predict a labelled token
    targets: Tensor  # (M,) the labelled tokens
    pixels: Tensor | None = None  # (N, 3, H, W): all pictures of all images (`image_pixels`)
    patches: Tensor | None = None  # (N, P, C_v) instead of pixels, where the features are kept

    def to(self, device: torch.device | str) -> "Batch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Into memory from which the copy to a GPU goes on by itself."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        tensors = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return type(self)(
            **{
                name: tensor if tensor is None else function(tensor)
                for name, tensor in tensors.items()
            }
        )
