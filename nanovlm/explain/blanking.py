"""Whether explanations hold: blank the patches that a word is said to have come from, and see.

If they are right, the word's log-probability falls, and by more than without as many other patches.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from nanovlm.explain.attribution import Answered, explain
from nanovlm.explain.places import blank_out
from nanovlm.inputs.batch import Batch
from nanovlm.inputs.image import image_pixels
from nanovlm.model.vlm import VisionLanguageModel

SHARE = 0.1  # of an image's patches, blanked at a time
DRAWS = 4  # random choices of as many


class Drop(NamedTuple):
    """How far a word's log-probability falls, in nats, without a tenth of the patches."""

    top: float  # those with the largest parts in the word
    random: float  # random ones
    other: float  # those with the largest parts in another word of the answer; NaN without any


def blanking_drops(
    model: VisionLanguageModel,
    prompt: Batch,
    images: Sequence[Image.Image],
    answer: Sequence[int],
    generator: torch.Generator,
) -> list[Drop]:
    """A `Drop` for each word of an answer whose probability the images at least double.

    The arguments are those of `explain`. The patches are blanked in the images themselves, where
    they get the mean colour, and these are encoded again.
    """
    words = explain(model, prompt, images, answer)
    words = [word for word in words if word.probability >= 2 * word.blank]
    if not words:
        return []
    answered = Answered(model, prompt, answer)
    assert prompt.pixels is not None, "explain refuses a conversation without an image"
    whole, device = answered.log_probs(prompt.pixels, words), prompt.pixels.device  # (W,)

    def drops(parts: Tensor) -> Tensor:
        """How far each word falls without the patches of the largest parts, (W,)."""
        blanked = _without_top(images, parts, model, [places.shape for places in words[0].maps])
        return whole - answered.log_probs(blanked.to(device), words)

    parts = [torch.cat([places.flatten() for places in word.maps]) for word in words]
    of_each = torch.stack([drops(each) for each in parts])  # (W blanked, W)
    random = [drops(torch.rand(len(parts[0]), generator=generator)) for _ in range(DRAWS)]
    top = of_each.diagonal()
    other = (of_each.sum(dim=0) - top) / (len(words) - 1) if len(words) > 1 else top * math.nan
    numbers = torch.stack((top, torch.stack(random).mean(dim=0), other), dim=1)
    return [Drop(*row) for row in numbers.tolist()]


def _without_top(
    images: Sequence[Image.Image],
    parts: Tensor,
    model: VisionLanguageModel,
    shapes: Sequence[torch.Size],
) -> Tensor:
    """The tiles of `images`, (N, 3, H, W), blank at the tenth of places with the largest `parts`.

    parts: of the places of all images, one after another, whose grids have these `shapes`.
    """
    config = model.config.image
    chosen = torch.zeros(len(parts), dtype=torch.bool)
    chosen[parts.topk(max(1, round(SHARE * len(parts)))).indices] = True
    places = chosen.split([math.prod(shape) for shape in shapes])
    blanked = [
        blank_out(image, of_image.view(shape), config)
        for image, of_image, shape in zip(images, places, shapes)
    ]
    return torch.cat([image_pixels(image, config) for image in blanked])
