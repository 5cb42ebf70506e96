"""Images in base64, in place of a path: the same pixels, and what is refused."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nanovlm.errors import NanoVLMError
from nanovlm.inputs.data_uri import is_data_uri, read, to_path
from nanovlm.inputs.image import image_size, open_image


@pytest.fixture(scope="module")
def png() -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("before", ["data:image/png;base64,", "data:;base64,", ""])
def test_an_image_in_base64_has_the_pixels_of_its_file(png, before, tmp_path):
    text = base64.b64encode(png).decode()
    assert "/" in text and "+" in text  # which a path would not keep as they are
    path = to_path(before + text)
    assert is_data_uri(before + text) and is_data_uri(path) and path == Path(str(path))
    (tmp_path / "a.png").write_bytes(png)
    assert read(path) == png and image_size(path) == (30, 40)
    assert open_image(path).tobytes() == open_image(tmp_path / "a.png").tobytes()
    assert to_path(str(path)) == path  # what a tool writes of it can be read again


def test_other_names_are_paths():
    for name in ("a.png", "/9j/a.jpg", "R0lGOD", "datasets/a.png", Path("a") / "data:"):
        assert not is_data_uri(name)


@pytest.mark.parametrize(
    "uri, reason",
    [
        ("data:image/svg+xml;utf8,<svg/>", "not in base64"),
        ("data:image/png;base64,iVBORw0KGgo", "damaged or cut off"),
        ("data:image/png;base64,iVB*Rw0KGgo=", "damaged or cut off"),
        ("data:image/png;base64,鸡蛋", "damaged or cut off"),
    ],
)
def test_what_is_no_base64_is_refused(uri, reason):
    with pytest.raises(NanoVLMError, match=reason):
        to_path(uri)


def test_base64_of_something_else_is_no_image():
    path = to_path("data:image/png;base64," + base64.b64encode(b"<html>" * 99).decode())
    with pytest.raises(NanoVLMError) as caught:
        open_image(path)
    assert len(str(caught.value)) < 300
