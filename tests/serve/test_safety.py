"""What a client may not do, and what it is told; places in the queue come back whatever happens."""

import io
import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="python -m pip install -r requirements-web.txt")

from nanovlm.engine.answering import Writer
from nanovlm.inputs import image as image_module
from nanovlm.serve import app
from nanovlm.serve.limits import Limits
from nanovlm.serve.server import Site
from tests.serve.malformed import MALFORMED, malformed
from tests.serve.serving import (
    DESCRIPTION,
    NAME,
    Gate,
    error_of,
    image_part,
    question,
    served,
    uri_of,
)


@pytest.fixture
def endless(model, monkeypatch):
    """The model never ends its turn."""
    monkeypatch.setattr(model.chat, "stop_ids", set())


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    "url, message",
    [
        ("/etc/passwd", "'/etc/passwd' is not fetched"),
        ("file:///etc/passwd", "is not fetched; send the image itself"),
        ("scene.png", "is not fetched"),
        ("nanovlm/assets/scene.png", "is not fetched"),
        ("images.tar::a.png", "is not fetched"),
        ("https://127.0.0.1/a.png", "is not fetched"),
        ("", "is not fetched"),
        ("data:image/png;base64,!!!!", "damaged or cut off in its base64"),
        ("data:image/png,abc", "not in base64"),
        ("data:image/png;base64,", "the file is empty"),
        (uri_of(b"/etc/passwd"), "not an image"),
        (uri_of(b"%PDF-1.7"), "is a PDF document"),
        (uri_of(png(64, 64)[:50]), "cannot read the image|not an image, or cut off"),
        (uri_of(png(2**14, 2**14)), "more pixels than the limit"),
        (uri_of(png(2**13, 2**13)), "more than this server's 33,554,432 pixels"),
    ],
    ids=range(15),
)
def test_no_path_is_opened_and_a_bad_image_is_refused(server, monkeypatch, url, message):
    opened = []
    monkeypatch.setattr(image_module, "open_regular", opened.append)
    response = server.post(question("描述图片", image_part(), image_part(url)))
    error = error_of(response)
    assert response.status_code == 400 and error["code"] == "invalid_image"
    assert error["message"].startswith("image 2: ") and re.search(message, error["message"])
    assert not opened


def test_images_are_counted(server):
    error = error_of(server.post(question("?", *[image_part()] * 17)))
    assert "17 images" in error["message"]


def test_a_full_queue_tells_to_come_later(model, monkeypatch):
    with served(model, Limits(queue=2)) as server, ThreadPoolExecutor(2) as pool:
        gate = Gate(server.server, monkeypatch)
        waiting = [pool.submit(server.post, question()) for _ in range(2)]
        server.wait_for_places(2)
        refused = server.post(question())
        with server.client() as client:
            assert client.get("/health").status_code == 200
        gate.open()
        assert [each.result().status_code for each in waiting] == [200, 200]
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert error_of(refused)["type"] == "rate_limit_error"
        assert server.post(question()).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_is_ended(model, monkeypatch, stream):
    with served(model, Limits(seconds=0.5)) as server:
        gate = Gate(server.server, monkeypatch)
        response = server.post(question(stream=stream))
        server.wait_for_places(0)
        gate.open()
        if stream:
            *_, told = [line for line in response.text.split("\n\n") if line]
            assert json.loads(told.removeprefix("data: "))["error"]["code"] == "timeout"
        else:
            assert response.status_code == 504 and error_of(response)["code"] == "timeout"
        assert server.post(question()).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_place(model, endless, monkeypatch, capsys, stream):
    written = []
    put = Writer.put

    def counting(writer, token):
        written.append(token)
        time.sleep(0.005)
        return put(writer, token)

    monkeypatch.setattr(Writer, "put", counting)
    body = json.dumps(question(max_tokens=500, stream=stream)).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with served(model) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head.encode() + body)
            while len(written) < 20:
                time.sleep(0.005)
            assert server.places == 1
        server.wait_for_places(0)
        if stream:
            while "client gone" not in (said := capsys.readouterr().err):
                time.sleep(0.01)
            assert said.startswith("POST /v1/chat/completions 200")
        monkeypatch.setattr(Writer, "put", put)
        server.post(question(max_tokens=1))  # the thread is free
        assert len(written) < 400


def test_a_client_that_leaves_while_it_sends_frees_its_place(server):
    for body in (b"", b'{"model"'):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            head += "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n"
            connection.sendall(head.encode() + body)
            server.wait_for_places(1)
        server.wait_for_places(0)


def test_a_client_that_sends_too_slowly_is_told_so(server, monkeypatch):
    monkeypatch.setattr(app, "BODY_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")
    server.wait_for_places(0)


def test_a_client_that_reads_slowly_holds_up_nobody(model, endless):
    body = json.dumps(question(max_tokens=200, stream=True)).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with (
        served(model) as server,
        socket.create_connection(("127.0.0.1", server.port)) as connection,
    ):
        connection.sendall(head.encode() + body)
        server.wait_for_places(1)
        assert server.post(question(max_tokens=1)).status_code == 200
        received = b""
        while b"[DONE]" not in received:
            received += connection.recv(300)
        assert received.count(b"data: ") > 150


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_refused(model, chunked):
    def pieces():
        yield from [b"x" * 10**6] * 3

    with served(model, Limits(body=2)) as server, server.client() as client:
        response = client.post(
            "/v1/chat/completions",
            content=pieces() if chunked else b"x" * 3 * 10**6,
            headers={"Content-Type": "application/json"},
        )
        assert response.status_code == 413
        assert "more than 2,000,000 bytes (--max-body)" in error_of(response)["message"]
        server.wait_for_places(0)


def test_the_api_asks_for_the_key(model):
    with served(model, site=Site(NAME, api_key="秘密 key", page=False)) as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer"}):
            with server.client(**headers) as client:
                for path in ("/v1/models", "/v1/nothing", "/v1"):
                    response = client.get(path)
                    assert response.status_code == 401
                    assert error_of(response)["code"] == "invalid_api_key"
                assert client.post("/v1/chat/completions").status_code == 401
                assert client.get("/health").status_code == 200
    with served(model, site=Site(NAME, api_key="secret", page=False)) as server:
        assert server.post(question(), Authorization="Bearer secret").status_code == 200


def test_other_sites_may_not_ask(server):
    """Neither from their pages, nor under a name of their own that leads to this machine."""
    response = server.post(question(), Origin="https://evil.example")
    assert "access-control-allow-origin" not in response.headers
    with server.client(Host="evil.example") as client:
        response = client.get("/v1/models")
        assert response.status_code == 403 and "localhost" in error_of(response)["message"]
    for host in ("localhost:8000", "127.0.0.1", "[::1]:1"):
        with server.client(Host=host) as client:
            assert client.get("/v1/models").status_code == 200
    response = server.post(question(), **{"Content-Type": "text/plain"})
    assert response.status_code == 415  # as a form of another site would send it


def test_named_sites_may_ask(model):
    site = Site(NAME, api_key="k", origins=("https://good.example",), page=False)
    with served(model, site=site) as server, server.client() as client:
        for origin, allowed in (("https://good.example", True), ("https://evil.example", False)):
            asked = {
                "Origin": origin,
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization",
            }
            preflight = client.options("/v1/chat/completions", headers=asked)
            assert ("access-control-allow-origin" in preflight.headers) == allowed
            headers = {"Origin": origin, "Authorization": "Bearer k"}
            answered = client.get("/v1/models", headers=headers)
            assert ("access-control-allow-origin" in answered.headers) == allowed


def test_a_failure_while_answering_is_said_and_the_next_one_is_answered(model, monkeypatch, capsys):
    with served(model) as server:

        def fail(*_):
            raise MemoryError("no memory left")

        monkeypatch.setattr(server.server.queue, "_answer_one", fail)
        response = server.post(question())
        assert response.status_code == 500 and error_of(response)["type"] == "server_error"
        monkeypatch.undo()
        assert server.post(question()).status_code == 200
    assert "error: MemoryError: no memory left" in capsys.readouterr().err


def test_the_log_has_one_line_a_request_and_nothing_of_what_was_said(model, capsys):
    with served(model) as server:
        server.post(question("描述图片"))
        server.post(question("描述图片", stream=True))
        server.post(question("描述图片", seed="x"))
        with server.client() as client:
            client.get("/v1/%0a\u202e" + "x" * 500)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    answered = r"POST /v1/chat/completions 200 in \d\.\d\d s, 69 \+ 21 tokens"
    assert re.fullmatch(answered, lines[0]) and re.fullmatch(answered, lines[1])
    assert re.fullmatch(r"POST /v1/chat/completions 400 in \d\.\d\d s", lines[2])
    assert lines[3].startswith(r"GET /v1/\n\u202exxx") and "404" in lines[3]
    assert not [line for line in lines if "描述" in line or "圆环" in line or len(line) > 200]


def test_the_end_of_the_server_waits_for_answers(model, monkeypatch):
    with ThreadPoolExecutor(2) as pool, served(model) as server:
        gate = Gate(server.server, monkeypatch)
        waiting = [pool.submit(server.post, question(stream=each)) for each in (False, True)]
        server.wait_for_places(2)
        server.server.should_exit = True
        while (refused := server.post({})).status_code != 503:
            time.sleep(0.01)  # uvicorn looks ten times a second
        gate.open()
        texts = [each.result().text for each in waiting]
    assert error_of(refused)["code"] == "shutting_down"
    assert DESCRIPTION in texts[0] and texts[1].endswith("data: [DONE]\n\n")


def test_malformed_requests_are_refused_with_a_json_error(server):
    """Each with a status that is the client's fault, and the server is as before."""
    before = threading.active_count()
    with server.client() as client:
        for number in range(MALFORMED):
            headers = {"Content-Type": "application/json"}
            body = malformed(number)
            response = client.post("/v1/chat/completions", content=body, headers=headers)
            if response.status_code != 200:  # a byte turned around within the text is no fault
                assert response.status_code in (400, 404), (number, response.text)
                error_of(response)
    server.wait_for_places(0)
    assert threading.active_count() <= before + 32  # of asyncio's pool
    assert server.post(question()).json()["choices"][0]["message"]["content"] == DESCRIPTION
