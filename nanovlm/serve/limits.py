"""What a client may ask for, and how it is told that something is wrong."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """The most that one request, or all of them together, may take."""

    body: int = 20  # MB of a request
    pixels: int = 2**25  # of an image
    images: int = 16  # in a conversation
    tokens: int = 512  # of an answer
    queue: int = 64  # requests that are read, wait, or are being answered
    together: int = 16  # requests answered in one batch
    seconds: float = 120.0  # from a request's arrival to the end of its answer
    image_hosts: tuple[str, ...] = ()  # from which images may be fetched

    @property
    def body_bytes(self) -> int:
        """`body` in bytes."""
        return self.body * 10**6


class RequestError(Exception):
    """What a client is told: a status, and the fields of OpenAI's error object."""

    def __init__(
        self, message: str, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code

    @property
    def headers(self) -> dict[str, str]:
        """The response's headers beside the usual ones."""
        return {"Retry-After": "1"} if self.status in (429, 503) else {}

    def body(self) -> dict:
        """The response as OpenAI documents it."""
        kind = "invalid_request_error"
        if self.status >= 500:
            kind = "server_error"
        elif self.status == 429:
            kind = "rate_limit_error"
        fields = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": fields}
