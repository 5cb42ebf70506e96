"""`python -m nanovlm.serve` as it is typed: what it says, what it refuses, how it ends."""

import builtins
import re
import signal
import socket

import pytest
import torch

pytest.importorskip("fastapi", reason="python -m pip install -r requirements-web.txt")

from nanovlm.serve.__main__ import main
from nanovlm.utils import device
from tests.serve.serving import ASSETS, DESCRIPTION, Served, question


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGTERM to handle")
def test_it_serves_the_shipped_model_and_ends_with_sigterm(command, tmp_path):
    process = command(
        "-m", "nanovlm.serve", "--port", "0", "--no-page", "--quantize", "int8", cwd=tmp_path
    )
    said = []
    while not (said and said[-1].startswith("http://")):
        said.append(process.stderr.readline().decode())
        assert said[-1], said
    port = int(re.search(r"127\.0\.0\.1:(\d+)/v1", said[-1])[1])
    assert "tiny-vlm (int8" in said[0] and "toy world" in said[1] and len(said) == 3
    answer = Served(None, port).post(question())
    assert answer.json()["choices"][0]["message"]["content"] == DESCRIPTION
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=30)
    assert process.returncode == 0
    assert len(rest.splitlines()) == 1 and rest.startswith(b"POST /v1/chat/completions 200")


def test_a_port_in_use_is_said_before_a_model_is_read(call):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = call(main, "--port", port, "--model", "nowhere")
    assert done.returncode == 2
    assert done.stderr == (
        f"error: cannot listen on 127.0.0.1 port {port}: Address already in use; "
        "take another --port or --host\n"
    )


@pytest.mark.parametrize("name", ["fastapi", "uvicorn", "gradio"])
def test_a_missing_package_is_said_with_the_command_that_installs_it(call, monkeypatch, name):
    importing = builtins.__import__

    def without(module, *rest):
        if module.partition(".")[0] == name or module == "nanovlm.serve.server":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return importing(module, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    done = call(main, "--port", 0)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: the server needs {name}; "
        "install it with  python -m pip install -r requirements-web.txt\n"
    )


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(call, monkeypatch):
    sizes = {"SC_PAGE_SIZE": 1024, "SC_PHYS_PAGES": 2048}
    monkeypatch.setattr(device.os, "sysconf", sizes.get)
    done = call(main, "--port", 0, "--model", ASSETS / "tiny-vlm", "--dtype", "float32")
    assert done.returncode == 2
    assert done.stderr.endswith(
        "tiny-vlm: the model takes 0.0 GB, and this machine has 0.0 GB of memory; "
        "take a smaller one\n"
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets other machines ask; give them a key"),
        (["--host", "no.such.host.invalid", "--api-key", "k"], "cannot listen on no.such.host"),
        (["--port", "70000"], "--port 70000 is no port"),
        (["--model", "nowhere", "--port", "0"], "nowhere: there is no such folder"),
        (["--max-queue", "0"], "--max-queue has to be 1 or more"),
        (["--timeout", "-1"], "--timeout has to be above 0"),
        (["--quantize", "int2"], "argument --quantize: invalid choice"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_flag_is_one_line(call, monkeypatch, flags, message):
    monkeypatch.delenv("NANOVLM_API_KEY", raising=False)
    done = call(main, *flags)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert message in done.stderr


def test_memory_of_a_gpu_is_compared_too(monkeypatch):
    class Properties:
        total_memory = 8e9

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    with pytest.raises(Exception, match="x takes 9.0 GB, and this GPU has 8.0 GB"):
        device.check_memory(9 * 10**9, "x", torch.device("cuda"))
