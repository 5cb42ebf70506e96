"""A small hub on 127.0.0.1 that speaks what huggingface_hub and modelscope_hub ask for.

It serves folders as repositories: their metadata, their trees, and their files with ranges. Large
files are redirected to a second server, as the hubs redirect to their storage. Faults are switched
on for the paths that a pattern names.
"""

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" * 6 + "c0ff"
LARGE = (".safetensors", ".bin", ".parquet", ".zip")  # stored with Git LFS, in the second server
PAGE = b"<!DOCTYPE html><html><body>Please log in to this network</body></html>"


@dataclass
class Fault:
    """What goes wrong with requests whose path holds `pattern`, `times` times."""

    pattern: str
    status: int = 0  # answer with this instead
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int = -1  # close the connection after so many bytes of a file
    damage: bool = False  # turn the first byte of a file around
    page: bool = False  # an HTML page instead
    seconds_a_byte: float = 0.0
    times: int = 10**6


@dataclass
class Request:
    """What a client asked for."""

    method: str
    path: str
    range: str
    token: str
    on_storage: bool


class HubServer:
    """`repositories` maps owner/name to a folder; `licence` is on every card."""

    def __init__(self) -> None:
        self.repositories: dict[str, Path] = {}
        self.listed: dict[str, list[dict[str, Any]]] = {}  # further lines of a repository's tree
        self.licence = "apache-2.0"
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.blobs: dict[str, Path] = {}
        self.url = self.storage_url = ""

    def fail(self, pattern: str, **what: Any) -> None:
        """Switch a fault on."""
        self.faults.append(Fault(pattern, **what))

    def fault(self, path: str) -> Fault:
        """The fault of a request, which is used up by it."""
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.pattern, path):
                fault.times -= 1
                return fault
        return Fault("")

    def ranges(self, pattern: str) -> list[str]:
        """The ranges of the requests for bytes whose path holds `pattern`, in their order."""
        return [r.range for r in self.requests if re.search(pattern, r.path) and r.method == "GET"]

    def tree(self, repository: str) -> list[dict[str, Any]]:
        """The files of a repository as Hugging Face lists them."""
        folder = self.repositories[repository]
        lines = []
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            data, name = path.read_bytes(), path.relative_to(folder).as_posix()
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            line = {"type": "file", "path": name, "size": len(data), "oid": blob}
            sha256 = hashlib.sha256(data).hexdigest()
            self.blobs[sha256] = path
            if name.endswith(LARGE):
                line["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 134}
            lines.append(line)
        return lines + self.listed.get(repository, [])


@contextmanager
def running_hub() -> Iterator[HubServer]:
    """A hub that answers until the end of the block."""
    hub = HubServer()
    servers = []
    for is_storage in (False, True):
        handler = type("Handler", (_Handler,), {"hub": hub, "is_storage": is_storage})
        server = _Server(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
    hub.url, hub.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients go away, as they are meant to


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    is_storage: bool
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, path = self.hub, unquote(self.path)
        given = self.headers.get
        hub.requests.append(
            Request(
                self.command,
                path,
                given("Range") or "",
                given("Authorization") or given("Cookie") or "",
                self.is_storage,
            )
        )
        fault = hub.fault(path)
        if fault.status:
            self._send(fault.status, b'{"error": "fault"}', fault.headers)
        elif fault.page:
            self._send(200, PAGE, {"Content-Type": "text/html"})
        elif self.is_storage:
            self._send_file(hub.blobs[path.split("/")[-1]], fault)
        else:
            self._route(urlsplit(path).path, parse_qs(urlsplit(self.path).query), fault)

    def _route(self, path: str, query: dict[str, list[str]], fault: Fault) -> None:
        hub = self.hub
        scope = re.fullmatch(r"/api/v1/(?:models|datasets)/([^/]+/[^/]+)/repo(/files|/tree)?", path)
        if scope and scope[1] in hub.repositories:  # ModelScope
            folder = hub.repositories[scope[1]]
            if scope[2]:
                page = int(query.get("PageNumber", ["1"])[0])
                files = [_as_modelscope(line, folder) for line in hub.tree(scope[1])]
                data = {"Files": files if page == 1 else []}
                self._send_json({"Code": 200, "Success": True, "Data": data})
            else:
                self._send_file(folder / query["FilePath"][0], fault)
            return
        api = re.fullmatch(
            r"/api/(?:models|datasets)/([^/]+/[^/]+)(?:/revision/[^/]+|/tree/[^/]+(/.+)?)?", path
        )
        if api and api[1] in hub.repositories:
            if "/tree/" in path:
                inside = f"{api[2][1:]}/" if api[2] else ""
                lines = [line for line in hub.tree(api[1]) if line["path"].startswith(inside)]
                self._send_json(lines)
            else:
                card = {"license": hub.licence}
                self._send_json({"id": api[1], "sha": COMMIT, "cardData": card, "siblings": []})
            return
        file = re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if file and file[1] in hub.repositories:
            self._resolve(file[1], file[3], fault)
            return
        self._send(404, b'{"error": "Not Found"}', {"X-Error-Code": "RepoNotFound"})

    def _resolve(self, repository: str, name: str, fault: Fault) -> None:
        line = next(line for line in self.hub.tree(repository) if line["path"] == name)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{line["oid"]}"'}
        if "lfs" in line:
            sha256 = line["lfs"]["oid"]
            headers |= {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(line["size"])}
            self._send(302, b"", headers | {"Location": f"{self.hub.storage_url}/{name}/{sha256}"})
        else:
            self._send_file(self.hub.repositories[repository] / name, fault, headers)

    def _send_file(self, path: Path, fault: Fault, headers: dict[str, str] | None = None) -> None:
        data, headers = path.read_bytes(), headers or {}
        if fault.damage:
            data = bytes([data[0] ^ 255]) + data[1:]
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(asked[1]) if asked else 0
        if asked:
            headers |= {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        self._send(206 if asked else 200, data[start:], headers, fault)

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(
        self, status: int, body: bytes, headers: dict[str, str], fault: Fault | None = None
    ) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is not None and fault.cut_after >= 0:
            body = body[: fault.cut_after]
            self.close_connection = True
        if fault is not None and fault.seconds_a_byte:
            for byte in body:
                self.wfile.write(bytes([byte]))
                time.sleep(fault.seconds_a_byte)
        else:
            self.wfile.write(body)


def _as_modelscope(line: dict[str, Any], folder: Path) -> dict[str, Any]:
    path = folder / line["path"]
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    return {"Path": line["path"], "Size": line["size"], "Sha256": sha256, "Type": "blob"}
