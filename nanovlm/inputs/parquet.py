"""The rows of a parquet table, read in small batches; needs pyarrow (the extra `data`)."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nanovlm.errors import NanoVLMError
from nanovlm.utils.console import first_line
from nanovlm.utils.files import open_regular

BATCH = 16  # rows that are held at once


def parquet_rows(path: Path, start: int = 0) -> Iterator[dict[str, Any]]:
    """The rows of a parquet table from number `start` on; groups of rows before it are not read."""
    with _opened(path) as table:
        before = 0
        for group in range(table.num_row_groups):
            count = table.metadata.row_group(group).num_rows
            if before + count > start:
                batches = table.iter_batches(BATCH, row_groups=[group], use_threads=False)
                for batch in batches:
                    for row in batch.to_pylist():
                        if before >= start:
                            yield row
                        before += 1
            else:
                before += count


def count_rows(path: Path) -> int:
    """The number of rows of a parquet table, which its end states."""
    with _opened(path) as table:
        return table.metadata.num_rows


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise NanoVLMError(
            f"{path}: is a parquet table, and pyarrow, which reads it, is not installed; "
            "python -m pip install -r requirements-data.txt"
        ) from None
    with open_regular(path) as file:
        try:
            # Page by page, not whole columns: a group of rows may be larger than the memory.
            with parquet.ParquetFile(file, pre_buffer=False, buffer_size=2**20) as table:
                yield table
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise NanoVLMError(
                f"{path}: is a damaged or cut off parquet table ({first_line(error)}); "
                "fetch it again"
            ) from None
