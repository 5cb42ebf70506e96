"""Facts about images, and copies of them."""

import io
import random
from base64 import b64encode
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.check import duplicates
from data_tools.check.duplicates import copies
from data_tools.check.images import ImageFacts, look_at_image, look_at_images
from nanovlm.inputs.data_uri import to_path
from nanovlm.inputs.image import open_image


def photo(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """Something with light, colours and edges at all scales, as a photo has."""
    generator = np.random.default_rng(seed)
    image = np.zeros((size[1], size[0], 3))
    for cells in (2, 4, 8, 16):
        coarse = Image.fromarray(generator.integers(0, 255, (cells, cells, 3), dtype=np.uint8))
        image += np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=float) / 4
    return Image.fromarray(image.astype(np.uint8))


def saved(image: Image.Image, path: Path, **options) -> Path:
    image.save(path, **options)
    return path


def names(found: dict[int, int], paths: list[Path]) -> dict[str, str]:
    return {paths[copy].name: paths[earlier].name for copy, earlier in found.items()}


def test_copies_are_told_from_what_only_looks_alike(tmp_path):
    original = photo(0)
    variants = {
        "0.png": (original, {}),
        "same bytes.png": (original, {}),
        "same pixels.bmp": (original, {}),
        "q50.jpg": (original, {"quality": 50}),
        "q20.jpg": (original, {"quality": 20}),
        "half.png": (original.resize((80, 60), Image.Resampling.LANCZOS), {}),
        "larger.webp": (original.resize((320, 240)), {"quality": 60}),
        "other.png": (photo(1), {}),
        "mirrored.png": (original.transpose(Image.Transpose.FLIP_LEFT_RIGHT), {}),
        "stretched.png": (original.resize((160, 90)), {}),
        "redder.png": (Image.merge("RGB", original.split()[::-1]), {}),
    }
    paths = [saved(image, tmp_path / name, **o) for name, (image, o) in variants.items()]
    exact, near = copies(list(look_at_images(paths, 0)))
    assert names(exact, paths) == {"same bytes.png": "0.png", "same pixels.bmp": "0.png"}
    assert names(near, paths) == dict.fromkeys(
        ("q50.jpg", "q20.jpg", "half.png", "larger.webp"), "0.png"
    )


def test_toy_scenes_are_all_different(tiny):
    paths = sorted((tiny.data / "images").rglob("*.png"))
    assert len(paths) >= 16 and copies(list(look_at_images(paths, 0))) == ({}, {})


def random_facts(count: int, seed: int = 0) -> list[ImageFacts]:
    """Images of which every third is nearly the first one of its group."""
    generator = random.Random(seed)
    facts = []
    for number in range(count):
        if number % 3 == 0:
            gradients, colors = generator.randbytes(16), generator.randbytes(192)
        bits = int.from_bytes(gradients)
        for _ in range(number % 3 * 3):  # six bits at most, which is always found
            bits ^= 1 << generator.randrange(128)
        pixels = number.to_bytes(16)
        facts.append(ImageFacts("", 8, 8, "PNG", pixels, pixels, bits.to_bytes(16), colors))
    return facts


def test_all_pairs_within_six_bits_are_found_without_comparing_all(monkeypatch):
    facts, compared = random_facts(3000), 0
    are_near = duplicates._are_near

    def counted(pairs, *rest):
        nonlocal compared
        compared += len(pairs)
        return are_near(pairs, *rest)

    monkeypatch.setattr(duplicates, "_are_near", counted)
    exact, near = copies(facts)
    assert exact == {} and near == {n: n - n % 3 for n in range(3000) if n % 3}
    assert compared < 3000 * 3000 / 2 / 20


def test_images_that_all_look_alike_take_no_time_of_all_pairs(monkeypatch):
    """Each is compared with its neighbours only."""
    flat = [
        ImageFacts(
            "", 8, 8, "PNG", n.to_bytes(16), n.to_bytes(16), bytes(16), bytes([n % 256] * 192)
        )
        for n in range(400)
    ]
    compared = 0
    are_near = duplicates._are_near

    def counted(pairs, *rest):
        nonlocal compared
        compared += len(pairs)
        return are_near(pairs, *rest)

    monkeypatch.setattr(duplicates, "_are_near", counted)
    copies(flat)
    assert compared <= 28 * 50 * 400


def test_a_chain_of_alike_images_is_not_all_one():
    """The third is near the second, but not the first: it is a copy of none that is kept."""
    hashes = [0, (1 << 10) - 1, (1 << 20) - 1]
    facts = [
        ImageFacts("", 8, 8, "PNG", bytes([n]), bytes([n]), bits.to_bytes(16), bytes(192))
        for n, bits in enumerate(hashes)
    ]
    assert copies(facts) == ({}, {1: 0})


@pytest.mark.parametrize("workers", [1, 2])
def test_facts_do_not_depend_on_the_number_of_workers(tmp_path, workers):
    paths = [saved(photo(n), tmp_path / f"{n}.png") for n in range(40)]
    (tmp_path / "7.png").write_bytes(b"no image")
    assert list(look_at_images(paths, workers)) == list(look_at_images(paths, 0))


def test_an_image_that_cannot_be_read_has_the_reason_of_training(tmp_path):
    path = saved(photo(0), tmp_path / "a.jpg")
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(Exception) as caught:
        open_image(path)
    assert str(caught.value) == f"{path}: {look_at_image(path).error}"


def test_the_facts_of_an_image(tmp_path):
    data = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(data, "WEBP")
    path = to_path("data:image/webp;base64," + b64encode(data.getvalue()).decode())
    facts = look_at_image(path)
    assert (facts.width, facts.height, facts.format, facts.is_blank) == (40, 30, "WebP", True)
    for suffix, name in (
        ("jpg", "JPEG"),
        ("png", "PNG"),
        ("gif", "GIF"),
        ("tiff", "TIFF"),
        ("ppm", "PPM"),
    ):
        assert look_at_image(saved(photo(0), tmp_path / f"a.{suffix}")).format == name
