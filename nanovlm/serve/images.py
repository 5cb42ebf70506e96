"""The images of a request: from data URIs, and from named hosts where that is allowed.

A client names no path: only what stands in its request, or what an allowed host sends, is opened.
"""

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Callable
from urllib.parse import urljoin, urlsplit

import httpx
from PIL import Image

from nanovlm.errors import NanoVLMError
from nanovlm.inputs import data_uri
from nanovlm.inputs.image import image_size, open_image
from nanovlm.serve.limits import Limits, RequestError

MAX_REDIRECTS = 3
MAX_SHOWN = 60  # characters of a URL in a message
PORT = 443


def is_public(address: str) -> bool:
    """Whether an address is one of the internet, not of this machine or a network around it."""
    parsed = ipaddress.ip_address(address)
    parsed = getattr(parsed, "ipv4_mapped", None) or parsed
    return parsed.is_global and not parsed.is_multicast


def open_bounded(data: bytes, limits: Limits) -> Image.Image:
    """Open an image file, which may have at most `limits.pixels` pixels.

    Raises NanoVLMError with the bare reason.
    """
    try:
        width, height = image_size(data)
        if width * height > limits.pixels:
            raise NanoVLMError(
                f"{width} x {height} is more than this server's {limits.pixels:,} pixels "
                "(--max-pixels); make the image smaller first"
            )
        return open_image(data)
    except NanoVLMError as error:
        raise NanoVLMError(str(error).removeprefix("image in memory: ")) from None


async def read_url(url: str, limits: Limits) -> bytes:
    """The image file that `url` holds or, of an allowed host, names.

    Raises NanoVLMError with the bare reason.
    """
    if url.startswith(data_uri.PREFIX):
        return await asyncio.to_thread(data_uri.decode, url)
    shown = ascii(url[:MAX_SHOWN])
    if not limits.image_hosts:
        raise NanoVLMError(
            f"{shown} is not fetched; send the image itself, as data:image/jpeg;base64,…"
        )
    return await fetch(url, limits.image_hosts, limits.body_bytes)


async def fetch(
    url: str,
    hosts: tuple[str, ...],
    max_bytes: int,
    is_allowed: Callable[[str], bool] = is_public,
    certificates: ssl.SSLContext | bool = True,
) -> bytes:
    """The file that an https URL names on one of `hosts`.

    Redirects are followed within `hosts` alone. Only addresses that `is_allowed` accepts are
    connected to: a name is resolved once, so that what is checked is what is asked.
    """
    # trust_env: a proxy would resolve the name once more, without these checks.
    async with httpx.AsyncClient(verify=certificates, timeout=10, trust_env=False) as client:
        for _ in range(MAX_REDIRECTS + 1):
            host, port, path = _split(url, hosts)
            address = await _resolve(host, port, is_allowed)
            shown = f"[{address}]" if ":" in address else address
            name = host if port == PORT else f"{host}:{port}"
            try:
                async with client.stream(
                    "GET",
                    f"https://{shown}:{port}{path}",
                    headers={"Host": name, "Accept": "image/*"},
                    extensions={"sni_hostname": host},
                ) as response:
                    if not response.has_redirect_location:
                        return await _read(response, host, max_bytes)
                    url = urljoin(url, response.headers["location"])
            except (httpx.HTTPError, httpx.InvalidURL, ssl.SSLError) as error:
                what = type(error).__name__
                raise NanoVLMError(f"cannot be fetched from {host} ({what})") from None
    raise NanoVLMError(f"{host} redirects more than {MAX_REDIRECTS} times")


def _split(url: str, hosts: tuple[str, ...]) -> tuple[str, int, str]:
    """The host, the port and the path of a URL that may be asked."""
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").lower(), parts.port or PORT
    except ValueError:
        raise NanoVLMError("is not a URL") from None
    if parts.scheme != "https" or parts.username or parts.password:
        raise NanoVLMError("is not fetched; only data: and https: URLs without a user are read")
    if host not in hosts:
        raise NanoVLMError(f"is not fetched; this server asks {', '.join(hosts)} alone")
    return host, port, (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


async def _resolve(host: str, port: int, is_allowed: Callable[[str], bool]) -> str:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise NanoVLMError(f"the address of {host} cannot be found") from None
    addresses = [str(each[4][0]) for each in found]
    if not addresses or not all(map(is_allowed, addresses)):
        raise NanoVLMError(f"{host} is in a private network, which is not asked")
    return addresses[0]


async def _read(response: httpx.Response, host: str, max_bytes: int) -> bytes:
    if response.status_code != httpx.codes.OK:
        raise NanoVLMError(f"{host} answers {response.status_code}")
    data = bytearray()
    async for piece in response.aiter_bytes():
        data += piece
        if len(data) > max_bytes:
            raise NanoVLMError(f"is larger than {max_bytes:,} bytes")
    return bytes(data)


async def read_images(urls: list[str], limits: Limits) -> list[bytes]:
    """The image files of a request; raises RequestError, naming which one is wrong."""
    files = []
    for number, url in enumerate(urls, 1):
        try:
            files.append(await read_url(url, limits))
        except NanoVLMError as error:
            raise image_error(number, error) from None
    return files


def image_error(number: int, error: NanoVLMError) -> RequestError:
    """What a client is told about its image `number`, counted from 1."""
    return RequestError(f"image {number}: {error}", param="messages", code="invalid_image")
