"""The safetensors file format, read and written by hand.

    8 bytes      N, the length of the header, unsigned, little-endian
    N bytes      the header, a JSON object, padded with spaces:
                 {"__metadata__": {"key": "value"},
                  "name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, …}
    the rest     the tensors' bytes, row-major, little-endian; offsets count from here

The tensors lie side by side and fill the rest exactly, so every byte of the file is accounted for.
Format description: https://github.com/huggingface/safetensors#format

Lesson: lessons/source/12_weights.py.
"""

import json
import math
import mmap
from collections.abc import Callable, KeysView, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nanovlm.errors import NanoVLMError, quoted
from nanovlm.utils.files import atomic_path, open_regular
from nanovlm.utils.sniff import FIRST_BYTES, what_is

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

LENGTH_BYTES = 8
# The reference reader's limit, so that a damaged length does not make a reader take gigabytes.
MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 64  # what torch supports in most operations
ALIGNMENT = 64  # a cache line: decoding from mapped weights that straddle two is about 15 % slower
MIN_ZEROS = 512  # bytes; fewer at the end of a file may be chance
MAX_BYTES = 2**63 - 1  # torch counts elements and bytes in signed 64-bit integers


class TensorEntry(NamedTuple):
    """One tensor of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # in bytes from the end of the header, as `end`
    end: int


@dataclass(frozen=True)
class Deferred:
    """A tensor for `save_file` that exists only while it is written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]  # of that shape, on any device; cast to `dtype`

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """A safetensors file, checked completely when it is opened, and memory-mapped.

    Its tensors take no memory until they are read. The mapping is private (copy-on-write): a tensor
    may be written to, and the file never changes. Replacing the file by a rename, as `save_file`
    does, keeps the mapped one until its last tensor is gone. Truncating a mapped file in place is
    the one thing that no mapping survives: the next read past its new end kills the process.

    Raises NanoVLMError for anything the format does not allow.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with open_regular(self.path) as file:
            first_bytes = file.read(FIRST_BYTES)
            if len(first_bytes) < LENGTH_BYTES:
                raise self._error(f"has {len(first_bytes)} bytes, too few for a safetensors file")
            what = what_is(first_bytes)
            if what is not None and what != "a safetensors file":
                raise NanoVLMError(f"{self.path}: is not a safetensors file but {what}")
            try:
                self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except OSError as error:
                raise NanoVLMError(f"{self.path}: cannot be read ({error.strerror})") from None
        header_bytes = int.from_bytes(self._mapping[:LENGTH_BYTES], "little")
        self._data_start = LENGTH_BYTES + header_bytes
        claim = f"claims a header of {header_bytes} bytes"
        if header_bytes > MAX_HEADER_BYTES:
            raise self._error(f"{claim}, the limit is {MAX_HEADER_BYTES}")
        if self._data_start > len(self._mapping):
            raise self._error(f"{claim}, but the file has only {len(self._mapping)}")

        header = self._parse(self._mapping[LENGTH_BYTES : self._data_start])
        self.metadata: dict[str, str] = self._check_metadata(header.pop("__metadata__", {}))
        self._entries = {name: self._check_entry(name, value) for name, value in header.items()}
        self._check_layout()

    def keys(self) -> KeysView[str]:
        """The tensors' names, in the order of the header."""
        return self._entries.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor `name`."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which the tensor `name` is stored."""
        return self._entry(name).dtype

    def tensor(self, name: str) -> Tensor:
        """The tensor `name`, on the CPU, as a view of the mapping: nothing is read or copied here.

        Two calls give views of the same memory. A tensor at an offset that its dtype cannot be
        addressed at (legal, but rare) is a copy.
        """
        dtype, shape, begin, end = self._entry(name)
        if begin == end:
            return torch.empty(shape, dtype=dtype)
        offset = self._data_start + begin
        data = torch.frombuffer(self._mapping, dtype=torch.uint8, count=end - begin, offset=offset)
        if offset % dtype.itemsize:
            data = data.clone()
        return data.view(dtype).view(shape)

    def forget(self, name: str) -> None:
        """Free the memory that reading `name` took, once it has been copied.

        The next read takes it from the file again; what was written to a view of it is lost.
        """
        _, _, begin, end = self._entry(name)
        # Whole pages alone: a neighbour shares the first and the last one.
        page = mmap.PAGESIZE
        first = -(-(self._data_start + begin) // page) * page
        length = (self._data_start + end) // page * page - first
        if length > 0 and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            self._mapping.madvise(mmap.MADV_DONTNEED, first, length)

    def check_end(self) -> None:
        """Refuse a file that ends in zeros where no model has them, as in the middle of a row.

        A program that reserves the space of a download first leaves such a file if it is stopped.
        Biases may be zero, rows of words that do not exist, and B of an adapter without a step.
        """
        zeros = self._zeros_at_end()
        first_zero = len(self._mapping) - self._data_start - zeros
        for name, (dtype, shape, begin, end) in self._entries.items():
            found = (end - max(first_zero, begin)) // dtype.itemsize  # zeros at the tensor's end
            row = math.prod(shape[1:] if len(shape) > 1 else shape)
            is_matrix = sum(size > 1 for size in shape) > 1 and not name.endswith(".lora_B")
            whole = begin >= first_zero and is_matrix
            if found > 0 and zeros >= MIN_ZEROS and (whole or found % row):
                raise NanoVLMError(
                    f"{self.path}: ends in {zeros:,} bytes of zeros, from tensor {quoted(name)} "
                    "on, as an interrupted download leaves them; download it again"
                )

    def _zeros_at_end(self) -> int:
        end = len(self._mapping)
        while end > self._data_start:
            begin = max(self._data_start, end - 2**16)
            if kept := len(self._mapping[begin:end].rstrip(b"\0")):
                return len(self._mapping) - begin - kept
            end = begin
        return len(self._mapping) - self._data_start

    def _entry(self, name: str) -> TensorEntry:
        try:
            return self._entries[name]
        except KeyError:
            raise NanoVLMError(f"{self.path}: holds no tensor {quoted(name)}") from None

    def _error(self, problem: str) -> NanoVLMError:
        return NanoVLMError(
            f"{self.path}: {problem}; it is damaged or not a safetensors file, "
            "fetch or write it again"
        )

    def _parse(self, header: bytes) -> dict:
        if not header.startswith(b"{"):
            raise self._error("the header is not a JSON object")
        try:
            return json.loads(header.decode("utf-8"), object_pairs_hook=_object_without_duplicates)
        except (ValueError, RecursionError) as error:
            raise self._error(f"the header is not valid JSON ({error})") from None

    def _check_metadata(self, metadata: object) -> dict[str, str]:
        if isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values()):
            return metadata
        raise self._error("__metadata__ is not an object of strings")

    def _check_entry(self, name: str, value: object) -> TensorEntry:
        if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
            raise self._error(
                f"tensor {quoted(name)} is not described by dtype, shape and data_offsets"
            )
        dtype_name, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
            raise NanoVLMError(
                f"{self.path}: tensor {quoted(name)} has dtype {quoted(dtype_name)}; "
                f"known are {', '.join(DTYPES)}"
            )
        if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
            raise self._error(f"tensor {quoted(name)} has the impossible shape {quoted(shape)}")
        if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise self._error(
                f"tensor {quoted(name)} has the impossible data_offsets {quoted(offsets)}"
            )

        dtype, (begin, end) = DTYPES[dtype_name], offsets
        # Without the zeros, so that [0, 2**62, 2**62] is refused too: torch has no strides for it.
        if math.prod(size for size in shape if size) * dtype.itemsize > MAX_BYTES:
            raise self._error(f"tensor {quoted(name)} has the impossible shape {quoted(shape)}")
        if (needed := math.prod(shape) * dtype.itemsize) != end - begin:
            raise self._error(
                f"tensor {quoted(name)} of shape {shape} and dtype {dtype_name} needs {needed} "
                f"bytes, its data_offsets span {end - begin}"
            )
        return TensorEntry(dtype, tuple(shape), begin, end)

    def _check_layout(self) -> None:
        """Every tensor begins where the one before it ends, and the last one ends with the file."""
        available = len(self._mapping) - self._data_start
        position = 0
        for name, entry in sorted(self._entries.items(), key=lambda item: item[1][2:]):
            _, _, begin, end = entry
            if end > available:
                raise self._error(
                    f"tensor {quoted(name)} ends at byte {end}, "
                    f"but the data is cut off at {available}"
                )
            where = f"tensor {quoted(name)} at data_offsets [{begin}, {end}]"
            if begin < position:
                raise self._error(f"{where} overlaps the tensor before it")
            if begin > position:
                raise self._error(f"{where} leaves a hole before it")
            position = end
        if position != available:
            raise self._error(
                f"the tensors end at byte {position} of the data, which has {available}"
            )


def save_file(
    tensors: Mapping[str, Tensor | Deferred],
    path: str | Path,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write `tensors` (any device, any strides) and `metadata` to `path` in one atomic step.

    Tensors are written one at a time. Memory beyond the tensors themselves is one tensor's copy,
    and only if it is not contiguous on the CPU, or deferred. Tensors that share memory are each
    written in full.

    Raises NanoVLMError for what the format cannot hold and for a failing disk; an old file at
    `path` is then untouched.
    """
    path = Path(path)
    if metadata and not all(isinstance(text, str) for pair in metadata.items() for text in pair):
        raise NanoVLMError(f"{path}: safetensors metadata must map strings to strings")
    for name, tensor in tensors.items():
        _check_can_save(name, tensor, path)

    # The format allows no gaps, so the order decides the alignment: first the tensors that fill
    # whole units, then those with the widest elements.
    def order(name: str) -> tuple[bool, int, str]:
        tensor = tensors[name]
        return tensor.nbytes % ALIGNMENT != 0, -tensor.dtype.itemsize, name

    ordered = {name: tensors[name] for name in sorted(tensors, key=order)}
    header = _encode_header(ordered, metadata)
    if len(header) > MAX_HEADER_BYTES:
        raise NanoVLMError(
            f"{path}: the header would have {len(header)} bytes, the limit is {MAX_HEADER_BYTES}"
        )
    try:
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            file.write(len(header).to_bytes(LENGTH_BYTES, "little"))
            file.write(header)
            for tensor in ordered.values():
                file.write(_bytes_of(tensor))
    except OSError as error:
        reason = f"{path}: cannot be written ({error.strerror})"
        raise NanoVLMError(f"{reason}; check the folder and the free space") from error


def _check_can_save(name: str, tensor: Tensor | Deferred, path: Path) -> None:
    if isinstance(tensor, Deferred):
        dense, kind = True, "deferred"
    else:
        dense = tensor.layout == torch.strided and not tensor.is_meta
        kind = f"{tensor.layout}, {tensor.device}"
    if name == "__metadata__" or tensor.dtype not in DTYPE_NAMES or not dense:
        raise NanoVLMError(
            f"{path}: cannot save tensor {name!r} ({tensor.dtype}, {kind}); it needs data, a dense "
            "layout, a dtype of the format and another name than __metadata__"
        )


def _encode_header(
    tensors: Mapping[str, Tensor | Deferred], metadata: dict[str, str] | None
) -> bytes:
    """The header of `tensors` in this order, padded so that the data begins at a whole unit."""
    header: dict[str, dict] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    return encoded + b" " * (-(LENGTH_BYTES + len(encoded)) % ALIGNMENT)


def _bytes_of(tensor: Tensor | Deferred) -> memoryview:
    data = tensor.make().to(tensor.dtype) if isinstance(tensor, Deferred) else tensor
    flat = data.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _object_without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = {}
    for key, item in pairs:
        if key in value:
            raise ValueError(f"key {quoted(key)} appears twice")
        value[key] = item
    return value


def _are_sizes(value: object) -> bool:
    """Whether `value` is a list of non-negative 64-bit integers, without JSON's true and 1.0."""
    if not isinstance(value, list):
        return False
    return all(type(size) is int and 0 <= size <= MAX_BYTES for size in value)
