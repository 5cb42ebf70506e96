"""From tiles to places of an image, and places painted over."""

import numpy as np
import pytest
import torch
from PIL import Image

from nanovlm.explain.places import blank_out, join_tiles, seen_part, spread
from nanovlm.inputs.image import image_pixels
from nanovlm.inputs.image_config import ImageConfig


def test_tiles_are_laid_side_by_side_and_the_whole_image_is_spread_over_them():
    tiles = torch.rand(2 * 3 + 1, 2, 2)
    joined = join_tiles(tiles, rows=2, columns=3)
    assert joined.shape == (4, 6) and joined.sum().item() == pytest.approx(tiles.sum().item())
    whole = tiles[-1] / 6
    # the tile in row 1, column 2 is number 5; its corner lies in the last quarter of the image
    assert joined[3, 5].item() == pytest.approx((tiles[5][1, 1] + whole[1, 1]).item())
    assert joined[0, 2].item() == pytest.approx((tiles[1][0, 0] + whole[0, 0]).item())
    assert torch.equal(join_tiles(tiles[-1:], 0, 0), tiles[-1])


def test_of_a_cropped_image_only_the_middle_is_seen():
    config = ImageConfig(8, 8, fit="crop", shortest_edge=16)
    assert seen_part(64, 32, config) == (24, 8, 40, 24)
    assert seen_part(64, 32, ImageConfig(8, 8)) == (0, 0, 64, 32)
    painted = spread(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 64, 32, config)
    assert painted.shape == (32, 64) and painted.sum() == (1 + 2 + 3 + 4) * 64
    assert painted[8, 24] == 1 and painted[23, 39] == 4 and painted[7, 24] == painted[8, 23] == 0


@pytest.mark.parametrize(
    ("config", "tile", "rows", "columns"),
    [
        (ImageConfig(16, 16), 0, slice(0, 4), slice(12, 16)),
        (ImageConfig(16, 16, fit="crop", shortest_edge=32), 0, slice(0, 4), slice(12, 16)),
        (ImageConfig(16, 16, fit="tiles", max_tiles=2), 1, slice(0, 8), slice(8, 16)),
    ],
)
def test_the_blanked_place_is_what_the_vision_encoder_gets_blank(config, tile, rows, columns):
    """The place is the top right one of 4 × 4 on the image; of a tile, one of 2 × 2."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 99, (32, 32, 3), np.uint8))
    places = torch.zeros(4, 4, dtype=torch.bool)
    places[0, 3] = True
    before, after = (
        image_pixels(image, config),
        image_pixels(blank_out(image, places, config), config),
    )
    changed = (before != after).any(dim=1)[tile]
    assert changed[rows, columns].all()
    if config.fit != "squash":  # elsewhere a filter reaches beyond the edge, here by two pixels
        margin = 2 if config.fit == "tiles" else 0
        middle = after[tile][:, rows.start : rows.stop - margin, columns.start + margin :]
        assert middle.abs().max() < 0.02
