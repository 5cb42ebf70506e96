"""Texts that are hard to tokenize, and random ones."""

import random

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>"]
CORPUS = [
    "一个穿红色衣服的小女孩在草地上奔跑，后面跟着一只白色的狗。",
    "两个男人站在海边的岩石上看日落。图中有几个红色的圆形？有三个红色的圆形。",
    "左边的蓝色三角形比右边的绿色正方形大，上面没有黄色的星形。",
    (
        "A little girl in a pink dress climbs the stairs; she's happy, isn't she? "
        "They'll go 2023-11-05."
    ),
    (
        "def forward(self, hidden_states):\r\n    return self.proj(hidden_states)  # (B, T, C)\n"
        "\n\n\tfor i in range(9):\n"
    ),
    "Привет, мир! こんにちは世界。안녕하세요 세계 مرحبا بالعالم नमस्ते दुनिया สวัสดีชาวโลก café naïve ",
    (
        "👨‍👩‍👧‍👦 👍🏽 🏳️‍🌈 🇨🇳 ❤️ ...... !!!! ==== ---- "
        "\n\n \n   \t\t    aaaaaaaaaaaaaaaa 哈哈哈哈哈哈哈哈"
    ),
]
ALPHABETS = [
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ'   ",
    "的一是在不了有和人这中大为上个国我以要他红色圆形左边狗，。？！：“”（） ",
    " \t\n\r\v\f\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000\u200b\ufeffx一",
    "👨👩👧👦🏽👍🏳🌈🇨🇳❤☠🧑🚀\u200d\ufe0f\ufe0e🏿\U000e0067\U000e007f😀 ",
    (
        "aeiounAEIOUNक़ড়가각각ΩåÅ\u0300\u0301\u0302\u0308\u030a\u0323"
        "\u0327\u0334\u0338\u0345\u093c\u05bc\u3099\u20d2"
    ),
    "".join(map(chr, range(0x20))) + "\x7f\x80\x9f\u200e\u202e\u2066\ufff9\uffff\U0010ffff",
    "0123456789٣४๔²½Ⅻ①〇零壹𝟘 .,-:",
    "{}[]()<>=+-*/\\|&^%$#@!~`\"';:,.?_ \n\tabcxyz01",
    "ſ'sStTrReEvVmMlLdDK'’ ",
    (
        "\u07fd\u0898\u1ac1\U00011938\U00011935\U00011930\U00016d63"
        "\U00016d67\U0001611e\U00010efd\u0301\u0323a"
    ),
]
FRAGMENTS = [
    *(
        *SPECIAL,
        "<tool_call>",
        "</tool_call>",
        "ệ!",
        "e\u0323\u0302!",
        "ệ!\u0338",
        "<|im_",
        "end|>",
    ),
    *("'ll", "'RE", "\r\n", "    ", "http://a.b/c?d=1", "１２"),
]


def random_text(rng: random.Random) -> str:
    """Up to about a hundred characters: scripts, emoji, marks, controls, code, any code point."""
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
