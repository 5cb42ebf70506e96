"""Images in tar files: found as tarfile finds them, and every kind of damage said in one line."""

import io
import os
import tarfile
from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image

from nanovlm.errors import NanoVLMError
from nanovlm.inputs import archive
from nanovlm.inputs.image import open_image, preprocess
from nanovlm.inputs.image_config import ImageConfig

LONG = "d" * 90 + "/" + "e" * 90 + "/" + "f" * 120 + ".jpg"  # beyond what ustar has room for
NAMES = [
    "a.jpg",
    "sub/b.jpg",
    "红色/圆形.png",
    "sp ace=1.jpg",
    "s" * 100,
    "p" * 80 + "/" + "q" * 60,
    LONG,
    "empty",
]


def add(
    tar: tarfile.TarFile, name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, **attributes
) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, len(data)
    for key, value in attributes.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(data))


def write(path: Path, names: list[str], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for number, name in enumerate(names):
            add(
                tar,
                name,
                b"" if name == "empty" else f"{number}:{name}".encode() * (300 * number + 1),
            )
    return path


@pytest.mark.parametrize(
    "format",
    [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT],
    ids=["pax", "gnu", "ustar"],
)
def test_members_are_read_as_tarfile_reads_them(tmp_path, format):
    names = [name for name in NAMES if format != tarfile.USTAR_FORMAT or name != LONG]
    path = write(tmp_path / "images.tar", names, format)
    with tarfile.open(path) as tar:
        for name in names:
            assert (
                archive.read_member(tmp_path / f"images.tar::{name}")
                == tar.extractfile(name).read()
            )


def test_a_name_may_begin_with_a_dot_and_the_last_of_two_counts(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:  # as `tar cf x.tar .` writes it
        for name, data in (("./a.jpg", b"old"), ("b.jpg", b"b"), ("./a.jpg", b"new")):
            add(tar, name, data)
    for name, data in (("a.jpg", b"new"), ("./a.jpg", b"new"), ("./b.jpg", b"b")):
        assert archive.read_member(f"{tmp_path}/x.tar::{name}") == data


def test_global_headers_and_large_numbers_are_understood(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w", pax_headers={"comment": "of git archive"}) as tar:
        add(tar, "a.jpg", b"a", uid=2**40, mtime=1e11)
    assert archive.read_member(tmp_path / "x.tar::a.jpg") == b"a"


def test_an_image_in_a_tar_file_is_the_image(tmp_path):
    Image.new("RGB", (9, 7), (200, 30, 40)).save(tmp_path / "a.png")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "text.txt", b"not one")
        tar.add(tmp_path / "a.png", "a.png")
    config = ImageConfig(4, 4)
    inside = preprocess(open_image(tmp_path / "x.tar::a.png"), config)
    assert torch.equal(inside, preprocess(open_image(tmp_path / "a.png"), config))
    with pytest.raises(NanoVLMError, match="x.tar::text.txt: not an image"):
        open_image(tmp_path / "x.tar::text.txt")
    with pytest.raises(NanoVLMError, match="x.tar::b.png: the archive has no such member"):
        open_image(str(tmp_path / "x.tar::b.png"))


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_what_is_no_plain_file_is_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "a.jpg", b"a")
        add(tar, "b.jpg", kind=kind, linkname="a.jpg")
    archive.check(tmp_path / "x.tar::a.jpg")
    for name in ("b.jpg", "b.jpg/"):
        with pytest.raises(
            NanoVLMError, match="is a link, a folder or a device|has no such member"
        ):
            archive.check(f"{tmp_path}/x.tar::{name}")


def test_a_missing_archive_or_member_or_file_is_said(tmp_path):
    write(tmp_path / "x.tar", ["a.jpg"])
    (tmp_path / "dir.tar").mkdir()
    for name, reason in (
        ("y.tar::a.jpg", "the archive cannot be read .No such file"),
        ("dir.tar::a.jpg", "the archive is a folder; give a regular file"),
        ("x.tar::../a.jpg", "the archive has no such member"),
        ("x.tar::", "the archive has no such member"),
        ("a.jpg", "does not exist"),
        ("dir.tar", "is a folder, a pipe, a device or a link to nothing, not a file"),
    ):
        with pytest.raises(NanoVLMError, match=reason):
            archive.check(f"{tmp_path}/{name}")


def test_an_archive_cut_off_anywhere_is_said_to_be(tmp_path):
    whole = write(tmp_path / "whole.tar", NAMES[:4]).read_bytes()
    end = len(whole.rstrip(b"\0"))
    for size in (*range(512, end, 512), 0, 1, 511, 700, end):
        path = tmp_path / f"{size}.tar"
        path.write_bytes(whole[:size])
        with pytest.raises(
            NanoVLMError, match="^the archive is damaged, cut off or compressed; fetch it again"
        ):
            archive.check(f"{path}::a.jpg")


@pytest.mark.parametrize(
    "at, data", [(0, b"\xff"), (124, b"z"), (148, b"1"), (124, b"\xff" * 12), (0, b"\x1f\x8b")]
)
def test_a_damaged_header_is_noticed(tmp_path, at, data):
    content = bytearray(write(tmp_path / "x.tar", NAMES[:3]).read_bytes())
    content[1024 + at : 1024 + at + len(data)] = data
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(NanoVLMError, match="^the archive is damaged, cut off or compressed; fetch"):
        archive.check(tmp_path / "x.tar::a.jpg")


@pytest.mark.parametrize("size", [-512, -1, 2**70])
def test_a_header_that_leads_back_or_far_away_ends_the_reading(tmp_path, size):
    with open(tmp_path / "x.tar", "wb") as file:
        header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
        header[124:136] = ((1 << 95) + size if size > 0 else (1 << 96) + size).to_bytes(12, "big")
        header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 256)
        file.write(bytes(header) + bytes(1024))
    with pytest.raises(NanoVLMError, match="^the archive is damaged"):
        archive.check(tmp_path / "x.tar::a.jpg")


@pytest.mark.parametrize("records", [b"0 path=a\n", b"11 size=-512\n"])
def test_a_damaged_pax_header_is_noticed(tmp_path, records):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "header", records, kind=b"x")
        add(tar, "a.jpg", b"a")
    with pytest.raises(NanoVLMError, match="^the archive is damaged"):
        archive.check(tmp_path / "x.tar::a.jpg")


def header(name: bytes, size: int | bytes = 0, kind: bytes = b"0") -> bytes:
    """A header written by hand, which may claim any size."""
    block = bytearray(tarfile.BLOCKSIZE)
    block[: len(name)] = name
    block[124:136] = size if isinstance(size, bytes) else b"%011o\0" % size
    block[156:157], block[257:265] = kind, b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


HUGE = (0x80 << 88 | 2**62).to_bytes(12)


@pytest.mark.parametrize("kind", [b"x", b"g", b"X", b"L", b"K", b"0"])
@pytest.mark.parametrize("size", [HUGE, 2**30, b"\xff" * 12, b"-00000000512", b"0x10"])
def test_a_header_that_claims_more_than_there_is(tmp_path, kind, size):
    data = header(b"pax", size, kind) + bytes(512) + header(b"a.jpg") + bytes(1024)
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(NanoVLMError, match="^the archive is damaged"):
        archive.check(tmp_path / "x.tar::a.jpg")


def test_many_headers_about_one_member(tmp_path):
    """Of two the first counts, as for tarfile, which calls itself for each and gives up."""
    names = (header(b"././@LongLink", 6, b"L") + name.ljust(512, b"\0") for name in (b"1", b"2"))
    data = b"".join(names) * 1200 + header(b"a.jpg") + bytes(1024)
    (tmp_path / "x.tar").write_bytes(data)
    assert archive.read_member(tmp_path / "x.tar::1") == b""


@pytest.mark.parametrize(
    "records",
    [
        b"9" * 8000,  # on which the regular expressions of tarfile once ran for minutes
        b"9999999 path=a\n",
        b"7 path\n",
        b"6 =aa\n",
        b"10 size=-1\n",
        b"12 size=1e30\n",
        b"30 size=99999999999999999999\n\n",
    ],
)
def test_attributes_that_make_no_sense(tmp_path, records):
    block = records.ljust(-(-len(records) // 512) * 512, b"\0")
    data = header(b"pax", len(records), b"x") + block + header(b"a.jpg", 1) + bytes(1536)
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(NanoVLMError, match="^the archive is damaged"):
        archive.check(tmp_path / "x.tar::a.jpg")


def test_an_archive_that_is_another_file_is_named(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"\x1f\x8b\x08" + bytes(997))
    with pytest.raises(NanoVLMError, match="^the archive is a gzip file: unpack it first$"):
        archive.check(tmp_path / "x.tar::a.jpg")


def test_a_name_outside_is_a_name_within(tmp_path):
    """Nothing is unpacked, so that no name leads anywhere."""
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "../../etc/passwd", b"a")
    assert archive.read_member(f"{tmp_path}/x.tar::../../etc/passwd") == b"a"


@pytest.mark.parametrize("seed", range(20))
def test_any_archive_is_read_as_tarfile_reads_it(tmp_path, seed):
    random = Random(seed)
    kinds = [*[tarfile.REGTYPE] * 3, *tarfile.SUPPORTED_TYPES[:8]]
    path, format = tmp_path / "x.tar", random.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
    with tarfile.open(path, "w", format=format) as tar:
        for number in range(12):
            name = random.choice(["a", "./b/c", "图/片", "=\n ", "x" * random.randint(90, 101)])
            kind = random.choice(kinds)
            size = random.choice([0, 1, 511, 512, 513]) if kind in tarfile.REGULAR_TYPES else 0
            target = random.choice(["a", "t" * 150])
            add(tar, f"{name}{number}", random.randbytes(size), kind, linkname=target, uid=2**40)
    with tarfile.open(path) as tar:
        places = {
            member.name.removeprefix("./"): (member.offset_data, member.size)
            for member in tar
            if member.isreg()
        }
    for name, (start, size) in places.items():
        assert archive.read_member(f"{path}::{name}") == path.read_bytes()[start : start + size]


def test_a_sparse_file_is_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "a.jpg", kind=tarfile.GNUTYPE_SPARSE)
    with tarfile.open(tmp_path / "y.tar", "w") as tar:
        add(tar, "a.jpg", pax_headers={"GNU.sparse.major": "1"})
    with pytest.raises(NanoVLMError, match="the archive holds a sparse file"):
        archive.check(tmp_path / "y.tar::a.jpg")
    with pytest.raises(NanoVLMError, match="the archive holds a sparse file"):
        archive.check(tmp_path / "x.tar::a.jpg")


def test_an_archive_that_changes_is_read_anew(tmp_path):
    path = write(tmp_path / "x.tar", ["a.jpg"])
    archive.check(f"{path}::a.jpg")
    write(path, ["b.jpg", "c.jpg"])
    os.utime(path, ns=(1, 1))
    archive.check(f"{path}::c.jpg")
    with pytest.raises(NanoVLMError, match="no such member"):
        archive.check(f"{path}::a.jpg")


def test_headers_are_read_once(tmp_path, monkeypatch):
    path = write(tmp_path / "x.tar", ["a.jpg", "b.jpg"])
    archive.check(f"{path}::a.jpg")
    monkeypatch.setattr(archive, "_members", None)
    assert archive.read_member(f"{path}::b.jpg").startswith(b"1:b.jpg")
