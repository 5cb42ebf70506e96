"""Turn the published files of Flickr8k-CN into records to train and evaluate on.

    python data_tools/flickr8k_cn.py --images images.tar --captions flickr8kzhc.caption.txt \\
        --names train.txt --out DIR

writes, with NAMES the stem of the names file (or `--split`):

    DIR/images/*.jpg        the photos named, and no others
    DIR/NAMES.jsonl         for training: one record a Chinese caption
    DIR/NAMES_zh.jsonl      for evaluation: one record a photo, its Chinese captions as `references`

and with `--captions-en flickr8kenc.caption.txt` also:

    DIR/NAMES_mixed.jsonl   for training: captions in both languages and yes/no questions,
                            shuffled
    DIR/NAMES_agreed.jsonl  for training: of each photo the two English captions and the Chinese
                            one that agree best with its others; a quarter of the questions
    DIR/NAMES_en.jsonl      for evaluation: as `_zh`, in English
    DIR/NAMES_yesno.jsonl   for evaluation: one record a yes/no question, shuffled

The same input gives the same bytes. A file that exists with other content is never overwritten.
The captions are described by Li et al., "Adding Chinese Captions to Images" (ICMR 2016), the photos
by Hodosh et al., "Framing Image Description as a Ranking Task" (JAIR 2013).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a plain clone

# First, because Ctrl-C is one line from here on, also during the slow imports below.
from nanovlm.utils.console import run_command, say

# isort: split
import argparse
import io
import lzma
import math
import random
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from tqdm import tqdm

from nanovlm.errors import NanoVLMError
from nanovlm.evaluation.metrics import cider_d_of_each, tokenize
from nanovlm.evaluation.things import THINGS, Thing
from nanovlm.utils.files import open_regular, read_text, to_jsonl
from nanovlm.utils.outputs import write_new
from nanovlm.utils.parser import CommandParser

DESCRIBE = {"zh": "用一句话描述这张图片。", "en": "Describe this image in one sentence."}
ASK = {"zh": "图中有{}吗？", "en": "Is there {} in the image?"}
YES = {"zh": "有。", "en": "Yes."}
NO = {"zh": "没有。", "en": "No."}

SEED = 0
# Captions of a photo in NAMES_agreed.jsonl, and one question in how many.
AGREED = {"zh": 1, "en": 2}
AGREED_QUESTIONS = 4
# Share of the photos or of the lines of a caption file; more than this looks like the wrong file.
MAX_SKIPPED = 0.01
MAX_PHOTO_BYTES = 64 * 2**20

NOT_WHOLE = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError)

Captions = dict[str, dict[int, str]]  # photo name -> caption number -> caption


@dataclass
class Skipped:
    """The entries of one input file that were left out, each with the reason."""

    source: Path
    names: list[str] = field(default_factory=list)

    def add(self, entry: str) -> None:
        self.names.append(entry)

    def check(self, total: int) -> None:
        """Print what was skipped; raise NanoVLMError if it is more than MAX_SKIPPED of `total`."""
        if not self.names:
            return
        listed = "; ".join(self.names[:10]) + ("; …" if len(self.names) > 10 else "")
        if len(self.names) > MAX_SKIPPED * total:
            raise NanoVLMError(
                f"{self.source}: {len(self.names)} of {total} cannot be used, more than "
                f"{MAX_SKIPPED:.0%} ({listed}); check that the files belong together"
            )
        say(f"{self.source}: skipped {len(self.names)} of {total}: {'; '.join(self.names)}")


def split_lines(text: str) -> list[str]:
    """Lines as files have them: `str.splitlines` also cuts at characters that captions hold."""
    return [line.rstrip("\n") for line in io.StringIO(text, newline=None)]


def read_lines(path: Path) -> list[str]:
    """The lines of a published text file."""
    return split_lines(read_text(path))


def read_names(path: Path) -> list[str]:
    """The photo names in `path`, one a line, each once and in that order."""
    skipped = Skipped(path)
    names: dict[str, None] = {}
    lines = [line.strip() for line in read_lines(path)]
    for number, name in enumerate(lines, start=1):
        if not name:
            continue
        if not re.fullmatch(r"\w[\w.-]*", name):
            skipped.add(f"line {number}: {name[:80]!r} is not a plain file name")
        elif name in names:
            skipped.add(f"line {number}: {name} again")
        else:
            names[name] = None
    skipped.check(len(lines))
    if not names:
        raise NanoVLMError(f"{path}: names no photo; give one file name a line")
    return list(names)


def read_captions(path: Path, language: str) -> Captions:
    """Captions from lines of `NAME.jpg#zhc#0 caption`; `language` is zh or en."""
    skipped = Skipped(path)
    captions: Captions = {}
    lines = read_lines(path)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        match = re.fullmatch(rf"([^\s#]+)#{language}\w*#(\d+)\s+(.*\S)\s*", line)
        if match is None:
            skipped.add(f"line {number}: {line[:80]!r} is not 'NAME#{language}c#NUMBER caption'")
        elif int(match[2]) in captions.setdefault(match[1], {}):
            skipped.add(f"line {number}: {match[1]} has a caption {match[2]} already")
        else:
            caption = match[3] if language == "zh" else tidy_english(match[3])
            captions[match[1]][int(match[2])] = caption
    skipped.check(len(lines))
    return captions


def tidy_english(caption: str) -> str:
    """`a dog , running .` as a sentence: `A dog, running.`"""
    caption = re.sub(r"\s+([.,;!?])", r"\1", " ".join(caption.split()))
    caption = caption[:1].upper() + caption[1:]
    return caption if caption.endswith((".", "!", "?", '"')) else caption + "."


def open_photos(source: Path, names: set[str]) -> Iterator[tuple[str, bytes | str]]:
    """Yield the name of each named photo in a tar file or folder, and its bytes or the problem."""
    try:
        if source.is_dir():
            for path in sorted(source.rglob("*")):
                if path.name in names:
                    yield path.name, path.read_bytes() if path.is_file() else "is not a file"
            return
        with open_regular(source) as tar, tarfile.open(fileobj=tar) as archive:
            for member in archive:
                # Only the last part of a member's path is used, so that none can lead elsewhere.
                name = PurePosixPath(member.name).name
                if name not in names:
                    continue
                file = archive.extractfile(member) if member.isfile() else None
                if file is None:
                    yield name, "is a link or a device in the archive"
                elif member.size > MAX_PHOTO_BYTES:
                    yield name, f"has {member.size} bytes"
                else:
                    yield name, file.read()
    except (*NOT_WHOLE, ValueError, OverflowError, RecursionError):  # of damaged headers
        raise NanoVLMError(f"{source}: is not a whole tar archive; fetch it again") from None
    except OSError as error:
        raise NanoVLMError(
            f"{source}: cannot be read ({error.strerror or error}); check the path"
        ) from None


def extract_photos(source: Path, names: list[str], folder: Path) -> list[str]:
    """Copy the named photos to `folder`; return the names of those that are usable, in order."""
    done: set[str] = set()
    problems: dict[str, str] = {}
    with tqdm(total=len(names), desc="photos", unit="photo") as bar:
        for name, photo in open_photos(source, set(names)):
            if isinstance(photo, str) or not photo:
                problems[name] = photo or "is empty"
                continue
            write_once(folder / name, photo)
            if name not in done:
                done.add(name)
                bar.update()
            if len(done) == len(names):
                break
    skipped = Skipped(source)
    for name in names:
        if name not in done:
            skipped.add(f"{name} {problems.get(name, 'is not there')}")
    skipped.check(len(names))
    return [name for name in names if name in done]


def write_once(path: Path, data: bytes) -> None:
    """Write `data` to `path`, unless it is there already; other content there is an error."""
    check_free(path, data)
    if path.exists():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_new(path, data)
    except OSError as error:
        raise NanoVLMError(
            f"{path}: cannot be written ({error.strerror}); choose another --out"
        ) from None


def check_free(path: Path, data: bytes) -> None:
    """Refuse a path that holds other content than `data`."""
    if path.is_symlink() or (path.exists() and not (path.is_file() and path.read_bytes() == data)):
        raise NanoVLMError(
            f"{path}: is there already with other content; delete it or choose another --out"
        )


def user_turn(prompt: str) -> dict:
    """The user's message: the photo and the prompt."""
    return {"role": "user", "content": f"<image>\n{prompt}"}


def training_record(identity: str, name: str, prompt: str, answer: str) -> dict:
    """A record with an answer to train on."""
    messages = [user_turn(prompt), {"role": "assistant", "content": answer}]
    return {"id": identity, "image": f"images/{name}", "messages": messages}


def evaluation_record(identity: str, name: str, prompt: str, references: list[str]) -> dict:
    """A record that ends with its question, and the reference answers."""
    return {
        "id": identity,
        "image": f"images/{name}",
        "messages": [user_turn(prompt)],
        "references": references,
    }


def caption_records(
    names: list[str], captions: Captions, language: str
) -> tuple[list[dict], list[dict]]:
    """Records for training, one a caption, and for evaluation, one a photo."""
    training, evaluation = [], []
    for name in names:
        numbered = sorted(captions[name].items())
        for number, caption in numbered:
            identity = f"{name}#{language}#{number}"
            training.append(training_record(identity, name, DESCRIBE[language], caption))
        references = [caption for _, caption in numbered]
        identity = f"{name}#{language}"
        evaluation.append(evaluation_record(identity, name, DESCRIBE[language], references))
    return training, evaluation


def most_agreed(names: list[str], captions: Captions, count: int) -> Captions:
    """The `count` captions of each photo that score highest against its others, by CIDEr-D.

    What one person saw and the others did not mention teaches a small model to invent. The order of
    the captions is kept; a photo with `count` captions or fewer keeps all.
    """
    answers, references, places = [], [], []
    for name in names:
        tokens = {number: tokenize(text) for number, text in sorted(captions[name].items())}
        for number in tokens if len(tokens) > count else ():
            answers.append(tokens[number])
            references.append([tokens[other] for other in tokens if other != number])
            places.append((name, number))
    scores = dict(zip(places, cider_d_of_each(answers, references) if answers else ()))
    agreed: Captions = {}
    for name in names:
        ranked = sorted(captions[name], key=lambda number: (-scores.get((name, number), 0), number))
        agreed[name] = {number: captions[name][number] for number in sorted(ranked[:count])}
    return agreed


def yes_no_pairs(
    names: list[str], zh: Captions, en: Captions
) -> dict[Thing, list[tuple[str, str]]]:
    """For each thing, pairs of a photo that shows it and one that does not, in random order."""
    pairs = {}
    for thing in THINGS:
        photos: dict[bool | None, list[str]] = {True: [], False: [], None: []}
        for name in names:
            photos[thing.answer(list(zh[name].values()), list(en[name].values()))].append(name)
        for answer in (True, False):
            random.Random(f"{SEED} {thing.en_name} {answer}").shuffle(photos[answer])
        pairs[thing] = list(zip(photos[True], photos[False]))
    return pairs


def yes_no_records(
    pairs: dict[Thing, list[tuple[str, str]]], one_in: int = 1
) -> tuple[list[dict], list[dict]]:
    """The same shuffled questions for training and for evaluation.

    For each thing and language, both answers are equally frequent, so that a question says nothing
    about its answer and guessing gives 50 %. `one_in` 4 gives a quarter of the questions.
    """
    training, evaluation = [], []
    for thing, of_thing in pairs.items():
        for index, pair in enumerate(of_thing[: math.ceil(len(of_thing) / one_in)]):
            language = ("zh", "en")[index % 2]
            prompt = ASK[language].format(thing.zh_name if language == "zh" else thing.en_name)
            for name, reply in zip(pair, (YES[language], NO[language])):
                identity = f"{name}#{language}#{thing.en_name}"
                training.append(training_record(identity, name, prompt, reply))
                evaluation.append(evaluation_record(identity, name, prompt, [reply]))
    for records in (training, evaluation):
        random.Random(SEED).shuffle(records)
    return training, evaluation


def make_records(
    names: list[str], split: str, zh: Captions, en: Captions | None
) -> dict[str, list[dict]]:
    """The records of each file, by its name."""
    zh_training, zh_evaluation = caption_records(names, zh, "zh")
    files = {f"{split}.jsonl": zh_training, f"{split}_zh.jsonl": zh_evaluation}
    if en is not None:
        en_training, en_evaluation = caption_records(names, en, "en")
        pairs = yes_no_pairs(names, zh, en)
        questions, yes_no_evaluation = yes_no_records(pairs)
        mixed = zh_training + en_training + questions
        agreed, _ = yes_no_records(pairs, AGREED_QUESTIONS)
        for language, captions in (("zh", zh), ("en", en)):
            chosen = most_agreed(names, captions, AGREED[language])
            agreed += caption_records(names, chosen, language)[0]
        for records in (mixed, agreed):
            random.Random(SEED).shuffle(records)
        files |= {
            f"{split}_mixed.jsonl": mixed,
            f"{split}_agreed.jsonl": agreed,
            f"{split}_en.jsonl": en_evaluation,
            f"{split}_yesno.jsonl": yes_no_evaluation,
        }
    return files


def parse_arguments() -> argparse.Namespace:
    """Read the flags."""
    parser = CommandParser(description="Turn the published files of Flickr8k-CN into records.")
    parser.add_argument("--images", type=Path, required=True, help="tar file or folder of photos")
    parser.add_argument(
        "--captions", type=Path, required=True, help="Chinese captions: NAME.jpg#zhc#0 caption"
    )
    parser.add_argument(
        "--captions-en",
        type=Path,
        help="English captions; adds English records and yes/no questions",
    )
    parser.add_argument(
        "--names", type=Path, required=True, help="the photos to take, one file name a line"
    )
    parser.add_argument("--split", help="name of the files written (default: the stem of --names)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    return parser.parse_args()


def main() -> None:
    """Read the published files, copy the photos, write the records."""
    arguments = parse_arguments()
    split = arguments.split or arguments.names.stem
    if not re.fullmatch(r"\w[\w.-]*", split):
        raise NanoVLMError(
            f"--split {split!r}: is not a plain name; use letters, digits, '_', '-' and '.'"
        )
    names = read_names(arguments.names)
    zh = read_captions(arguments.captions, "zh")
    en = read_captions(arguments.captions_en, "en") if arguments.captions_en else None

    for path, captions in ((arguments.captions, zh), (arguments.captions_en, en)):
        if captions is not None:
            missing = [f"{name} has no caption" for name in names if name not in captions]
            Skipped(path, missing).check(len(names))
            names = [name for name in names if name in captions]
    names = extract_photos(arguments.images, names, arguments.out / "images")

    files = {
        arguments.out / name: to_jsonl(records).encode()
        for name, records in make_records(names, split, zh, en).items()
    }
    for path, data in files.items():
        check_free(path, data)
    for path, data in files.items():
        write_once(path, data)
        count = data.count(b"\n")
        say(f"{path}: {count:,} records")
    say(f"{arguments.out / 'images'}: {len(names):,} photos")


if __name__ == "__main__":
    run_command(main)
