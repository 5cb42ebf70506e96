"""Worker processes: what they leave to their parent, and what is said when one dies."""

import os
import signal
import subprocess
import sys
import time

import pytest
from torch.utils.data import Dataset

from nanovlm.data.workers import prepare_ahead
from nanovlm.errors import NanoVLMError

pytestmark = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create"
)  # on a machine with fewer cores


class Processes(Dataset):
    """Item i is the number of the process that makes it; one item may end it."""

    def __init__(self, deadly: int = -1) -> None:
        self.deadly = deadly

    def __getitem__(self, number: int) -> int:
        if number == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return os.getpid()


def test_signals_are_left_to_the_parent():
    items = prepare_ahead(Processes(), 0, 30, workers=1)
    worker = next(items)
    assert worker != os.getpid()
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker, number)
        time.sleep(0.05)
    assert set(items) == {worker}  # more items than are prepared ahead: it lives on


def test_a_worker_that_dies_is_said_in_one_line_where_its_item_is_asked_for(monkeypatch, capfd):
    # Seconds that it waits for the other workers to end.
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
    items = prepare_ahead(Processes(deadly=8), 0, 20, workers=2)
    next(items)
    with pytest.raises(NanoVLMError) as caught:
        for _ in range(8):
            for _ in range(10):  # nothing raises here, though a worker may be dead by now
                time.sleep(0.001)
            next(items)
    assert "a process that prepares batches died" in str(caught.value) and "\n" not in str(
        caught.value
    )
    assert "--workers" in str(caught.value) and "Traceback" not in capfd.readouterr().err


def test_an_error_of_the_dataset_is_no_death():
    class Broken(Dataset):
        def __getitem__(self, number: int) -> int:
            raise RuntimeError("a mistake of ours")

    for workers in (0, 1):
        with pytest.raises(RuntimeError, match="a mistake of ours"):
            next(prepare_ahead(Broken(), 0, 2, workers))


def test_without_workers_items_are_made_here():
    assert list(prepare_ahead(Processes(), 2, 5, workers=0)) == [os.getpid()] * 3


def test_workers_end_with_their_parent_though_they_heed_no_signal(tmp_path):
    """Also where something, such as a traceback, keeps the loader alive until Python exits."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\nfrom nanovlm.data.workers import prepare_ahead\n"
        "from tests.data.test_workers import Processes\n"
        "items = prepare_ahead(Processes(), 0, 100, workers=1)\n"
        "next(items)\nsys.exit(3)\n"
    )
    # Waits until the worker, too, has closed its end of the pipes.
    done = subprocess.run(
        [sys.executable, script],
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 3 and done.stderr == ""
