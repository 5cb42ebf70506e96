"""Images of every odd and broken kind, and agreement with the reference image processors."""

import io
import json
import random
import struct
import warnings
import zlib
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from nanovlm.errors import NanoVLMError
from nanovlm.hub.image_configs import parse_image_config
from nanovlm.inputs import image as image_module
from nanovlm.inputs.image import image_pixels, image_size, open_image, preprocess, tile_grid
from nanovlm.inputs.image_config import ImageConfig
from nanovlm.utils.config import from_dict

pytestmark = pytest.mark.filterwarnings("error")  # pillow's warnings must not reach a user

DINOV2 = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "resample": 3,
    "size": {"shortest_edge": 256},
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 0.00392156862745098,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
SMOLVLM2 = {  # as published
    "do_convert_rgb": True,
    "do_image_splitting": True,
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "SmolVLMImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "max_image_size": {"longest_edge": 512},
    "processor_class": "SmolVLMProcessor",
    "resample": 1,
    "rescale_factor": 0.00392156862745098,
    "size": {"longest_edge": 2048},
    "video_sampling": {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 512}},
}


def random_image(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with some noise, so that both filters and decoders have something to do."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    return Image.fromarray(
        np.clip(smooth + generator.integers(-20, 21, smooth.shape), 0, 255).astype(np.uint8)
    )


def encode(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(width: int, height: int, data: bytes, bits: int = 1, colour: int = 0) -> bytes:
    """A PNG written by hand, so that its header can say anything."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def pixels_of(data: bytes) -> list[list[tuple[int, int, int]]]:
    image = open_image(data)
    assert image.mode == "RGB"
    return [[tuple(pixel) for pixel in row] for row in np.asarray(image).tolist()]


# Good and odd


def test_path_string_bytes_and_stream_give_the_same(tmp_path: Path) -> None:
    image = random_image(7, 5)
    path = tmp_path / "图片.png"
    image.save(path)
    with path.open("rb") as stream:
        stream.read(3)  # a stream is read from its start, wherever it stands
        opened = [
            open_image(path),
            open_image(str(path)),
            open_image(path.read_bytes()),
            open_image(stream),
        ]
        assert not stream.closed
    assert all(one.tobytes() == image.tobytes() and one.mode == "RGB" for one in opened)


@pytest.mark.parametrize(
    "mode, colour, format, expected",
    [
        ("RGB", (10, 20, 30), "PNG", (10, 20, 30)),
        ("L", 77, "PNG", (77, 77, 77)),
        ("1", 1, "PNG", (255, 255, 255)),
        ("1", 0, "TIFF", (0, 0, 0)),
        ("CMYK", (0, 255, 255, 0), "TIFF", (255, 0, 0)),
        ("CMYK", (0, 255, 255, 0), "JPEG", (254, 0, 0)),
        ("YCbCr", (255, 128, 128), "TIFF", (255, 255, 255)),
        ("LA", (0, 0), "PNG", (255, 255, 255)),
        ("LA", (100, 255), "PNG", (100, 100, 100)),
        ("RGBA", (200, 0, 0, 0), "PNG", (255, 255, 255)),
        ("RGBA", (255, 0, 0, 128), "WEBP", (255, 127, 127)),
        ("I;16", 0x8000, "PNG", (128, 128, 128)),
        ("I;16", 65535, "PNG", (255, 255, 255)),
        ("I;16", 65535, "TIFF", (255, 255, 255)),
        ("I;16", 0x4000, "PPM", (64, 64, 64)),
        ("I", 128, "TIFF", (128, 128, 128)),
        ("I", 32768, "TIFF", (128, 128, 128)),
        ("I", 2**30, "TIFF", (255, 255, 255)),
        ("I", 0, "TIFF", (0, 0, 0)),
        ("F", 0.5, "TIFF", (128, 128, 128)),
        ("F", 200.0, "TIFF", (200, 200, 200)),
    ],
)
def test_every_mode_keeps_its_colour(
    mode: str, colour, format: str, expected: tuple[int, int, int]
) -> None:
    options = (
        {"lossless": True} if format == "WEBP" else {"quality": 100} if format == "JPEG" else {}
    )
    pixels = np.array(pixels_of(encode(Image.new(mode, (9, 6), colour), format, **options)))
    assert pixels.shape == (6, 9, 3)
    assert np.abs(pixels - expected).max() <= 1


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(1, 256)
    for format in ("PNG", "TIFF", "PPM"):
        assert [
            pixel[0] for pixel in pixels_of(encode(Image.fromarray(values), format))[0]
        ] == list(range(256))


def test_16_bit_colour() -> None:
    data = png(1, 1, zlib.compress(b"\0" + struct.pack(">HHH", 65535, 32768, 0)), bits=16, colour=2)
    assert pixels_of(data) == [[(255, 128, 0)]]


def test_negative_values_become_black_at_the_smallest() -> None:
    values = np.array([[-255, 0, 255]], dtype=np.int32)
    assert [pixel[0] for pixel in pixels_of(encode(Image.fromarray(values), "TIFF"))[0]] == [
        0,
        128,
        255,
    ]


def test_transparency_of_palettes_and_single_colours_is_flattened_on_white() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    white, red, green = (255, 255, 255), (255, 0, 0), (0, 255, 0)
    assert pixels_of(encode(palette, "PNG", transparency=0)) == [[white, green]]
    assert pixels_of(encode(palette, "PNG", transparency=bytes([255, 0]))) == [[red, white]]
    assert pixels_of(encode(palette, "PNG", transparency=bytes([128, 255]))) == [
        [(255, 127, 127), green]
    ]
    assert pixels_of(encode(palette, "GIF", transparency=1)) == [[red, white]]
    assert pixels_of(encode(palette, "PNG")) == [[red, green]]
    colour = Image.new("RGB", (2, 1), red)
    colour.putpixel((0, 0), green)
    assert pixels_of(encode(colour, "PNG", transparency=green)) == [[white, red]]
    assert pixels_of(encode(Image.new("L", (1, 1), 9), "PNG", transparency=9)) == [[white]]
    assert pixels_of(encode(Image.new("I;16", (1, 1), 900), "PNG", transparency=900)) == [[white]]


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_an_animation(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert {pixel for row in pixels_of(data) for pixel in row} == {(255, 0, 0)}


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_rotation_is_applied(format: str) -> None:
    # The scene, upright: red above blue, 16 wide and 32 high. Stored as each orientation stores it.
    upright = Image.new("RGB", (16, 32), "red")
    upright.paste((0, 0, 255), (0, 16, 16, 32))
    # And white in the top left corner, to tell mirrors apart.
    upright.paste((255, 255, 255), (0, 0, 8, 16))
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.rotate(180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.rotate(90, expand=True),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.rotate(-90, expand=True),
    }
    options = (
        {"lossless": True} if format == "WEBP" else {"quality": 95} if format == "JPEG" else {}
    )
    for orientation, image in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encode(image, format, exif=exif, **options)
        opened = open_image(data)
        assert opened.size == upright.size == image_size(data)
        corners = np.array([opened.getpixel(at) for at in ((2, 2), (13, 2), (2, 29))])
        assert np.abs(corners - [(255, 255, 255), (255, 0, 0), (0, 0, 255)]).max() <= 3, orientation


def test_damaged_exif_does_not_lose_the_image() -> None:
    data = encode(random_image(16, 8), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage")
    assert open_image(data).size == image_size(data) == (16, 8)


def test_a_size_is_read_without_the_pixels(tmp_path: Path) -> None:
    for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"):
        data = encode(random_image(160, 80), format)
        assert image_size(data) == (160, 80)
        if format not in ("TIFF", "WEBP"):  # in which pillow needs the end, too
            assert image_size(data[: len(data) * 2 // 3]) == (160, 80)
            with pytest.raises(NanoVLMError):
                open_image(data[: len(data) * 2 // 3])
    broken = tmp_path / "broken.png"
    broken.write_bytes(data[:2])
    with pytest.raises(NanoVLMError, match="broken.png"):
        image_size(broken)
    with pytest.raises(NanoVLMError, match="no such file"):
        image_size(tmp_path / "missing.png")
    with pytest.raises(NanoVLMError, match="limit"):
        image_size(png(9000, 9000, b""))


def test_the_size_of_a_png_whose_exif_comes_last(monkeypatch) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(random_image(16, 8), "PNG", exif=exif)
    at = data.index(b"eXIf") - 4
    chunk = data[at : at + 12 + struct.unpack(">I", data[at : at + 4])[0]]
    late = data.replace(chunk, b"").replace(b"\0\0\0\0IEND", chunk + b"\0\0\0\0IEND")
    assert late.index(b"IDAT") < late.index(b"eXIf")
    assert open_image(late).size == image_size(late) == image_size(data) == (8, 16)
    monkeypatch.setattr(
        ImageFile.ImageFile, "load", lambda self: pytest.fail("the image is decoded")
    )
    assert image_size(data) == (8, 16) and image_size(encode(random_image(16, 8), "PNG")) == (16, 8)


def test_extreme_shapes() -> None:
    assert preprocess(
        open_image(encode(Image.new("RGB", (1, 1), "red"), "PNG")), ImageConfig()
    ).shape == (3, 224, 224)
    for size in ((1, 5000), (5000, 1)):
        image = open_image(encode(random_image(*size), "PNG"))
        assert preprocess(image, ImageConfig()).shape == (3, 224, 224)
        assert preprocess(image, parse_image_config(DINOV2)).shape == (3, 224, 224)


# Bad


def assert_refused(source, *words: str) -> None:
    with pytest.raises(NanoVLMError) as caught:
        open_image(source)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_what_is_no_file(tmp_path: Path) -> None:
    assert_refused(tmp_path / "none.jpg", "none.jpg", "no such file")
    assert_refused(str(tmp_path), str(tmp_path), "not a file")
    assert_refused("/dev/null", "/dev/null", "not a file")
    assert_refused("a\0b.png", "no such file")
    assert_refused("x" * 5000)


@pytest.mark.parametrize(
    "content, word",
    [
        (b"", "empty"),
        (b"hello, this is text\n" * 20, "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (b"\x89PNG\r\n\x1a\n", "not an image"),
        (b"\xff\xd8\xff", "not an image"),
        (bytes(1000), "not an image"),
    ],
)
def test_what_is_no_image(tmp_path: Path, content: bytes, word: str) -> None:
    path = tmp_path / "image.jpg"
    path.write_bytes(content)
    assert_refused(path, "image.jpg", word)
    assert_refused(content, "image in memory", word)
    with path.open("rb") as stream:
        assert_refused(stream, "image.jpg", word)


ENCODED = {
    "jpeg": encode(random_image(24, 18), "JPEG"),
    "progressive": encode(random_image(24, 18), "JPEG", progressive=True),
    "png": encode(random_image(24, 18), "PNG"),
    "gif": encode(random_image(24, 18).quantize(32), "GIF"),
    "webp": encode(random_image(24, 18), "WEBP"),
    "lossless": encode(random_image(24, 18), "WEBP", lossless=True),
    "bmp": encode(random_image(24, 18), "BMP"),
    "tiff": encode(random_image(24, 18), "TIFF"),
    "ppm": encode(random_image(24, 18), "PPM"),
}


@pytest.mark.parametrize("name", ENCODED)
def test_a_truncated_file_never_gives_part_of_the_image(name: str) -> None:
    whole = ENCODED[name]
    expected = open_image(whole).tobytes()
    refused = 0
    for length in range(len(whole)):
        try:
            # Only an end marker was lost.
            assert open_image(whole[:length]).tobytes() == expected, length
        except NanoVLMError:
            refused += 1
    # 21: the tail of a PNG, its last checksum and the empty end chunk.
    assert refused >= len(whole) - 21
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_large_headers_are_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", never)
    limit, pillow_limit = f"{image_module.MAX_PIXELS:,}", Image.MAX_IMAGE_PIXELS
    assert_refused(png(30_000, 30_000, zlib.compress(b"")), limit)
    assert_refused(png(8193, 8192, zlib.compress(b"")), limit, "8193 x 8192")
    # Pillow only warns about this one.
    assert_refused(png(10_000, 10_000, zlib.compress(bytes(1251 * 10_000))), limit)
    assert_refused(png(2**31 - 1, 2**31 - 1, b""), limit)
    assert_refused(b"P6 40000 40000 255\n", limit)
    assert pillow_limit == Image.MAX_IMAGE_PIXELS


def test_an_image_of_the_largest_size_allowed_opens() -> None:
    row = bytes(1 + 4096 // 8)
    assert open_image(png(4096, 2**14, zlib.compress(row * 2**14))).size == (4096, 2**14)


def test_not_finite_values_are_refused() -> None:
    values = np.array([[0.0, np.nan]], dtype=np.float32)
    assert_refused(encode(Image.fromarray(values), "TIFF"), "NaN")


def test_whatever_pillow_raises_becomes_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (
        SyntaxError("a\nb"),
        struct.error(),
        ValueError(),
        KeyError("x"),
        zlib.error("y"),
        MemoryError(),
    ):

        def fail(*arguments, error=error, **options):
            raise error

        monkeypatch.setattr(Image, "open", fail)
        assert_refused(ENCODED["png"], "cannot read the image: ")


def test_fuzz() -> None:
    generator = random.Random(0)
    opened = refused = 0
    for _ in range(300):
        data = bytearray(
            ENCODED[generator.choice(["jpeg", "progressive", "png", "gif", "webp", "lossless"])]
        )
        for _ in range(generator.randint(1, 8)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        if generator.random() < 0.3:
            del data[generator.randrange(len(data)) :]
        if generator.random() < 0.2:
            at = generator.randrange(len(data) + 1)
            data[at:at] = generator.randbytes(generator.randint(1, 20))
        try:
            image = open_image(bytes(data))
            assert image.mode == "RGB" and len(image.tobytes()) == image.width * image.height * 3
            assert image_size(bytes(data)) == image.size
            opened += 1
        except NanoVLMError as error:
            assert "\n" not in str(error)
            refused += 1
    assert opened > 20 and refused > 100


def test_the_callers_warning_filters_are_left_alone() -> None:
    before = list(warnings.filters)
    open_image(ENCODED["png"])
    assert warnings.filters == before


# Preprocessing, against the reference


SIZES = [(640, 480), (375, 500), (224, 224), (256, 300), (31, 47), (1, 1), (1000, 90)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "resample, number", [("nearest", 0), ("lanczos", 1), ("bilinear", 2), ("bicubic", 3)]
)
def test_same_pixels_as_the_reference(size: tuple[int, int], resample: str, number: int) -> None:
    image = random_image(*size)
    crop = BitImageProcessorPil(**DINOV2 | {"resample": number})
    squash = ViTImageProcessorPil(size={"height": 126, "width": 98}, resample=number)
    for processor in (crop, squash):
        config = parse_image_config(json.loads(json.dumps(processor.to_dict())))
        assert config.resample == resample and config.fit == (
            "crop" if processor is crop else "squash"
        )
        expected = processor(image, return_tensors="pt")["pixel_values"][0]
        actual = preprocess(image, config)
        assert (
            actual.dtype == torch.float32
            and actual.is_contiguous()
            and actual.shape == expected.shape
        )
        difference = (actual - expected).abs() * torch.tensor(config.std).view(3, 1, 1)
        if processor is squash:
            assert difference.max() < 1e-6
        elif resample != "nearest":
            # A rounding here and there.
            assert difference.max() < 1.01 / 255 and difference.mean() < 1e-4
        else:
            # At most one row and one column lies between two pixels.
            different = (difference > 1e-6).any(dim=0)
            assert different.any(dim=0).sum() <= 1 or different.any(dim=1).sum() <= 1


@pytest.mark.parametrize("size", [*SIZES, (3, 700)])
@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"size": {"shortest_edge": 98}, "crop_size": {"height": 98, "width": 98}},
        {"size": 98, "crop_size": 84},
    ],
)
def test_same_pixels_as_clips_processor(size: tuple[int, int], noise: bool, settings: dict) -> None:
    image = noisy(*size) if noise else random_image(*size)
    processor = CLIPImageProcessorPil(**settings)
    config = parse_image_config(json.loads(json.dumps(processor.to_dict())))
    assert config == parse_image_config(
        {"image_processor_type": "CLIPImageProcessorFast", **settings}
    )
    expected = processor(image, return_tensors="pt")["pixel_values"]
    difference = (image_pixels(image, config) - expected).abs() * torch.tensor(config.std).view(
        3, 1, 1
    )
    assert difference.max() < 1.01 / 255 and difference.mean() < 1e-5


@pytest.mark.parametrize("size", [*SIZES, (3, 700)])
@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"size": {"height": 98, "width": 98}, "do_convert_rgb": None},
        {"size": {"height": 96, "width": 96}, "resample": 2},
    ],
)
def test_same_pixels_as_siglips_processor(
    size: tuple[int, int], noise: bool, settings: dict
) -> None:
    image = noisy(*size) if noise else random_image(*size)
    processor = SiglipImageProcessorPil(**settings)
    config = parse_image_config(json.loads(json.dumps(processor.to_dict())))
    assert config == parse_image_config(
        {"image_processor_type": "SiglipImageProcessor", **settings}
    )
    expected = processor(image, return_tensors="pt")["pixel_values"]
    assert (image_pixels(image, config) - expected).abs().max() < 1e-6


def noisy(width: int, height: int) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


@pytest.mark.parametrize(
    "size",
    [
        (640, 480),
        (480, 640),
        (300, 300),
        (1, 1),
        (2048, 1024),
        (31, 47),
        (1000, 90),
        (3, 700),
        (1, 3000),
        (5000, 1),
        (257, 256),
        (256, 257),
        (129, 512),
    ],
)
@pytest.mark.parametrize("tile, most, resample", [(32, 4, 1), (64, 2, 3), (98, 3, 2), (84, 4, 1)])
def test_same_tiles_as_the_reference(
    size: tuple[int, int], tile: int, most: int, resample: int
) -> None:
    image = noisy(*size) if tile == 32 else random_image(*size)
    settings = {
        "size": {"longest_edge": tile * most},
        "max_image_size": {"longest_edge": tile},
        "resample": resample,
    }
    processor = (SmolVLMImageProcessorPil if most == 4 else Idefics3ImageProcessorPil)(**settings)
    config = parse_image_config(json.loads(json.dumps(processor.to_dict())))
    expected = processor(image, return_row_col_info=True, return_tensors="pt")
    rows, columns = tile_grid(*size, config)
    assert (rows, columns) == (expected["rows"][0][0], expected["cols"][0][0])
    pixels = image_pixels(image, config)
    assert (
        pixels.shape == (rows * columns + 1, 3, tile, tile)
        and len(pixels) <= config.max_tiles_per_image
    )
    assert (pixels - expected["pixel_values"][0]).abs().max() < 1e-6


def test_same_grid_as_the_reference_for_many_shapes() -> None:
    generator = np.random.default_rng(0)
    sizes = [
        *generator.integers(1, 3000, (1000, 2)).tolist(),
        *generator.integers(1, 40, (300, 2)).tolist(),
    ]
    for tile, most in ((512, 4), (364, 4), (384, 5)):
        processor = SmolVLMImageProcessorPil(
            size={"longest_edge": tile * most}, max_image_size={"longest_edge": tile}
        )
        config = parse_image_config(json.loads(json.dumps(processor.to_dict())))
        for width, height in sizes:
            count, rows, columns = processor.get_number_of_image_patches(height, width)
            assert (
                tile_grid(width, height, config) == (rows, columns) and count == rows * columns + 1
            )
    assert tile_grid(100, 100, config) == (5, 5) and config.max_tiles_per_image == 26
    assert tile_grid(640, 480, ImageConfig()) == (0, 0) and ImageConfig().max_tiles_per_image == 1


def test_the_grid_of_a_square_a_wide_and_a_tall_image() -> None:
    config = parse_image_config(SMOLVLM2)
    assert [tile_grid(*size, config) for size in ((64, 64), (2000, 500), (30, 4000))] == [
        (4, 4),
        (1, 4),
        (4, 1),
    ]
    whole = image_pixels(Image.new("RGB", (80, 20), (255, 0, 0)), config)
    assert (
        whole.shape == (5, 3, 512, 512)
        and whole.is_contiguous()
        and whole[:, 0].min() == 1
        and whole[:, 1:].max() == -1
    )


def test_without_tiles_an_image_is_one_tile() -> None:
    image = random_image(40, 30)
    for config in (ImageConfig(28, 28), parse_image_config(DINOV2)):
        assert torch.equal(image_pixels(image, config), preprocess(image, config)[None])


def test_normalisation_by_hand() -> None:
    config = ImageConfig(height=2, width=3, mean=(0.5, 0.0, 1.0), std=(0.5, 1.0, 2.0))
    pixels = preprocess(Image.new("RGB", (3, 2), (255, 51, 0)), config)
    expected = torch.tensor([1.0, 0.2, -0.5]).view(3, 1, 1).expand(3, 2, 3)
    torch.testing.assert_close(pixels, expected)


# Configurations


def test_from_hf_reads_dinov2() -> None:
    expected = ImageConfig(height=224, width=224, fit="crop", shortest_edge=256, resample="bicubic")
    assert parse_image_config(DINOV2) == expected
    older = {"feature_extractor_type": "ViTFeatureExtractor", "size": 384, "image_mean": [0.5] * 3}
    assert parse_image_config(older) == ImageConfig(
        384, 384, resample="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3
    )


def test_from_hf_reads_published_files() -> None:
    half = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    tiles = ImageConfig(512, 512, fit="tiles", max_tiles=4, resample="lanczos", **half)
    assert parse_image_config(SMOLVLM2) == tiles
    assert (
        parse_image_config(SMOLVLM2 | {"image_processor_type": "Idefics3ImageProcessorFast"})
        == tiles
    )
    assert parse_image_config({"image_processor_type": "Idefics3ImageProcessor"}) == replace(
        tiles, height=364, width=364
    )
    siglip = {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "image_processor_type": "SiglipImageProcessor",
        "processor_class": "SiglipProcessor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": 384, "width": 384},
    }
    assert parse_image_config(siglip) == ImageConfig(384, 384, resample="bicubic", **half)
    fast = {
        "crop_size": None,
        "data_format": "channels_first",
        "default_to_square": True,
        "device": None,
        "disable_grouping": None,
        "do_center_crop": None,
        "do_convert_rgb": None,
        "do_pad": None,
        "input_data_format": None,
        "pad_size": None,
        "return_tensors": None,
    }  # what is added where the processor on tensors wrote the file
    assert parse_image_config(siglip | fast) == parse_image_config(siglip)
    assert (
        parse_image_config(SMOLVLM2 | fast | {"image_processor_type": "SmolVLMImageProcessorFast"})
        == tiles
    )
    clip = {
        "crop_size": 336,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "resample": 3,
        "size": 336,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    assert parse_image_config(clip) == ImageConfig(
        336,
        336,
        fit="crop",
        shortest_edge=336,
        mean=tuple(clip["image_mean"]),
        std=tuple(clip["image_std"]),
    )


def test_round_trip_through_json() -> None:
    for config in (
        ImageConfig(),
        parse_image_config(DINOV2),
        parse_image_config(SMOLVLM2),
        ImageConfig(64, 32, resample="nearest"),
    ):
        assert from_dict(ImageConfig, json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize(
    "change, words",
    [
        ({"do_center_corp": True}, ("do_center_corp", "do_center_crop")),
        (
            {"image_processor_type": "LlavaNextImageProcessor"},
            ("LlavaNextImageProcessor", "BitImageProcessor"),
        ),
        (
            {"image_processor_type": "SiglipImageProcessor", "size": 384, "do_center_crop": False},
            ("size",),
        ),
        ({"do_image_splitting": True}, ("do_image_splitting",)),
        ({"image_processor_type": None}, ("image_processor_type",)),
        ({"do_resize": False}, ("do_resize",)),
        ({"do_rescale": False}, ("do_rescale",)),
        ({"do_normalize": False}, ("do_normalize",)),
        ({"do_pad": True}, ("do_pad",)),
        ({"rescale_factor": 1.0}, ("rescale_factor",)),
        ({"resample": 5}, ("resample",)),
        ({"resample": [3]}, ("resample",)),
        ({"do_center_crop": False}, ("do_center_crop",)),
        ({"size": {"shortest_edge": 256, "longest_edge": 512}}, ("longest_edge",)),
        ({"size": {"height": 256, "width": 256}}, ("crop_size",)),
        ({"size": 3.5}, ("size",)),
        ({"crop_size": "224"}, ("crop_size",)),
        ({"size": {"shortest_edge": 100}}, ("shortest_edge",)),
        ({"image_std": [0.2, 0.0, 0.2]}, ("std",)),
        ({"image_mean": [0.2, 0.1]}, ("mean",)),
    ],
)
def test_from_hf_refuses(change: dict, words: tuple[str, ...]) -> None:
    with pytest.raises(NanoVLMError) as caught:
        parse_image_config(DINOV2 | change)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"do_image_splitting": False}, ("do_image_splitting",)),
        ({"size": {"longest_edge": 512}}, ("longest_edge", "max_image_size")),
        ({"size": {"longest_edge": 1000}}, ("longest_edge",)),
        ({"size": {"longest_edge": 8192}}, ("4096",)),
        ({"size": {"height": 512, "width": 512}}, ("height",)),
        ({"max_image_size": 512}, ("max_image_size",)),
        ({"max_image_size": {"longest_edge": 0}}, ("max_image_size",)),
        ({"do_center_crop": True}, ("do_center_crop",)),
        ({"do_resize": False}, ("do_resize",)),
    ],
)
def test_from_hf_refuses_of_tiles(change: dict, words: tuple[str, ...]) -> None:
    with pytest.raises(NanoVLMError) as caught:
        parse_image_config(SMOLVLM2 | change)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"max_tiles": 4},
        {"fit": "tiles"},
        {"fit": "tiles", "max_tiles": 1},
        {"fit": "tiles", "max_tiles": 2.0},
        {"fit": "tiles", "max_tiles": 2, "width": 100},
        {"fit": "tiles", "max_tiles": 2, "shortest_edge": 300},
        {"height": 0},
        {"width": 2.5},
        {"height": True},
        {"fit": "pad"},
        {"fit": "crop"},
        {"shortest_edge": 256},
        {"resample": "box"},
        {"resample": []},
        {"mean": (0.1, 0.2)},
        {"std": (1, 1, -1)},
        {"std": ("a", "b", "c")},
        {"mean": (float("nan"),) * 3},
        {"fit": "crop", "shortest_edge": 100},
    ],
)
def test_bad_settings_are_refused(change: dict) -> None:
    with pytest.raises(NanoVLMError):
        replace(ImageConfig(), **change)
    with pytest.raises(NanoVLMError):
        from_dict(ImageConfig, change)


def test_unknown_key_names_the_nearest() -> None:
    with pytest.raises(NanoVLMError, match="'heigth'.*'height'"):
        from_dict(ImageConfig, {"heigth": 3})
    with pytest.raises(NanoVLMError, match="expected"):
        from_dict(ImageConfig, [1])
    with pytest.raises(NanoVLMError, match="expected"):
        parse_image_config([])
    with pytest.raises(NanoVLMError, match="std_deviation"):
        from_dict(ImageConfig, {"std_deviation": 3})
