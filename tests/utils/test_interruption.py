"""Ctrl-C at any moment of a command: one line, exit code 130, and no traceback."""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nanovlm.utils import interruption

ROOT = Path(__file__).parents[2]
PACKAGES_RUN = [*ROOT.glob("nanovlm/*/__main__.py"), *ROOT.glob("data_tools/*/__main__.py")]
MODULES = ["nanovlm.report", *(f"{path.parts[-3]}.{path.parent.name}" for path in PACKAGES_RUN)]
SCRIPTS = [
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("data_tools/*.py")]
    if "run_command(main)" in path.read_text(encoding="utf-8")
]
# Whichever of the packages is imported first, it gets a Ctrl-C, and takes its time.
PACKAGES = ("torch", "numpy", "tqdm", "PIL", "matplotlib", "fontTools", "sentencepiece")
CTRL_C = "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)"


@pytest.mark.skipif(os.name == "nt", reason="sends a signal")
@pytest.mark.parametrize("command", [*SCRIPTS, *(f"-m {module}" for module in MODULES)])
def test_ctrl_c_during_the_imports(command: str, tmp_path: Path):
    for name in PACKAGES:
        (tmp_path / f"{name}.py").write_text(CTRL_C)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "RANK": "", "WORLD_SIZE": ""}
    done = subprocess.run(
        [sys.executable, *command.split()],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_all_commands_are_among_these():
    assert {"infer.py", "train_stage1.py", "data_tools/make_scenes.py"} < set(SCRIPTS)
    assert {"nanovlm.bench", "nanovlm.report", "data_tools.convert"} < set(MODULES)
    modules = [path for path in ROOT.glob("nanovlm/*.py") if "run_command(" in path.read_text()]
    assert {f"nanovlm.{path.stem}" for path in modules} < set(MODULES)


@pytest.mark.skipif(os.name == "nt", reason="sends a signal")
def test_a_program_that_imports_the_package_keeps_its_own_ctrl_c():
    assert signal.getsignal(signal.SIGINT) is not interruption.end_at_once


@pytest.mark.parametrize("before", [signal.default_int_handler, interruption.end_at_once])
def test_ctrl_c_is_an_exception_within_main_and_what_it_was_after(before):
    previous = signal.signal(signal.SIGINT, before)
    try:
        with pytest.raises(KeyboardInterrupt), interruption.raised_as_exception():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, previous)


def test_a_command_in_the_background_keeps_ignoring_ctrl_c():
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruption.raised_as_exception():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, previous)


@pytest.mark.skipif(os.name == "nt", reason="there, processes inherit no mask of signals")
def test_ctrl_c_is_kept_from_children_and_put_off_here():
    code = "import signal; signal.raise_signal(signal.SIGINT); print('goes on')"
    with pytest.raises(KeyboardInterrupt):
        with interruption.kept_from_children():
            signal.raise_signal(signal.SIGINT)
            done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
        pytest.fail("was lost")
    assert done.stdout == b"goes on\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a process")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_is_forked_while_a_run_waits_ignores_the_signal(number: signal.Signals):
    with interruption.Interruption() as kept, kept.while_waiting():
        fork = multiprocessing.get_context("fork")
        child = fork.Process(target=signal.raise_signal, args=[number])
        child.start()
        child.join()
    assert (child.exitcode, kept.signal) == (0, 0)
