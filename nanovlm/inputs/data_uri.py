"""Images that stand in a record itself, in base64: `data:image/png;base64,iVBORw0KGgo…`.

Such an image goes where the path of a file goes: as a path in base64url, which has no separators.
"""

import base64
import re
from pathlib import Path

from nanovlm.errors import NanoVLMError

PREFIX = "data:"
# How a JPEG, a PNG, a GIF and a WebP image begin in base64. A file's name is never that long.
_BARE = re.compile(r"(/9j/|iVBORw0KGgo|R0lGOD|UklGR)[\w+/=\s]{200}", re.ASCII)
_FROM_URL = str.maketrans("-_", "+/")


def is_data_uri(name: str | Path) -> bool:
    """Whether `name` is an image in base64, with or without `data:` before it."""
    return str(name).startswith(PREFIX) or (isinstance(name, str) and bool(_BARE.match(name)))


def to_path(uri: str) -> Path:
    """The image as a path, for `read`. Raises NanoVLMError with the bare reason."""
    return from_bytes(decode(uri))


def from_bytes(data: bytes) -> Path:
    """An image file's bytes as a path, for `read`."""
    return Path(f"{PREFIX};base64,{base64.urlsafe_b64encode(data).decode()}")


def decode(uri: str) -> bytes:
    """The image file that stands in `uri`. Raises NanoVLMError with the bare reason."""
    head, _, text = uri.partition(",") if uri.startswith(PREFIX) else (";base64", "", uri)
    if not head.endswith(";base64"):
        raise NanoVLMError("is a data: URI that is not in base64; write it in base64")
    try:
        return base64.b64decode("".join(text.split()).translate(_FROM_URL), validate=True)
    except ValueError:
        raise NanoVLMError("is damaged or cut off in its base64; write it again") from None


def read(path: str | Path) -> bytes:
    """The image file that `to_path` or `from_bytes` made a path of."""
    return base64.urlsafe_b64decode(str(path).partition(",")[2])
