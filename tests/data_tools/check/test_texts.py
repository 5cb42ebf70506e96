"""Rules about texts: they find what they are for, and pass over what people write."""

import time
from pathlib import Path

import pytest

from data_tools.check.findings import KINDS
from data_tools.check.texts import garbled, language, problems, repeated_within, says_nothing, size
from nanovlm.data.records import Record, read_records
from nanovlm.inputs.chat import Message


def kinds(question: str, answer: str) -> list[str]:
    messages = (Message.parse("user", f"<image>\n{question}"), Message.parse("assistant", answer))
    record = Record("data.jsonl:1", (Path("a.jpg"),), messages, (), {})
    return [problem.kind for problem in problems(record)]


@pytest.mark.parametrize(
    "question, answer, kind",
    [
        ("这是什么？", "。", "empty"),
        ("What is it?", "...", "empty"),
        ("What is it?", "NaN", "empty"),
        ("What is it?", "null", "empty"),
        ("Describe it.", "a dog, " * 12, "repeated"),
        ("描述图片", "一只狗在草地上奔跑，" * 4, "repeated"),
        ("描述图片", "图里有一只猫。" + "猫的颜色是白色的。" * 6, "repeated"),
        ("这是什么？", "ä½\xa0å¥½", "garbled"),
        ("这是什么？", "ä½ å¥½", "garbled"),  # whose no-break space has become a space
        ("What is it?", "The manâ€™s dog", "garbled"),
        ("What is it?", "A cafÃ© in Paris", "garbled"),
        ("这是什么？", "这是浣犲ソ涓栫晫", "garbled"),
        ("这是什么？", "一只锟斤拷", "garbled"),
        ("What is it?", "It\ufffds a dog", "garbled"),
        ("What is it?", "a dog\x07", "garbled"),
        ("What is it?", "The man&#39;s dog &amp; cat", "garbled"),
        ("Is &quot;STOP&quot; written there?", "Yes, it is.", "garbled"),
        ("What is it?", "As an AI language model, I have no eyes.", "boilerplate"),
        ("What is it?", "I'm sorry, but I cannot see the image you mention.", "boilerplate"),
        ("What is it?", "Please upload the image first.", "boilerplate"),
        ("这是什么？", "抱歉，我无法回答这个问题。", "boilerplate"),
        ("这是什么？", "图片加载失败", "boilerplate"),
        ("这是什么？", "作为一个人工智能，我没有感情。", "boilerplate"),
        ("这是什么？", "我无法直接查看您提供的图片。", "boilerplate"),
        ("图中的人正在做什么？", "图中的人正在做什么？", "copied"),
        (
            "请描述这张图片里的情景。",
            "A man is riding a brown horse along the beach while two dogs run behind him.",
            "language",
        ),
        (
            "What are the people in this picture doing?",
            "图中有三个人在海边骑马，后面跟着两只棕色的狗。",
            "language",
        ),
        ("请详细描述这张图片。", "狗。", "short"),
        ("What does it say about the war?", "word " * 2001, "too-long"),
    ],
)
def test_a_rule_finds_what_it_is_for(question, answer, kind):
    assert kind in kinds(question, answer)
    assert {*kinds(question, answer)} <= KINDS.keys()


@pytest.mark.parametrize(
    "question, answer",
    [
        # Short answers, symbols, and words that programs also write for missing values.
        ("图中有狗吗？", "有。"),
        ("What is on the table?", "None"),
        ("Who is she?", "Nan, my grandmother."),
        ("Which operator is it?", "+"),
        ("How many?", "3"),
        ("Was it good?", "👍"),
        ("请描述这张图片。", "一个穿着红色T恤的男人在骑自行车。"),
        # Repetition that is meant.
        ("What does she say?", "Ha ha ha ha ha ha!"),
        ("她在做什么？", "她在哈哈哈哈哈哈哈哈大笑。"),
        ("Give a table.", "| a | b | c |\n| --- | --- | --- |\n| 1 | 2 | 3 |\n| 1 | 2 | 4 |"),
        (
            "What is there?",
            "A red ball, a red box, a red car, a red book, a red pen and a red hat.",
        ),
        ("图里有什么？", "一只红色的杯子、一只蓝色的杯子、一只绿色的杯子和一只白色的杯子。"),
        ("What number?", "1 000 000 000 000 000 000 000 000 000 000 000 000 000 000 000"),
        ("Which ones?", "see page 1, see page 2, see page 3, see page 4, see page 5, see page 6"),
        ("Count.", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15"),
        ("What is it?", "A border: ------------------------------------------------"),
        # Accents, quotation marks and dashes of several languages, and rare characters.
        ("What is it?", "Ein Café in Köln: „Größe“ – naïve Gäste… Spaß”"),
        ("Qu'est-ce?", "« Où est l’été à Nîmes ? » À côté du café…"),
        ("O que é?", "NÃO É UM CÃO, É UMA ÂNCORA. São Tomé"),
        ("Что это?", "Это кошка."),
        ("これは何？", "これは猫です。"),
        ("这是什么？", "这是龘和𠮷，还有“引号”——以及省略号……"),
        ("联通是什么？", "中国联通的标志，联通手机"),
        ("What is it?", "A family 👨‍👩‍👧 at 20 °C, £5 ½ price ± 2 × 3"),
        ("What??", "Really????? That is a very long dog, is it not?"),
        ("How is & written in HTML?", "It is written `&amp;`."),
        ("What is AT&T;?", "AT&T; is a company"),
        # What only sounds like an apology or like a machine.
        ("Why?", "The man is sorry that he can't see the stage."),
        ("What is said?", "I can see the image's background: a forest."),
        ("What is it?", "A robot with AI inside, as an aid for farmers."),
        ("她说了什么？", "她说很抱歉来晚了，我无法想象她有多累。"),
        ("这是什么？", "一个人工智能展览上的机器人和许多图片。"),
        # Languages that differ, because the question says so, or in a name.
        (
            "图中的文字是什么？",
            "KEEP CALM AND CARRY ON UNTIL THE END OF THE DAY AND THEN REST A BIT",
        ),
        ("Translate it into Chinese.", "图中有三个人在海边骑马，后面跟着两只棕色的狗。"),
        ("这是什么牌子？", "Coca-Cola"),
        # An answer that says again what was asked.
        ("Is the man happy?", "Yes, the man is happy."),
        ("图中的猫是什么颜色的？", "图中的猫是白色的，它趴在窗台上晒太阳。"),
        ("Hi", "Hi"),
    ],
)
def test_what_people_write_is_no_finding(question, answer):
    assert kinds(question, answer) == []


def test_the_records_of_the_toy_world_have_no_findings(tiny):
    for name in ("train", "val", "novel"):
        records, _ = read_records(tiny.data / f"{name}.jsonl")
        assert not [problem for record in records for problem in problems(record)]


def test_a_question_that_is_asked_twice_in_a_conversation():
    turns = [("user", "这只猫是什么颜色？"), ("assistant", "白色。")] * 2
    messages = tuple(Message.parse(role, text) for role, text in turns)
    assert [each.kind for each in problems(Record("", (), messages, (), {}))] == ["asked-twice"]
    short = tuple(Message.parse(role, text[:2]) for role, text in turns)
    assert not list(problems(Record("", (), short, (), {})))


def test_answers_that_are_not_learned_are_not_judged():
    turns = (Message.parse("user", "?"), Message("assistant", ("图片加载失败",), labelled=False))
    assert not list(problems(Record("", (), turns, (), {})))


def test_what_a_garbled_text_probably_says_is_told():
    assert "is probably 你好 (UTF-8 read as Latin-1)" in garbled("ä½\xa0å¥½")
    assert "is probably 你好世界 (UTF-8 read as GBK)" in garbled("浣犲ソ涓栫晫")
    assert garbled("line one\nline\ttwo") == ""


def test_every_text_that_utf8_as_latin1_makes_of_chinese_is_found():
    for text in ("你好", "图中有一只猫。", "猫", "穿着红色T恤的男人", "“引号”"):
        for encoding in ("latin-1", "cp1252"):
            wrong = text.encode().decode(encoding, errors="ignore")
            assert encoding == "cp1252" or len(text) == 1 or garbled(wrong), (text, wrong)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("一只穿着T恤的猫", "Chinese"),
        ("A cat named 咪 sleeps on the warm sofa in the living room all day", "English"),
        ("这是 machine learning 的 training loop", "mixed"),
        ("Это кошка", "other"),
        ("これはねこです", "other"),
        ("42", "none"),
    ],
)
def test_languages(text, expected):
    assert language(text) == expected


def test_sizes_count_words_and_chinese_characters():
    assert size("一只 big dog's tail，42。") == 5


def test_says_nothing():
    assert says_nothing("") and says_nothing("——") and not says_nothing("a")


@pytest.mark.parametrize(
    "text",
    [
        "ab" * 50_000,
        "a " * 50_000,
        "一" * 100_000,
        "Â" * 100_000,
        "&" * 100_000,
        "I am sorry " * 9000,
    ],
    ids=["ab", "a", "han", "latin", "entity", "sorry"],
)
def test_no_text_takes_long(text):
    start = time.process_time()
    kinds(text, text)
    repeated_within(text)
    assert time.process_time() - start < 2
