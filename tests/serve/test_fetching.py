"""Images of named hosts: by https alone, bounded, and never from a private network."""

import asyncio
import contextlib
import http.server
import ssl
import subprocess
import threading

import pytest

pytest.importorskip("fastapi", reason="python -m pip install -r requirements-web.txt")

from nanovlm.errors import NanoVLMError
from nanovlm.serve import images
from nanovlm.serve.images import fetch, is_public
from nanovlm.serve.limits import Limits
from tests.serve.serving import ASSETS, DESCRIPTION, error_of, image_part, question, served

IMAGE = (ASSETS / "scene.png").read_bytes()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append((self.headers["Host"], self.path))
        if self.path.startswith("/to?"):
            self.send_response(302)
            self.send_header("Location", self.path.partition("?")[2])
            self.end_headers()
            return
        self.send_response(200 if self.path.startswith("/scene.png") else 404)
        self.end_headers()
        if self.path == "/scene.png?long":
            with contextlib.suppress(OSError):
                for _ in range(1000):
                    self.wfile.write(b"x" * 10**5)
        self.wfile.write(IMAGE)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def https(tmp_path_factory):
    """An https server as `images.test`, and the context that trusts its certificate."""
    folder = tmp_path_factory.mktemp("certificate")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-keyout", key, "-out", certificate, "-subj", "/CN=images.test"]
    command += ["-addext", "subjectAltName=DNS:images.test"]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("openssl cannot make a certificate here")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server, ssl.create_default_context(cafile=str(certificate))
    server.shutdown()
    server.server_close()


@pytest.fixture
def get(https, monkeypatch):
    """Fetch a path of images.test, whose name leads to the server here."""
    server, trusted = https
    server.asked.clear()

    async def resolve(self, host, port, **_):
        assert host == "images.test"
        return [(None, None, None, None, ("127.0.0.1", port))]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", resolve)

    def fetched(path: str, **options) -> bytes:
        options = {"is_allowed": lambda _: True, "certificates": trusted, **options}
        url = f"https://images.test:{server.server_port}{path}"
        return asyncio.run(fetch(url, ("images.test",), 10**6, **options))

    return fetched


def test_an_image_is_fetched_under_the_name_of_its_host(get, https):
    assert get("/scene.png?size=1") == IMAGE
    host = f"images.test:{https[0].server_port}"
    assert https[0].asked == [(host, "/scene.png?size=1")]


def test_a_redirect_within_the_host_is_followed(get):
    assert get("/to?/scene.png") == IMAGE


@pytest.mark.parametrize(
    "path, message",
    [
        ("/to?https://other.test/scene.png", "this server asks images.test alone"),
        ("/to?http://images.test/scene.png", "only data: and https:"),
        ("/to?file:///etc/passwd", "only data: and https:"),
        ("/to?/to?/to?/to?/to?/scene.png", "redirects more than 3 times"),
        ("/nothing", "answers 404"),
        ("/scene.png?long", "is larger than 1,000,000 bytes"),
    ],
)
def test_what_a_host_may_not_do(get, path, message):
    with pytest.raises(NanoVLMError, match=message):
        get(path)


def test_a_name_that_leads_into_a_private_network_is_not_asked(get, https):
    with pytest.raises(NanoVLMError, match="is in a private network"):
        get("/scene.png", is_allowed=is_public)
    assert not https[0].asked


def test_a_certificate_of_nobody_is_not_trusted(get, https):
    with pytest.raises(NanoVLMError, match="cannot be fetched from images.test"):
        get("/scene.png", certificates=True)
    assert not https[0].asked


@pytest.mark.parametrize(
    "address, public",
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("192.168.1.1", False),
        ("172.20.0.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:10.0.0.1", False),
    ],
)
def test_which_addresses_are_public(address, public):
    assert is_public(address) == public


def test_the_server_asks_named_hosts_alone(model, monkeypatch):
    asked = []

    async def fake(url, hosts, max_bytes):
        asked.append((url, hosts, max_bytes))
        return IMAGE

    with served(model, Limits(image_hosts=("localhost",))) as server:
        for url, message in (
            ("https://example.com/a.png", "this server asks localhost alone"),
            ("https://user:pass@localhost/a.png", "without a user"),
            ("http://localhost/a.png", "only data: and https:"),
            ("https://localhost/a.png", "is in a private network"),
            ("https://localhost:x/a.png", "is not a URL"),
            ("https://[::1/a.png", "is not a URL"),
            ("/etc/passwd", "only data: and https:"),
        ):
            error = error_of(server.post(question("?", image_part(url))))
            assert error["code"] == "invalid_image" and message in error["message"]
        monkeypatch.setattr(images, "fetch", fake)
        answer = server.post(question("描述图片", image_part("https://localhost/a.png")))
        assert answer.json()["choices"][0]["message"]["content"] == DESCRIPTION
    assert asked == [("https://localhost/a.png", ("localhost",), 20 * 10**6)]
