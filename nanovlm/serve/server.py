"""The server's parts put together, and its end: answers that are being written are finished."""

import asyncio
import os
import socket
import time
from dataclasses import dataclass

import uvicorn

from nanovlm.errors import NanoVLMError
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.serve.app import build_app
from nanovlm.serve.guard import Guard
from nanovlm.serve.limits import Limits
from nanovlm.serve.queue import AnswerQueue
from nanovlm.utils.console import say

KEEP_ALIVE = 30  # seconds; clients close at 5, and would else ask while the server closes
LAST_BYTES = 2  # seconds for sending them; an open page keeps its connection for longer


@dataclass(frozen=True)
class Site:
    """Who the server is, and whom it answers."""

    name: str  # of the model
    api_key: str = ""
    local_only: bool = True
    origins: tuple[str, ...] = ()  # of pages of other sites that may ask
    page: bool = True


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; raises NanoVLMError if it cannot."""
    if not 0 <= port < 2**16:
        raise NanoVLMError(f"--port {port} is no port; take one from 1 to 65535, or 0 for any")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # With its protocol, without which asyncio leaves Nagle's algorithm on: 40 ms a request.
        listener = socket.socket(family, kind, protocol)
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)  # here, because two sockets may be bound before either listens
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise NanoVLMError(
            f"cannot listen on {host} port {port}: {reason}; take another --port or --host"
        ) from None
    return listener


class Server(uvicorn.Server):
    """Uvicorn's, which first lets the queue come to its end."""

    def __init__(self, model: VisionLanguageModel, limits: Limits, site: Site) -> None:
        self.queue = queue = AnswerQueue(model, limits)
        app = build_app(queue, site.name, int(time.time()), site.origins)
        if site.page:
            from nanovlm.serve.page import Page  # Gradio takes seconds

            app = Page(queue, site.name).mount(app, site.api_key)
        config = uvicorn.Config(
            Guard(app, limits.body_bytes, site.api_key, site.local_only),
            log_level="error",
            access_log=False,
            ws="none",
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=LAST_BYTES,
            server_header=False,
        )
        super().__init__(config)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse new requests, finish those that have a place, and close."""
        self.queue.refuse_more()
        if self.queue.places:
            say(f"finishing {self.queue.places} requests; Ctrl-C ends them")
        while self.queue.places and not self.force_exit:
            await asyncio.sleep(0.05)
        await super().shutdown(sockets)
        await asyncio.to_thread(self.queue.stop)
