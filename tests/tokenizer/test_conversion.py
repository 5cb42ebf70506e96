"""A SentencePiece model as a `tokenizer.json` gives the same ids, and the same text back."""

import io
import json
import random
from pathlib import Path

import pytest
import tokenizers
from sentencepiece import SentencePieceTrainer

from nanovlm.errors import NanoVLMError
from nanovlm.tokenizer import SentencePieceTokenizer, load_tokenizer
from nanovlm.tokenizer.conversion import to_tokenizer_json
from tests.reference.models import CORPUS, sentence_piece

TINY = Path(__file__).parents[2] / "nanovlm/assets/tiny-vlm"
CHARACTERS = "图中有几个红色的圆形？ 0123 abcde\n\t  哈哈哈哈AB😀é▁----    00aa"


@pytest.fixture(params=["tiny", "vicuna"])
def tokenizer(request, tmp_path) -> SentencePieceTokenizer:
    """One that puts no space before a text, and one that does."""
    if request.param == "vicuna":
        sentence_piece(tmp_path)
    tokenizer = load_tokenizer(TINY if request.param == "tiny" else tmp_path)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    return tokenizer


def test_ids_and_texts_are_the_same(tokenizer):
    reference = tokenizers.Tokenizer.from_str(json.dumps(to_tokenizer_json(tokenizer)))
    assert reference.get_vocab_size() == tokenizer.vocab_size
    pieces = [tokenizer.decode([id]) for id in range(tokenizer.vocab_size)]
    choose = random.Random(0)
    for number in range(2000):
        source = pieces if number % 2 else [*CHARACTERS, *"".join(pieces)]
        text = "".join(choose.choice(source) for _ in range(choose.randint(1, 20)))
        if number % 5 == 0:
            text = choose.choice(CHARACTERS) * choose.randint(1, 9) + text
        if any(token in text for token in tokenizer.special_tokens):
            continue  # text to us, a token to a tool that reads the whole
        ids = reference.encode(text, add_special_tokens=False).ids
        assert ids == tokenizer.encode(text), text
        assert reference.decode(ids) == tokenizer.decode(ids), text


def test_special_tokens_are_found(tokenizer):
    reference = tokenizers.Tokenizer.from_str(json.dumps(to_tokenizer_json(tokenizer)))
    text = "图<image> a</s>\n<image><image>b </s>"
    assert reference.encode(text).ids == tokenizer.encode_with_special(text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "unigram"}, "is no byte-pair encoding"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalizes texts"),
        ({"remove_extra_whitespaces": True}, "removes extra spaces"),
        ({"treat_whitespace_as_suffix": True}, "puts the space of a word behind it"),
    ],
)
def test_models_that_would_give_other_ids_are_refused(settings, message):
    model, plain = io.BytesIO(), {"model_type": "bpe", "normalization_rule_name": "identity"}
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 9),
        model_writer=model,
        vocab_size=120,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **({"remove_extra_whitespaces": False} | plain | settings),
    )
    with pytest.raises(NanoVLMError, match=message):
        to_tokenizer_json(SentencePieceTokenizer(model.getvalue()))
