"""What holds for every request, the page's too: who may ask, how much, and its line in the log."""

import hmac
import re
import time
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanovlm.serve.limits import RequestError
from nanovlm.utils.console import say

LOCAL_HOST = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?", re.IGNORECASE)
# Browsers ask nobody else, whatever the page's code says.
CONTENT_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    "object-src 'none'; base-uri 'self'; frame-ancestors 'self'"
)
LOGGED = ("/v1/", "/health")  # the page says itself what it answers


class Guard:
    """ASGI middleware around the whole server."""

    def __init__(self, app: ASGIApp, max_body: int, api_key: str, local_only: bool) -> None:
        self.app, self.max_body, self.api_key = app, max_body, api_key
        self.local_only = local_only  # then no site may have its name resolved to this machine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request, or refuse it before anything of its body is read."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":  # there are no websockets
                await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0
        facts: dict[str, Any] = {}  # for the log, from further inside
        scope["facts"] = facts

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = CONTENT_POLICY
                headers["Referrer-Policy"] = "no-referrer"
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        try:
            self._check(scope)
            await self.app(scope, self._bounded(receive), send_on)
        except RequestError as error:
            response = JSONResponse(error.body(), error.status, error.headers)
            await response(scope, receive, send_on)
        finally:
            if scope["path"].startswith(LOGGED):
                log_line(scope, status, time.perf_counter() - began, facts)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if self.local_only and not LOCAL_HOST.fullmatch(headers.get("host", "")):
            raise RequestError("this server answers as localhost alone (--host)", 403)
        # A browser asks with OPTIONS, and without the key, whether it may send it (CORS).
        if self.api_key and scope["path"].startswith("/v1") and scope["method"] != "OPTIONS":
            given = headers.get("authorization", "").removeprefix("Bearer ")
            if not same(given, self.api_key):
                raise RequestError("the API key is missing or wrong", 401, code="invalid_api_key")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.max_body:
            raise self._too_large()

    def _bounded(self, receive: Receive) -> Receive:
        """`receive` for a body that does not say how long it is."""
        left = self.max_body

        async def receive_bounded() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                # Of Starlette's kind, which the page's part of the server answers, too.
                raise HTTPException(413, self._too_large().message)
            return message

        return receive_bounded

    def _too_large(self) -> RequestError:
        return RequestError(
            f"the request has more than {self.max_body:,} bytes (--max-body)",
            413,
            code="request_too_large",
        )


def same(given: str, key: str) -> bool:
    """Whether `given` is the key, in a time that does not tell how much of it is right."""
    return hmac.compare_digest(given.encode(errors="replace"), key.encode())


def log_line(scope: Scope, status: int, seconds: float, facts: dict[str, Any]) -> None:
    """One line about a request, with nothing of what was asked or answered."""
    path = scope["path"] if len(scope["path"]) < 80 else f"{scope['path'][:80]}…"
    tokens = f", {facts['prompt']} + {facts['written']} tokens" if "written" in facts else ""
    note = f", {facts['note']}" if "note" in facts else ""
    say(f"{scope['method']} {path} {status or '-'} in {seconds:.2f} s{tokens}{note}")
