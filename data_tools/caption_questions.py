"""Hallucinations in captions of photos, judged by people's captions of them.

    python data_tools/caption_questions.py ANSWERS.jsonl

reads what `python -m nanovlm.evaluation --answers ANSWERS.jsonl` wrote about photos, and prints how
often the model's captions name a thing that no person's caption of the photo mentions or leaves
possible (CHAIR, Rohrbach et al., 2018, with the few THINGS of `nanovlm/evaluation/things.py`):
{"chair_i": share of the things named, "chair_s": share of the captions, "n": number of captions}.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a plain clone

# First, because Ctrl-C is one line from here on, also during the slow imports below.
from nanovlm.utils.console import run_command

# isort: split
import json

from nanovlm.errors import NanoVLMError
from nanovlm.evaluation.things import things_named
from nanovlm.utils.files import read_jsonl
from nanovlm.utils.parser import CommandParser


def main() -> None:
    """Read answers and print the shares of hallucinated things."""
    parser = CommandParser(
        description="How often a model's captions name a thing that is not on the photo."
    )
    parser.add_argument(
        "answers",
        type=Path,
        metavar="ANSWERS.jsonl",
        help="as nanovlm.evaluation --answers writes them",
    )
    path = parser.parse_args().answers
    try:
        answers = [(line["answer"], line["references"]) for line in read_jsonl(path)]
        if not answers or not all(isinstance(references, list) for _, references in answers):
            raise ValueError(path)
        results = [things_named(answer, references) for answer, references in answers]
    except (ValueError, KeyError, TypeError):
        raise NanoVLMError(
            f"{path}: holds no answers; write them with python -m nanovlm.evaluation --answers"
        ) from None
    num_named = sum(len(named) for named, _ in results)
    num_wrong = sum(len(wrong) for _, wrong in results)
    captions_with_wrong = sum(bool(wrong) for _, wrong in results)
    shares = {
        "chair_i": round(num_wrong / max(num_named, 1), 6),
        "chair_s": round(captions_with_wrong / max(len(results), 1), 6),
        "n": len(results),
    }
    print(json.dumps(shares))


if __name__ == "__main__":
    run_command(main)
