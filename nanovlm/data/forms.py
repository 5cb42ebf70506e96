"""The published forms of records: each is read as messages and the names of their images.

A record holds a list of turns, or a question and its answer:

- `messages`, `conversations`: turns with `role` or `from`, and `content` or `value` (OpenAI,
  ShareGPT, LLaVA, ms-swift). A content is text or a list of parts, some of them images.
- `conversation`, `texts`: questions with their answers (XTuner, the Cauldron).
- `prompt`, `query`, `instruction` or `question`, with `response`, `completion`, `output` or
  `answer`, and earlier turns in `history` (TRL, ms-swift, LLaMA-Factory).

A system prompt may stand beside the turns, in `system`. `image` and `images` name the images of
places without a name. What is null or empty is absent.

A record that cannot be read as it is meant is refused: it would teach something else in silence.
"""

import dataclasses
import re
from collections.abc import Collection, Iterator
from typing import Any

from nanovlm.errors import NanoVLMError, quoted
from nanovlm.inputs.chat import IMAGE, IMAGE_MARKER, Message
from nanovlm.inputs.data_uri import is_data_uri

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}
TURN_LISTS = ("messages", "conversations", "conversation", "texts")
PROMPTS = ("prompt", "query", "instruction")
QUESTIONS = (*PROMPTS, "question")
ANSWERS = ("response", "completion", "output", "answer")
SYSTEM = ("system", "system_prompt", "system_message")
IMAGES = ("images", "image")
READ = {*TURN_LISTS, *QUESTIONS, *ANSWERS, *SYSTEM, *IMAGES, "input", "history", "references"}
# What belongs to a question and is not read; "A" as in MMBench, whose choices have keys.
CONTEXT = ("context", "passage", "article", "choices", "options", "hint", "A", "option_a")

# Of a turn, and of a question with its answer that stand in a list.
ROLE, TEXT = ("role", "from"), ("content", "value", "text")
ASKED, ANSWERED = (*QUESTIONS, "user", "human", "input"), (*ANSWERS, "assistant", "gpt", "bot")
LOSS = ("loss", "weight", "loss_weight", "loss_scale", "train", "training", "trainable", "masked")

# Types of parts; and where an object has the name of an image, or the image itself in base64.
TEXT_PARTS = ("text", "input_text", "output_text")
IMAGE_PARTS = ("image", "image_url", "input_image")
IMAGE_NAMES = ("image_url", "image", "url", "path", "source", "input_image")
IMAGE_BYTES = ("bytes", "base64", "data")

# The place of an image in a user's text, in Qwen-VL's form with its name.
_PLACE = re.compile(r"<image>|<img>([^<>]+)</img>")
# What other programs write for images, video, sound and boxes. Here it would be learned as text.
_FOREIGN = re.compile(
    r"<\|?(?:(?:start|begin|end)_of_|fake_token_around_)?"
    r"(?:image|img|im_patch|picture|video|audio|speech|sound|vision|media)"
    r"[\w-]{0,40}(?: \d{1,4})?\|? ?/?>|<(?:bbox|ref-object)>"
    r"|</(?:image|img)>|\[(?:img|image)\](?!\()",  # but not a link in Markdown
    re.IGNORECASE,
)
# Keys of a record or a turn that change what it means, and others that name images.
_OF_A_FILE = r"(?:[_-]?(?:path|file|name|url|uri|data|base64|b64|bytes|list)s?)*"
_MEANING = re.compile(
    rf"(?:video|audio|speech|sound|voice)s?{_OF_A_FILE}|input_audio|tools?|functions?|tool_calls?"
    r"|tool_call_id|function_call|thinking|reasoning|reasoning_content|kto_tag"
    r"|chosen|rejected|rejected_response|train(?:ing)?_detail",
    re.IGNORECASE,
)
IMAGE_KEY = re.compile(
    rf"(?:image|img|picture|pic|photo|screenshot)s?[_-]?\d*{_OF_A_FILE}", re.IGNORECASE
)
_OTHER_IMAGE_KEY = re.compile(rf"\w+[_-](?:image|img|picture|photo)s?{_OF_A_FILE}", re.IGNORECASE)
# Keys of a turn that may say whether it is learned, besides those that are read.
_LEARNING = re.compile(r"(?:\w+_)?(?:loss|mask|train|supervised?)(?:_\w+)?", re.IGNORECASE)
_IMAGE_FILE = re.compile(r".+\.(?:jpe?g|png|webp|gif|bmp|tiff?)", re.IGNORECASE)


def present(entry: dict[str, Any]) -> dict[str, Any]:
    """An object without what is null or empty, as a table has it in columns that are not used."""
    return {
        key: value
        for key, value in entry.items()
        if value is not None and value == value and value not in ("", [], {})  # NaN is not itself
    }


def read_conversation(entry: dict[str, Any]) -> tuple[tuple[Message, ...], list[str]]:
    """The messages of a record, and the name of each image in them, in reading order.

    Raises NanoVLMError with the bare reason.
    """
    entry = present(entry)
    _refuse(entry, _MEANING)
    if not _is_learned(entry) or entry.get("label") is False:  # an answer to be avoided (KTO)
        raise NanoVLMError("is not to be learned, by its loss, weight, train or label")
    turns, has_roles = _turns(entry)
    messages, names = [], []
    for turn in turns:
        message, own = _read_turn(turn, len(names))
        messages.append(message)
        names += own
    given = _given_images(entry)
    first = next((i for i, message in enumerate(messages) if message.role == "user"), None)
    if not names and not has_roles and first is not None:  # images are before the question
        messages[first] = _with_images(messages[first], len(given))
        names = [""] * len(given)
    names = _fill(names, given)
    _check_other_images(entry, names)
    for key in SYSTEM:
        if key in entry:
            messages = _with_system(messages, entry[key], key)
    answers = [message for message in messages if message.role == "assistant"]
    if answers and not any(message.labelled for message in answers):
        raise NanoVLMError("none of its answers is to be learned")
    return tuple(messages), names


def as_turns(value: Any, role: str) -> list[Any]:
    """Turns as they are, a list of them or one; any other value is the content of a new one."""
    if not _has_turn(value):
        return [{"role": role, "content": value}]
    return value if isinstance(value, list) else [value]


def _turns(entry: dict[str, Any]) -> tuple[list[Any], bool]:
    """The turns of a record, and whether it gives them with roles."""
    found = [key for key in TURN_LISTS if key in entry]
    if found:
        others = [key for key in (*PROMPTS, "history") if key in entry]
        found += [key for key in others if not repeats(entry[key], entry[found[0]])]
    else:
        found += [key for key in QUESTIONS if key in entry]
    if not found:
        raise NanoVLMError(
            "has neither messages nor conversations, nor a question with an answer; "
            f"it has {quoted(', '.join(entry))}"
        )
    if len(found) > 1:
        raise NanoVLMError(f"has {' and '.join(found)}; it is not clear which holds the turns")
    key, given = found[0], entry[found[0]]
    if key in QUESTIONS:
        return _question_and_answer(entry, key), _has_turn(given)
    if not isinstance(given, list):
        raise NanoVLMError(f"{key} is {quoted(given)}, expected a list of turns")
    return list(_unpaired(given)), _has_turn(given)


def repeats(prompt: Any, turns: Any) -> bool:
    """Whether a prompt says again how a list of turns begins (UltraChat, UltraFeedback)."""
    first = [turn for turn in turns[:2] if isinstance(turn, dict)] if _has_turn(turns) else []
    return any(prompt == turn.get(key) for turn in first for key in TEXT)


def _question_and_answer(entry: dict[str, Any], key: str) -> list[Any]:
    question, answer = entry[key], _first(entry, ANSWERS)
    for other in (*CONTEXT, *ANSWERS):
        if other in entry and other != answer:
            raise NanoVLMError(f"has {other!r} beside {key!r}, which is not read")
    if "input" in entry:
        if not isinstance(question, str) or not isinstance(entry["input"], str):
            raise NanoVLMError(f"{key} and input are not both text")
        question = f"{question}\n{entry['input']}"
    turns = [*_unpaired(entry.get("history", [])), *as_turns(question, "user")]
    return turns + (as_turns(entry[answer], "assistant") if answer else [])


def _unpaired(items: Any) -> Iterator[Any]:
    """The turns of a list, in which a question and its answer may be one item."""
    for item in items if isinstance(items, list) else [items]:
        if isinstance(item, dict):
            item = present(item)
            asked, answered = _first(item, ASKED), _first(item, ANSWERED)
            if asked and answered and not _is_turn(item):
                if system := _first(item, SYSTEM):
                    yield {"role": "system", "content": item[system]}
                item = [item[asked], item[answered]]
            elif asked and not _is_turn(item):
                raise NanoVLMError(f"a question has no answer beside {asked!r}")
        if isinstance(item, list) and len(item) == 2:
            yield {"role": "user", "content": item[0]}
            yield {"role": "assistant", "content": item[1]}
        else:
            yield item


def _read_turn(turn: Any, number: int = 0) -> tuple[Message, list[str]]:
    """The message of a turn, and the names of its images: "" for the next one of the record.

    `number` is the number of images before it.
    """
    if not isinstance(turn, dict):
        raise NanoVLMError(f"a turn is {quoted(turn)}, expected an object with role and content")
    turn = present(turn)
    role_key, text_key = _first(turn, ROLE) or "role", _first(turn, TEXT) or "content"
    written = turn.get(role_key)
    role = ROLES.get(written.strip().lower()) if isinstance(written, str) else None
    if role is None:
        raise NanoVLMError(
            f"a turn has {role_key} = {quoted(written)}, expected system, user or assistant"
        )
    rest = {key: value for key, value in turn.items() if key not in (*ROLE, *TEXT, *LOSS)}
    for keys in (_MEANING, IMAGE_KEY, _LEARNING):
        _refuse(rest, keys)
    _check_other_images(rest, [])
    content = turn.get(text_key, "")
    if any(turn[key] != content for key in TEXT if key in turn):
        raise NanoVLMError(f"a turn of the {role} has two texts, and they differ")
    text, names = _read_content(content, role, number)
    if not text.strip() and role != "system":  # an empty system prompt replaces a model's own
        raise NanoVLMError(f"a turn of the {role} has no text in {text_key!r}")
    if role != "assistant":
        own = text.replace(IMAGE_MARKER, "") if role == "user" else text
        if foreign := _FOREIGN.search(own):
            raise NanoVLMError(f"a turn of the {role} has {foreign[0]}, which is no image here")
        if _first(turn, LOSS) and _is_learned(turn):
            raise NanoVLMError(f"a turn of the {role} is to be learned, and only answers can be")
    return Message.parse(role, text, _is_learned(turn)), names


def _read_content(content: Any, role: str, number: int) -> tuple[str, list[str]]:
    """The text of a turn, with `<image>` for each of its images, and their names."""
    parts, whole, names = content if isinstance(content, list) else [content], "", []
    if len(parts) > 1 and all(isinstance(part, str) for part in parts):
        raise NanoVLMError(f"has a list of texts, {quoted(parts)}; it is not clear what they are")
    for part in parts:
        text, name = _read_part(part, number + len(names))
        if text is None:
            if role != "user":
                raise NanoVLMError(f"a turn of the {role} has an image; images belong to the user")
            whole += IMAGE_MARKER
            names.append(name)
            continue
        if role == "user":
            names += [(match[1] or "").strip() for match in _PLACE.finditer(text)]
            text = _PLACE.sub(IMAGE_MARKER, text)
        # The images that a turn opens with are on a line of their own, as `infer.py` has them.
        if whole and not whole.replace(IMAGE_MARKER, "") and not text[:1].isspace():
            whole += "\n"
        whole += text
    return whole, names


def _read_part(part: Any, number: int) -> tuple[str | None, str]:
    """The text of a part of a content, or None and the name of an image ("": of the record's).

    An image of the record's may be given by its `number` (llava-instruct-mix), which has to be the
    next one.
    """
    if isinstance(part, str):
        return part, ""
    if isinstance(part, dict):
        part = present(part)
        if part.get("type") == "image" and part.get("index") == number:
            del part["index"]
        kind = part.get("type") or _first(part, ("text", *IMAGE_NAMES))
        has_image = _first(part, (*IMAGE_NAMES, *IMAGE_BYTES))
        text = part.get("text", "" if len(part) == 1 else None)
        if kind in TEXT_PARTS and not has_image and isinstance(text, str):
            _refuse(part, IMAGE_KEY)
            return text, ""
        if kind in IMAGE_PARTS and "text" not in part and (has_image or len(part) == 1):
            return None, _image_name(part) if has_image else ""
    raise NanoVLMError(f"has a part {quoted(part)}, expected text or an image")


def _image_name(value: Any) -> str:
    """The name of an image, or the image itself in base64, from the ways in which it is written."""
    if isinstance(value, dict):
        value = present(value)
        if data := _first(value, IMAGE_BYTES):
            is_text = isinstance(value[data], str)
            value = f"data:;base64,{value[data].rpartition(',')[2]}" if is_text else None
        elif name := _first(value, IMAGE_NAMES):
            return _image_name(value[name])
    if not isinstance(value, str):
        raise NanoVLMError("image is not a path or a list of paths")
    return value.strip()


def _given_images(entry: dict[str, Any]) -> list[str]:
    """The names in `images` or `image`."""
    lists = [entry[key] for key in IMAGES if key in entry]
    lists = [each if isinstance(each, list) else [each] for each in lists]
    lists = [[_image_name(image) for image in each if image is not None] for each in lists]
    if len(lists) > 1 and lists[0] != lists[1]:
        raise NanoVLMError("has image and images, and they differ")
    return lists[0] if lists else []


def _fill(names: list[str], given: list[str]) -> list[str]:
    """Names for all places: those without one take the images that the record lists, in order."""
    nameless = names.count("")
    if not nameless and given in ([], names):
        return names
    if nameless != len(given):
        total = len(names) - nameless + len(given)
        raise NanoVLMError(
            f"the text has {len(names)} {IMAGE_MARKER} markers and the record {total} images"
        )
    remaining = iter(given)
    return [name or next(remaining) for name in names]


def _with_images(message: Message, count: int) -> Message:
    content = (*[IMAGE] * count, f"\n{message.text}") if count else message.content
    return dataclasses.replace(message, content=content)


def _with_system(messages: list[Message], content: Any, key: str) -> list[Message]:
    """The messages with the system prompt that stands beside the turns."""
    system, _ = _read_turn({"role": "system", "content": content})
    if messages[0].role != "system":
        return [system, *messages]
    if messages[0].content != system.content:
        raise NanoVLMError(f"has a system turn and another system prompt in {key!r}")
    return messages


def _is_learned(entry: dict[str, Any]) -> bool:
    """Whether a turn, or all of a record, is to be learned."""
    learned = True
    for key in LOSS:
        value = entry.get(key, key != "masked")
        if value not in (0, 1):
            raise NanoVLMError(f"has {key!r} = {quoted(value)}; all or nothing is learned (1 or 0)")
        learned &= bool(value) == (key != "masked")
    return learned


def _check_other_images(entry: dict[str, Any], names: list[str]) -> None:
    """Refuse a record whose other keys name images that are not read."""
    known = {_base_name(name) for name in names}
    for key, value in entry.items():
        if key in READ:
            continue
        if IMAGE_KEY.fullmatch(key):  # beside images that are read, addresses and file names
            if not names or not all("://" in t or _base_name(t) in known for t in _texts(value)):
                _refuse_key(key)
        elif not names and (
            any(map(_names_image, _texts(value)))
            or (_OTHER_IMAGE_KEY.fullmatch(key) and any(_texts(value)))
        ):
            _refuse_key(key)


def _texts(value: Any, depth: int = 3) -> Iterator[str]:
    """The texts in a value, and in lists and objects in it."""
    if isinstance(value, str):
        yield value
    elif depth and isinstance(value, (list, dict)):
        for child in value.values() if isinstance(value, dict) else value:
            yield from _texts(child, depth - 1)


def _base_name(name: str) -> str:
    return name.replace("\\", "/").rpartition("/")[2]


def _names_image(text: str) -> bool:
    return is_data_uri(text) or (len(text) < 1000 and bool(_IMAGE_FILE.fullmatch(text)))


def _refuse(entry: dict[str, Any], keys: re.Pattern[str]) -> None:
    for key in filter(keys.fullmatch, entry):
        if entry[key] != "[]":  # a list without anything, written down as text (LLaMA-Factory)
            _refuse_key(key)


def _refuse_key(key: str) -> None:
    raise NanoVLMError(f"has {quoted(key)}, which is not read and would change what it means")


def _first(entry: dict[str, Any], keys: Collection[str]) -> str:
    """The first of `keys` that an object has, or ""."""
    return next((key for key in keys if key in entry), "")


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and bool(_first(value, ROLE))


def _has_turn(value: Any) -> bool:
    """Whether a value is a turn, or a list with one in it."""
    return any(map(_is_turn, value if isinstance(value, list) else [value]))
