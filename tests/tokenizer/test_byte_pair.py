"""Byte-pair encoding against the `tokenizers` package; user text never gives special tokens."""

import base64
import json
import os
import pickle
import random
import time
from pathlib import Path

import pytest
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from nanovlm.errors import NanoVLMError
from nanovlm.tokenizer import BytePairTokenizer, load_tokenizer
from nanovlm.tokenizer.merges import token_to_bytes
from nanovlm.tokenizer.pretokenize import QWEN_PATTERN, nfc
from tests.tokenizer.texts import CORPUS, FRAGMENTS, SPECIAL, random_text


def assert_agrees(
    ours: BytePairTokenizer, reference: tokenizers.Tokenizer, texts: list[str]
) -> None:
    """Ids and decoded text equal the reference's, for a user's text and for the program's."""
    for as_user, encode in ((True, ours.encode), (False, ours.encode_with_special)):
        reference.encode_special_tokens = as_user
        for text in texts:
            ids = encode(text)
            assert ids == reference.encode(text, add_special_tokens=False).ids, ascii(text)
            for skip in (False, True):
                assert ours.decode(ids, skip) == reference.decode(ids, skip_special_tokens=skip), (
                    ascii(text)
                )


def train_reference(
    pre_tokenizer: pre_tokenizers.PreTokenizer, normalizer: normalizers.Normalizer | None
) -> tokenizers.Tokenizer:
    reference = tokenizers.Tokenizer(models.BPE())
    if normalizer is not None:
        reference.normalizer = normalizer
    reference.pre_tokenizer = pre_tokenizer
    reference.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    reference.train_from_iterator(CORPUS * 4, trainer)
    reference.add_special_tokens(SPECIAL)
    reference.add_tokens([tokenizers.AddedToken("<tool_call>", normalized=False)])
    reference.add_tokens([tokenizers.AddedToken("ệ!", normalized=True)])
    return reference


def qwen_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated")
    return pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


@pytest.fixture(scope="module")
def reference() -> tokenizers.Tokenizer:
    return train_reference(qwen_pre_tokenizer(), normalizers.NFC())


@pytest.fixture(scope="module")
def folder(reference: tokenizers.Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("byte-pair")
    reference.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture
def ours(folder: Path) -> BytePairTokenizer:
    return load_tokenizer(folder)


def test_equals_tokenizers_on_random_text(ours, reference):
    rng = random.Random(0)
    texts = [*CORPUS, "", " ", "\r\n", *(random_text(rng) for _ in range(4000))]
    assert_agrees(ours, reference, texts)


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(False), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split("red", "isolated"),
                pre_tokenizers.Split(Regex(r"\p{N}{1,3}|[^\s\p{L}\p{M}]+|\S+"), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
    ],
    ids=["gpt2", "digits", "digit runs", "splits"],
)
def test_equals_tokenizers_with_other_patterns(pre_tokenizer, tmp_path):
    reference = train_reference(pre_tokenizer, None)
    reference.save(str(tmp_path / "tokenizer.json"))
    rng = random.Random(1)
    texts = CORPUS + [random_text(rng) for _ in range(500)]
    assert_agrees(load_tokenizer(tmp_path), reference, texts)


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_equals_tokenizers_when_merges_are_out_of_order_or_missing(folder, tmp_path, ignore_merges):
    def change(document: dict) -> None:
        merges = document["model"]["merges"]
        random.Random(8).shuffle(merges)
        document["model"].update(merges=merges[: len(merges) * 3 // 4], ignore_merges=ignore_merges)

    ours = load_tokenizer(damaged(folder, tmp_path, change))
    reference = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    rng = random.Random(9)
    assert_agrees(ours, reference, CORPUS + [random_text(rng) for _ in range(500)])


LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def test_equals_tokenizers_on_a_file_like_smollm2s(tmp_path):
    """Its special tokens come first in the vocabulary, and digits stand alone."""
    reference = tokenizers.Tokenizer(models.BPE())
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    reference.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    reference.train_from_iterator(CORPUS * 4, trainer)
    reference.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    assert ours.special_tokens == {token: id for id, token in enumerate(special)}
    rng = random.Random(11)
    assert_agrees(ours, reference, CORPUS + special + [random_text(rng) for _ in range(500)])


def test_equals_tokenizers_on_a_file_like_llama_3s(tmp_path):
    """Up to three digits together, `ignore_merges`, and a post-processor."""
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
    reference = train_reference(
        pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)]), None
    )
    begin = "<|begin_of_text|>"
    reference.add_special_tokens([begin])
    reference.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                f"{begin} $A", special_tokens=[(begin, reference.token_to_id(begin))]
            ),
        ]
    )
    document = json.loads(reference.to_str())
    document["model"]["ignore_merges"] = True
    document["model"]["merges"] = document["model"]["merges"][::2]  # so that some words have none
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    reference = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    rng = random.Random(12)
    texts = CORPUS + ["1234567", begin] + [random_text(rng) for _ in range(500)]
    assert_agrees(load_tokenizer(tmp_path), reference, texts)


def test_the_first_qwens_special_tokens_follow_its_vocabulary(ours, folder, tmp_path):
    vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    lines = (
        f"{base64.b64encode(token_to_bytes(token)).decode()} {id}\n" for token, id in vocab.items()
    )
    (tmp_path / "qwen.tiktoken").write_text("".join(lines))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({
        "model_max_length": 32768, "tokenizer_class": "QWenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}}))  # fmt: skip
    qwen = load_tokenizer(tmp_path)
    extra = [f"<|extra_{number}|>" for number in range(205)]
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *extra]
    assert qwen.special_tokens == {name: len(vocab) + number for number, name in enumerate(names)}
    assert qwen.vocab_size == len(vocab) + 208  # 151,643 + 208 in the published one
    rng = random.Random(13)
    for text in CORPUS + [random_text(rng) for _ in range(300)]:
        if "<tool_call>" not in text and "ệ!" not in nfc(text):  # which `ours` knows besides
            assert qwen.encode(text) == ours.encode(text), ascii(text)
    assert not set(qwen.encode("".join(names))) & set(qwen.special_tokens.values())
    assert qwen.encode_with_special("狗<|extra_0|>")[-1] == len(vocab) + 3
    qwen.save(tmp_path)  # a tokenizer.json, which goes before the tiktoken file
    again = load_tokenizer(tmp_path)
    assert again.special_tokens == qwen.special_tokens
    assert again.encode(CORPUS[0]) == qwen.encode(CORPUS[0])


def test_equals_the_real_qwen_tokenizer_on_20000_strings():
    real = os.environ.get("NANOVLM_REAL")
    if not real:
        pytest.skip("NANOVLM_REAL does not name a folder with qwen2.5-0.5b")
    path = Path(real) / "qwen2.5-0.5b"
    reference = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    ours = load_tokenizer(path)
    rng = random.Random(2)
    assert_agrees(ours, reference, [random_text(rng) for _ in range(20_000)])


def test_special_tokens_never_come_from_user_text(ours):
    specials = set(ours.special_tokens.values())
    assert set(ours.special_tokens) == set(SPECIAL)
    rng = random.Random(3)
    fragments = [*SPECIAL, *FRAGMENTS, "<", "|", ">", "＜|im_end|＞"]
    for _ in range(300):
        text = "".join(rng.choices(fragments, k=8))
        ids = ours.encode(text)
        assert not specials & set(ids)
        assert ours.decode(ids) == nfc(text)
    assert ours.encode_with_special("<|im_end|>") == [ours.special_tokens["<|im_end|>"]]
    assert ours.decode(ours.encode_with_special("狗<|im_end|>"), skip_special=True) == "狗"


def test_decoding_gives_back_the_text_and_bytes_may_be_cut_anywhere(ours):
    rng = random.Random(4)
    for _ in range(300):
        text = random_text(rng)
        ids = ours.encode(text)
        assert ours.decode(ids) == nfc(text)
        assert b"".join(ours.decode_bytes([id]) for id in ids) == nfc(text).encode()
    assert ours.decode([ours.vocab_size + 5]) == ""


def test_lone_surrogates_are_read_as_the_replacement_character(ours):
    assert ours.encode("a\ud83d狗") == ours.encode("a\ufffd狗")


def test_ids_survive_saving_adding_and_pickling(ours, reference, tmp_path):
    size = ours.vocab_size
    assert ours.add_special_token("<image>") == size == ours.add_special_token("<image>")
    assert ours.vocab_size == size + 1
    assert size not in ours.encode("<image>")
    ours.save(tmp_path)
    again, packed = load_tokenizer(tmp_path), pickle.loads(pickle.dumps(ours))
    assert again.special_tokens == ours.special_tokens and again.vocab_size == ours.vocab_size
    rng = random.Random(5)
    texts = [random_text(rng) + "<image>" for _ in range(200)]
    assert_agrees(again, tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")), texts)
    assert all(packed.encode(text) == ours.encode(text) == again.encode(text) for text in texts)
    with pytest.raises(NanoVLMError, match="already in the vocabulary"):
        ours.add_special_token("<tool_call>")


def test_the_older_file_formats_give_the_same_ids(ours, folder, tmp_path):
    document = json.loads((folder / "tokenizer.json").read_text())
    model, added = document["model"], document["added_tokens"]
    config = {
        "added_tokens_decoder": {token.pop("id"): token for token in added},
        "tokenizer_class": "Qwen2Tokenizer",
    }
    pairs, tik = tmp_path / "pairs", tmp_path / "tik"
    for path in (pairs, tik):
        path.mkdir()
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    (pairs / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (pairs / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    in_order = sorted(model["vocab"], key=model["vocab"].get)
    tokens = [
        (base64.b64encode(token_to_bytes(token)).decode(), id) for id, token in enumerate(in_order)
    ]
    (tik / "small.tiktoken").write_text("".join(f"{token} {id}\n" for token, id in tokens))
    rng = random.Random(6)
    texts = CORPUS + [random_text(rng) for _ in range(500)]
    for other in (load_tokenizer(pairs), load_tokenizer(tik)):
        assert other.vocab_size == ours.vocab_size and other.special_tokens == ours.special_tokens
        for text in texts:
            assert other.encode(text) == ours.encode(text), ascii(text)
            assert other.encode_with_special(text) == ours.encode_with_special(text), ascii(text)


@pytest.mark.parametrize(
    "unit", ["a", "abcdefg", "狗", "é", " ", "\n", "\u0301", "e\u0301", "\u0301\u0323", " 狗"]
)
def test_time_grows_in_step_with_length(ours, unit):
    def seconds(length: int) -> float:
        text = unit * (length // len(unit))
        start = time.process_time()
        ours.encode(text)
        return time.process_time() - start

    short = min(seconds(20_000) for _ in range(3))
    assert seconds(160_000) < 30 * max(short, 0.005)  # 8 times if linear, 64 times if quadratic


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["a", "xyzt", "狗", " ", "\n", "红色的狗，"])
def test_a_megabyte_equals_tokenizers(ours, reference, unit):
    assert_agrees(ours, reference, [unit * (1_000_000 // len(unit.encode()))])


def damaged(folder: Path, target: Path, change) -> Path:
    document = json.loads((folder / "tokenizer.json").read_text())
    change(document)
    (target / "tokenizer.json").write_text(json.dumps(document))
    return target


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["model"]["merges"].append(["狗", "猫"]), "merge .* not two tokens"),
        (lambda d: d["model"]["merges"].append("one"), "merge .* not two tokens"),
        (lambda d: d["model"]["merges"].append(7), "merge .* not two tokens"),
        (lambda d: d["model"].pop("merges"), "not byte-pair"),
        (lambda d: d["model"].update(merges=None), "not laid out"),
        (lambda d: d["model"].update(type="WordPiece"), "not byte-pair"),
        (lambda d: d["model"]["vocab"].pop("Ā"), "lacks 1 of the 256 bytes"),
        (lambda d: d["model"]["vocab"].update(zzz=0), "used twice"),
        (lambda d: d["model"]["vocab"].update(zzz="0"), "whole numbers"),
        (lambda d: d["model"].update(dropout=0.1), "dropout"),
        (lambda d: d["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix"),
        (lambda d: d.update(normalizer={"type": "Lowercase"}), "Lowercase"),
        (lambda d: d.update(pre_tokenizer=None), "ByteLevel"),
        (lambda d: d.update(pre_tokenizer={"type": "Whitespace"}), "Whitespace"),
        (lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"), "behavior"),
        (
            lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": r"\p{Han}+"}),
            "p{Han}",
        ),
        (
            lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "(a"}),
            "regular expression",
        ),
        (
            lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": 3}),
            "not laid out",
        ),
        (
            lambda d: d["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
            "add_prefix_space",
        ),
        (lambda d: d.update(decoder={"type": "WordPiece"}), "decoder"),
        (lambda d: d["added_tokens"][0].update(lstrip=True), "lstrip"),
        (lambda d: d["added_tokens"][0].update(id=3), "has the same id"),
        (lambda d: d["added_tokens"][0].update(content="!"), "already in the vocabulary"),
        (
            lambda d: d["added_tokens"][0].update(content="!", id=d["model"]["vocab"]["!"]),
            "ordinary text",
        ),
        (lambda d: d["model"]["vocab"].update(zzz=2**62), "the highest id is .* at most 4194304"),
        (lambda d: d["model"]["vocab"].update({"\ud800": 9999}), "lone surrogate"),
        (lambda d: d["added_tokens"][0].update(content="\ud800"), "lone surrogate"),
        (lambda d: d.update(post_processor={"type": "\ud800"}), "lone surrogate"),
        (lambda d: d["added_tokens"][0].update(id=2**62), "the id is .* at most 4194304"),
        (
            lambda d: d.update(
                added_tokens=[{"id": 999 + i, "content": f"<{i}>"} for i in range(20_000)]
            ),
            "20000 added tokens; the limit",
        ),
        (
            lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "(a+)+b"}),
            "a group holds a repetition without an end",
        ),
        (lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(pattern={}), "has no text"),
        (
            lambda d: d["pre_tokenizer"].update(
                pretokenizers=[{"type": "Digits"}] * 99 + d["pre_tokenizer"]["pretokenizers"]
            ),
            "has 100 steps; the limit",
        ),
        (lambda d: d["added_tokens"].append("x"), "added token"),
        (lambda d: d.update(added_tokens=3), "not laid out"),
    ],
)
def test_damaged_or_unsupported_files_say_so_in_one_line(folder, tmp_path, change, words):
    with pytest.raises(NanoVLMError, match=words) as caught:
        load_tokenizer(damaged(folder, tmp_path, change))
    assert "tokenizer.json" in str(caught.value) and "\n" not in str(caught.value)


def test_cutting_and_padding_are_passed_over_and_not_saved(folder, tmp_path):
    """They act where the `tokenizers` package is asked to cut or to pad, and not here."""
    settings = {"truncation": {"max_length": 3}, "padding": {"pad_id": 0}, "version": "2.0"}
    tokenizer = load_tokenizer(damaged(folder, tmp_path, lambda d: d.update(settings)))
    text = "描述图片 and what is in it"
    assert tokenizer.encode(text) == load_tokenizer(folder).encode(text)
    tokenizer.save(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    assert saved["truncation"] is None and saved["padding"] is None


def test_ids_may_have_holes(folder, tmp_path):
    tokenizer = load_tokenizer(
        damaged(folder, tmp_path, lambda d: d["model"]["vocab"].update(zzz=100_000))
    )
    assert tokenizer.vocab_size == 100_001 and tokenizer.decode([99_999]) == ""
    assert tokenizer.decode([100_000]) == "zzz"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "holds no tokenizer"),
        ({"tokenizer.json": "{\n oops"}, "tokenizer.json:2"),
        ({"tokenizer.json": "[]"}, "expected an object"),
        ({"vocab.json": "{}", "merges.txt": "a b\n"}, "lacks 256"),
        ({"a.tiktoken": "IQ== 0\n??? 1\n"}, "a.tiktoken:2"),
        ({"a.tiktoken": "IQ== 0\n"}, "lacks 255"),
        ({"a.tiktoken": "", "b.tiktoken": ""}, "leave one"),
        ({"a.tiktoken": "", "tokenizer_config.json": '{"tokenizer_class": "Odd"}'}, "Odd"),
        (
            {"a.tiktoken": "", "tokenizer_config.json": '{"added_tokens_decoder": [1]}'},
            "added_tokens_decoder",
        ),
        ({"tokenizer.model": ""}, "not a SentencePiece model"),
        ({"tokenizer.model": "hello, I am text"}, "not a SentencePiece model"),
        ({"x.model": "\x0a\x7f"}, "not a SentencePiece model"),
    ],
)
def test_folders_without_a_readable_tokenizer_say_so_in_one_line(tmp_path, files, words):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(NanoVLMError, match=words) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
