"""Outputs: never an input or what is there, whole or not at all, and one writer of a folder."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nanovlm.errors import NanoVLMError
from nanovlm.utils import outputs
from nanovlm.utils.outputs import (
    LOCK,
    TakenError,
    check_new_file,
    check_no_input,
    new_file,
    new_folder,
    only_writer,
    write_new,
)


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def test_an_input_by_any_name_is_no_output(tmp_path):
    given, folder = tmp_path / "data.jsonl", tmp_path / "model"
    given.write_text("mine")
    folder.mkdir()
    (tmp_path / "link").symlink_to(given)
    os.link(given, tmp_path / "hard")
    (tmp_path / "linked").symlink_to(folder)
    before = contents(tmp_path)
    same = (given, tmp_path / "model" / ".." / "data.jsonl", tmp_path / "link", tmp_path / "hard")
    for out in (*same, folder, tmp_path / "linked"):
        for check in (check_new_file, check_no_input):
            with pytest.raises(NanoVLMError, match="is read by this command .* with --out"):
                check(out, "--out", [folder, given])
    for out in (folder / "new", tmp_path / "linked" / "new", folder / "a" / "b"):
        with pytest.raises(NanoVLMError, match="lies in a folder that this command reads"):
            check_new_file(out, "--out", [given, folder])
    with pytest.raises(NanoVLMError, match="is read by this command"):
        check_new_file(given, "--out", [given], replace=True)
    check_new_file(tmp_path / "new", "--out", [given, folder, tmp_path / "nowhere"])
    assert contents(tmp_path) == before


def test_what_is_there_is_no_output(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = contents(tmp_path)
    for name, expected in (
        ("file", "is there already and stays as it is; name another file with --out, or delete"),
        ("dangling", "is there already"),
        (".", "is a folder; name a file with --out"),
        ("nowhere/a", "nowhere: is not a folder; make it, so that --out can be written"),
        ("file/a", "file: is not a folder"),
        ("x" * 300, "cannot be written (File name too long)"),
    ):
        with pytest.raises(NanoVLMError) as caught:
            check_new_file(tmp_path / name, "--out")
        assert expected in str(caught.value)
    check_new_file(tmp_path / "file", "--out", replace=True)
    assert contents(tmp_path) == before


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_told_before_the_work(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(NanoVLMError, match="cannot be written .Permission denied"):
        check_new_file(tmp_path / "a", "--out")


@pytest.mark.parametrize("links", [True, False])
def test_a_file_made_by_another_process_meanwhile_stays_and_nothing_is_lost(
    tmp_path, monkeypatch, links
):
    if not links:  # such as on a USB stick

        def refuse(*_):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    out = tmp_path / "answers.jsonl"
    write_new(out, "图\n")
    assert out.read_text(encoding="utf-8") == "图\n" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(NanoVLMError, match="stays as it is; what was to be written") as caught:
        write_new(out, "other")
    (kept,) = (path for path in tmp_path.iterdir() if path != out)
    assert str(kept) in str(caught.value) and kept.read_text() == "other"
    assert kept.suffix == out.suffix and not kept.name.startswith(".")
    assert out.read_text(encoding="utf-8") == "图\n" and len(list(tmp_path.iterdir())) == 2
    write_new(out, "new", replace=True)
    assert out.read_text() == "new"


def test_a_failure_leaves_neither_file_nor_folder(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_file(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(OSError) as caught, new_folder(tmp_path / "b" / "c", "--out") as folder:
        (folder / "a").write_text("half")
        assert not (tmp_path / "b" / "c").exists()
        raise OSError(28, "No space left on device")
    assert caught.value.filename == str(tmp_path / "b" / "c")
    assert contents(tmp_path) == {"b": None}


def test_a_folder_is_new_or_empty(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "a").write_text("mine")
    monkeypatch.chdir(tmp_path / "empty")
    for path in (Path("."), tmp_path / "deep" / "er"):
        with new_folder(path, "--out") as folder:
            (folder / "a").write_text("whole")
    monkeypatch.chdir(tmp_path)
    assert (tmp_path / "empty" / "a").read_text() == "whole"
    assert (tmp_path / "deep" / "er" / "a").read_text() == "whole"
    before = contents(tmp_path)
    for name, expected in (
        ("taken", "holds a already; name a new or an empty folder with --out"),
        ("taken/a", "is not a folder; name a new one with --out"),
        ("taken/a/b", "cannot be written"),
    ):
        with pytest.raises(NanoVLMError, match=expected), new_folder(tmp_path / name, "--out"):
            raise AssertionError
    assert contents(tmp_path) == before
    with new_folder(tmp_path / "taken", "--out", replace=True) as folder:
        (folder / "b").write_text("new")
    assert contents(tmp_path / "taken") == {"b": b"new"}


def test_a_folder_made_by_another_process_meanwhile_stays_and_nothing_is_lost(tmp_path):
    with pytest.raises(TakenError) as caught, new_folder(tmp_path / "out", "--out") as folder:
        (folder / "a").write_text("ours")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "a").write_text("theirs")
    assert (tmp_path / "out" / "a").read_text() == "theirs"
    assert (caught.value.kept / "a").read_text() == "ours"
    assert str(caught.value.kept) in str(caught.value)


HOLD = """
import sys, time
from pathlib import Path
from nanovlm.utils.outputs import only_writer
with only_writer(Path(sys.argv[1]), "--out"):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(folder: Path, **environment: str) -> subprocess.Popen:
    """A process that holds the lock of a folder until its stdin ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
    )
    assert process.stdout is not None and process.stdout.readline().strip() == b"held"
    return process


def test_one_process_writes_a_folder_and_a_dead_one_is_in_nobodys_way(tmp_path):
    run = tmp_path / "run"
    process = hold(run)
    with (
        pytest.raises(
            NanoVLMError,
            match=rf"run: is being written by another process .process {process.pid} on",
        ),
        only_writer(run, "--out"),
    ):
        raise AssertionError
    process.send_signal(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
    process.communicate()
    assert (run / LOCK).exists()
    with only_writer(run, "--out"):
        (run / "a").write_text("")
    assert [path.name for path in run.iterdir()] == ["a"]
    process = hold(run)
    process.communicate()
    assert process.returncode == 0 and [path.name for path in run.iterdir()] == ["a"]


def test_other_processes_of_a_run_take_no_lock_and_leave_it(tmp_path):
    process = hold(tmp_path / "run")
    other = hold(tmp_path / "run", RANK="1", WORLD_SIZE="2")
    other.communicate()
    assert other.returncode == 0 and (tmp_path / "run" / LOCK).exists()
    process.communicate()
    assert not (tmp_path / "run").exists()  # nothing was written there


def test_of_many_processes_one_at_a_time_holds_the_lock(tmp_path):
    code = f"""
import random, time
from pathlib import Path
from nanovlm.errors import NanoVLMError
from nanovlm.utils.outputs import only_writer
run, held = Path({str(tmp_path / "run")!r}), 0
end = time.time() + 1.5
while time.time() < end or not held:
    try:
        with only_writer(run, "--out"):
            open(run / "inside", "x").close()  # fails if somebody else is inside
            held += 1
            time.sleep(random.random() / 500)
            (run / "inside").unlink()
    except NanoVLMError:
        pass
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    started = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(3)]
    assert [process.wait() for process in started] == [0, 0, 0]


def test_a_folder_that_its_last_writer_deletes_just_now_is_made_again(tmp_path, monkeypatch):
    made = []

    def mkdir(path, *arguments):
        made.append(path)
        if len(made) == 1:  # there when it is to be made, and gone when one looks
            raise FileExistsError(17, "File exists", str(path))
        real(path, *arguments)

    real = os.mkdir
    monkeypatch.setattr(os, "mkdir", mkdir)
    with only_writer(tmp_path / "run", "--out"):
        assert made == [tmp_path / "run"] * 2 and (tmp_path / "run" / LOCK).exists()


def test_a_folder_below_a_link_to_nowhere_is_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("link", "link/run"):
        with pytest.raises((NanoVLMError, OSError)), only_writer(tmp_path / name, "--out"):
            raise AssertionError
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_a_lock_made_by_another_writer_just_after_it_was_missing_is_looked_at_again(
    tmp_path, monkeypatch
):
    def missing(path, mode):
        monkeypatch.undo()
        path.write_text("")  # by whoever has made the folder again
        raise FileNotFoundError(2, "No such file or directory", str(path))

    monkeypatch.setattr(outputs, "open", missing, raising=False)
    with only_writer(tmp_path / "run", "--out"):
        assert str(os.getpid()) in (tmp_path / "run" / LOCK).read_text()


def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, capsys):
    def refuse(_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(outputs, "_lock", refuse)
    with only_writer(tmp_path, "--out"):
        (tmp_path / "a").write_text("")
    assert "this file system has no locks (No locks available)" in capsys.readouterr().err
    host, dead = socket.gethostname(), subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for writer in (f"process {os.getppid()} on {host}", f"process {dead.pid} on another", "?"):
        (tmp_path / LOCK).write_text(writer)
        with pytest.raises(NanoVLMError) as caught, only_writer(tmp_path, "--out"):
            raise AssertionError
        assert f"another process ({writer})" in str(caught.value)
        assert f"if it has ended, delete {tmp_path / LOCK}" in str(caught.value)
    (tmp_path / LOCK).write_text(f"process {dead.pid} on {host}")
    with only_writer(tmp_path, "--out"):
        assert str(os.getpid()) in (tmp_path / LOCK).read_text()
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(NanoVLMError, match="file: is not a folder"),
        only_writer(tmp_path / "file", "--out"),
    ):
        raise AssertionError
    assert (tmp_path / "file").read_text() == "mine"
