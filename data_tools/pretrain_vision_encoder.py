"""Pretraining of the tiny vision encoder on the toy world, from object labels and without any text.

As ImageNet models are trained on class numbers, this one is trained on the labels of each object:
the patches that it covers, the place of its centre, its shape, colour and size, all as numbers.
Each label has a linear head of its own, so that the patch vectors encode them separately, and
shape and colour combine into pairs that were never shown. The heads are not saved.
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

from data_tools.pretrain_common import fit, make_all
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
)
from nanovlm.hub.names import DINOV2, invert, translate
from nanovlm.hub.safetensors import save_file
from nanovlm.hub.vision_configs import parse_vision_encoder_config
from nanovlm.model.vision_encoder import VisionEncoder
from nanovlm.utils.files import write_json

PATCH = 8  # pixels: small objects, 12 pixels across, cover about four patches
GRID = IMAGE_SIZE // PATCH
# Bins of 4 pixels are finer than the 6 pixels by which objects differ in a question of position.
BINS = 16
HUB_CONFIG = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "mlp_ratio": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH,
    "num_channels": 3,
    "qkv_bias": True,
    "use_swiglu_ffn": False,
    "torch_dtype": "bfloat16",
}
PREPROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
# The labels of a patch and their numbers of classes. `place` is background, object or centre.
HEADS = {
    "place": 3,
    "shape": len(SHAPES),
    "colour": len(COLOURS),
    "size": len(SIZES),
    "x": BINS,
    "y": BINS,
}
WEIGHTS = {"x": 0.3, "y": 0.3}  # shapes are the hard part; positions need not be exact
BACKGROUND, OBJECT, CENTRE = range(3)
Compose = Callable[[Random, Sequence[Pair]], Scene]
NEVER_SHOWN = torch.tensor(
    [[(colour, shape) in HELD_OUT_PAIRS for shape in SHAPES] for colour in COLOURS]
)


def patch_labels(scene: Scene) -> np.ndarray:
    """(heads, patches) class numbers, as in HEADS.

    A patch belongs to the object that covers its middle.
    """
    labels = np.zeros((len(HEADS), GRID, GRID), dtype=np.uint8)
    middle = PATCH * np.arange(GRID) + PATCH / 2
    for thing in scene.objects:
        column, row = int(thing.x // PATCH), int(thing.y // PATCH)
        covered = np.hypot(middle[None, :] - thing.x, middle[:, None] - thing.y) <= thing.radius + 2
        covered[row, column] = True  # no object is too small to have a patch
        classes = (
            OBJECT,
            list(SHAPES).index(thing.shape),
            list(COLOURS).index(thing.colour),
            list(SIZES).index(thing.size),
            int(thing.x * BINS / IMAGE_SIZE),
            int(thing.y * BINS / IMAGE_SIZE),
        )
        labels[:, covered] = np.array([classes]).T
        labels[0, row, column] = CENTRE
    return labels.reshape(len(HEADS), -1)


def crowded_scene(rng: Random, pairs: Sequence[Pair]) -> Scene:
    """A scene with as many objects as fit, four or five: more labels than in the world itself."""
    objects: list[SceneObject] = []
    for _ in range(24):
        thing = random_object(rng, rng.choice(pairs))
        free = thing.reach + GAP
        x, y = (rng.uniform(free, IMAGE_SIZE - free) for _ in range(2))
        distances = ((math.hypot(x - other.x, y - other.y), other.reach) for other in objects)
        if all(distance >= thing.reach + reach + GAP for distance, reach in distances):
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
    make = partial(_labelled_scene, compose, pairs, name)
    for index, made in enumerate(make_all(make, count, f"scenes {name}")):
        pixels[index], labels[index] = (torch.tensor(array) for array in made)
    return pixels, labels


def mirror(pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Exchange left and right, which changes no shape of this world."""
    labels = labels.unflatten(-1, (GRID, GRID)).flip(-1).flatten(-2).clone()
    x = list(HEADS).index("x")
    labels[:, x] = torch.where(labels[:, 0] == BACKGROUND, 0, BINS - 1 - labels[:, x])
    return pixels.flip(-1), labels


def normalise(pixels: Tensor) -> Tensor:
    """uint8 pixels → fp32 as PREPROCESSOR normalises them."""
    return pixels.float().div(127.5).sub(1)


class LabelHeads(nn.Module):
    """A linear classifier for each label, on each patch vector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, sum(HEADS.values()))

    def forward(self, patches: Tensor) -> dict[str, Tensor]:
        """(N, P, C) → for each head (N, P, classes)."""
        logits = self.linear(patches).float().split(list(HEADS.values()), dim=-1)
        return dict(zip(HEADS, logits, strict=True))

    def loss(self, patches: Tensor, labels: Tensor) -> Tensor:
        """The weighted sum of the heads' cross-entropies; patches (N, P, C), labels (N, heads, P).

        All heads but `place` count on objects only. A shape that never occurs in an object's colour
        is left out of its softmax, and so is such a colour for a shape. Otherwise the vision
        encoder would learn "red, so not a star" and fail on the first red star.
        """
        targets = dict(zip(HEADS, labels.long().unbind(1), strict=True))
        logits, is_object = self(patches), targets["place"] != BACKGROUND
        total = F.cross_entropy(logits.pop("place").flatten(0, 1), targets["place"].flatten())
        left_out = {
            "shape": NEVER_SHOWN[targets["colour"][is_object]],
            "colour": NEVER_SHOWN.T[targets["shape"][is_object]],
        }
        for name, scores in logits.items():
            scores = scores[is_object]
            if name in left_out:
                scores = scores.masked_fill(left_out[name], -torch.inf)
            loss = F.cross_entropy(scores, targets[name][is_object])
            total = total + WEIGHTS.get(name, 1.0) * loss
        return total


@torch.no_grad()
def accuracy(
    vision_encoder: VisionEncoder, heads: LabelHeads, pixels: Tensor, labels: Tensor
) -> dict[str, float]:
    """The accuracy of each head at the objects' centres; `object`: shape, colour and size right."""
    logits = [heads(vision_encoder.patches(normalise(part))) for part in pixels.split(200)]
    centre = labels[:, 0] == CENTRE
    right = {}
    for head, name in enumerate(HEADS):
        predicted = torch.cat([part[name] for part in logits]).argmax(-1)
        right[name] = (predicted == labels[:, head])[centre]
    right["object"] = right["shape"] & right["colour"] & right["size"]
    return {name: hits.float().mean().item() for name, hits in right.items()}


def pretrain_vision_encoder(
    folder: Path, seed: int, steps: int, scenes: int, batch_size: int = 32, peak_lr: float = 1.5e-3
) -> dict[str, dict[str, float]]:
    """Train the vision encoder and write it in DINOv2's hub layout.

    Returns its accuracies on unseen scenes, with seen pairs and with held-out ones.
    """
    pixels, labels = labelled_scenes(crowded_scene, TRAIN_PAIRS, f"pretrain/{seed}", scenes)
    torch.manual_seed(seed)
    config = parse_vision_encoder_config(HUB_CONFIG)
    vision_encoder, heads = VisionEncoder(config), LabelHeads(config.hidden_size)

    def loss_of_step(step: int) -> Tensor:
        chosen = torch.randint(scenes, (batch_size,))
        images, targets = pixels[chosen], labels[chosen]
        if step % 2:
            images, targets = mirror(images, targets)
        with torch.autocast("cpu", torch.bfloat16):
            patches = vision_encoder.patches(normalise(images))
        return heads.loss(patches.float(), targets)

    parameters = [*vision_encoder.parameters(), *heads.parameters()]
    fit(parameters, loss_of_step, steps, peak_lr, "vision encoder")
    vision_encoder.eval().bfloat16().float()  # measured as it will be stored
    result = {}
    for split, pairs in (("seen pairs", TRAIN_PAIRS), ("held-out pairs", HELD_OUT_PAIRS)):
        unseen = labelled_scenes(random_scene, pairs, f"pretrain/{seed}/{split}", min(1000, scenes))
        result[split] = accuracy(vision_encoder, heads, *unseen)
    _save(vision_encoder, folder)
    return result


def _save(vision_encoder: VisionEncoder, folder: Path) -> None:
    """Write the two configs, then `model.safetensors` under DINOv2's names."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", HUB_CONFIG)
    write_json(folder / "preprocessor_config.json", PREPROCESSOR)
    published = translate(invert(DINOV2))
    state = vision_encoder.state_dict()
    tensors = {str(published(name)): tensor.detach().bfloat16() for name, tensor in state.items()}
    # The layout also has a mask token, which is not used.
    width = vision_encoder.config.hidden_size
    tensors["embeddings.mask_token"] = torch.zeros(1, width, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
