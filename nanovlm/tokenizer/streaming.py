"""The text of tokens that come one by one.

Lessons: lessons/source/04_tokenizers.py, lessons/source/10_generation.py.
"""

import codecs

from nanovlm.tokenizer.base import Tokenizer


class TextStreamer:
    """Token ids in, text out, whole characters only.

    The bytes of a character may be spread over several tokens. A space before the first word is
    left out where SentencePiece puts it, and with `strip_space` (`Chat.space_opens_answer`).
    """

    def __init__(self, tokenizer: Tokenizer, strip_space: bool = False) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_space = strip_space or tokenizer.puts_space

    def put(self, token: int) -> str:
        """The characters that `token` completes: often one word, sometimes nothing yet."""
        text = self._utf8.decode(self._tokenizer.decode_bytes([token]))
        if self._strip_space and text:
            text, self._strip_space = text.removeprefix(" "), False
        return text

    def end(self) -> str:
        """What is left when the answer stops within a character."""
        return self._utf8.decode(b"", final=True)
