"""What a file is, by its first bytes: for messages that name what was given in place of the file.

Formats are recognised by their signatures, and text by its first words. Nothing is decoded.
"""

import codecs
import re
from pathlib import Path

from nanovlm.errors import NanoVLMError

FIRST_BYTES = 1024  # enough for every signature below

_UNPACK = "unpack it first"
_SAVE_IMAGE = "save it as JPEG or PNG"
_TO_RECORDS = "convert it to .jsonl, one JSON object a line"
_OTHER_WEIGHTS = "this format is not read; take the folder with model.safetensors"
_PICKLE = "it can run code and is not opened; take model.safetensors"
_FETCH_AGAIN = "fetch the file again"

# What a file begins with, what it is, and what to do where the format is never read. The first line
# that fits counts.
_BINARY = (
    # First, because its first bytes are a number, which may look like any of the others.
    (rb".{3}[\0-\x05]\0{4}\{", "a safetensors file", ""),
    # Compressed files and archives.
    (rb"\x1f\x8b", "a gzip file", _UNPACK),
    (rb"BZh[1-9]", "a bzip2 file", _UNPACK),
    (rb"\xfd7zXZ\0", "an xz file", _UNPACK),
    (rb"\x28\xb5\x2f\xfd", "a zstd file", _UNPACK),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (rb"Rar!", "a RAR archive", _UNPACK),
    (rb"PK\x03\x04.{26}[^/]{1,200}/(data\.pkl|version|byteorder)", "a PyTorch file (.bin, .pt)",
     _PICKLE),
    (rb"PK\x03\x04", "a zip archive", _UNPACK),
    (rb".{257}ustar", "a tar archive", ""),
    # Tables.
    (rb"PAR1", "a parquet table", "`python -m data_tools.convert` makes records of it"),
    (rb"ARROW1|\xff{4}..\0\0", "an Arrow table", _TO_RECORDS),
    (rb"SQLite format 3\0", "an SQLite database", _TO_RECORDS),
    # Weights.
    (rb"GGUF", "a GGUF file (llama.cpp)", _OTHER_WEIGHTS),
    (rb"lmgg|tjgg|fmgg", "a GGML file (llama.cpp)", _OTHER_WEIGHTS),
    (rb"\x89HDF", "an HDF5 file (Keras)", _OTHER_WEIGHTS),
    (rb"\x93NUMPY", "a NumPy array", _OTHER_WEIGHTS),
    (rb"\x80[\x02-\x05]", "a Python pickle (.bin, .pt)", _PICKLE),
    (rb"\x0a[^\n]\x0a.<unk>", "a SentencePiece model", ""),
    # Images, sound and video.
    (rb"\xff\xd8\xff", "a JPEG image", ""),
    (rb"\x89PNG\r\n\x1a\n", "a PNG image", ""),
    (rb"RIFF.{4}WEBP", "a WebP image", ""),
    (rb"GIF8[79]a", "a GIF image", ""),
    (rb"BM.{4}\0{4}", "a BMP image", ""),
    (rb"II[*+]\0|MM\0[*+]", "a TIFF image", ""),
    (rb".{4}ftypavi[fs]", "an AVIF image", _SAVE_IMAGE),
    (rb".{4}ftyp(hei[cxms]|hev[cxms]|mif1|msf1)", "an HEIC image", _SAVE_IMAGE),
    (rb"\xff\x0a|\0{3}\x0cJXL ", "a JPEG XL image", _SAVE_IMAGE),
    (rb"\0{3}\x0cjP  |\xff\x4f\xff\x51", "a JPEG 2000 image", _SAVE_IMAGE),
    (rb"8BPS", "a Photoshop image", _SAVE_IMAGE),
    (rb"\0\0\x01\0[^\0]", "an icon", _SAVE_IMAGE),
    (rb"%!PS", "a PostScript file", _SAVE_IMAGE),
    (rb"%PDF", "a PDF document", "save its pages as JPEG or PNG"),
    (rb".{4}ftyp|\x1aE\xdf\xa3|RIFF.{4}AVI ", "a video", "save its frames as JPEG or PNG"),
    (rb"RIFF.{4}WAVE|ID3|fLaC|OggS", "a sound file", "sound is not read"),
    (rb"\0+\Z", "a file of zeros, as an interrupted download leaves it", _FETCH_AGAIN),
    (rb"\xff\xfe|\xfe\xff", "text, in UTF-16", "save it as UTF-8"),
)  # fmt: skip
# Of text, after white space and a byte order mark.
_TEXT = (
    (rb"version https?://(git-lfs|hawser)\.", "a Git LFS pointer",
     "`git lfs pull` fetches the file itself"),
    (rb"/annex/objects/", "a git-annex pointer", "`git annex get` fetches the file itself"),
    (rb"\.\./\.\./blobs/[0-9a-f]{40}", "a link of the hub's cache, copied without its file",
     "copy the folder with `cp -L`, or download it again"),
    # Pages that a server sends in place of a file, and drawings.
    (rb"(?i:<!doctype html|(<[?!][^>]*>\s*)*<(html|head|body|script)\b)", "an HTML page",
     "the server sent it in place of the file; download the file again"),
    (rb"(?i:(<[?!][^>]*>\s*)*<svg\b)", "an SVG drawing", _SAVE_IMAGE),
    (rb"<\?xml\b|<Error>", "an XML document", _FETCH_AGAIN),
)  # fmt: skip
_LANGUAGES = (
    (rb'\{\s*["}]|\[\s*[\[\]{"\d-]', "JSON", ""),
    (rb"%YAML|---\s|(#[^\n]*\n\s*)*([\w-]+:( [^\n]*)?\n\s*){2}", "YAML", ""),
    (rb"(#[^\n]*\n\s*)*(\[\[?[\w.-]+\]\]?\s*\n|[\w.-]+ *= *\S)", "TOML", ""),
)


def what_is(first_bytes: bytes) -> str | None:
    """What a file is that begins with `first_bytes`, of which FIRST_BYTES are enough.

    A noun phrase, followed by what to do where the format is never read: "a Git LFS pointer: `git
    lfs pull` fetches the file itself". None for what is not recognised, such as plain text.
    """
    first_bytes = first_bytes[:FIRST_BYTES]
    if not first_bytes:
        return f"an empty file: {_FETCH_AGAIN}"
    text = first_bytes.removeprefix(codecs.BOM_UTF8).lstrip()
    return (
        _match(_BINARY, first_bytes)
        or _match(_TEXT, text)
        or _other_encoding(first_bytes)
        or _match(_LANGUAGES, text)
    )


def refuse_stand_in(path: str | Path, text: str) -> str:
    """`text`, read from `path`, unless it only stands in for the file: a pointer or a page."""
    if what := _match(_TEXT, text[:FIRST_BYTES].lstrip().encode(errors="replace")):
        raise NanoVLMError(f"{path}: is {what}")
    return text


def _match(table: tuple[tuple[bytes, str, str], ...], data: bytes) -> str | None:
    """The first line of `table` whose pattern `data` begins with, in words."""
    for pattern, noun, advice in table:
        if re.match(pattern, data, re.DOTALL):
            return f"{noun}: {advice}" if advice else noun
    return None


def _other_encoding(first_bytes: bytes) -> str | None:
    """Whether this is text, but not in UTF-8."""
    if re.search(rb"[\0-\x08\x0e-\x1a\x1c-\x1f]", first_bytes):
        return None
    for encoding in ("utf-8", "gb18030"):
        try:
            codecs.getincrementaldecoder(encoding)().decode(first_bytes)
        except UnicodeDecodeError:
            continue
        return None if encoding == "utf-8" else "text, probably in GBK: save it as UTF-8"
    return None
