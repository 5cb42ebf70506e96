"""Answer questions about images over HTTP, and on a page in the browser.

python -m nanovlm.serve
python -m nanovlm.serve --model runs/mine/model --quantize int8 --port 9000
"""

# First, because Ctrl-C is one line from here on, also during the slow imports below.
from nanovlm.utils.console import run_command, say

# isort: split
import argparse
import os
import signal
from pathlib import Path

from nanovlm.engine.loading import add_folder_flag, add_model_flags, load_chosen
from nanovlm.errors import NanoVLMError
from nanovlm.serve.limits import Limits
from nanovlm.utils.parser import CommandParser

LOOPBACK = ("127.0.0.1", "localhost", "::1")
KEY_VARIABLE = "NANOVLM_API_KEY"
INSTALL = "python -m pip install -r requirements-web.txt"


def main() -> None:
    """Load a model and serve it until SIGTERM or Ctrl-C."""
    arguments = _parser().parse_args()
    limits = _limits(arguments)
    api_key = arguments.api_key or os.environ.get(KEY_VARIABLE, "")
    is_local = arguments.host in LOOPBACK
    if not is_local and not api_key:
        raise NanoVLMError(
            f"--host {arguments.host} lets other machines ask; give them a key to show, with "
            f"--api-key or in the variable {KEY_VARIABLE}"
        )
    try:
        from nanovlm.serve.server import Server, Site, listen
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("nanovlm"):
            raise
        raise NanoVLMError(f"the server needs {error.name}; install it with  {INSTALL}") from None
    listener = listen(arguments.host, arguments.port)  # before the model takes its time
    folder, model = load_chosen(arguments)
    name = arguments.name or _name(folder)
    site = Site(name, api_key, is_local, tuple(arguments.cors), page=not arguments.no_page)
    port = listener.getsockname()[1]
    shown = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    say(f"http://{shown}:{port} is the chat page, http://{shown}:{port}/v1 the API; Ctrl-C ends")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what uvicorn comes back to, when it has ended
    Server(model, limits, site).run(sockets=[listener])


def _limits(arguments: argparse.Namespace) -> Limits:
    for name in ("max_body", "max_pixels", "max_images", "max_tokens", "max_queue", "together"):
        if getattr(arguments, name) < 1:
            raise NanoVLMError(f"--{name.replace('_', '-')} has to be 1 or more")
    if arguments.timeout <= 0:
        raise NanoVLMError("--timeout has to be above 0")
    return Limits(
        arguments.max_body,
        arguments.max_pixels,
        arguments.max_images,
        arguments.max_tokens,
        arguments.max_queue,
        arguments.together,
        arguments.timeout,
        tuple(host.lower() for host in arguments.allow_image_hosts),
    )


def _name(folder: Path) -> str:
    """What clients call the model: its folder, or its run for the folder `model` of a run."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "model" else folder.name


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m nanovlm.serve",
        description="Serve a model: a chat page at / and OpenAI's API under /v1.",
    )
    add_folder_flag(parser)
    parser.add_argument(
        "--name", metavar="NAME", help="what clients call the model (default: its folder)"
    )
    parser.add_argument("--no-page", action="store_true", help="the API alone")
    network = parser.add_argument_group("network")
    network.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="H",
        help="address to listen on (default: 127.0.0.1, this machine alone); any other needs a key",
    )
    network.add_argument("--port", type=int, default=8000, metavar="P", help="default: 8000")
    network.add_argument(
        "--api-key",
        default="",
        metavar="KEY",
        help=f"what clients have to show; or set the variable {KEY_VARIABLE}, which nobody sees",
    )
    network.add_argument(
        "--cors", nargs="+", default=[], metavar="ORIGIN", help="sites whose pages may ask"
    )
    network.add_argument(
        "--allow-image-hosts",
        nargs="+",
        default=[],
        metavar="HOST",
        help="hosts from which images are fetched by https; without it, from none",
    )
    _add_limits(parser.add_argument_group("limits"))
    add_model_flags(parser.add_argument_group("model and machine"))
    return parser


def _add_limits(group: argparse._ActionsContainer) -> None:
    default = Limits()
    for name, value, what in (
        ("body", default.body, "MB of a request"),
        ("pixels", default.pixels, "pixels of an image"),
        ("images", default.images, "images in a conversation"),
        ("tokens", default.tokens, "tokens of an answer"),
        ("queue", default.queue, "requests in the queue; further ones are told to come later"),
    ):
        group.add_argument(
            f"--max-{name}", type=int, default=value, metavar="N", help=f"{what} ({value:,})"
        )
    group.add_argument(
        "--together",
        type=int,
        default=default.together,
        metavar="N",
        help=f"waiting requests answered in one batch ({default.together})",
    )
    group.add_argument(
        "--timeout",
        type=float,
        default=default.seconds,
        metavar="S",
        help=f"seconds from a request's arrival to the end of its answer ({default.seconds:g})",
    )


if __name__ == "__main__":
    run_command(main)
