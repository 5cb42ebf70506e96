"""The two hubs as `data_tools.download` sees them: what a repository holds, and one file of it.

Their own libraries do the transfers, with retries, resuming, tokens, proxies and mirrors. Both are
imported only when they are used. An error of either becomes one line here.
"""

import errno
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from urllib.request import getproxies

from tqdm import tqdm

from data_tools.hub_files import HubFile
from nanovlm.errors import NanoVLMError
from nanovlm.utils.console import first_line

MIRROR = "https://hf-mirror.com"  # of Hugging Face, in China
CHUNK = 2**18  # bytes that arrive before they are written: as much is lost when a line is cut
INSTALL = "`python -m pip install -r requirements-hub.txt`"
TOKENS = {
    "hf": "make one at https://huggingface.co/settings/tokens and set HF_TOKEN to it",
    "modelscope": "make one at https://modelscope.cn/my/myaccesstoken and set MODELSCOPE_API_TOKEN "
    "to it",
}


@dataclass(frozen=True)
class Listing:
    """A repository at one revision."""

    revision: str
    licence: str  # as the hub names it; empty where it does not
    files: list[HubFile]


class Hub(Protocol):
    """A repository on a hub."""

    address: str  # of the hub

    def list_files(self, revision: str, folder: str) -> Listing:
        """The files at a revision ("" for the newest), of one folder or ("") of all."""
        ...

    def fetch(self, file: HubFile, revision: str, folder: Path) -> Path:
        """Fetch a file, or what of it is not in `folder` yet; where it lies there, unchecked."""
        ...


def open_hub(hub: str, repository: str, is_data: bool) -> Hub:
    """The repository on "hf", "hf-mirror" or "modelscope"."""
    try:
        if hub == "modelscope":
            return ModelScope(repository, is_data)
        address = MIRROR if hub == "hf-mirror" else os.environ.get("HF_ENDPOINT")
        return HuggingFace(repository, is_data, address or None)
    except ImportError as error:
        raise NanoVLMError(f"{error.name} is not installed; {INSTALL}") from None


class HuggingFace:
    """A repository of Hugging Face or of a mirror (`HF_ENDPOINT`)."""

    def __init__(self, repository: str, is_data: bool, address: str | None) -> None:
        from huggingface_hub import HfApi, constants
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # download.py has one for all files
        constants.DOWNLOAD_CHUNK_SIZE = CHUNK  # in place of 10 MB
        constants.HF_HUB_DISABLE_TELEMETRY = True  # it asks the main site, also behind a mirror
        self._api = HfApi(endpoint=address)
        self.address = self._api.endpoint
        self._repository, self._kind = repository, "dataset" if is_data else "model"

    def list_files(self, revision: str, folder: str) -> Listing:
        """See Hub."""
        from huggingface_hub.hf_api import RepoFile

        info = self._api.repo_info(
            self._repository, repo_type=self._kind, revision=revision or None
        )
        licence = getattr(getattr(info, "card_data", None), "license", None) or ""
        tree = self._api.list_repo_tree(
            self._repository,
            folder or None,
            recursive=True,
            revision=info.sha,
            repo_type=self._kind,
        )
        files = [
            HubFile(item.path, item.size, _digest(item))
            for item in tree
            if isinstance(item, RepoFile)
        ]
        licence = licence if isinstance(licence, str) else ", ".join(licence)
        return Listing(info.sha or revision, licence, files)

    def fetch(self, file: HubFile, revision: str, folder: Path) -> Path:
        """See Hub. Resumes what an earlier run left, which `hf_hub_download` does not do."""
        from huggingface_hub.file_download import hf_hub_url, http_get
        from huggingface_hub.utils import build_hf_headers

        # Named by path and content: what has arrived of another revision is not gone on with.
        path = folder / hashlib.sha256(f"{file.path} {file.digest}".encode()).hexdigest()
        done = path.stat().st_size if path.exists() else 0
        if done > file.size:
            path.unlink()
            done = 0
        url = hf_hub_url(
            self._repository,
            file.path,
            repo_type=self._kind,
            revision=revision,
            endpoint=self.address,
        )
        try:
            with open(path, "ab", buffering=0) as out:  # what has arrived is on disk at any moment
                http_get(
                    url,
                    out,
                    resume_size=done,
                    headers=build_hf_headers(),
                    expected_size=file.size,
                    displayed_filename=file.path,
                )
        except OSError as error:
            if "Consistency check" in str(error) or _status([error])[0] == 416:
                path.unlink()  # not a part of this file
            raise
        return path


def _digest(item: Any) -> str:
    return f"sha256:{item.lfs.sha256}" if item.lfs else f"git:{item.blob_id}"


class ModelScope:
    """A repository of ModelScope (`MODELSCOPE_ENDPOINT`)."""

    def __init__(self, repository: str, is_data: bool) -> None:
        # A large file on a slow line takes more than the library's hour.
        os.environ.setdefault("MODELSCOPE_DOWNLOAD_TOTAL_TIMEOUT", str(30 * 24 * 3600))
        import modelscope_hub
        from modelscope_hub import _download

        setattr(_download, "tqdm", partial(tqdm, disable=True))  # noqa: B010 (a private name)
        self._api = modelscope_hub.HubApi(endpoint=os.environ.get("MODELSCOPE_ENDPOINT") or None)
        self.address = str(self._api.legacy.endpoint)
        self._repository, self._kind = repository, "dataset" if is_data else "model"

    def list_files(self, revision: str, folder: str) -> Listing:
        """See Hub. The hub tells its licence on the page alone."""
        items = self._api.list_repo_files(self._repository, self._kind, revision=revision or None)
        inside = f"{folder}/" if folder else ""
        files = [
            HubFile(item.path, item.size, f"sha256:{item.sha256.lower()}" if item.sha256 else "")
            for item in items
            if item.type == "blob" and item.path.startswith(inside)
        ]
        return Listing(revision or "master", "", files)

    def fetch(self, file: HubFile, revision: str, folder: Path) -> Path:
        """See Hub."""
        return self._api.download_file(
            self._repository,
            self._kind,
            file.path,
            revision=revision,
            local_dir=folder,
            expected_sha256=file.digest.removeprefix("sha256:") or None,
            file_size=file.size,
        )


def explain(error: Exception, hub: str, address: str, repository: str) -> str | None:
    """One line about an error of the network, the hub or the disk; None for a bug.

    hub: one of HUBS.
    """
    chain = list(_chain(error))
    text = " ".join(f"{type(link).__name__} {link}" for link in chain)
    if any(isinstance(link, OSError) and link.errno == errno.ENOSPC for link in chain):
        return "the disk is full; free some room and run the same command, which goes on from there"
    site = f"{address} ({repository})"
    status, wait = _status(chain)
    if status:
        return f"{site}: {_explain_status(status, wait, hub, repository, text)}"
    for pattern, explanation in _NETWORK:
        if re.search(pattern, text, re.IGNORECASE):
            proxies = " and ".join(f"{name}_proxy" for name in getproxies() if name != "no")
            via = f" ({proxies} is set)" if proxies else ""
            return f"{site}: {explanation}{via}"
    if isinstance(error, OSError) and error.errno and error.filename:
        return None  # of the disk, which names the file
    if isinstance(error, OSError) or type(error).__module__.startswith(
        ("huggingface_hub", "modelscope_hub", "httpx", "requests", "urllib3")
    ):
        return f"{site}: {first_line(error)}"
    return None


_GOES_ON = "the same command goes on from there"
# What the texts of an error and its causes say, and what it is. The first that fits counts.
_NETWORK = (
    ("OfflineModeIsEnabled", "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set; unset it to fetch"),
    ("Consistency check failed|FileSizeMismatch",
     f"a file arrived with another size than the hub lists; {_GOES_ON}"),
    ("JSONDecode|Expecting value|non-JSON|Invalid JSON|not valid JSON",
     "answers with something that is not the hub's data, perhaps the login page of a network"),
    ("FileIntegrityError|Hash mismatch",
     f"a file arrived damaged and was removed; {_GOES_ON}"),
    ("Proxy", "the proxy cannot be used; check HTTP_PROXY, HTTPS_PROXY and ALL_PROXY"),
    ("CERTIFICATE|SSL|TLS",
     "its TLS certificate is not accepted; is the clock right? SSL_CERT_FILE names a proxy's"),
    ("Name or service not known|name resolution|NameResolution|getaddrinfo|nodename|No address",
     "no such host is found; is there a network, and does its DNS know the hub?"),
    ("RemoteProtocol|ReadError|Incomplete|ChunkedEncoding|ConnectionReset|RemoteDisconnected",
     f"the connection was cut; {_GOES_ON}"),
    ("Timeout|timed out|Deadline", f"does not answer in time; {_GOES_ON}"),
    ("ConnectError|ConnectionError|ConnectionRefused|NetworkError",
     "cannot be reached; is there a network?"),
)  # fmt: skip


def _explain_status(status: int, wait: str, hub: str, repository: str, text: str) -> str:
    site = "modelscope" if hub == "modelscope" else "hf"
    if status == 403 or "GatedRepo" in text:
        page = f"https://huggingface.co/{repository}" if site == "hf" else "its page"
        return f"is open only to those who accept its terms: do so at {page}, then {TOKENS[site]}"
    if status == 401:
        return f"refuses access without a valid token (or has no such repository); {TOKENS[site]}"
    if status == 404:
        return "has no such repository or file (any more)"
    if status == 429:
        return f"has had too many requests from here; wait {wait or 'some minutes'}, or use a token"
    if status == 416:
        return f"part of a file fits no longer and was removed; {_GOES_ON}"
    return f"answers with an error of its own (HTTP {status}); try again later"


def _status(chain: list[BaseException]) -> tuple[int, str]:
    """The HTTP status of an answer and how long it asks to wait, in words; 0 if there is none."""
    for link in chain:
        response = getattr(link, "response", None)
        status = getattr(response, "status_code", None) or getattr(link, "status_code", None)
        if isinstance(status, int):
            headers = getattr(response, "headers", {})
            wait = headers.get("Retry-After") or getattr(link, "retry_after", None)
            return status, f"{wait} s" if wait else ""
    return 0, ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what caused it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
