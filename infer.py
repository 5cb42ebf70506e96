"""Ask a model about images, or talk to it.

python infer.py photo.jpg "描述图片"
python infer.py a.jpg b.jpg "两张图有什么不同？" --model runs/mine/model --temperature 0.7
python infer.py photo.jpg "描述图片" --explain words.png
python infer.py photo.jpg --chat
python infer.py --batch photos --prompt "描述图片" --out answers.jsonl
"""

# First, because Ctrl-C is one line from here on, also during the slow imports below.
from nanovlm.utils.console import run_command, say

# isort: split
import argparse
import os
import sys
import time
from pathlib import Path

from nanovlm.data.collate import prepare
from nanovlm.engine.conversation import Conversation
from nanovlm.engine.loading import add_folder_flag, add_model_flags, load_chosen
from nanovlm.engine.many import IMAGE_SUFFIXES, answer_all, read_questions
from nanovlm.errors import NanoVLMError, see
from nanovlm.explain.attribution import refuse_few_bits
from nanovlm.generate import check_not_compiled
from nanovlm.inputs.batch import Batch
from nanovlm.inputs.chat import IMAGE, Message
from nanovlm.inputs.image import open_image
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.sampling import Sampling, add_beam_flags
from nanovlm.tokenizer.streaming import TextStreamer
from nanovlm.utils.outputs import check_new_file
from nanovlm.utils.parser import CommandParser

MAX_PROMPT = 2**20  # bytes of a line on stdin, which may come from a file or a device


def main() -> None:
    """Answer one prompt, many, or keep a conversation going until an empty line."""
    arguments = _parser().parse_args()
    sampling = Sampling(
        arguments.temperature,
        arguments.top_p,
        arguments.top_k,
        arguments.repetition_penalty,
        arguments.seed,
        arguments.beams,
        arguments.length_penalty,
    )
    check_not_compiled(sampling, arguments.compile)
    if arguments.max_new_tokens < 1:
        raise NanoVLMError("--max-new-tokens has to be 1 or more")
    if arguments.batch:
        _answer_many(arguments, sampling)
    elif arguments.prompt or arguments.out:
        raise NanoVLMError("--prompt and --out belong to --batch; a prompt for one answer is last")
    else:
        _answer_here(arguments, sampling)


def _answer_many(arguments: argparse.Namespace, sampling: Sampling) -> None:
    """Write a file of answers."""
    if arguments.explain:
        raise NanoVLMError("--explain draws one answer; leave it out, or --batch")
    if arguments.inputs or arguments.chat:
        raise NanoVLMError("--batch has its questions from a folder or a file; give no others")
    if not arguments.out:
        raise NanoVLMError("--batch writes a file of answers; name it with --out answers.jsonl")
    questions = read_questions(arguments.batch, arguments.prompt)
    check_new_file(arguments.out, "--out", [arguments.batch])
    _, model = load_chosen(arguments)
    _check_prompt(arguments.prompt or "", model)
    answer_all(model, questions, arguments.out, arguments.max_new_tokens, sampling)


def _answer_here(arguments: argparse.Namespace, sampling: Sampling) -> None:
    """Answer on stdout."""
    image_paths, prompt = _split_positionals(arguments.inputs, arguments.chat)
    if arguments.explain:
        _check_explain(arguments, image_paths)
    images = [open_image(os.path.expanduser(path)) for path in image_paths]
    _, model = load_chosen(arguments)
    if prompt is not None:
        _check_prompt(prompt, model)

    conversation = Conversation(model)
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
        batch = prepare(model, [messages], [images], add_generation_prompt=True)
        answer, tokens = _answer(
            conversation, batch, arguments.max_new_tokens, sampling, arguments.verbose
        )
        if arguments.explain:
            from nanovlm.explain.picture import draw_answer  # with matplotlib, which takes a second

            prompt_batch = batch.to(next(model.parameters()).device)
            draw_answer(arguments.explain, model, prompt_batch, images, tokens)
        messages.append(Message("assistant", (answer,)))
        if not arguments.chat:
            return
        prompt, new_images = None, 0


def _answer(
    conversation: Conversation, batch: Batch, max_new_tokens: int, sampling: Sampling, verbose: bool
) -> tuple[str, list[int]]:
    """Stream the answer to stdout; returns it as text and as tokens."""
    model = conversation.model
    streamer = TextStreamer(model.tokenizer, model.chat.space_opens_answer)
    answer = ""
    start, first = time.perf_counter(), 0.0

    def show(text: str) -> None:
        nonlocal answer
        answer += text
        print(text, end="", flush=True)

    def on_tokens(tokens: list[int]) -> None:
        nonlocal first
        first = first or time.perf_counter()
        if tokens[0] >= 0:
            show(streamer.put(tokens[0]))

    device = next(model.parameters()).device
    tokens = conversation.generate(batch.to(device), max_new_tokens, sampling, on_tokens)
    show(streamer.end())
    print()
    if not answer.strip():
        say(f"the answer is empty: the model ended its turn at once; {see('same-answers')}")
    if verbose:
        speed = len(tokens) / max(time.perf_counter() - first, 1e-9)
        then = f"then {speed:.1f} tokens/s for {len(tokens)} tokens"
        if sampling.beams > 1:  # all of them come at once
            then = f"and with it all {len(tokens)} tokens of the best of {sampling.beams} beams"
        say(
            f"{batch.input_ids.shape[1]} prompt tokens, first token after {first - start:.3f} s, "
            f"{then}"
        )
    return answer, tokens


def _check_explain(arguments: argparse.Namespace, image_paths: list[str]) -> None:
    """Refuse what `--explain` cannot draw."""
    if arguments.chat:
        raise NanoVLMError("--explain draws one answer; leave it out, or --chat")
    if not image_paths:
        raise NanoVLMError("--explain draws where in an image the words came from; give an image")
    if arguments.explain.suffix.lower() != ".png":
        raise NanoVLMError(f"--explain {arguments.explain}: the picture is a PNG; name it so")
    refuse_few_bits(arguments.quantize)
    check_new_file(arguments.explain, "--explain", image_paths)


def _split_positionals(inputs: list[str], chat: bool) -> tuple[list[str], str | None]:
    """IMAGE… PROMPT → images and prompt.

    In a chat the prompt may be missing, so there a last argument that names a file is an image.
    """
    ends_with_file = bool(inputs) and os.path.isfile(inputs[-1])  # of any length, unlike pathlib's
    if chat and (not inputs or ends_with_file):
        return inputs, None
    if not inputs:
        raise NanoVLMError('nothing asked; for example:  python infer.py photo.jpg "描述图片"')
    if not inputs[-1].strip():
        raise NanoVLMError("the prompt is empty; say what you want to know")
    if ends_with_file:
        raise NanoVLMError(
            f"{inputs[-1]} is a file, and the last argument is the prompt; for example:  "
            f'python infer.py {inputs[-1]} "描述图片"'
        )
    if len(inputs) == 1 and Path(inputs[0]).suffix.lower() in IMAGE_SUFFIXES:
        raise NanoVLMError(f"{inputs[0]}: no such file, and no prompt after it")
    try:
        return inputs[:-1], os.fsencode(inputs[-1]).decode()  # the bytes, whatever the locale
    except UnicodeError:
        raise NanoVLMError(
            f"the prompt is not UTF-8 text; set the terminal to UTF-8; {see('console')}"
        ) from None


def _check_prompt(prompt: str, model: VisionLanguageModel) -> None:
    """Refuse the spellings of control tokens, which would be read as ordinary text."""
    if token := model.chat.control_token(prompt):
        raise NanoVLMError(
            f"the prompt contains {token!r}, which only the program may place; take it out "
            "(images are given as files before the prompt)"
        )


def _read_prompt() -> str:
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.buffer.readline(MAX_PROMPT + 1)
    if len(line) > MAX_PROMPT:
        raise NanoVLMError(f"the prompt has more than {MAX_PROMPT:,} bytes; shorten it")
    text = line.decode(errors="replace").strip()
    if "\ufffd" in text:
        say(f"the prompt is not UTF-8 text; what could not be read is � in it; {see('console')}")
    return text


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
    add_folder_flag(parser)
    parser.add_argument(
        "--chat", action="store_true", help="keep the conversation going; an empty line ends it"
    )
    parser.add_argument(
        "--verbose", action="store_true", help="time to first token and speed, on stderr"
    )
    parser.add_argument(
        "--explain",
        type=Path,
        metavar="FILE",
        help="draw for each word of the answer the patches that it came from, as a PNG",
    )
    many = parser.add_argument_group("many answers")
    many.add_argument(
        "--batch",
        type=Path,
        metavar="FILE|FOLDER",
        help="answer every record of a .json or .jsonl file, or --prompt for every image of a "
        "folder; broken off, the same command goes on where it was",
    )
    many.add_argument("--prompt", metavar="TEXT", help="the question of images without one")
    many.add_argument("--out", type=Path, metavar="FILE", help="where answers go, one a line")
    _add_sampling_flags(parser.add_argument_group("sampling"))
    add_model_flags(parser.add_argument_group("model and machine"))
    return parser


def _add_sampling_flags(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="longest answer (default: 128)"
    )
    group.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)"
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="keep the likeliest tokens that together have this probability",
    )
    group.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="keep the K likeliest tokens"
    )
    group.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="above 1, tokens already there become less likely",
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="random seed for sampling")
    add_beam_flags(group)


if __name__ == "__main__":
    run_command(main)
