"""A file is named by its first bytes, and what to do stands beside the name."""

import gzip
import io
import json
import pickle
import tarfile
import zipfile

import pytest
from PIL import Image

from nanovlm.utils.sniff import what_is

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 988097824\n"


def zipped(name: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr(name, b"x")
    return stream.getvalue()


def tarred() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as file:
        file.addfile(tarfile.TarInfo("a"), io.BytesIO())
    return stream.getvalue()


def image(format: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, format)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (LFS, "a Git LFS pointer: `git lfs pull` fetches the file itself"),
        (b"\xef\xbb\xbf" + LFS, "a Git LFS pointer"),
        (b"../../blobs/" + b"0a" * 20, "a link of the hub's cache, copied without its file: copy"),
        (b"", "an empty file"),
        (bytes(100), "a file of zeros"),
        (b"<!DOCTYPE html>\n<html><head>", "an HTML page"),
        (b"\n\n  <HTML lang='en'>", "an HTML page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "an XML document"),
        (b'<?xml version="1.0"?>\n<!-- a -->\n<svg xmlns="...">', "an SVG drawing"),
        (gzip.compress(b"{}"), "a gzip file: unpack it first"),
        (zipped("archive/data.pkl"), "a PyTorch file"),
        (zipped("a.txt"), "a zip archive"),
        (tarred(), "a tar archive"),
        (
            b"PAR1\x15\x04\x15\x10\xff\xfe",
            "a parquet table: `python -m data_tools.convert` makes records",
        ),
        (b"\xff\xff\xff\xff\x10\x00\x00\x00", "an Arrow table"),
        (b"GGUF\x03\x00\x00\x00", "a GGUF file"),
        (pickle.dumps({}), "a Python pickle"),
        ((300).to_bytes(8, "little") + b'{"a":', "a safetensors file"),
        (b"\x00\x00\x00\x1cftypavif\x00\x00\x00\x00", "an AVIF image: save it as JPEG or PNG"),
        (b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00", "an HEIC image: save it as JPEG or PNG"),
        (b"\x00\x00\x00\x18ftypmp42\x00\x00\x00\x00", "a video"),
        (image("JPEG"), "a JPEG image"),
        (image("PNG"), "a PNG image"),
        (image("WEBP"), "a WebP image"),
        (image("GIF"), "a GIF image"),
        (image("BMP"), "a BMP image"),
        (image("TIFF"), "a TIFF image"),
        (b'{"image": "a.png"}\n', "JSON"),
        (b'[\n  {"image": "a.png"}]\n', "JSON"),
        (json.dumps({"问": "图"}, ensure_ascii=False).encode("gbk"), "text, probably in GBK"),
        ("图片".encode("utf-16"), "text, in UTF-16"),
        (b"batch_size: 4\nout: runs/a\n", "YAML"),
        (b"# comment\nbatch_size = 4\n", "TOML"),
        (b"[stage1]\nbatch_size = 4\n", "TOML"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_kind_is_named(data: bytes, expected: str):
    found = what_is(data)
    assert found is not None and found.startswith(expected)
    assert what_is(data[:1024]) == found, "the first 1024 bytes are enough"


@pytest.mark.parametrize(
    "data", ["一句中文".encode(), "一句中文".encode()[:-1], b"two words\n", b"\x01\x02\x03\x04\xfe"]
)
def test_plain_text_and_unknown_bytes_are_not_named(data: bytes):
    assert what_is(data) is None
