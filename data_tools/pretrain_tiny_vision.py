"""The tiny eyes: a vision transformer that learns from object labels, without any text, to see the toy world.

As ImageNet models learn from class numbers, these learn from what a labeller would note of each object: which patches
it covers, where its centre is, its shape, its colour and its size, all as numbers. Each has a linear head of its own,
so the patch vectors carry them apart, and shape and colour compose into pairs never shown. The heads are thrown away.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_tools.pretrain_tiny_common import fit, make_all
from data_tools.scenes_world import (
    BACKGROUNDS,
    COLOURS,
    GAP,
    HELD_OUT_PAIRS,
    IMAGE_SIZE,
    SHAPES,
    SIZES,
    TRAIN_PAIRS,
    Pair,
    Scene,
    SceneObject,
    draw,
    random_object,
    random_scene,
)  # fmt: skip
from nanovlm.hub.names import DINOV2, invert, translate
from nanovlm.hub.safetensors import save_file
from nanovlm.hub.vision_configs import parse_vision_encoder_config
from nanovlm.model.vision_encoder import VisionEncoder
from nanovlm.utils.files import write_json

PATCH = 8  # pixels: small objects, 12 pixels across, cover about four patches
GRID = IMAGE_SIZE // PATCH
BINS = 16  # of 4 pixels: finer than the 6 pixels by which objects differ when it is asked which is further left
HUB_CONFIG = {
    "architectures": ["Dinov2Model"], "model_type": "dinov2", "hidden_size": 192, "num_hidden_layers": 4,
    "num_attention_heads": 4, "mlp_ratio": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "image_size": IMAGE_SIZE,
    "patch_size": PATCH, "num_channels": 3, "qkv_bias": True, "use_swiglu_ffn": False, "torch_dtype": "bfloat16",
}  # fmt: skip
PREPROCESSOR = {
    "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    "resample": 2, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
}  # fmt: skip
# What each patch is labelled with, and its number of classes. `place` says: background, an object, an object's centre.
HEADS = {
    "place": 3,
    "shape": len(SHAPES),
    "colour": len(COLOURS),
    "size": len(SIZES),
    "x": BINS,
    "y": BINS,
}
WEIGHTS = {"x": 0.3, "y": 0.3}  # shapes are what is hard; a place need not be exact to the square
BACKGROUND, OBJECT, CENTRE = range(3)
Compose = Callable[[Random, Sequence[Pair]], Scene]
NEVER_SHOWN = torch.tensor(
    [[(colour, shape) in HELD_OUT_PAIRS for shape in SHAPES] for colour in COLOURS]
)


def patch_labels(scene: Scene) -> np.ndarray:
    """(heads, patches) class numbers, as in HEADS. A patch belongs to the object that its middle lies in."""
    labels = np.zeros((len(HEADS), GRID, GRID), dtype=np.uint8)
    middle = PATCH * np.arange(GRID) + PATCH / 2
    for thing in scene.objects:
        column, row = int(thing.x // PATCH), int(thing.y // PATCH)
        covered = np.hypot(middle[None, :] - thing.x, middle[:, None] - thing.y) <= thing.radius + 2
        covered[row, column] = True  # no object is too small to have a patch
        labels[:, covered] = np.array([[
            OBJECT, list(SHAPES).index(thing.shape), list(COLOURS).index(thing.colour), list(SIZES).index(thing.size),
            int(thing.x * BINS / IMAGE_SIZE), int(thing.y * BINS / IMAGE_SIZE)]]).T  # fmt: skip
        labels[0, row, column] = CENTRE
    return labels.reshape(len(HEADS), -1)


def crowded_scene(rng: Random, pairs: Sequence[Pair]) -> Scene:
    """A scene with as many objects as fit, four or five: more to learn from than in the world itself."""
    objects: list[SceneObject] = []
    for _ in range(24):
        thing = random_object(rng, rng.choice(pairs))
        free = thing.reach + GAP
        x, y = (rng.uniform(free, IMAGE_SIZE - free) for _ in range(2))
        if all(
            math.hypot(x - other.x, y - other.y) >= thing.reach + other.reach + GAP
            for other in objects
        ):
            objects.append(replace(thing, x=x, y=y))
    return Scene(tuple(objects), rng.choice(BACKGROUNDS), rng.getrandbits(48))


def _labelled_scene(
    compose: Compose, pairs: Sequence[Pair], name: str, index: int
) -> tuple[np.ndarray, np.ndarray]:
    scene = compose(Random(f"{name}/{index}"), pairs)
    return np.asarray(draw(scene)).transpose(2, 0, 1), patch_labels(scene)


def labelled_scenes(
    compose: Compose, pairs: Sequence[Pair], name: str, count: int
) -> tuple[Tensor, Tensor]:
    """(count, 3, 64, 64) pixels and (count, heads, patches) labels, both uint8."""
    pixels = torch.empty(count, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    labels = torch.empty(count, len(HEADS), GRID * GRID, dtype=torch.uint8)
    for index, made in enumerate(
        make_all(partial(_labelled_scene, compose, pairs, name), count, f"scenes {name}")
    ):
        pixels[index], labels[index] = (torch.tensor(array) for array in made)
    return pixels, labels


def mirror(pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Left and right exchanged, which changes no shape of this world."""
    labels = labels.unflatten(-1, (GRID, GRID)).flip(-1).flatten(-2).clone()
    x = list(HEADS).index("x")
    labels[:, x] = torch.where(labels[:, 0] == BACKGROUND, 0, BINS - 1 - labels[:, x])
    return pixels.flip(-1), labels


def normalise(pixels: Tensor) -> Tensor:
    """uint8 pixels → what PREPROCESSOR makes of them, in fp32."""
    return pixels.float().div(127.5).sub(1)


class LabelHeads(nn.Module):
    """One linear classifier a label, on each patch vector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, sum(HEADS.values()))

    def forward(self, patches: Tensor) -> dict[str, Tensor]:
        """(N, P, C) → for each head (N, P, classes)."""
        return dict(
            zip(
                HEADS, self.linear(patches).float().split(list(HEADS.values()), dim=-1), strict=True
            )
        )

    def loss(self, patches: Tensor, labels: Tensor) -> Tensor:
        """The sum of the heads' cross-entropies; labels (N, heads, P). All but `place` are asked of objects only.

        Among shapes, one that never comes in an object's colour is not counted as wrong for it, nor such a colour for a
        shape. Otherwise the eyes would learn "red, so no star" and be blind to the first red star they meet.
        """
        wanted = dict(zip(HEADS, labels.long().unbind(1), strict=True))
        logits, belongs = self(patches), wanted["place"] != BACKGROUND
        total = F.cross_entropy(logits.pop("place").flatten(0, 1), wanted["place"].flatten())
        excused = {
            "shape": NEVER_SHOWN[wanted["colour"][belongs]],
            "colour": NEVER_SHOWN.T[wanted["shape"][belongs]],
        }
        for name, scores in logits.items():
            scores = scores[belongs]
            if name in excused:
                scores = scores.masked_fill(excused[name], -torch.inf)
            total = total + WEIGHTS.get(name, 1.0) * F.cross_entropy(scores, wanted[name][belongs])
        return total


@torch.no_grad()
def accuracy(
    vision: VisionEncoder, heads: LabelHeads, pixels: Tensor, labels: Tensor
) -> dict[str, float]:
    """For each head, the share of objects that are right at their centre; `object`: shape, colour and size all are."""
    logits = [heads(vision.patches(normalise(part))) for part in pixels.split(200)]
    centre = labels[:, 0] == CENTRE
    right = {name: (torch.cat([part[name] for part in logits]).argmax(-1) == labels[:, head])[centre]
             for head, name in enumerate(HEADS)}  # fmt: skip
    right["object"] = right["shape"] & right["colour"] & right["size"]
    return {name: hits.float().mean().item() for name, hits in right.items()}


def pretrain_vision(
    folder: Path, seed: int, steps: int, scenes: int, batch_size: int = 32, peak_lr: float = 1.5e-3
) -> dict[str, dict[str, float]]:
    """Train the eyes and write them to `folder` in DINOv2's hub layout; return their accuracies on unseen scenes."""
    pixels, labels = labelled_scenes(crowded_scene, TRAIN_PAIRS, f"pretrain/{seed}", scenes)
    torch.manual_seed(seed)
    config = parse_vision_encoder_config(HUB_CONFIG)
    vision, heads = VisionEncoder(config), LabelHeads(config.hidden_size)

    def loss_of_step(step: int) -> Tensor:
        chosen = torch.randint(scenes, (batch_size,))
        images, wanted = pixels[chosen], labels[chosen]
        if step % 2:
            images, wanted = mirror(images, wanted)
        with torch.autocast("cpu", torch.bfloat16):
            patches = vision.patches(normalise(images))
        return heads.loss(patches.float(), wanted)

    fit([*vision.parameters(), *heads.parameters()], loss_of_step, steps, peak_lr, "eyes")
    vision.eval().bfloat16().float()  # measured as it will be stored
    result = {}
    for split, pairs in (("seen pairs", TRAIN_PAIRS), ("held-out pairs", HELD_OUT_PAIRS)):
        unseen = labelled_scenes(random_scene, pairs, f"pretrain/{seed}/{split}", min(1000, scenes))
        result[split] = accuracy(vision, heads, *unseen)
    _save(vision, folder)
    return result


def _save(vision: VisionEncoder, folder: Path) -> None:
    """Write the two configs, then `model.safetensors` under DINOv2's names."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", HUB_CONFIG)
    write_json(folder / "preprocessor_config.json", PREPROCESSOR)
    published = translate(invert(DINOV2))
    tensors = {
        published(name): tensor.detach().bfloat16() for name, tensor in vision.state_dict().items()
    }
    # The layout has a mask token too, which nothing uses.
    tensors["embeddings.mask_token"] = torch.zeros(
        1, vision.config.hidden_size, dtype=torch.bfloat16
    )
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
