"""Servers within the test's process, on free ports of this machine."""

import base64
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.serve.limits import Limits
from nanovlm.serve.server import Server, Site, listen

ASSETS = Path(__file__).parents[2] / "nanovlm/assets"
NAME = "tiny-vlm"
DEFAULT, WITHOUT_PAGE = Limits(), Site(NAME, page=False)
DESCRIPTION = "图中有三个物体，从左到右是：大的红色圆环、大的蓝色五角星、小的橙色三角形。"


@dataclass
class Served:
    """A server that runs."""

    server: Server
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def places(self) -> int:
        return self.server.queue.places

    def client(self, **headers: str) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers=headers, timeout=30, trust_env=False)

    def post(self, body, **headers: str) -> httpx.Response:
        """A chat completion, of JSON or of any bytes."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **headers}
        with self.client() as client:
            return client.post("/v1/chat/completions", content=content, headers=headers)

    def wait_for_places(self, number: int) -> None:
        """Until so many requests have a place; fails after some seconds."""
        for _ in range(500):
            if self.places == number:
                return
            time.sleep(0.01)
        raise AssertionError(f"{self.places} places, not {number}")


@contextlib.contextmanager
def served(
    model: VisionLanguageModel, limits: Limits = DEFAULT, site: Site = WITHOUT_PAGE
) -> Iterator[Served]:
    listener = listen("127.0.0.1", 0)
    server = Server(model, limits, site)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.005)
        yield Served(server, listener.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()


class Gate:
    """Keeps a server's thread from answering until it is opened."""

    def __init__(self, server: Server, monkeypatch) -> None:
        self._open, answer = threading.Event(), server.queue._answer
        self.batches: list[int] = []

        def answer_behind_gate(jobs) -> None:
            assert self._open.wait(30)
            self.batches.append(len(jobs))
            answer(jobs)

        monkeypatch.setattr(server.queue, "_answer", answer_behind_gate)

    def open(self) -> None:
        self._open.set()


def uri_of(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def data_uri(name: str = "scene.png") -> str:
    return uri_of((ASSETS / name).read_bytes())


def image_part(url: str | None = None) -> dict:
    return {"type": "image_url", "image_url": {"url": data_uri() if url is None else url}}


def question(text: str = "描述图片", *parts: dict, **parameters) -> dict:
    """The body of a request about scene.png, or about `parts`."""
    content = [{"type": "text", "text": text}, *(parts or [image_part()])]
    return {"model": NAME, "messages": [{"role": "user", "content": content}], **parameters}


def error_of(response: httpx.Response) -> dict:
    """The error object of a response, which has OpenAI's fields."""
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["message"]
    assert "\n" not in error["message"]
    return error
