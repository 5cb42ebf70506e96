"""Our safetensors files and the `safetensors` package's, and damaged files."""

import json
import mmap
import random
import resource
import sys
import weakref
from functools import partial
from pathlib import Path

import pytest
import safetensors
import safetensors.torch as reference
import torch
from torch import Tensor

from nanovlm.errors import NanoVLMError
from nanovlm.hub.safetensors import DTYPES, MAX_HEADER_BYTES, Deferred, SafetensorsFile, save_file


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(one: Tensor, other: Tensor) -> bool:
    return (
        one.dtype == other.dtype and one.shape == other.shape and as_bytes(one) == as_bytes(other)
    )


def random_tensor(dtype: torch.dtype, *shape: int) -> Tensor:
    """Random bits, which include NaN and infinity; booleans are 0 or 1."""
    size = torch.Size(shape).numel() * dtype.itemsize
    data = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8)
    return data.view(dtype).view(shape)


def every_kind() -> dict[str, Tensor]:
    tensors = {f"matrix.{name}": random_tensor(dtype, 3, 5) for name, dtype in DTYPES.items()}
    tensors |= {f"empty.{name}": random_tensor(dtype, 2, 0, 3) for name, dtype in DTYPES.items()}
    tensors |= {
        f"scalar.{name}": random_tensor(dtype).reshape(()) for name, dtype in DTYPES.items()
    }
    return tensors | {'名字 "quoted"\n': torch.arange(7)}


def write_raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A file with any header: an object is written as JSON, a string or bytes as they are."""
    if not isinstance(header, str | bytes):
        header = json.dumps(header)
    encoded = header.encode() if isinstance(header, str) else header
    path.write_bytes(
        (len(encoded) if length is None else length).to_bytes(8, "little") + encoded + data
    )
    return path


def entry(shape: object, offsets: object, dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_reads_what_the_package_writes(tmp_path):
    tensors = every_kind()
    reference.save_file(tensors, tmp_path / "a.safetensors", {"format": "pt", "作者": "无"})
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert file.metadata == {"format": "pt", "作者": "无"}
    assert file.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (file.shape(name), file.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
        assert same(file.tensor(name), tensor), name


def test_the_package_reads_what_we_write(tmp_path):
    tensors = every_kind()
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt", "作者": "无"})
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "作者": "无"}
        assert set(file.keys()) == tensors.keys()
        for name, tensor in tensors.items():
            assert same(file.get_tensor(name), tensor), name


def test_writes_any_strides_shared_memory_and_parameters(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "transposed": base.T,
        "sliced": base[1:, ::2],
        "expanded": base[0].expand(3, 6),
        "all": base,
        "again": base,
        "parameter": torch.nn.Parameter(base),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    loaded = reference.load_file(tmp_path / "a.safetensors")
    assert all(same(loaded[name], tensor) for name, tensor in tensors.items())


def test_no_tensors_at_all(tmp_path):
    save_file({}, tmp_path / "ours.safetensors")
    reference.save_file({}, tmp_path / "theirs.safetensors")
    assert reference.load_file(tmp_path / "ours.safetensors") == {}
    assert not SafetensorsFile(tmp_path / "theirs.safetensors").keys()


def test_header_and_tensors_are_aligned(tmp_path):
    path = tmp_path / "a.safetensors"
    for length in range(1, 10):
        tensors = {
            "x" * length: torch.ones(3, dtype=torch.int8),
            "bias": torch.ones(5),
            "gate": torch.ones(2).double(),
            "weight": torch.ones(8, 16),
            "table": torch.ones(32).bfloat16(),
        }
        save_file(tensors, path)
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
        file = SafetensorsFile(path)
        assert all(file.tensor(name).data_ptr() % 64 == 0 for name in ("weight", "table"))
        assert file.tensor("gate").data_ptr() % 8 == 0 and file.tensor("bias").data_ptr() % 4 == 0
        assert reference.load_file(path)["gate"].tolist() == [1, 1]


def test_views_of_one_private_mapping(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(1024), "b": torch.ones(1024)}, path)
    before = path.read_bytes()
    file = SafetensorsFile(path)
    a, b = file.tensor("a"), file.tensor("b")
    assert b.data_ptr() - a.data_ptr() == 4096  # neighbours in the file are neighbours in memory
    assert file.tensor("a").data_ptr() == a.data_ptr()
    a.fill_(7)
    assert file.tensor("a").sum() == 7 * 1024
    assert path.read_bytes() == before
    assert SafetensorsFile(path).tensor("a").sum() == 0


@pytest.mark.skipif(
    sys.platform != "linux", reason="other systems may keep what they are told they may forget"
)
def test_forgetting_a_tensor_lets_go_of_its_pages_alone(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(5000), "b": torch.zeros(50_000), "c": torch.zeros(5000)}, path)
    file = SafetensorsFile(path)
    a, b, c = (file.tensor(name).fill_(7) for name in "abc")
    file.forget("b")
    page = mmap.PAGESIZE // 4
    assert b[page:-page].count_nonzero() == 0, "its pages still hold what was written to them"
    assert a.sum() == c.sum() == 7 * 5000


def test_tensors_outlive_the_reader_and_the_replaced_file(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.full((1000,), 3.0)}, path)
    old = SafetensorsFile(path).tensor("a")
    save_file({"a": torch.zeros(2)}, path)
    assert (old == 3).all()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_opening_reads_only_the_header(tmp_path):
    path = tmp_path / "a.safetensors"
    with open(path, "wb") as file:
        header = json.dumps(
            {"big": entry([2**30], [0, 2**30], "U8"), "small": entry([], [2**30, 2**30 + 4])}
        ).encode()
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2**30 + 4)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    file = SafetensorsFile(path)
    assert file.tensor("big").shape == (2**30,)
    assert file.tensor("small").item() == 0
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
    )  # KiB, of a file of 1 GiB


def test_misaligned_tensors_are_copied(tmp_path):
    values = torch.arange(5, dtype=torch.float64)
    header = {"byte": entry([1], [0, 1], "U8"), "wide": entry([5], [1, 41], "F64")}
    path = write_raw(tmp_path / "a.safetensors", header, b"\7" + as_bytes(values))
    file = SafetensorsFile(path)
    assert same(file.tensor("wide"), values)
    assert file.tensor("wide").data_ptr() % 8 == 0
    assert file.tensor("byte").item() == 7


def test_deferred_tensors_are_made_once_and_one_at_a_time(tmp_path):
    made: list[weakref.ref] = []

    def make(value: int) -> torch.Tensor:
        assert not any(tensor() is not None for tensor in made)
        tensor = torch.full((3, 4), float(value))
        made.append(weakref.ref(tensor))
        return tensor

    path = tmp_path / "a.safetensors"
    save_file(
        {str(value): Deferred((3, 4), torch.bfloat16, partial(make, value)) for value in range(5)},
        path,
    )
    file = SafetensorsFile(path)
    assert len(made) == 5 and all(
        same(file.tensor(str(value)), torch.full((3, 4), value).bfloat16()) for value in range(5)
    )


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(2)}, path)
    before = path.read_bytes()
    unsaveable = [
        torch.ones(2, dtype=torch.complex64),
        torch.ones(2, device="meta"),
        torch.eye(2).to_sparse(),
        torch.eye(2).to_sparse_csr(),
    ]
    for tensor in unsaveable:
        with pytest.raises(NanoVLMError, match="cannot save tensor 'bad'"):
            save_file({"a": torch.zeros(2), "bad": tensor}, path)
    with pytest.raises(NanoVLMError, match="__metadata__"):
        save_file({"__metadata__": torch.zeros(2)}, path)
    with pytest.raises(NanoVLMError, match="strings"):
        save_file({"a": torch.zeros(2)}, path, {"step": 3})
    with pytest.raises(NanoVLMError, match="cannot be written"):
        save_file({"a": torch.zeros(2)}, tmp_path / "absent" / "a.safetensors")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


F4 = b"\0" * 4
MALFORMED = {
    "not JSON": ("{'a': 1}", F4, "not valid JSON"),
    "not UTF-8": (b'{"\xff": 1}', F4, "not valid JSON"),
    "a list": ([entry([1], [0, 4])], F4, "not a JSON object"),
    "a number": ("3", F4, "not a JSON object"),
    "empty header": ("", F4, "a file of zeros"),
    "nested without end": ('{"a":' * 100_000, F4, "not valid JSON"),
    "integer of 5,000 digits": ('{"a":' + "9" * 5000 + "}", F4, "not valid JSON"),
    "duplicate tensor": (
        '{"a":%s,"a":%s}' % ((json.dumps(entry([1], [0, 4])),) * 2),
        F4,
        "'a' appears twice",
    ),
    "duplicate field": (
        '{"a":{"dtype":"F32","dtype":"I32","shape":[1],"data_offsets":[0,4]}}',
        F4,
        "appears twice",
    ),
    "tensor not an object": ({"a": [0, 4]}, F4, "'a' is not described"),
    "missing field": ({"a": {"dtype": "F32", "shape": [1]}}, F4, "'a' is not described"),
    "unknown field": ({"a": entry([1], [0, 4]) | {"scale": 2}}, F4, "'a' is not described"),
    "metadata a list": ({"__metadata__": ["pt"]}, b"", "__metadata__"),
    "metadata null": ({"__metadata__": None}, b"", "__metadata__"),
    "metadata of numbers": (
        {"__metadata__": {"step": 3}, "a": entry([1], [0, 4])},
        F4,
        "__metadata__",
    ),
    "unknown dtype": ({"a": entry([1], [0, 4], "F4_E9")}, F4, "'a' has dtype 'F4_E9'"),
    "dtype a list": ({"a": entry([1], [0, 4], ["F32"])}, F4, "'a' has dtype"),
    "negative dimension": ({"a": entry([-1, -1], [0, 4])}, F4, "impossible shape"),
    "dimension a float": ({"a": entry([1.0], [0, 4])}, F4, "impossible shape"),
    "dimension a boolean": ({"a": entry([True], [0, 4])}, F4, "impossible shape"),
    "shape a number": ({"a": entry(1, [0, 4])}, F4, "impossible shape"),
    "shape of 1,000 dimensions": ({"a": entry([1] * 1000, [0, 4])}, F4, "impossible shape"),
    "shape beyond 64 bits": ({"a": entry([2**64], [0, 4])}, F4, "impossible shape"),
    "shape product that wraps to 4 bytes": (
        {"a": entry([2**32 + 1, 2**32, 2**32], [0, 4])},
        F4,
        "impossible shape",
    ),
    "empty, with strides beyond 64 bits": (
        {"a": entry([0, 2**62, 2**62], [0, 0])},
        b"",
        "impossible shape",
    ),
    "negative offset": ({"a": entry([1], [-4, 0])}, F4, "impossible data_offsets"),
    "offsets reversed": ({"a": entry([1], [4, 0])}, F4, "impossible data_offsets"),
    "offsets floats": ({"a": entry([1], [0.0, 4.0])}, F4, "impossible data_offsets"),
    "offsets booleans": ({"a": entry([1], [False, True], "U8")}, b"\0", "impossible data_offsets"),
    "offsets null": ({"a": entry([1], None)}, F4, "impossible data_offsets"),
    "three offsets": ({"a": entry([1], [0, 4, 4])}, F4, "impossible data_offsets"),
    "too few bytes for the shape": ({"a": entry([2], [0, 4])}, F4, "needs 8 bytes"),
    "too many bytes for the shape": ({"a": entry([], [0, 8])}, F4 * 2, "needs 4 bytes"),
    "data truncated": ({"a": entry([2], [0, 8])}, F4, "cut off"),
    "data left over": ({"a": entry([1], [0, 4])}, F4 * 2, "which has 8"),
    "overlap": ({"a": entry([2], [0, 8]), "b": entry([2], [4, 12])}, F4 * 3, "overlaps"),
    "one inside another": ({"a": entry([3], [0, 12]), "b": entry([1], [4, 8])}, F4 * 3, "overlaps"),
    "hole": ({"a": entry([1], [0, 4]), "b": entry([1], [8, 12])}, F4 * 3, "hole"),
    "hole at the front": ({"a": entry([1], [4, 8])}, F4 * 2, "hole"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_headers_are_one_clear_line(tmp_path, case):
    header, data, expected = MALFORMED[case]
    path = write_raw(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(NanoVLMError) as caught:
        SafetensorsFile(path)
    message = str(caught.value)
    assert str(path) in message and expected in message
    assert "\n" not in message and len(message) < 500 + len(str(path))


def test_malformed_files(tmp_path):
    path = tmp_path / "bad.safetensors"
    good = write_raw(path, {"a": entry([4], [0, 16])}, F4 * 4).read_bytes()
    for size in range(len(good)):
        path.write_bytes(good[:size])
        with pytest.raises(NanoVLMError, match=r"bad\.safetensors: "):
            SafetensorsFile(path)
    for length in (MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1):
        write_raw(path, {"a": entry([1], [0, 4])}, F4, length=length)
        with pytest.raises(NanoVLMError, match="claims a header"):
            SafetensorsFile(path)
    for unreadable in (tmp_path / "absent", tmp_path, "nul\0character"):
        with pytest.raises(NanoVLMError, match="cannot be read|is a folder|can have this name"):
            SafetensorsFile(unreadable)
    write_raw(path, {"a": entry([1], [0, 4])}, F4)
    with pytest.raises(NanoVLMError, match="no tensor 'b'"):
        SafetensorsFile(path).tensor("b")


def test_random_damage_to_the_header_is_an_error_or_a_valid_read(tmp_path):
    """And whatever we accept, the reference accepts and reads as the same bytes."""
    path = tmp_path / "fuzz.safetensors"
    tensors = {
        "a.weight": torch.randn(3, 4),
        "a.bias": torch.ones(4, dtype=torch.bfloat16),
        "b": torch.arange(10),
    }
    save_file(tensors, path, {"format": "pt"})
    good = path.read_bytes()
    header_end = 8 + int.from_bytes(good[:8], "little")
    source = random.Random(0)
    accepted = refused = 0
    for _ in range(1500):
        data = bytearray(good)
        for _ in range(source.choice((1, 1, 1, 2, 5))):
            # Half the time a byte that the header is made of, so that the JSON often survives.
            new = (
                source.choice(good[8:header_end])
                if source.random() < 0.5
                else source.randrange(256)
            )
            data[source.randrange(0 if source.random() < 0.1 else 8, header_end)] = new
        path.write_bytes(data)
        try:
            file = SafetensorsFile(path)
        except NanoVLMError:
            refused += 1
            continue
        accepted += 1
        expected = reference.load_file(path)
        assert file.keys() == expected.keys()
        assert all(same(file.tensor(name), expected[name]) for name in expected)
    assert accepted > 50 and refused > 500
