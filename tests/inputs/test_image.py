"""Images of every odd and broken kind, and agreement with the reference image processors."""

import io
import json
import os
import random
import struct
import warnings
import zlib
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import PIL
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
from nanovlm.inputs.image import (
    image_pixels,
    image_size,
    open_image,
    preprocess,
    resized_within,
    tile_grid,
)
from nanovlm.inputs.image_config import ImageConfig
from nanovlm.utils.config import from_dict
from tests.hub.test_image_configs import DINOV2, SMOLVLM2

pytestmark = pytest.mark.filterwarnings("error")  # pillow's warnings must not reach a user


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
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", data), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


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
        pytest.param(
            *("YCbCr", (255, 128, 128), "TIFF", (255, 255, 255)),
            marks=pytest.mark.skipif(
                int(PIL.__version__.split(".")[0]) < 13,
                reason="pillow before 13 cannot read the YCbCr of a TIFF, also its own",
            ),
        ),
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
    with pytest.raises(NanoVLMError, match="No such file"):
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


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((64, 48), (320, 240)),
        ((900, 1200), (240, 320)),
        ((4000, 3), (320, 1)),
        ((1, 900), (1, 320)),
    ],
)
def test_an_image_to_look_at_keeps_its_shape_and_a_pixel(size, expected) -> None:
    assert resized_within(random_image(*size), 320).size == expected


# Bad


def assert_refused(source, *words: str) -> None:
    with pytest.raises(NanoVLMError) as caught:
        open_image(source)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_what_is_no_file(tmp_path: Path) -> None:
    assert_refused(tmp_path / "none.jpg", "none.jpg: cannot be read (No such file or directory)")
    assert_refused(str(tmp_path), f"{tmp_path}: is a folder; give a regular file")
    assert_refused("/dev/null", "/dev/null: is a device; give a regular file")
    assert_refused("a\0b.png", "no file can have this name")
    assert_refused("x" * 5000, "cannot be read")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no named pipes of this kind")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    assert_refused(tmp_path / "a.png", "a.png: is a pipe; give a regular file")
    with pytest.raises(NanoVLMError, match="is a pipe"):
        image_size(tmp_path / "a.png")


def test_a_file_of_too_many_bytes(tmp_path: Path) -> None:
    """WebP is read as a whole; a file may claim to be as large as a disk and take no room on it."""
    with (tmp_path / "a.webp").open("wb") as file:
        file.write(ENCODED["webp"])
        file.truncate(2**40)
    assert_refused(tmp_path / "a.webp", "has 1,099,511,627,776 bytes, more than the limit of")


@pytest.mark.parametrize(
    "content, word",
    [
        (b"", "empty"),
        (b"hello, this is text\n" * 20, "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n", "is a PostScript file"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is an SVG drawing: save it as JPEG or PNG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(400), "is an HEIC image: save it as JPEG"),
        (b"\0\0\0\x20ftypavif\0\0\0\0avifmif1" + bytes(400), "is an AVIF image: save it as JPEG"),
        (b"\0\0\0\x20ftypisom\0\0\0\0isomiso2" + bytes(400), "is a video: save its frames"),
        (b"%PDF-1.7\n" + bytes(400), "is a PDF document: save its pages as JPEG or PNG"),
        (b"<!DOCTYPE html><html>404</html>", "is an HTML page: the server sent it in place"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer: "),
        (b"\x89PNG\r\n\x1a\n", "not an image"),
        (b"\xff\xd8\xff", "not an image"),
        (bytes(1000), "is a file of zeros"),
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


def test_the_longest_side_allowed_can_be_resized() -> None:
    for size in ((2**16, 1), (1, 2**16)):
        image = open_image(encode(Image.new("L", size, 255), "PNG"))
        for config in (
            ImageConfig(64, 64),
            parse_image_config(DINOV2),
            parse_image_config(SMOLVLM2),
        ):
            assert image_pixels(image, config).isfinite().all()
    # Within the limit of pixels, but bicubic resizing would take gigabytes.
    long = png(2**26, 1, zlib.compress(bytes(1 + 2**23), 9))
    assert len(long) < 10_000
    assert_refused(long, "67108864 x 1 is beyond the limits")


def repeat_scan(jpeg: bytes, times: int) -> bytes:
    """A progressive JPEG with its last scan so many times."""
    start = jpeg.rindex(b"\xff\xda")
    return jpeg[:-2] + jpeg[start:-2] * times + jpeg[-2:]


def test_a_jpeg_of_many_scans_is_refused_before_decoding(monkeypatch) -> None:
    monkeypatch.setattr(image_module, "MAX_SCANNED", 30 * 24 * 18)
    assert open_image(repeat_scan(ENCODED["progressive"], 20)).size == (24, 18)
    many = repeat_scan(ENCODED["progressive"], 21)
    assert many.count(b"\xff\xda") == 31
    assert_refused(many, "a JPEG of more than 30 scans, too many for its size; save it again")
    # Within other data, such as the thumbnails of a camera, the same bytes are no scans.
    segment = b"\xff\xe1" + struct.pack(">H", 202) + b"\xff\xda" * 100
    assert open_image(many[:2] + segment + ENCODED["progressive"][2:]).size == (24, 18)
    assert open_image(ENCODED["progressive"] + b"\xff\xda" * 100).size == (24, 18)


@pytest.mark.parametrize(
    "kind, start", [(b"zTXt", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0"), (b"iCCP", b"a\0\0")]
)
@pytest.mark.parametrize("late", [False, True], ids=["before the pixels", "after them"])
def test_long_text_in_a_png_is_passed_over(kind: bytes, start: bytes, late: bool) -> None:
    bomb = chunk(kind, start + zlib.compress(bytes(50_000_000), 9))
    at = -12 if late else 33
    data = ENCODED["png"][:at] + bomb + ENCODED["png"][at:]
    assert open_image(data).tobytes() == open_image(ENCODED["png"]).tobytes()
    assert image_size(data) == (24, 18)


def test_much_text_in_a_png_is_passed_over() -> None:
    text = chunk(b"tEXt", b"workflow\0" + b"x" * 2**20) * 65  # pillow takes 64 MiB
    assert open_image(ENCODED["png"][:33] + text + ENCODED["png"][33:]).size == (24, 18)
    cut = ENCODED["png"][:33] + text + ENCODED["png"][33:-30]
    assert_refused(cut)  # the pixels are read as strictly as ever


def test_exif_of_any_form_turns_the_image() -> None:
    for kind, value in ((3, "H"), (4, "I")):
        for order, mark in (("<", b"II*\0"), (">", b"MM\0*")):
            tag = struct.pack(f"{order}HHI{value}", 0x0112, kind, 1, 6).ljust(12, b"\0")
            exif = b"Exif\0\0" + mark + struct.pack(f"{order}IH", 8, 1) + tag + bytes(4)
            assert image_size(encode(random_image(16, 8), "JPEG", exif=exif)) == (8, 16)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    text = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)
    assert open_image(ENCODED["png"][:33] + text + ENCODED["png"][33:]).size == (18, 24)
    lines = f"\nexif\n {len(exif)}\n{exif.hex()}\n".encode()  # as ImageMagick writes it
    text = chunk(b"tEXt", b"Raw profile type exif\0" + lines)
    assert open_image(ENCODED["png"][:33] + text + ENCODED["png"][33:]).size == (18, 24)


def test_tags_that_all_claim_the_whole_file_are_not_read() -> None:
    """65,534 tags of 3 MB each: 200 GB."""
    tags = b"".join(
        struct.pack(">HHII", tag, 7, 3_000_000, 0) for tag in range(1, 65536) if tag != 0x0112
    )
    exif = b"MM\0*" + struct.pack(">IH", 8, 65534) + tags + bytes(3_000_000)
    data = ENCODED["png"][:33] + chunk(b"eXIf", exif) + ENCODED["png"][33:]
    assert open_image(data).size == image_size(data) == (24, 18)


def test_no_file_is_read_over_and_over() -> None:
    metered = image_module._Metered(io.BytesIO(bytes(1000)), 2500)
    for _ in range(2):
        metered.seek(0)
        assert len(metered.read()) == 1000
    metered.seek(0)
    with pytest.raises(NanoVLMError, match="its parts lie over each other"):
        metered.read()


@pytest.mark.parametrize(
    "data",
    [b"P5 #" + b"a" * 2**23, b"\xff\xd8" + b"\xff" * 2**23, b"P5 " + b" " * 2**23],
    ids=["a comment", "padding", "spaces"],
)
def test_a_header_that_goes_on_and_on_is_given_up(data: bytes) -> None:
    assert_refused(data, "is all header")


def test_what_pillow_decodes_in_python_is_small() -> None:
    assert open_image(b"P2 64 64 255\n" + b"9 " * 64 * 64).size == (64, 64)
    assert open_image(b"P5 640 480 100\n" + bytes(640 * 480)).size == (640, 480)
    for start in (b"P2 2048 2048 255\n", b"P5 2048 2048 100\n", b"P6 2048 2048 100\n"):
        assert_refused(start + b"9 " * 2048 * 2048 * 3, "save it as PNG")
    assert open_image(b"P5 2048 2048 255\n" + bytes(2**22)).size == (2048, 2048)


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


def test_round_trip_through_json() -> None:
    for config in (
        ImageConfig(),
        parse_image_config(DINOV2),
        parse_image_config(SMOLVLM2),
        ImageConfig(64, 32, resample="nearest"),
    ):
        assert from_dict(ImageConfig, json.loads(json.dumps(asdict(config)))) == config


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
    with pytest.raises(NanoVLMError, match="std_deviation"):
        from_dict(ImageConfig, {"std_deviation": 3})
