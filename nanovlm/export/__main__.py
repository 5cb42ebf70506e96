"""Write a model as a folder that `transformers` loads, and what builds on it.

    python -m nanovlm.export runs/stage2/model --to transformers --out exported
    python -m nanovlm.export weights/qwen-vlm --merge-adapter runs/lora/adapter --dtype bfloat16
        --shard-size 2GB --out exported

The folder is a LLaVA, an Idefics3 or a SmolVLM; docs/en/export.md says which models have such a
form, and how the folder is asked.
"""

import re
from pathlib import Path

from nanovlm.errors import NanoVLMError
from nanovlm.export.card import write_card
from nanovlm.export.families import Form, published_form
from nanovlm.export.tokenizers import write_generation_config, write_tokenizer
from nanovlm.export.weights import published_tensors, write_weights
from nanovlm.hub.adapters import load_adapter
from nanovlm.hub.models import load_model
from nanovlm.hub.shapes import find_model
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.utils.console import run_command, say
from nanovlm.utils.device import DTYPES
from nanovlm.utils.files import write_json
from nanovlm.utils.outputs import check_no_input, new_folder
from nanovlm.utils.parser import CommandParser

SHARD_SIZE = "5GB"
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def main(flags: list[str] | None = None) -> None:
    """Load the model, find its form, write the folder. `flags`: in place of the command line's."""
    arguments = _parser().parse_args(flags)
    shard_size = parse_size(arguments.shard_size)
    inputs = [find_model(arguments.model), *filter(None, [arguments.merge_adapter])]
    check_no_input(arguments.out, "--out", inputs)
    with new_folder(arguments.out, "--out") as folder:
        model = load_model(inputs[0])
        if arguments.merge_adapter:
            load_adapter(model, arguments.merge_adapter)
        try:
            form = published_form(model)
            files, size = _write(model, form, folder, arguments.dtype, shard_size)
        except NanoVLMError as error:
            raise NanoVLMError(f"{arguments.model}: {error}") from None
        write_card(model, form, inputs, (folder, arguments.out))
    architecture = form.config["architectures"][0]
    say(f"{arguments.out}: {architecture}, {size / 1e9:,.2f} GB of weights in {files} file(s)")


def _write(
    model: VisionLanguageModel, form: Form, folder: Path, dtype: str | None, shard_size: int
) -> tuple[int, int]:
    """Write all but the card; returns the number of files of weights and their bytes."""
    kept = model.language_model.embed_tokens.weight.dtype
    name = dtype or next((name for name, known in DTYPES.items() if known == kept), "float32")
    tensors = published_tensors(model, form, DTYPES[name])
    write_json(folder / "config.json", {**form.config, "torch_dtype": name})
    write_json(folder / "preprocessor_config.json", form.image_processor)
    write_json(folder / "processor_config.json", form.processor)
    length = model.config.language_model.max_position_embeddings
    write_tokenizer(model.chat, form, folder, length)
    write_generation_config(model.chat, form, folder)
    files = write_weights(tensors, folder, shard_size)
    return files, sum(tensor.nbytes for tensor in tensors.values())


def parse_size(text: str) -> int:
    """The bytes that `5GB` or `500MB` are."""
    match = re.fullmatch(r"([0-9]{1,6}) ?([KMG]I?B)", text.upper())
    if match is None or not int(match[1]):
        raise NanoVLMError(f"--shard-size {text!r} is no size; give one such as 5GB or 500MB")
    return int(match[1]) * UNITS[match[2]]


def _parser() -> CommandParser:
    summary_line = "Write a model as a folder that transformers loads."
    parser = CommandParser(prog="python -m nanovlm.export", description=summary_line)
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="model folder, trained here or published"
    )
    parser.add_argument(
        "--to", choices=("transformers",), default="transformers", help="the layout to write"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to make")
    parser.add_argument(
        "--merge-adapter",
        type=Path,
        metavar="DIR",
        help="adapter folder of a LoRA run on this model, merged into it",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights (default: the language model's)"
    )
    parser.add_argument(
        "--shard-size",
        default=SHARD_SIZE,
        metavar="SIZE",
        help=f"largest file of weights, such as 500MB (default: {SHARD_SIZE})",
    )
    return parser


if __name__ == "__main__":
    run_command(main)
