"""A command run in a process of its own."""

from pathlib import Path

import pytest

from nanovlm.errors import NanoVLMError
from nanovlm.utils.processes import output_of


def test_the_json_that_a_command_prints_is_returned(tmp_path: Path):
    file = tmp_path / "a file"
    file.write_text("[1, 2]", encoding="utf-8")
    assert output_of("json.tool", [str(file)], "formats") == [1, 2]


def test_a_command_that_fails_is_named_with_its_code(tmp_path: Path, capfd):
    file = tmp_path / "broken.json"
    file.write_text("[", encoding="utf-8")
    with pytest.raises(NanoVLMError, match="^the process that formats 'x' ended with code 1; see"):
        output_of("json.tool", [str(file)], "formats 'x'")
    assert "line 1 column" in capfd.readouterr().err  # its own message is shown
