"""A conversion that is killed goes on where it was; threads and kills leave the same bytes."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_tools.convert import output as output_module
from data_tools.convert import pipeline
from data_tools.convert.__main__ import Task, convert
from data_tools.convert.output import Output
from nanovlm.errors import NanoVLMError
from tests.data_tools.convert import published
from tests.data_tools.convert.test_forms import CASES

pytest.importorskip("pyarrow")
REPOSITORY = Path(__file__).parents[3]


# One of each way to read, and the rest behind `-m slow`.
QUICK = ("cc3m_zip", "the_cauldron", "coco", "basic_vlm", "webdataset", "folder_of_texts", "csv")
RESUMED = [
    pytest.param(make, shards, id=f"{make.__name__}-{'shards' if shards else 'files'}",
                 marks=[] if make.__name__ in QUICK[: 2 if shards else None] else pytest.mark.slow)
    for make in CASES for shards in (False, True)
]  # fmt: skip


def tree(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Groups of two rows, each of which the journal knows; shards of two images."""
    monkeypatch.setattr(pipeline, "ROWS", 2)
    monkeypatch.setattr(output_module, "SAVE_EVERY", -1.0)
    monkeypatch.setattr(output_module, "SHARD_SIZE", 2)


def killed(task: Task, writes: int) -> None:
    """Convert in a process that ends, as if killed, before it writes record number `writes`."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 9
        return
    written, write = 0, Output.write

    def dying(self, record, images):
        nonlocal written
        if written == writes:
            self._records.flush()  # what may or may not have reached the disk
            os._exit(9)
        written += 1
        write(self, record, images)

    Output.write = dying
    try:
        convert(task)
    finally:
        os._exit(1)


@pytest.mark.parametrize(("make", "shards"), RESUMED)
def test_a_killed_conversion_ends_with_the_same_bytes(tmp_path, make, shards: bool):
    make(tmp_path / "source")
    whole, out = tmp_path / "whole", tmp_path / "out"
    task = Task(tmp_path / "source", out, shards=shards)
    convert(Task(task.source, whole, shards=shards, threads=1))
    for writes in (3, 0):  # of the process that begins, and of those that go on
        killed(task, writes)
        assert not (out / "records.jsonl").exists()
    convert(task)
    assert tree(out) == tree(whole)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_changes_nothing(tmp_path, monkeypatch, threads: int):
    published.minimind(tmp_path / "source")
    convert(Task(tmp_path / "source", tmp_path / "one", threads=1))
    slow, first = pipeline.Converter.rows, []

    def uneven(self, rows):  # the first group takes longest
        if not first:
            first.append(time.sleep(0.05))
        return slow(self, rows)

    monkeypatch.setattr(pipeline.Converter, "rows", uneven)
    convert(Task(tmp_path / "source", tmp_path / "out", threads=threads))
    assert tree(tmp_path / "out") == tree(tmp_path / "one")


def test_only_the_same_conversion_goes_on(tmp_path):
    published.llava_folder(tmp_path / "source")
    task = Task(tmp_path / "source", tmp_path / "out")
    killed(task, 1)
    before = tree(task.out)
    for other in (Task(task.source, task.out, limit=2), Task(task.source, task.out, shards=True)):
        with pytest.raises(NanoVLMError, match="holds an unfinished conversion of another source"):
            convert(other)
    published.put(task.source / "llava_instruct.json", [published.llava(0)])
    with pytest.raises(NanoVLMError, match="or of files that have changed; delete it"):
        convert(task)
    assert tree(task.out) | {".lock": before[".lock"]} == before
    shutil.rmtree(task.out)
    assert convert(task).records_out == 1


def test_a_folder_that_lost_something_is_not_gone_on_with(tmp_path):
    published.llava_folder(tmp_path / "source")
    task = Task(tmp_path / "source", tmp_path / "out")
    killed(task, 3)
    (task.out / ".records.jsonl.part").write_bytes(b"{}\n")
    with pytest.raises(NanoVLMError, match="part: is not as it was left; delete .*out, and begin"):
        convert(task)
    shutil.rmtree(task.out)
    convert(task)
    journal = task.out / ".convert.json"
    journal.write_text("{}")  # a kill right at the end leaves it
    with pytest.raises(NanoVLMError, match="out: holds records.jsonl already"):
        convert(task)


def test_nothing_that_is_there_is_written_over(tmp_path):
    published.llava_folder(tmp_path / "source")
    out = tmp_path / "out"
    published.put(out / "mine.txt", "mine")
    with pytest.raises(NanoVLMError, match="out: holds mine.txt already; name a new or an empty"):
        convert(Task(tmp_path / "source", out))
    assert tree(out) == {"mine.txt": b"mine"}
    done = tmp_path / "done"
    convert(Task(tmp_path / "source", done))
    before = tree(done)
    with pytest.raises(NanoVLMError, match="done: holds records.jsonl already"):
        convert(Task(tmp_path / "source", done))
    assert tree(done) == before
    inside = tmp_path / "source" / "records"
    with pytest.raises(NanoVLMError, match="lies in a folder that this command reads"):
        convert(Task(tmp_path / "source", inside))
    assert not inside.exists()


def test_a_full_disk_loses_nothing_that_was_done(tmp_path, monkeypatch):
    published.the_cauldron(tmp_path / "source")
    task = Task(tmp_path / "source", tmp_path / "out")
    convert(Task(task.source, tmp_path / "whole"))
    write, written = Output.write, []

    def full(self, record, images):
        written.append(record)
        if len(written) == 4:
            raise OSError(28, "No space left on device")
        write(self, record, images)

    monkeypatch.setattr(Output, "write", full)
    with pytest.raises(OSError):
        convert(task)
    assert not (task.out / "records.jsonl").exists()
    monkeypatch.setattr(Output, "write", write)
    convert(task)
    assert tree(task.out) == tree(tmp_path / "whole")


def test_ctrl_c_is_one_line_and_the_command_goes_on_afterwards(tmp_path):
    rows = [published.llava(n, "0.jpg") for n in range(200_000)]
    published.put_lines(tmp_path / "source" / "chat.jsonl", rows)
    published.put_images(tmp_path / "source", ["0.jpg"])
    command = [sys.executable, "-m", "data_tools.convert", str(tmp_path / "source"),
               "--out", str(tmp_path / "out")]  # fmt: skip
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    part = tmp_path / "out" / ".records.jsonl.part"
    while process.poll() is None and not (part.exists() and part.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in errors and errors.rstrip().endswith("interrupted")
    assert not (tmp_path / "out" / "records.jsonl").exists()
    assert (tmp_path / "out" / ".convert.json").exists()
