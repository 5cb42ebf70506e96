"""Ask a model about images, or talk to it.

python infer.py photo.jpg "描述图片"
python infer.py a.jpg b.jpg "两张图有什么不同？" --model runs/mine/model --temperature 0.7
python infer.py photo.jpg --chat
"""

import argparse
import os
import sys
import time
from pathlib import Path

import torch

from nanovlm.data.sequences import TokenSequence, collate
from nanovlm.errors import NanoVLMError
from nanovlm.generate import Sampling, TextStreamer, generate
from nanovlm.hub.adapters import load_adapter
from nanovlm.hub.models import load_model
from nanovlm.inputs.chat import IMAGE, IMAGE_MARKER, ImageTokens, Message
from nanovlm.inputs.image import image_pixels, open_image
from nanovlm.model.lora import merge_adapters
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.utils.console import run_command, say
from nanovlm.utils.device import choose_device, choose_dtype
from nanovlm.utils.parser import CommandParser

TRAINED = Path("runs/stage2/model")
CHATML = (
    "<|im_start|>",
    "<|im_end|>",
)  # refused in prompts of any model: what is copied around has these in it
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
SHIPPED = Path(__file__).parent / "nanovlm/assets/tiny-vlm"


def main() -> None:
    """Answer one prompt, or keep a conversation going until an empty line."""
    arguments = _parser().parse_args()
    image_paths, prompt = _split_positionals(arguments.inputs, arguments.chat)
    sampling = Sampling(
        arguments.temperature,
        arguments.top_p,
        arguments.top_k,
        arguments.repetition_penalty,
        arguments.seed,
    )
    if arguments.max_new_tokens < 1:
        raise NanoVLMError("--max-new-tokens has to be 1 or more")
    images = [open_image(path) for path in image_paths]
    model = _load_model(arguments)
    if prompt is not None:
        _check_prompt(prompt, model)

    tokens = [model.image_tokens(*image.size) for image in images]
    pixels = (
        torch.cat([image_pixels(image, model.config.image) for image in images]) if images else None
    )
    messages: list[Message] = []
    new_images = len(images)
    while True:
        if prompt is None:
            prompt = _read_prompt()
            if not prompt:
                return
            _check_prompt(prompt, model)
        # Each image opens the turn it came with, on a line of its own, as in the training records.
        content = [part for _ in range(new_images) for part in (IMAGE, "\n")]
        messages.append(Message("user", (*content, prompt)))
        messages.append(
            Message("assistant", (_answer(model, messages, tokens, pixels, arguments, sampling),))
        )
        if not arguments.chat:
            return
        prompt, new_images = None, 0


def _answer(
    model: VisionLanguageModel,
    messages: list[Message],
    images: list[ImageTokens],
    pixels: torch.Tensor | None,
    arguments: argparse.Namespace,
    sampling: Sampling,
) -> str:
    """Stream the answer to stdout and return it."""
    start = time.perf_counter()
    encoded = model.chat.encode(messages, images, add_generation_prompt=True)
    batch = collate([TokenSequence.of(encoded)], model.chat.image_token_id)
    batch.attention_mask = None  # one row, nothing to mask
    batch.pixels = pixels
    device = next(model.parameters()).device
    streamer, answer, first = TextStreamer(model.tokenizer), [], None

    def show(text: str) -> None:
        answer.append(text)
        print(text, end="", flush=True)

    def on_tokens(tokens: list[int]) -> None:
        nonlocal first
        first = first or time.perf_counter()
        if tokens[0] >= 0:
            show(streamer.put(tokens[0]))

    tokens = generate(model, batch.to(device), arguments.max_new_tokens, sampling, on_tokens)[0]
    show(streamer.end())
    print()
    if not "".join(answer).strip():
        say("the answer is empty: the model ended its turn at once")
    if arguments.verbose:
        seconds = time.perf_counter() - first
        say(
            f"{len(encoded.input_ids)} prompt tokens, first token after {first - start:.3f} s, then {len(tokens) / max(seconds, 1e-9):.1f} "
            f"tokens/s for {len(tokens)} tokens"
        )
    return "".join(answer)


def _split_positionals(inputs: list[str], chat: bool) -> tuple[list[str], str | None]:
    """IMAGE… PROMPT. In a chat the prompt may be missing, so there a last word that names a file is an image."""
    if chat and (
        not inputs or os.path.isfile(inputs[-1])
    ):  # unlike pathlib's, it takes a prompt of any length
        return inputs, None
    if not inputs:
        raise NanoVLMError('nothing asked; for example:  python infer.py photo.jpg "描述图片"')
    if not inputs[-1].strip():
        raise NanoVLMError("the prompt is empty; say what you want to know")
    if (
        len(inputs) == 1
        and Path(inputs[0]).suffix.lower() in IMAGE_SUFFIXES
        and not os.path.isfile(inputs[0])
    ):
        raise NanoVLMError(f"{inputs[0]}: no such file, and no prompt after it")
    if os.path.isfile(inputs[-1]):
        raise NanoVLMError(
            f"{inputs[-1]} is a file, and the last argument is the prompt; for example:  "
            f'python infer.py {inputs[-1]} "描述图片"'
        )
    return inputs[:-1], inputs[-1]


def _check_prompt(prompt: str, model: VisionLanguageModel) -> None:
    """Refuse spellings of control tokens: as text they would not do what whoever typed them expects."""
    for token in (*model.tokenizer.special_tokens, *CHATML, IMAGE_MARKER):
        if token in prompt:
            raise NanoVLMError(
                f"the prompt contains {token!r}, which only the program may place; take it out "
                "(images are given as files before the prompt)"
            )


def _read_prompt() -> str:
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    return sys.stdin.buffer.readline().decode(errors="replace").strip()


def _load_model(arguments: argparse.Namespace) -> VisionLanguageModel:
    """The model asked for, else the one trained here, else the one that ships; says which on stderr."""
    folder = arguments.model or (TRAINED if TRAINED.exists() else SHIPPED)
    device = choose_device(arguments.device)
    dtype, why = choose_dtype(arguments.dtype, device)
    model = load_model(folder, dtype)
    if arguments.adapter:
        load_adapter(model, arguments.adapter)
        merge_adapters(model)
    model.to(device)
    shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    say(f"model: {shown}" + (f" ({why})" if why else ""))
    if arguments.adapter:
        say(f"adapter: {arguments.adapter}")
    if folder == SHIPPED:
        say(
            "this is the shipped tiny model: it only knows its toy world of coloured shapes (data_tools/make_scenes.py)"
        )
    return model


def _parser() -> CommandParser:
    parser = CommandParser(
        description="Ask a vision-language model. Answers go to stdout, everything else to stderr.",
        usage="%(prog)s [IMAGE …] PROMPT [flags]",
    )
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="IMAGE… PROMPT",
        help="image files, then the question; images may be left out",
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help=f"model folder (default: {TRAINED}, else the shipped one)",
    )
    parser.add_argument(
        "--adapter",
        type=Path,
        metavar="DIR",
        help="adapter folder of a run with LoRA, for the model it learned on",
    )
    parser.add_argument(
        "--chat", action="store_true", help="keep the conversation going; an empty line ends it"
    )
    parser.add_argument(
        "--verbose", action="store_true", help="time to first token and speed, on stderr"
    )
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="longest answer (default: 128)"
    )
    sampling.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)"
    )
    sampling.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="keep the likeliest tokens of this much probability",
    )
    sampling.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="keep the K likeliest tokens"
    )
    sampling.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="above 1 avoids repeating",
    )
    sampling.add_argument("--seed", type=int, default=0, metavar="N", help="of the dice")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    machine.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto"
    )
    return parser


if __name__ == "__main__":
    run_command(main)
