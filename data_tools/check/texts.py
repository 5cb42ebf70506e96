"""Rules about what a conversation says: what is wrong with its questions and answers.

Each rule is made to pass over what people write: a short answer, a list, a table, code, laughter
and quotations are no finding. What a rule cannot tell from that, it does not report.
"""

import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple
from unicodedata import category

import numpy as np

from nanovlm.data.records import Record

LOOKED_AT = 20_000  # characters of a text that the slower rules look at
LONG_ANSWER = 2000  # words and Chinese characters
FOREIGN_ANSWER = 12  # words and Chinese characters from which an answer has a language
SHORT_ANSWER = 2  # of a description
COPIED_QUESTION = 5  # words and Chinese characters: "Yes or no?" is no question to copy

HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
WORD = re.compile(r"[A-Za-zÀ-ɏ]+(?:['’-][A-Za-zÀ-ɏ]+)*")
_PIECE = re.compile(f"{HAN.pattern}|{WORD.pattern}|[0-9]+")
_OTHER_LETTER = re.compile(f"[^\\W\\d_A-Za-zÀ-ɏ{HAN.pattern[1:-1]}]")
# Shares of Chinese characters among these and words, by which a text counts as English or Chinese.
ENGLISH, CHINESE = 0.1, 0.7

NOTHING = ("nan", "NaN", "null", "NULL", "undefined", "[]", "{}", "<eos>", "<pad>", "<unk>")

_DESCRIBE = re.compile(r"描述|详细|\bdescri|\bcaption\b|\bin detail\b", re.IGNORECASE)
# Questions that name a language, or ask for what is written somewhere.
_OTHER_LANGUAGE = re.compile(
    r"[中英日法德俄韩]文|[汉英日法德俄韩]语|翻译|文字|写|字|品牌|念|代码|\b(?:chinese|english|japanese|french"
    r"|german|spanish|translat\w*|languages?|text|words?|writ\w*|says?|read|ocr|letters?|code)\b",
    re.IGNORECASE,
)

# An answer about itself, or about an image that did not come with the question.
_MODEL = r"(?:an? )?(?:ai|a\.i\.|artificial intelligence|(?:large )?language model|text-based)\b"
_IMAGE = r"(?:images?|pictures?|photo(?:graph)?s?)(?!['’]s)\b"
_SEE = r"(?:see|view|open|access|display|process|analy[sz]e|look at)"
_BOILERPLATE = re.compile(
    rf"\bas {_MODEL}|\bi(?:['’]m| am) (?:just |only )?{_MODEL}"
    rf"|\bi(?:['’]m| am) (?:sorry|unable|not able)\b[^.!?\n]{{0,60}}\b{_SEE}\b"
    rf"[^.!?\n]{{0,30}}{_IMAGE}"
    rf"|\bi (?:can['’]?t|cannot|can not|do(?: not|n['’]t) have the ability to) "
    rf"(?:actually |directly )?{_SEE} "
    rf"(?:the |this |that |your |any |an? )?(?:attached |uploaded |provided )?{_IMAGE}"
    rf"|\bno {_IMAGE} (?:was|were|is|has been|have been) "
    r"(?:provided|attached|uploaded|given|included)"
    rf"|\b{_IMAGE} (?:failed to load|could not be loaded|not available|unavailable|not found)"
    rf"|\bplease (?:provide|upload|attach|share) (?:me with )?(?:the|an?|your) {_IMAGE}"
    r"|(?:图片|图像|照片)(?:加载失败|无法加载|加载不出来|无法显示|未能加载|已失效)"
    r"|作为(?:一[个名款])?(?:人工智能|AI|大?语言模型)|我(?:只)?是(?:一[个名款])?(?:人工智能|AI|大?语言模型|基于文本)"
    r"|(?:抱歉|对不起|很遗憾)[，,。！! ]{0,2}(?:但)?我(?:无法|不能|没有办法|没法|看不到)"
    r"|我(?:无法|不能|没法|没有办法)(?:直接)?(?:查看|看到|看见|访问|打开|浏览|接收)[^，。！？\n]{0,8}(?:图片|图像|照片)"
    r"|请(?:您|你)?(?:重新|先)?(?:上传|提供)(?:一张|该|这张|相关)?(?:的)?(?:图片|图像|照片)",
    re.IGNORECASE,
)

# Latin-1 and Windows-1252 as the bytes of UTF-8 look in them; a space may have been a no-break one.
_CONTINUED = "[\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]"
_OF_THREE = f"[à-ï](?:{_CONTINUED}{_CONTINUED}|{_CONTINUED} | {_CONTINUED})"
_MOJIBAKE = re.compile(
    f"(?:[ÂÃ]{_CONTINUED}|{_OF_THREE}|ð{_CONTINUED}{{3}})"
    f"(?:[Â-ß]{_CONTINUED}|{_OF_THREE}|ð{_CONTINUED}{{3}})*"
)
_HAN_IN_UTF8 = re.compile(rb"(?:[\xe4-\xe9][\x80-\xbf]{2}){2,}")
_NOT_ASCII = re.compile("[^\0-\x7f]{3,}")
_CONTROL = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_PRIVATE = re.compile("[\ue000-\uf8ff]")
_LOST = re.compile("\ufffd|锟斤拷|[?？]{4,}")
_ENTITY = re.compile(
    r"&(?:amp|lt|gt|quot|apos|nbsp|hellip|[mn]dash|[lr][sd]quo|times|copy|#\d{2,6}|#x[0-9a-fA-F]{2,5});"
)
# Where entities are meant: in code and in markup.
_MARKUP = re.compile(
    r"```|`[^`\n]*&|</?[a-z][a-z0-9]*[^<>\n]*>|\bHTML\b|\bXML\b|实体|转义", re.IGNORECASE
)

_SENTENCE_END = re.compile(r"[。！？.!?\n]+")
# A phrase of several words that stands three times in a row is a loop, and a shorter one that
# stands five times; so long in all, and so much of the answer.
LONG_PHRASE, LONGEST_PHRASE = 4, 60  # words and Chinese characters
LOOP, LOOP_SHARE = 12, 0.3
VARIED = 0.85  # share of distinct pairs of words above which nothing can be a loop


class Problem(NamedTuple):
    """What a rule says about a text."""

    kind: str  # of `findings.KINDS`
    detail: str
    severity: float = 0.0


def problems(record: Record) -> Iterator[Problem]:
    """What is wrong with the questions and the labelled answers of a record, by itself."""
    question, asked = "", set[str]()
    for message in record.messages:
        text = message.text.strip()
        if message.role == "user":
            question = text
            key = normal(text)
            if key in asked and size(text) >= COPIED_QUESTION:
                yield Problem("asked-twice", shorten(text))
            asked.add(key)
        if detail := garbled(text):
            yield Problem("garbled", detail)
        if message.role == "assistant" and message.labelled:
            yield from _problems_of_answer(question, text)


def _problems_of_answer(question: str, answer: str) -> Iterator[Problem]:
    if says_nothing(answer):
        yield Problem("empty", repr(shorten(answer)))
    if found := _BOILERPLATE.search(answer[:LOOKED_AT]):
        yield Problem("boilerplate", shorten(found[0]))
    if loop := repeated_within(answer):
        yield Problem("repeated", loop, severity=len(answer))
    length = size(answer)
    if length > LONG_ANSWER:
        yield Problem("too-long", f"{length:,} words or Chinese characters", severity=length)
    if length <= SHORT_ANSWER and _DESCRIBE.search(question) and not says_nothing(answer):
        yield Problem("short", shorten(answer))
    if size(question) >= COPIED_QUESTION and _is_copy(question, answer):
        yield Problem("copied", shorten(answer))
    asked_in, answered_in = language(question), language(answer)
    if (
        {asked_in, answered_in} == {"Chinese", "English"}
        and length >= FOREIGN_ANSWER
        and not _OTHER_LANGUAGE.search(question)
    ):
        yield Problem("language", f"asked in {asked_in}, answered in {answered_in}")


def language(text: str) -> str:
    """The language of a text by its script: Chinese, English, mixed, other, or none without words.

    Whatever is written in Latin letters counts as English.
    """
    han, words = len(HAN.findall(text)), len(WORD.findall(text))
    others = len(_OTHER_LETTER.findall(text))
    if not han + words + others:
        return "none"
    if others > han + words:
        return "other"
    share = han / (han + words)
    return "English" if share <= ENGLISH else "Chinese" if share >= CHINESE else "mixed"


def size(text: str) -> int:
    """Words and Chinese characters of a text."""
    return len(HAN.findall(text)) + len(WORD.findall(text))


def normal(text: str) -> str:
    """A text without its case, its white space and its punctuation."""
    return "".join(character for character in text.lower() if character.isalnum())


def shorten(text: str, length: int = 60) -> str:
    """The beginning of a text on one line."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def says_nothing(answer: str) -> bool:
    """Whether an answer is punctuation alone, or a word that programs write for a missing value.

    A symbol may be an answer ("+"), and "None" is one: "What is on the table?"
    """
    if answer.strip(".。 ") in NOTHING:
        return True
    return not any(category(letter)[0] in "LNS" or letter in "*/#&@%" for letter in answer)


def garbled(text: str) -> str:
    """How a text is garbled; "" if it is not."""
    found = _LOST.search(text)
    if found and (found[0][0] not in "?？" or len(found[0]) > 0.3 * len(text)):
        return f"characters were lost: {shorten(found[0], 20)}"
    if found := _CONTROL.search(text):
        return f"the control character U+{ord(found[0]):04X}"
    if found := _PRIVATE.search(text):
        return f"the character U+{ord(found[0]):04X}, which has no meaning of its own"
    if (found := _ENTITY.search(text)) and not _MARKUP.search(text):
        return f"the HTML entity {found[0]}"
    for found in _MOJIBAKE.finditer(text[:LOOKED_AT]):
        if meant := _decoded(found[0]):
            return (
                f"{shorten(found[0], 20)} is probably {shorten(meant, 20)} (UTF-8 read as Latin-1)"
            )
    for found in _NOT_ASCII.finditer(text[:LOOKED_AT]):
        if meant := _decoded_from_gbk(found[0]):
            return f"{shorten(found[0], 20)} is probably {shorten(meant, 20)} (UTF-8 read as GBK)"
    return ""


def _decoded(run: str) -> str:
    """What the bytes of a text that was read as Windows-1252 say in UTF-8; "" if nothing."""
    encoded = bytearray()
    for character in run:
        try:
            encoded += character.encode("cp1252")
        except UnicodeEncodeError:  # the five bytes that the code page leaves out
            encoded += character.encode("latin-1", errors="ignore")
    for data in (bytes(encoded), bytes(encoded).replace(b" ", b"\xa0")):
        try:
            meant = data.decode()
        except UnicodeDecodeError:
            continue
        # One character alone may be a word's end with a quotation mark or an ellipsis behind it.
        return meant if len(meant) > 1 or run[0] in "ÂÃâð" else ""
    return ""


def _decoded_from_gbk(run: str) -> str:
    """What the bytes of a text that was read as GBK say in UTF-8: Chinese, or ""."""
    data = run.encode("gbk", errors="replace")
    found = _HAN_IN_UTF8.search(data)
    if found is None or (len(found[0]) < 9 and found[0] != data):  # three of them are no accident
        return ""
    return found[0].decode()


def repeated_within(answer: str) -> str:
    """The phrase or sentence that an answer says over and over; "" if there is none.

    It has words or Chinese characters, and fills a good part of the answer: neither a table's ruler
    nor laughter is a loop.
    """
    text = answer[:LOOKED_AT]
    words = _PIECE.findall(text)
    pairs = [*pairwise(words)]
    if len(set(pairs)) <= VARIED * len(pairs) and (loop := _loop(words)):
        return loop
    sentences = [sentence.strip() for sentence in _SENTENCE_END.split(text)]
    long = [sentence for sentence in sentences if size(sentence) >= LONG_PHRASE]
    for sentence, times in Counter(long).most_common(1):
        if times >= 3 and times * len(sentence) >= 2 * LOOP_SHARE * len(text):
            return f"{shorten(sentence)!r} {times} times"
    return ""


def _loop(words: list[str]) -> str:
    """The shortest phrase that stands so often in a row that it is a loop."""
    number = {word: place for place, word in enumerate(words)}
    ids = np.array([number[word] for word in words])
    for length in range(1, min(LONGEST_PHRASE, len(words) // 3) + 1):
        same = np.concatenate(([False], ids[length:] == ids[:-length], [False]))
        starts, ends = np.flatnonzero(np.diff(same.astype(np.int8))).reshape(-1, 2).T
        if not len(starts):
            continue
        longest = int(np.argmax(ends - starts))
        repeated = int(ends[longest] - starts[longest])
        phrase = words[starts[longest] : starts[longest] + length]
        times = repeated // length + 1
        joined = "".join(word if HAN.match(word) else f"{word} " for word in phrase)
        is_speech = size(joined) and (len(set(phrase)) > 1 or len(phrase[0]) > 2)  # not "Ha ha"
        is_often = times >= (3 if length >= LONG_PHRASE else 5)
        if is_speech and is_often and repeated + length >= max(LOOP, LOOP_SHARE * len(words)):
            return f"{shorten(joined)!r} {times} times in a row"
    return ""


def _is_copy(question: str, answer: str) -> bool:
    """Whether an answer is its question, with a few more words at most."""
    asked, answered = normal(question), normal(answer)
    return asked in answered and len(asked) >= 0.8 * len(answered)
