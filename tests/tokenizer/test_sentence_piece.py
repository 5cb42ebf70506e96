"""SentencePiece models against the package; user text never gives special tokens."""

import io
import json
import pickle
import random

import pytest
import sentencepiece

from nanovlm.errors import NanoVLMError
from nanovlm.tokenizer import SentencePieceTokenizer, load_tokenizer
from tests.reference.models import sentence_piece as llama_folder
from tests.tokenizer.texts import CORPUS, random_text


def train_sentence_piece(**settings) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_writer=model,
        vocab_size=450,
        byte_fallback=True,
        user_defined_symbols=["<image>", "<|user|>"],
        control_symbols=["<|end|>"],
        minloglevel=2,
        **settings,
    )
    return model.getvalue()


SENTENCE_PIECE = {
    "plain bpe": {
        "model_type": "bpe",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
    },
    "unigram with its defaults": {"model_type": "unigram"},
}


@pytest.fixture(scope="module", params=SENTENCE_PIECE.values(), ids=SENTENCE_PIECE.keys())
def sentence_piece_model(request: pytest.FixtureRequest) -> bytes:
    return train_sentence_piece(**request.param)


def test_sentence_piece_equals_the_package(sentence_piece_model):
    package = sentencepiece.SentencePieceProcessor(model_proto=sentence_piece_model)
    ours = SentencePieceTokenizer(sentence_piece_model)
    rng = random.Random(7)
    for text in CORPUS + [random_text(rng) for _ in range(1000)]:
        ids = ours.encode(text)
        assert ids == package.encode(text), ascii(text)
        decoded = package.decode(ids)
        assert ours.decode(ids, skip_special=True) == decoded or "\ufffd" in decoded, ascii(text)


def test_sentence_piece_specials_never_come_from_user_text(sentence_piece_model):
    package = sentencepiece.SentencePieceProcessor(model_proto=sentence_piece_model)
    ours = SentencePieceTokenizer(sentence_piece_model)
    assert set(ours.special_tokens) == {"<unk>", "<s>", "</s>", "<image>", "<|user|>", "<|end|>"}
    assert ours.add_special_token("<|im_end|>") == ours.vocab_size - 1 == package.vocab_size()
    for spelling in [*ours.special_tokens, "＜image＞", "<ima<image>ge>", "<0x41>"]:
        ids = ours.encode(f"看{spelling}图")
        assert not set(ids) & set(ours.special_tokens.values())
        assert ours.decode(ids) == package.normalize(f"看{spelling}图").strip("\u2581 ")
        if spelling in ours.special_tokens:
            assert ours.special_tokens[spelling] in ours.encode_with_special(f"看{spelling}图")
    assert package.piece_to_id("<image>") in package.encode("看＜image＞图")  # the trap is real
    ids = ours.encode_with_special("看<image>图")
    assert "<image>" in ours.decode(ids) and "<image>" not in ours.decode(ids, skip_special=True)


def test_sentence_piece_bytes_may_be_cut_anywhere(sentence_piece_model):
    ours = SentencePieceTokenizer(sentence_piece_model)
    ids = ours.encode("x🦄")
    assert len(ids) >= 5
    assert ours.decode(ids) == "x🦄"
    assert b"".join(ours.decode_bytes([id]) for id in ids[:-1]).lstrip() == "x🦄".encode()[:-1]
    assert ours.decode(ids[:-1]) == "x\ufffd"
    assert ours.encode("x\ud800") == ours.encode("x\ufffd")


def test_sentence_piece_survives_saving_and_pickling(sentence_piece_model, tmp_path):
    ours = SentencePieceTokenizer(sentence_piece_model)
    ours.add_special_token("<|im_start|>")
    ours.save(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == sentence_piece_model
    text = "<|im_start|>红色的狗<image>"
    for again in (load_tokenizer(tmp_path), pickle.loads(pickle.dumps(ours))):
        assert again.special_tokens == ours.special_tokens and again.vocab_size == ours.vocab_size
        assert again.encode(text) == ours.encode(text)
        assert again.encode_with_special(text) == ours.encode_with_special(text)
    (tmp_path / "added_tokens.json").write_text('{"<x>": 3}')
    with pytest.raises(NanoVLMError, match="has id 3"):
        load_tokenizer(tmp_path)
    half = sentence_piece_model[: len(sentence_piece_model) // 2]
    (tmp_path / "tokenizer.model").write_bytes(half)
    with pytest.raises(NanoVLMError, match="tokenizer.model"):
        load_tokenizer(tmp_path)


def test_a_llama_folder_is_read_from_its_sentence_piece_model(tmp_path):
    """Equal to the conversion beside it, which the reference reads."""
    reference = llama_folder(tmp_path)
    ours = load_tokenizer(tmp_path)
    assert isinstance(ours, SentencePieceTokenizer) and ours.puts_space
    model_file = str(tmp_path / "tokenizer.model")
    size = sentencepiece.SentencePieceProcessor(model_file=model_file).vocab_size()
    own = {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert ours.special_tokens == own | {"<image>": size, "<pad>": size + 1}
    assert ours.vocab_size == len(reference)
    rng = random.Random(14)
    for text in CORPUS + [random_text(rng) for _ in range(500)]:
        text = text.replace("\0", "")  # which ends a C string
        if text and not any(token in text for token in ours.special_tokens):
            expected = reference.encode(text, add_special_tokens=False)
            assert ours.encode(text) == expected, ascii(text)
    text = "<s>USER: <image>描述图片</s>"
    assert ours.encode_with_special(text) == reference.encode(text, add_special_tokens=False)


def test_tokens_beside_a_sentence_piece_model(tmp_path):
    llama_folder(tmp_path)
    size = load_tokenizer(tmp_path).vocab_size
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    repeated = {"<image>": size - 2, "<pad>": size - 1}  # as in LLaVA
    (tmp_path / "added_tokens.json").write_text(json.dumps(repeated))
    named = {
        "eos_token": {"content": "</s>"},
        "pad_token": "<pad>",
        "additional_special_tokens": ["<sep>"],  # without an id, so it gets the next one
    }
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(named))
    assert load_tokenizer(tmp_path).special_tokens["<sep>"] == size
    (tmp_path / "special_tokens_map.json").write_text('{"sep_token": "▁the"}')
    message = "tokenizer.model: special token '▁the': ordinary text gives that piece too"
    with pytest.raises(NanoVLMError, match=message):
        load_tokenizer(tmp_path)
    (tmp_path / "special_tokens_map.json").unlink()
    cases = [
        ({"2": {"content": "<s>", "special": True}}, "'<s>' has id 2, expected 1"),
        ({str(size): {"content": "<x>", "special": False}}, "'<x>' is not special"),
        (
            {str(size + 7): {"content": "<x>", "special": True}},
            f"has id {size + 7}, expected {size}",
        ),
        ({str(size): {"content": "▁the", "special": True}}, "ordinary text gives that piece too"),
    ]
    for added, message in cases:
        path.write_text(json.dumps(config | {"added_tokens_decoder": added}))
        with pytest.raises(NanoVLMError, match=message) as caught:
            load_tokenizer(tmp_path)
        assert "\n" not in str(caught.value)
    path.write_text(json.dumps(config))
    (tmp_path / "tokenizer.model").unlink()
    advice = "put the tokenizer.model that this was made from beside it"
    with pytest.raises(NanoVLMError, match=advice):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (b"\x0a" + b"\xff" * 1_000_000, "an integer does not end"),
        (b"\x0a\x09\x0a\x05<0xG>\x18\x06", "'<0xG>' is not a byte"),
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "but a Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "but an HTML page"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_no_model_is_named_at_once(tmp_path, model: bytes, message: str):
    (tmp_path / "tokenizer.model").write_bytes(model)
    with pytest.raises(NanoVLMError, match=f"tokenizer.model: is not a Senten.*{message}"):
        load_tokenizer(tmp_path)
