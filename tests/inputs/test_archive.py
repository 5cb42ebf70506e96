"""Images in tar files: found as tarfile finds them, and every kind of damage said in one line."""

import io
import os
import tarfile
from pathlib import Path

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
        ("dir.tar::a.jpg", "the archive is not a file"),
        ("x.tar::../a.jpg", "the archive has no such member"),
        ("x.tar::", "the archive has no such member"),
        ("a.jpg", "does not exist"),
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


def test_a_sparse_file_is_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "a.jpg", kind=tarfile.GNUTYPE_SPARSE)
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
