"""Exit codes and error messages of commands."""

import os
import subprocess
import sys

import pytest

from nanovlm.errors import NanoVLMError
from nanovlm.utils.console import run_command


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
                "with the same flags says what fits\n"
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
        (SystemExit(143), 143, ""),
    ],
)
def test_an_error_of_the_user_is_one_line_on_stderr(capsys, error, status, message):
    assert end(fail(error), capsys) == (status, "", message)


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)


def test_a_closed_pipe_ends_the_command_quietly():
    code = "from nanovlm.utils.console import run_command\nrun_command(lambda: print('x'))"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False
    )
    os.close(writer)
    assert done.returncode == 141 and done.stderr == b""
