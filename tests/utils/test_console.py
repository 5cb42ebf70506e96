"""Exit codes and error messages of commands."""

import os
import subprocess
import sys

import pytest

import nanovlm
from nanovlm.errors import NanoVLMError
from nanovlm.utils.console import MAX_LINE, run_command, say


def end(main, capsys) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        run_command(main)
    return caught.value.code, *capsys.readouterr()


def fail(error: BaseException):
    def main():
        raise error

    return main


def test_status_of_main(capsys):
    assert end(lambda: None, capsys) == (0, "", "")
    assert end(lambda: 3, capsys) == (3, "", "")


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (NanoVLMError("a.txt:3: is wrong; mend it"), 2, "error: a.txt:3: is wrong; mend it\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            PermissionError(13, "Permission denied", "/locked/file"),
            2,
            "error: /locked/file: Permission denied\n",
        ),
        (OSError(28, "No space left on device"), 2, "error: the system: No space left on device\n"),
        (
            RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried\nto"
            ),
            2,
            (
                "error: out of memory ([enforce fail] DefaultCPUAllocator: "
                "can't allocate memory: you tried); `python -m nanovlm.memory --gpu GB` "
                "with the same flags says what fits; "
                "see docs/en/troubleshooting.md#out-of-memory\n"
            ),
        ),
        (
            RuntimeError(
                "cumsum_cuda_kernel does not have a deterministic implementation, but you set "
                "'torch.use_deterministic_algorithms(True)'. You can turn off …"
            ),
            2,
            (
                "error: --deterministic: cumsum_cuda_kernel has no version here that gives the "
                "same bits in every run; take --no-deterministic, or another --device\n"
            ),
        ),
        (
            MemoryError("Unable to allocate 9 GiB"),
            2,
            (
                "error: out of memory (Unable to allocate 9 GiB); "
                "`python -m nanovlm.memory --gpu GB` with the same flags says what fits; "
                "see docs/en/troubleshooting.md#out-of-memory\n"
            ),
        ),
        (
            NanoVLMError("a\nerror: forged \x1b[2J\x9b\u2028\u202e\udc80 图"),
            2,
            "error: a\\nerror: forged \\x1b[2J\\x9b\\u2028\\u202e\\udc80 图\n",
        ),
        (NanoVLMError("a list:", "  1\r", "  2"), 2, "error: a list:\n  1\\r\n  2\n"),
        (
            NanoVLMError("x" * 5000 + ": is too long"),
            2,
            (
                f"error: {'x' * (MAX_LINE // 2 - 7)} … "
                f"{5020 - MAX_LINE:,} characters … {'x' * (MAX_LINE // 2 - 13)}: is too long\n"
            ),
        ),
        (SystemExit(143), 143, ""),
    ],
)
def test_an_error_of_the_user_is_one_line_on_stderr(capsys, error, status, message):
    assert end(fail(error), capsys) == (status, "", message)


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)


# Commands of a few lines, in processes of their own that load no PyTorch.
PREAMBLE = f"""
import sys, types
package = types.ModuleType("nanovlm")
package.__path__ = {list(nanovlm.__path__)}
sys.modules["nanovlm"] = package
from nanovlm.utils.console import run_command, say
"""


def run(main: str, redirections: str = "", **environment: str) -> tuple[int, bytes, bytes]:
    """Exit code, stdout and stderr of a command with this `main`, started by a shell."""
    code = f"{PREAMBLE}\ndef main():\n    {main}\nrun_command(main)"
    shell = ["sh", "-c", f'exec "$0" -c "$1" {redirections}', sys.executable, code]
    done = subprocess.run(
        shell, capture_output=True, timeout=60, check=False, env=os.environ | environment
    )
    return done.returncode, done.stdout, done.stderr


NO_ROOM = "error: stdout: No space left on device\n"
needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")


@pytest.mark.skipif(os.name == "nt", reason="the redirections are a shell's")
@pytest.mark.parametrize(
    ("main", "redirections", "expected"),
    [
        ("print([sys.stdin.read()])", "<&-", (0, "['']\n", "")),
        ("print('x')", ">&-", (2, "", "error: stdout: Bad file descriptor\n")),
        ("say('x')", ">&-", (0, "", "x\n")),
        ("say('x'); print('y')", "2>&-", (0, "y\n", "")),
        ("sys.exit(3)", "<&- >&- 2>&-", (3, "", "")),
        ("say('x'); open('/none')", "<&- >&- 2>&-", (2, "", "")),
        pytest.param("print('x')", ">/dev/full", (2, "", NO_ROOM), marks=needs_full),
        pytest.param("print('x', flush=True)", ">/dev/full", (2, "", NO_ROOM), marks=needs_full),
        pytest.param("say('x'); print('y')", "2>/dev/full", (0, "y\n", ""), marks=needs_full),
        pytest.param("open('/none')", "2>/dev/full", (2, "", ""), marks=needs_full),
    ],
)
def test_a_stream_that_is_closed_or_full(main, redirections, expected):
    status, out, err = expected
    assert run(main, redirections) == (status, out.encode(), err.encode())


@pytest.mark.skipif(os.name == "nt", reason="runs a shell")
@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "gbk"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_streams_are_utf_8_whatever_the_console_says(environment):
    main = "say('\\u56fe'); print('\\u56fe \\udcff')"
    assert run(main, **environment) == (0, "图 \\udcff\n".encode(), "图\n".encode())


@pytest.mark.skipif(os.name == "nt", reason="runs a shell")
def test_the_environment_of_torchrun():
    assert run("say('x')", RANK="", WORLD_SIZE=" ") == (0, b"", b"x\n")
    status, out, err = run("say('x')", RANK="first")
    assert (status, out) == (2, b"")
    assert err.startswith(b"error: RANK is 'first' in the environment, expected a number; unset")


def test_what_stands_in_a_line_stays_in_it(capsys):
    say("skipped: a\nerror: b", "\tc")
    assert capsys.readouterr() == ("", "skipped: a\\nerror: b\n\\tc\n")


def test_a_closed_pipe_ends_the_command_quietly():
    reader, writer = os.pipe()
    os.close(reader)
    code = PREAMBLE + "run_command(lambda: print('x'))"
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False
    )
    os.close(writer)
    assert done.returncode == 141 and done.stderr == b""


def test_one_of_several_processes_ends_without_clean_up():
    """Threads of a connection that is being closed can abort a process that cleans up."""
    program = (
        "import atexit, os; from nanovlm.utils.console import run_command; "
        "atexit.register(os.abort); run_command(lambda: print('done'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"RANK": "0", "WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
