"""Records in a new file, from which the paths of their images lead to the same files."""

import os
import re
from pathlib import Path
from typing import Any

from data_tools.check.reading import parse
from nanovlm.data.forms import IMAGES
from nanovlm.data.records import Record
from nanovlm.errors import NanoVLMError, quoted
from nanovlm.inputs import data_uri


def relocated(entry: dict[str, Any], record: Record, source: Path, target: Path) -> dict[str, Any]:
    """A record as it was written, but for its images, which are named from the folder `target`.

    `source` is the folder from which they were named before. Absolute paths stay as they are, and
    so do images within the record. One whose turns name its images is written as messages.
    Raises NanoVLMError for a path that no record can hold.
    """
    if not record.images or os.path.realpath(source) == os.path.realpath(target):
        return entry
    names = [_name_from(path, source, target) for path in record.images]
    for name in names:
        if re.search("[\ud800-\udfff]", name):
            raise NanoVLMError(
                f"{record.where}: image {quoted(name)} has a path that is no UTF-8 text, which no "
                "record can hold; rename the folder, or write the new file beside the old one"
            )
    expected = tuple(data_uri.to_path(n) if data_uri.is_data_uri(n) else target / n for n in names)
    for key in IMAGES:
        if entry.get(key):
            new = {**entry, key: names[0] if isinstance(entry[key], str) else names}
            try:
                if parse(new, record.where, target).images == expected:
                    return new
            except NanoVLMError:  # its turns name them, too
                pass
    return record.to_entry(names)


def _name_from(path: Path, source: Path, target: Path) -> str:
    was_absolute = path.is_absolute() and not path.is_relative_to(source)
    if was_absolute or data_uri.is_data_uri(path):
        return str(path)
    try:
        return Path(os.path.relpath(path, target)).as_posix()
    except ValueError:  # on another drive of Windows
        return os.path.abspath(path)
