"""Text to ids and back: one interface over byte-pair encoding (Qwen) and SentencePiece (LLaMA).

`encode` is for a user's text and never gives the id of a special token, however the text is
spelled. Only the program places those, by `special_tokens[…]` or `encode_with_special`.
"""

from nanovlm.tokenizer.base import Tokenizer
from nanovlm.tokenizer.byte_pair import BytePairTokenizer
from nanovlm.tokenizer.loading import load_tokenizer
from nanovlm.tokenizer.sentence_piece import SentencePieceTokenizer

__all__ = ["BytePairTokenizer", "SentencePieceTokenizer", "Tokenizer", "load_tokenizer"]
