"""Two hundred clients at once, good and bad: nothing leaks, and each gets its own answer.

python -m pytest -m slow tests/serve/test_load.py
"""

import asyncio
import contextlib
import json
import os
import random
import re
import statistics
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="python -m pip install -r requirements-web.txt")

import httpx

from tests.serve.malformed import MALFORMED, malformed
from tests.serve.serving import image_part, question, uri_of

CLIENTS, ROUNDS = 200, 3
ASKED = ("描述图片", "How many objects are there?", "图中有几个物体？", "Describe the image.")
HEADERS = {"Content-Type": "application/json"}
ADDRESS = "/v1/chat/completions"
TRUST = httpx.create_ssl_context()  # once: each client would take 20 ms for its own


@dataclass
class Figures:
    seconds: list[float] = field(default_factory=list)  # of answers, from first try to the end
    health: list[float] = field(default_factory=list)
    told_to_wait: int = 0
    left: int = 0
    slow: int = 0
    refused: int = 0


@dataclass
class State:
    """Of the server's process."""

    memory: float  # MB
    threads: int
    files: int

    @classmethod
    def of(cls, pid: int) -> "State":
        status = Path(f"/proc/{pid}/status").read_text()
        return cls(
            int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1000,
            int(re.search(r"Threads:\s+(\d+)", status)[1]),
            len(os.listdir(f"/proc/{pid}/fd")),
        )


async def answer(client: httpx.AsyncClient, asked: dict, figures: Figures) -> str:
    """Ask until there is a place."""
    began = time.perf_counter()
    while True:
        response = await client.post(ADDRESS, json=asked)
        if response.status_code != 429:
            break
        figures.told_to_wait += 1
        await asyncio.sleep(float(response.headers["retry-after"]) * random.uniform(0.2, 1))
    assert response.status_code == 200, response.text
    figures.seconds.append(time.perf_counter() - began)
    return response.json()["choices"][0]["message"]["content"]


async def read_slowly(client: httpx.AsyncClient, asked: dict, figures: Figures) -> str | None:
    """A stream, a few bytes at a time; None where there was no place."""
    text = ""
    async with client.stream("POST", ADDRESS, json={**asked, "stream": True}) as response:
        if response.status_code == 429:
            figures.told_to_wait += 1
            return None
        async for line in response.aiter_lines():
            await asyncio.sleep(0.02)
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
    figures.slow += 1
    return text


async def leave(client: httpx.AsyncClient, asked: dict, figures: Figures) -> None:
    """Ask, and go away before or within the answer."""
    asked = {**asked, "stream": random.random() < 0.5, "temperature": 2, "max_tokens": 300}
    with contextlib.suppress(httpx.TimeoutException):
        await client.post(ADDRESS, json=asked, timeout=random.uniform(0.01, 0.3))
    figures.left += 1


async def one_client(number: int, url: str, expected: dict[str, tuple], figures: Figures) -> None:
    draw = random.Random(number)
    async with httpx.AsyncClient(base_url=url, timeout=300, verify=TRUST) as client:
        for _ in range(ROUNDS):
            asked, right = draw.choice([*expected.values()])
            kind = draw.random()
            if kind < 0.15:
                await leave(client, asked, figures)
            elif kind < 0.3:
                assert await read_slowly(client, asked, figures) in (right, None)
            else:
                assert await answer(client, asked, figures) == right


async def send_malformed(url: str, figures: Figures) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=300, verify=TRUST) as client:
        for number in range(MALFORMED):
            response = await client.post(ADDRESS, content=malformed(number), headers=HEADERS)
            assert response.status_code in (200, 400, 404, 429), response.text
            figures.refused += response.status_code != 200


def watch_health(url: str, figures: Figures, ended: threading.Event) -> None:
    with httpx.Client(base_url=url, timeout=10, verify=TRUST) as client:
        while not ended.is_set():
            began = time.perf_counter()
            assert client.get("/health").status_code == 200
            figures.health.append(time.perf_counter() - began)
            time.sleep(0.05)


async def load(url: str, expected: dict[str, tuple]) -> Figures:
    figures, ended = Figures(), threading.Event()
    watching = asyncio.create_task(asyncio.to_thread(watch_health, url, figures, ended))
    clients = [one_client(number, url, expected, figures) for number in range(CLIENTS)]
    try:
        await asyncio.gather(*clients, send_malformed(url, figures))
    finally:
        ended.set()
        await watching
    return figures


async def answers_alone(url: str, scenes: list[str]) -> dict[str, tuple]:
    """The questions and what the server answers when it has nothing else to do."""
    found = {}
    async with httpx.AsyncClient(base_url=url, timeout=60, verify=TRUST) as client:
        for scene in scenes:
            for text in ASKED:
                asked = question(text, image_part(scene))
                found[scene + text] = asked, await answer(client, asked, Figures())
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads Linux's /proc")
def test_two_hundred_clients(command, tiny, capsys):
    scenes = sorted((tiny.data / "images/val").glob("*.png"))
    uris = [uri_of(scene.read_bytes()) for scene in scenes]
    process = command("-m", "nanovlm.serve", "--port", 0, "--no-page", "--dtype", "float32")
    try:
        while not (line := process.stderr.readline().decode()).startswith("http://"):
            assert line
        url = re.match(r"http://127\.0\.0\.1:\d+", line)[0]
        # The log is read on, so that its pipe does not fill.
        threading.Thread(target=process.stderr.read, daemon=True).start()

        async def run() -> list[tuple[State, Figures | None, float]]:
            expected = await answers_alone(url, uris)
            assert len({right for _, right in expected.values()}) > 8
            found = [(State.of(process.pid), None, 0.0)]
            for _ in range(3):
                began = time.perf_counter()
                figures = await load(url, expected)
                await asyncio.sleep(1)
                found.append((State.of(process.pid), figures, time.perf_counter() - began - 1))
            return found

        found = asyncio.run(run())
        process.terminate()
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
    with capsys.disabled():
        for state, figures, seconds in found:
            print()
            if figures:
                print(lines(figures, seconds))
            print(f"{state.memory:.0f} MB, {state.threads} threads, {state.files} open files")
    assert max(seconds for _, figures, _ in found if figures for seconds in figures.health) < 2
    first, last = found[1][0], found[-1][0]
    assert last.memory < first.memory + 20
    assert last.threads <= first.threads and last.files <= first.files + 2


def lines(figures: Figures, seconds: float) -> str:
    answered = sorted(figures.seconds)
    return (
        f"{seconds:.1f} s: {len(answered)} answers, half of them within "
        f"{statistics.median(answered):.1f} s, 95 % within "
        f"{answered[len(answered) * 95 // 100]:.1f} s; {figures.told_to_wait} times 429\n"
        f"{figures.slow} slow readers, {figures.left} clients gone, {figures.refused} malformed "
        f"requests refused; /health asked {len(figures.health)} times, at most "
        f"{max(figures.health):.2f} s"
    )
