"""Where a patch stands in its image: tables of a vector a place, fitted to other grids, and fixed ones of sines and cosines."""

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_positions(
    table: Tensor, side: int, rows: int, columns: int, mode: str = "bicubic"
) -> Tensor:
    """A table for a grid of side × side places, (1, side², C), as one for rows × columns: (1, rows · columns, C).

    `mode` is "bicubic", "bicubic_antialias" (a larger filter where the grid shrinks), or "nearest": each place takes the
    vector of the one that its upper left corner falls in.
    """
    if (rows, columns) == (side, side):
        return table
    grid = table.unflatten(1, (side, side))  # (1, side, side, C)
    if (
        mode == "nearest"
    ):  # in whole numbers: where a corner falls between two places, fractions would choose at random
        down, across = (
            torch.arange(count, device=table.device) * side // count for count in (rows, columns)
        )
        return grid[:, down[:, None], across].flatten(1, 2)
    grid = grid.permute(0, 3, 1, 2).float()  # bicubic in half precision shifts the table
    grid = F.interpolate(
        grid, (rows, columns), mode="bicubic", antialias=mode == "bicubic_antialias"
    )
    return grid.flatten(2).transpose(1, 2).to(table.dtype)


def sine_cosine_positions(
    side: int, width: int, device: torch.device | str | None = None
) -> Tensor:
    """Fixed positions of a grid of side × side places (Vaswani et al. 2017, in two dimensions): (1, side², width) in fp32.

    The first half of a vector says the column, the second the row; each half is its number's sines at width / 4
    frequencies, then its cosines. `width` is a multiple of 4.
    """
    frequencies = 10000 ** (
        -torch.arange(width // 4, device=device, dtype=torch.float32) / (width // 4)
    )
    angles = torch.arange(side, device=device)[:, None] * frequencies  # (side, width / 4)
    numbers = torch.cat((angles.sin(), angles.cos()), dim=-1)  # (side, width / 2)
    across = numbers[None].expand(side, -1, -1)  # of a place in row i and column j, the j-th
    down = numbers[:, None].expand(-1, side, -1)
    return torch.cat((across, down), dim=-1).flatten(0, 1)[None]
