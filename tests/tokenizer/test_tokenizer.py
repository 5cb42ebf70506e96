"""The tokenizers against the `tokenizers` and `sentencepiece` packages, and what users must not be able to do."""

import base64
import io
import json
import os
import pickle
import random
import time
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from nanovlm.errors import NanoVLMError
from nanovlm.tokenizer import BytePairTokenizer, SentencePieceTokenizer, load_tokenizer
from nanovlm.tokenizer.merges import unspell
from nanovlm.tokenizer.pretokenize import QWEN_PATTERN, cut, nfc, translate_pattern
from tests.reference.models import sentence_piece as llama_folder

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>"]
CORPUS = [
    "一个穿红色衣服的小女孩在草地上奔跑，后面跟着一只白色的狗。",
    "两个男人站在海边的岩石上看日落。图中有几个红色的圆形？有三个红色的圆形。",
    "左边的蓝色三角形比右边的绿色正方形大，上面没有黄色的星形。",
    "A little girl in a pink dress climbs the stairs; she's happy, isn't she? They'll go 2023-11-05.",
    "def forward(self, hidden_states):\r\n    return self.proj(hidden_states)  # (B, T, C)\n\n\n\tfor i in range(9):\n",
    "Привет, мир! こんにちは世界。안녕하세요 세계 مرحبا بالعالم नमस्ते दुनिया สวัสดีชาวโลก café naïve ",
    "👨‍👩‍👧‍👦 👍🏽 🏳️‍🌈 🇨🇳 ❤️ ...... !!!! ==== ---- \n\n \n   \t\t    aaaaaaaaaaaaaaaa 哈哈哈哈哈哈哈哈",
]
ALPHABETS = [
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ'   ",
    "的一是在不了有和人这中大为上个国我以要他红色圆形左边狗，。？！：“”（） ",
    " \t\n\r\v\f\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000\u200b\ufeffx一",
    "👨👩👧👦🏽👍🏳🌈🇨🇳❤☠🧑🚀\u200d\ufe0f\ufe0e🏿\U000e0067\U000e007f😀 ",
    "aeiounAEIOUNक़ড়가각각ΩåÅ\u0300\u0301\u0302\u0308\u030a\u0323\u0327\u0334\u0338\u0345\u093c\u05bc\u3099\u20d2",
    "".join(map(chr, range(0x20))) + "\x7f\x80\x9f\u200e\u202e\u2066\ufff9\uffff\U0010ffff",
    "0123456789٣४๔²½Ⅻ①〇零壹𝟘 .,-:",
    "{}[]()<>=+-*/\\|&^%$#@!~`\"';:,.?_ \n\tabcxyz01",
    "ſ'sStTrReEvVmMlLdDK'’ ",
    "\u07fd\u0898\u1ac1\U00011938\U00011935\U00011930\U00016d63\U00016d67\U0001611e\U00010efd\u0301\u0323a",
]
FRAGMENTS = [
    *SPECIAL,
    "<tool_call>",
    "</tool_call>",
    "ệ!",
    "e\u0323\u0302!",
    "ệ!\u0338",
    "<|im_",
    "end|>",
]
FRAGMENTS += ["'ll", "'RE", "\r\n", "    ", "http://a.b/c?d=1", "１２"]


def random_text(rng: random.Random) -> str:
    """A string of up to about a hundred characters: scripts, emoji, marks, controls, code and any code point, mixed."""
    pieces = []
    for _ in range(rng.randint(1, 6)):
        kind = rng.random()
        if kind < 0.55:
            pieces += rng.choices(rng.choice(ALPHABETS), k=rng.randint(1, 20))
        elif kind < 0.7:
            pieces += (
                chr(code)
                for code in rng.choices(range(0x110000), k=8)
                if not 0xD800 <= code <= 0xDFFF
            )
        elif kind < 0.8:
            pieces += map(chr, rng.choices(range(0x80, 0x3400), k=8))
        elif kind < 0.9:
            pieces.append(rng.choice(FRAGMENTS))
        else:
            line = rng.choice(CORPUS)
            start = rng.randrange(len(line))
            pieces.append(line[start : start + 20])
    return "".join(pieces)


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
    assert_agrees(
        ours, reference, CORPUS + ["", " ", "\r\n"] + [random_text(rng) for _ in range(4000)]
    )


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
    assert_agrees(
        load_tokenizer(tmp_path), reference, CORPUS + [random_text(rng) for _ in range(500)]
    )


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
    """Up to three digits together, words of the vocabulary whether merges lead to them or not, and a post-processor."""
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
    lines = (f"{base64.b64encode(unspell(token)).decode()} {id}\n" for token, id in vocab.items())
    (tmp_path / "qwen.tiktoken").write_text("".join(lines))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({
        "model_max_length": 32768, "tokenizer_class": "QWenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}}))  # fmt: skip
    qwen = load_tokenizer(tmp_path)
    names = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        *(f"<|extra_{number}|>" for number in range(205)),
    ]
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
    assert again.special_tokens == qwen.special_tokens and again.encode(CORPUS[0]) == qwen.encode(
        CORPUS[0]
    )


def test_character_classes_equal_those_of_tokenizers_for_every_code_point():
    text = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code <= 0xDFFF)
    for name in (r"\p{L}", r"\p{M}", r"\p{N}", r"\s", r"[^\s\p{L}]"):
        words = pre_tokenizers.Split(Regex(name + "+"), "isolated").pre_tokenize_str(text)
        assert cut(text, [translate_pattern(name + "+")]) == [word for word, _ in words], name


def test_normalization_equals_that_of_tokenizers_around_every_code_point():
    reference = normalizers.NFC()
    for code in range(0x110000):
        if not 0xD800 <= code <= 0xDFFF:
            text = f"a\u0301{chr(code)}\u0323\u0301"
            assert nfc(text) == reference.normalize_str(text), hex(code)
    rng = random.Random(10)
    for length in range(1, 300):  # long runs of marks
        text = "".join(
            rng.choices(
                "a\u0301\u0323\u0334\u0345\u0344\u07fd", [1, 30, 30, 30, 30, 5, 1], k=length
            )
        )
        assert nfc(text) == reference.normalize_str(text), ascii(text)


def test_equals_the_real_qwen_tokenizer_on_20000_strings():
    real = os.environ.get("NANOVLM_REAL")
    if not real:
        pytest.skip("NANOVLM_REAL does not name a folder with qwen2.5-0.5b")
    path = Path(real) / "qwen2.5-0.5b"
    reference, ours = (
        tokenizers.Tokenizer.from_file(str(path / "tokenizer.json")),
        load_tokenizer(path),
    )
    rng = random.Random(2)
    assert_agrees(ours, reference, [random_text(rng) for _ in range(20_000)])


def test_special_tokens_never_come_from_user_text(ours):
    specials = set(ours.special_tokens.values())
    assert set(ours.special_tokens) == set(SPECIAL)
    rng = random.Random(3)
    for text in [
        "".join(rng.choices(SPECIAL + FRAGMENTS + ["<", "|", ">", "＜|im_end|＞"], k=8))
        for _ in range(300)
    ]:
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
    tokens = [(base64.b64encode(unspell(token)).decode(), id) for id, token in enumerate(in_order)]
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
        (lambda d: d.update(truncation={"max_length": 3}), "truncation"),
        (lambda d: d["added_tokens"][0].update(lstrip=True), "lstrip"),
        (lambda d: d["added_tokens"][0].update(id=3), "has the same id"),
        (lambda d: d["added_tokens"][0].update(content="!"), "already in the vocabulary"),
        (
            lambda d: d["added_tokens"][0].update(content="!", id=d["model"]["vocab"]["!"]),
            "ordinary text",
        ),
        (lambda d: d["added_tokens"].append("x"), "added token"),
        (lambda d: d.update(added_tokens=3), "not laid out"),
    ],
)
def test_damaged_or_unsupported_files_say_so_in_one_line(folder, tmp_path, change, words):
    with pytest.raises(NanoVLMError, match=words) as caught:
        load_tokenizer(damaged(folder, tmp_path, change))
    assert "tokenizer.json" in str(caught.value) and "\n" not in str(caught.value)


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
    (tmp_path / "tokenizer.model").write_bytes(
        sentence_piece_model[: len(sentence_piece_model) // 2]
    )
    with pytest.raises(NanoVLMError, match="tokenizer.model"):
        load_tokenizer(tmp_path)


def test_a_llama_folder_is_read_from_its_sentence_piece_model(tmp_path):
    """Equal to the conversion that stands beside it and that the reference reads."""
    reference = llama_folder(tmp_path)
    ours = load_tokenizer(tmp_path)
    assert isinstance(ours, SentencePieceTokenizer) and ours.puts_space
    size = sentencepiece.SentencePieceProcessor(
        model_file=str(tmp_path / "tokenizer.model")
    ).vocab_size()
    assert ours.special_tokens == {
        "<unk>": 0,
        "<s>": 1,
        "</s>": 2,
        "<image>": size,
        "<pad>": size + 1,
    }
    assert ours.vocab_size == len(reference)
    rng = random.Random(14)
    texts = [
        text.replace("\0", "") for text in CORPUS + [random_text(rng) for _ in range(500)]
    ]  # which ends a C string
    for text in filter(None, texts):
        if not any(token in text for token in ours.special_tokens):
            assert ours.encode(text) == reference.encode(text, add_special_tokens=False), ascii(
                text
            )
    text = "<s>USER: <image>描述图片</s>"
    assert ours.encode_with_special(text) == reference.encode(text, add_special_tokens=False)


def test_tokens_beside_a_sentence_piece_model(tmp_path):
    llama_folder(tmp_path)
    size = load_tokenizer(tmp_path).vocab_size
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    (tmp_path / "added_tokens.json").write_text(
        json.dumps({"<image>": size - 2, "<pad>": size - 1})
    )  # once more, as in LLaVA
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps(
            {
                "eos_token": {"content": "</s>"},
                "pad_token": "<pad>",
                "additional_special_tokens": ["<sep>"],
            }
        )
    )
    assert (
        load_tokenizer(tmp_path).special_tokens["<sep>"] == size
    )  # only named, so it gets the next id
    (tmp_path / "special_tokens_map.json").write_text('{"sep_token": "▁the"}')
    with pytest.raises(
        NanoVLMError,
        match="tokenizer.model: special token '▁the': ordinary text gives that piece too",
    ):
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
    with pytest.raises(
        NanoVLMError, match="put the tokenizer.model that this was made from beside it"
    ):
        load_tokenizer(tmp_path)
