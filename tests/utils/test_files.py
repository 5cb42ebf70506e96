"""Files appear whole or not at all; only regular ones are read; an error about broken JSON names
the line."""

import os
import socket
from pathlib import Path

import pytest

from nanovlm.errors import NanoVLMError, quoted
from nanovlm.utils.files import atomic_path, open_regular, read_json, read_text, write_atomically


def test_text_and_bytes_replace_what_was_there(tmp_path):
    write_atomically(tmp_path / "a", "图\n")
    assert (tmp_path / "a").read_bytes() == "图\n".encode()
    write_atomically(tmp_path / "a", b"\x00")
    assert (tmp_path / "a").read_bytes() == b"\x00"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_failure_in_the_middle_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("half")
        assert (tmp_path / "a").read_text() == "old" and temporary.parent == tmp_path
        raise RuntimeError
    assert (tmp_path / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "is not JSON but an empty file"),
        (b'{\n"a": 1,\n}', ":3:1: is not valid JSON"),
        (b'{"a": 1\n"b": 2}', ":2:1: is not valid JSON (Expecting ',' delimiter)"),
        (b"[1]", "holds a JSON list, expected an object"),
        (b'{"a": "\xff\xff"}', "is not UTF-8 text; was it damaged or compressed?"),
        (b"\x1f\x8b\x08\0\xff", "is not UTF-8 text but a gzip file: unpack it first"),
        (LFS_POINTER, "is not JSON but a Git LFS pointer: `git lfs pull` fetches the file"),
        (b"[" * 100_000, "is not valid JSON (nested more than 64 deep)"),
        (b'{"a": ' + b"[" * 64 + b"]" * 64 + b"}", "is not valid JSON (nested more than 64 deep)"),
        (b'{"a": ' + b"1" * 5000 + b"}", "is not valid JSON (Exceeds the limit"),
    ],
)
def test_json_that_cannot_be_used(tmp_path, data, expected):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(NanoVLMError) as caught:
        read_json(tmp_path / "a.json")
    message = str(caught.value)
    assert expected in message and message.startswith(str(tmp_path / "a.json"))
    assert "\n" not in message


def test_json_with_half_a_character_is_refused(tmp_path):
    """It could not be written again."""
    (tmp_path / "a.json").write_text('{"a": [{"b": "\\uD83D"}]}')
    with pytest.raises(NanoVLMError, match="a.json: holds half of a character"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"a": "\\uD83D\\uDE00"}')  # both halves
    assert read_json(tmp_path / "a.json") == {"a": "😀"}


def test_json_that_is_there_and_json_that_is_not(tmp_path):
    (tmp_path / "a.json").write_text('{"图": [1, 2.5, null]}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"图": [1, 2.5, None]}
    with pytest.raises(NanoVLMError, match="cannot be read .No such file or directory."):
        read_json(tmp_path / "b.json")


def test_json_and_text_are_read_without_byte_order_mark_and_line_ends_of_windows(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a":\r\n 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}
    assert read_text(tmp_path / "a.json") == '{"a":\n 1}'


def test_json_may_be_nested_as_deep_as_the_limit(tmp_path):
    (tmp_path / "a.json").write_text('{"a": ' + "[" * 63 + "]" * 63 + "}")
    assert read_json(tmp_path / "a.json")


def test_a_text_of_more_than_the_limit_is_refused(tmp_path):
    (tmp_path / "a").write_text("12345")
    assert read_text(tmp_path / "a", limit=5) == "12345"
    with pytest.raises(NanoVLMError, match="a: is larger than 4 bytes"):
        read_text(tmp_path / "a", limit=4)


@pytest.mark.skipif(os.name == "nt", reason="Windows has none of these")
def test_only_regular_files_are_opened(tmp_path, monkeypatch):
    """None of them may be waited for: a pipe without a writer would be opened for ever."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # the path of a socket has to be short
        server.bind("socket")
        for name, expected in (
            ("pipe", "is a pipe; give a regular file"),
            ("socket", "is a socket; give a regular file"),
            ("zero", "is a device; give a regular file"),
            (".", "is a folder; give a regular file"),
            ("dangling", "cannot be read (No such file or directory); check the path"),
            ("loop", "cannot be read (Too many levels of symbolic links); check the path"),
            ("a\0b", "no file can have this name; check the path"),
            ("\ud800", "no file can have this name; check the path"),
            ("x" * 5000, "cannot be read (File name too long); check the path"),
        ):
            with pytest.raises(NanoVLMError) as caught:
                open_regular(Path(name))
            assert str(caught.value) == f"{name}: {expected}"


def test_a_quoted_value_is_cut_and_escaped():
    assert quoted("图\x1b\n") == r"'图\x1b\n'"
    assert quoted([1] * 500) == repr([1] * 500)[:200] + "…"
