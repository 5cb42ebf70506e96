"""The environment of torchrun, and a command run in a process of its own."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from nanovlm.errors import NanoVLMError
from nanovlm.utils.processes import output_of, processes, processes_here, rank_here


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


VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def set_variables(monkeypatch, values: tuple[str | None, ...]) -> None:
    for name, value in zip(VARIABLES, values):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((None,) * 4, (0, 1, 0, 1)),
        (("",) * 4, (0, 1, 0, 1)),  # as templates of jobs leave them
        ((" ", "\n", "0", "0"), (0, 1, 0, 1)),
        (("3", "8", "1", "2"), (3, 8, 1, 2)),
        (("3", "8", None, None), (3, 8, 0, 8)),
    ],
)
def test_the_environment_of_torchrun(monkeypatch, values, expected):
    set_variables(monkeypatch, values)
    assert (*processes(), rank_here(), processes_here()) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("x", "2"), "RANK is 'x' in the environment, expected a number; unset it, or start"),
        (("-1", "2"), "RANK is '-1' in the environment"),
        (("0", "1e3"), "WORLD_SIZE is '1e3' in the environment"),
        (("0", "٣"), "WORLD_SIZE is '٣' in the environment"),
        (("0", "9" * 5000), f"WORLD_SIZE is '{'9' * 199}… in the environment"),
        (("2", "2"), "RANK is 2 and WORLD_SIZE 2 in the environment, so there is no such process"),
        (("1", None), "RANK is 1 and WORLD_SIZE 1"),
        (("0", "0"), "RANK is 0 and WORLD_SIZE 0"),
    ],
)
def test_an_environment_that_makes_no_sense(monkeypatch, values, message):
    set_variables(monkeypatch, values)
    with pytest.raises(NanoVLMError) as caught:
        processes()
    assert str(caught.value).startswith(message)


@pytest.mark.skipif(os.name == "nt", reason="sends a signal")
def test_ctrl_c_ends_the_other_process_which_says_nothing(capfd):
    """A terminal sends it to both; one of them says so."""
    code = "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(60)"
    threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        output_of("timeit", ["-n1", "-r1", code], "waits")
    assert time.monotonic() - start < 30
    assert capfd.readouterr() == ("", "")
