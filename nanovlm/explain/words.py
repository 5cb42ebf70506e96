"""The tokens of an answer, grouped into words to look at."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.tokenizer.streaming import TextStreamer

# Scripts that put no spaces between words: Thai to Burmese, Khmer, Chinese, Japanese kana. There a
# word is what the tokenizer takes for one.
_UNSPACED = re.compile(
    "[\u0e00-\u109f\u1780-\u17ff\u2e80-\ua4cf\uf900-\ufaff\U00020000-\U0003ffff]"
)


@dataclass(frozen=True)
class Word:
    """A word of an answer, and the numbers of its tokens there, counted from 0."""

    text: str
    tokens: tuple[int, ...]


def answer_words(model: VisionLanguageModel, answer: Sequence[int]) -> list[Word]:
    """The words of an answer's token ids, in order.

    Tokens within a word of letters belong together, and so do those that share a character's
    bytes. Chinese stays as the tokenizer cuts it. What has no letter or digit, such as
    punctuation, is no word, and neither are special tokens.
    """
    streamer = TextStreamer(model.tokenizer, model.chat.space_opens_answer)
    special = set(model.tokenizer.special_tokens.values())
    words: list[Word] = []
    waiting: tuple[int, ...] = ()  # tokens whose last character is not complete
    for number, token in enumerate(answer):
        text = "\0" if token in special else streamer.put(token)
        waiting = (*waiting, number)
        if not text:
            continue
        if words and _is_within_word(words[-1].text[-1]) and _is_within_word(text[0]):
            last = words.pop()
            words.append(Word(last.text + text, last.tokens + waiting))
        else:
            words.append(Word(text, waiting))
        waiting = ()
    named = (Word(word.text.strip(), word.tokens) for word in words)
    return [word for word in named if any(char.isalnum() for char in word.text)]


def _is_within_word(char: str) -> bool:
    """Whether a word may go on before or after it: a letter, a mark, a digit, a hyphen."""
    is_part = unicodedata.category(char)[0] in "LMN" or char in "'’-"
    return is_part and not _UNSPACED.match(char)
