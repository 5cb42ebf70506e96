"""Worker processes: what they leave to their parent, and what is said when one dies."""

import gc
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import reduction
from multiprocessing.connection import Client
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import Dataset

from nanovlm.data.workers import Loading, _watched, choose_loading, prepare_ahead
from nanovlm.errors import NanoVLMError

pytestmark = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create"
)  # on a machine with fewer cores
CUDA = torch.device("cuda")


class Processes(Dataset):
    """Item i is the number of the process that makes it; one item may end it."""

    def __init__(self, deadly: int = -1) -> None:
        self.deadly = deadly

    def __getitem__(self, number: int) -> int:
        if number == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return os.getpid()


def test_signals_are_left_to_the_parent():
    items = prepare_ahead(Processes(), 0, 30, Loading(workers=1))
    worker = next(items)
    assert worker != os.getpid()
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker, number)
        time.sleep(0.05)
    assert set(items) == {worker}  # more items than are prepared ahead: it lives on


def test_a_worker_that_dies_is_said_in_one_line_where_its_item_is_asked_for(monkeypatch, capfd):
    # Seconds that it waits for the other workers to end.
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
    items = prepare_ahead(Processes(deadly=8), 0, 20, Loading(workers=2))
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


def test_a_death_that_the_thread_that_pins_memory_saw_first_is_said_alike():
    def loader():
        raise RuntimeError("Pin memory thread exited unexpectedly")
        yield

    with pytest.raises(NanoVLMError, match="a process that prepares batches died"):
        next(_watched(loader(), ()))


class HalfRead(Dataset):
    """Item 0 hands a file over to a reader that goes away instead of taking it; 1 fails for good.

    Both happen in the thread that hands over the tensors of a batch.
    """

    def __getitem__(self, number: int) -> int:
        with open(os.devnull, "rb") as file:
            address, key = reduction.DupFd(file.fileno())._id
            authkey = multiprocessing.current_process().authkey
            with Client(address, authkey=authkey) as client:
                if number == 1:
                    client.send((key + 1_000, os.getpid()))
            os.close(reduction.DupFd(file.fileno()).detach())  # it is done with the one before
        return number


@pytest.mark.skipif(sys.platform == "win32", reason="files are handed over in another way there")
def test_a_parent_that_stops_reading_in_the_middle_of_a_batch_is_no_error_of_a_worker(capfd):
    items = prepare_ahead(HalfRead(), 0, 1, Loading(workers=1))
    assert list(items) == [0]
    assert capfd.readouterr().err == ""
    assert list(prepare_ahead(HalfRead(), 1, 2, Loading(workers=1))) == [1]
    assert "KeyError" in capfd.readouterr().err


def test_an_error_of_the_dataset_is_no_death():
    class Broken(Dataset):
        def __getitem__(self, number: int) -> int:
            raise RuntimeError("a mistake of ours")

    for workers in (0, 1):
        with pytest.raises(RuntimeError, match="a mistake of ours"):
            next(prepare_ahead(Broken(), 0, 2, Loading(workers)))


def test_without_workers_items_are_made_here():
    assert list(prepare_ahead(Processes(), 2, 5, Loading(workers=0))) == [os.getpid()] * 3


def test_workers_end_with_their_parent_though_they_heed_no_signal(tmp_path):
    """Also where something, such as a traceback, keeps the loader alive until Python exits."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\nfrom nanovlm.data.workers import Loading, prepare_ahead\n"
        "from tests.data.test_workers import Processes\n"
        "items = prepare_ahead(Processes(), 0, 100, Loading(workers=1))\n"
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


@pytest.fixture
def many_cores(monkeypatch):
    """A Linux machine with 12 cores and plenty of shared memory."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)), raising=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**33))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


@pytest.mark.parametrize(("cores", "processes", "workers"), [(12, 1, 8), (6, 1, 6), (12, 5, 2)])
def test_a_gpu_has_a_worker_per_core_and_eight_at_most(
    monkeypatch, many_cores, cores, processes, workers
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    loading, how = choose_loading("auto", CUDA)
    assert loading == Loading(workers, pin_memory=True)
    assert how == f"{workers} processes prepare batches in advance"


def test_elsewhere_there_is_none_and_a_given_number_wins(many_cores):
    for device in map(torch.device, ("cpu", "mps")):
        assert choose_loading("auto", device) == (Loading(0, pin_memory=False), "")
        assert choose_loading(3, device) == (Loading(3, pin_memory=False), "")
    for number in (0, 20):
        assert choose_loading(number, CUDA) == (Loading(number, pin_memory=True), "")


def test_where_workers_would_fail_there_is_none_and_the_reason_is_said(monkeypatch, many_cores):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=64e6))
    loading, how = choose_loading("auto", CUDA)
    assert loading == Loading(0, pin_memory=True)
    assert "/dev/shm has 64 MB free" in how and "--shm-size" in how
    monkeypatch.setattr(sys, "platform", "win32")
    loading, how = choose_loading("auto", CUDA)
    assert loading == Loading(0, pin_memory=True) and "--workers" in how


def test_a_loader_that_is_done_leaves_nothing_to_do_at_exit(monkeypatch):
    """A run starts one at every validation."""
    at_exit = []
    monkeypatch.setattr("atexit.register", at_exit.append)
    monkeypatch.setattr("atexit.unregister", at_exit.remove)
    assert len(set(prepare_ahead(Processes(), 0, 6, Loading(workers=2)))) == 2
    assert not at_exit
    begun = prepare_ahead(Processes(), 0, 6, Loading(workers=2))
    next(begun)
    assert len(at_exit) == 2
    begun.close()
    assert not at_exit


class Slow(Dataset):
    def __getitem__(self, number: int) -> int:
        time.sleep(60 * number)
        return number


def test_a_loader_that_is_given_up_does_not_wait_for_its_workers(monkeypatch):
    """Each would be waited for, five seconds at least (60 here), while a scheduler counts."""
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 60)
    others, start = multiprocessing.active_children(), time.monotonic()
    loader = prepare_ahead(Slow(), 0, 4, Loading(workers=2))
    assert next(loader) == 0
    loader.close()
    assert time.monotonic() - start < 30
    assert set(multiprocessing.active_children()) <= set(others)


def test_a_loader_that_is_given_up_asks_for_no_lock_that_a_killed_worker_held(monkeypatch):
    shut_down = []
    kind = torch.utils.data.dataloader._MultiProcessingDataLoaderIter
    monkeypatch.setattr(kind, "_shutdown_workers", shut_down.append)
    loader = prepare_ahead(Processes(), 0, 6, Loading(workers=2))
    next(loader)
    loader.close()
    del loader
    gc.collect()
    assert not shut_down


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_for_a_gpu_come_in_pinned_memory():
    class Tensors(Dataset):
        def __getitem__(self, number: int) -> torch.Tensor:
            return torch.full((2, 3), number)

    for number, item in enumerate(prepare_ahead(Tensors(), 0, 6, choose_loading("auto", CUDA)[0])):
        assert item.is_pinned() and torch.equal(item.cuda().cpu(), torch.full((2, 3), number))
