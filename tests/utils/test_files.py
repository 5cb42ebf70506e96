"""Files appear whole or not at all; an error about broken JSON names the line."""

import pytest

from nanovlm.errors import NanoVLMError
from nanovlm.utils.files import atomic_path, read_json, write_atomically


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


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", ":1: is not valid JSON"),
        (b'{\n"a": 1,\n}', ":3: is not valid JSON"),
        (b"[1]", "holds a JSON list, expected an object"),
        (b'{"a": "\xff"}', "is not UTF-8 text"),
        (b"[" * 100_000, "is not usable JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "is not usable JSON"),
    ],
)
def test_json_that_cannot_be_used(tmp_path, data, expected):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(NanoVLMError) as caught:
        read_json(tmp_path / "a.json")
    message = str(caught.value)
    assert expected in message and message.startswith(str(tmp_path / "a.json"))
    assert "\n" not in message


def test_json_that_is_there_and_json_that_is_not(tmp_path):
    (tmp_path / "a.json").write_text('{"图": [1, 2.5, null]}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"图": [1, 2.5, None]}
    with pytest.raises(NanoVLMError, match="cannot be read .No such file or directory."):
        read_json(tmp_path / "b.json")
