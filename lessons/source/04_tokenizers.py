# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["zh"]
# # 04 · 分词器
#
# 图片的路先放一放，这一课走文字的路。语言模型不认识汉字，也不认识字母，只认识编号（id）；把文字变成编号、再把编号变回文字的，是分词器（tokenizer）。
#
# **进来的**：字符串 `描述图片`。**出去的**：一串整数，每个整数是词表里的一个 token；每个 token 在嵌入表里有一行 192 维的向量。

# %% [markdown] tags=["en"]
# # 04 · Tokenizers
#
# This lesson leaves the image's way and follows the text. A language model knows no Chinese characters and no letters; it knows numbers. A tokenizer turns text into numbers, and numbers back into text.
#
# **In**: the string `描述图片` ("describe the image"). **Out**: a row of integers, each a token of the vocabulary, and for each token a row of 192 numbers in the embedding table.

# %% tags=["setup"]
import sys

sys.path.insert(0, "../..")  # the repository: nanovlm and the drawing helpers

import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from random import Random

import torch

from data_tools.scenes_text import questions
from data_tools.scenes_world import COLOURS, SHAPES, random_scene
from data_tools.scenes_world import draw as draw_scene
from lessons import draw
from lessons.check import check
from nanovlm import IMAGE, Message, generate, load_model, prepare

ASSETS = "../../nanovlm/assets"
torch.set_grad_enabled(False)
draw.strip("sequence")

# %% [markdown] tags=["zh"]
# ## 先猜一猜
#
# 「描述图片」这四个字，用 UTF-8 存是几个字节？我们自己训练一个分词器，学 384 次合并，它会切成几个 token？模型自带的词表呢？
#
# 再猜一个：如果不用自带的切法，而是把同样四个字**一个字一个 token** 地喂给模型，文字一模一样，它的回答会变吗？

# %% [markdown] tags=["en"]
# ## Predict
#
# How many bytes do the four characters 描述图片 take in UTF-8? We will train a tokenizer with 384 merges: how many tokens will it need? And the vocabulary that ships with the model?
#
# One more: if the same four characters are given to the model as **one token each** instead of its own way, the text being exactly the same, will its answer change?

# %% [markdown] tags=["zh"]
# ## 一、字节
#
# 最小的、什么都能表示的词表只有 256 个 token：一个字节一个。任何文字都能写成 UTF-8 字节，所以永远不会遇到「不认识的字」。

# %% [markdown] tags=["en"]
# ## 1. Bytes
#
# The smallest vocabulary that can hold everything has 256 tokens, one for each byte. Any text can be written as UTF-8 bytes, so there is never an unknown character.

# %%
text = "描述图片"
raw = text.encode()
print(len(text), "characters,", len(raw), "bytes:", list(raw))
for letter in "aé描🙂":
    print(letter, [f"{byte:08b}" for byte in letter.encode()])

# %%
made, axis = draw.figure(1, height=1.3)
names = [f"{byte:02x}" for byte in raw]
parts = [part for part in ("vision", "word", "vision", "word") for _ in range(3)]
below = [letter if number == 1 else "" for letter in text for number in range(3)]
draw.tokens(axis, names, parts, below=below)
draw.show(made, "Four characters, twelve bytes (in hexadecimal)")

# %% [markdown] tags=["zh"]
# 一个汉字三个字节，一个英文字母一个，表情符号四个。看二进制的开头就知道一个字节在字里的位置：`0` 开头自成一字；`110`、`1110`、`11110` 开头是两、三、四字节字的首字节；`10` 开头是后续字节，不能单独成字。
#
# 用字节做 token 的坏处是序列太长：一个汉字就占三个位置，而注意力的计算量随长度的平方增长。所以要把常在一起的字节合并起来。
#
# ## 二、合并
#
# 字节对编码（byte-pair encoding, BPE）的训练只有一句话：**数一数哪两个相邻的 token 出现得最多，把它们合成一个新 token，重复。** 语料用玩具世界的 40 个场景的问答，中英都有。先写合并一对 token 的 `merge`，再写 `learn`：数所有相邻的对，取最多的一对，合并，记下来，回到开头。

# %% [markdown] tags=["en"]
# A Chinese character takes three bytes, an English letter one, an emoji four. The first bits tell a byte's role: `0` stands alone; `110`, `1110` and `11110` begin a character of two, three and four bytes; `10` continues one and means nothing alone.
#
# Bytes as tokens make long sequences. The cost of attention grows with the square of the length, and a Chinese character takes three times the room of an English letter. So bytes that often stand together are joined.
#
# ## 2. Merges
#
# Training byte-pair encoding (BPE) is one sentence: **count which two neighbouring tokens occur most often, join them into a new token, repeat.** The corpus: questions and answers on 40 scenes of the toy world, in both languages. The cells below write `merge`, which joins one pair, and then `learn`, which counts, joins the most frequent pair, notes it down and starts over.


# %%
def lines_about(seeds):
    """Questions and answers on scenes, as a list of strings."""
    found = []
    for seed in seeds:
        random = Random(seed)
        for asked in questions(random_scene(random), random):
            found += [asked.text, asked.answer]
    return found


corpus, unseen = lines_about(range(40)), lines_about(range(1000, 1010))
print(len(corpus), "lines,", sum(len(line.encode()) for line in corpus), "bytes, such as")
print("  ", corpus[0], "→", corpus[1])


# %%
def merge(tokens, pair):
    """Join every occurrence of a pair of neighbours, from the left."""
    merged, place = [], 0
    while place < len(tokens):
        is_pair = tuple(tokens[place : place + 2]) == pair
        merged.append(b"".join(pair) if is_pair else tokens[place])
        place += 2 if is_pair else 1
    return merged


tokens = [bytes([byte]) for byte in "图片，图中".encode()]
print(tokens)
print(merge(tokens, (b"\xe5", b"\x9b")))


# %%
def learn(lines, count):
    """The `count` pairs to merge, in the order in which they were learned."""
    often = Counter(lines)  # equal lines are counted once and weighed
    split = {line: [bytes([byte]) for byte in line.encode()] for line in often}
    merges = []
    for _ in range(count):
        pairs = Counter()
        for line, tokens in split.items():
            for pair in pairwise(tokens):
                pairs[pair] += often[line]
        best = max(pairs, key=lambda pair: (pairs[pair], pair))  # ties: a fixed order
        merges.append(best)
        split = {line: merge(tokens, best) for line, tokens in split.items()}
    return merges


# %%
def readable(token):
    """A token as text, or its bytes if they are no whole characters."""
    shown = token.decode(errors="replace")
    return token.hex(" ") if "\ufffd" in shown else shown


merges = learn(corpus, 384)
vocabulary = [bytes([byte]) for byte in range(256)] + [left + right for left, right in merges]
ids = {token: number for number, token in enumerate(vocabulary)}
partial = [token for token in vocabulary[256:] if "\ufffd" in token.decode(errors="replace")]
print("first:", " | ".join(readable(left + right) for left, right in merges[:14]))
print("last: ", " | ".join(readable(left + right) for left, right in merges[-8:]))
print(len(vocabulary), "tokens;", len(partial), "merged ones begin or end inside a character")

# %% [markdown] tags=["zh"]
# 最先学到的不是字，而是半个字：`e8 89` 是「色」的前两个字节，加上第三个才是「色」。合并只看字节，不认识字的边界，所以词表里留着不少头尾落在字中间的 token。越往后越长，最后连整句话都成了一个 token。
#
# ## 三、编码
#
# 给一段新文字编码，就是把学到的合并按**学会的先后**重放一遍：在所有相邻的对里，先合并排名最靠前的。后学会的合并建立在先学会的结果上，例如先有 `e8 89`，才有「色」；照同样的次序来，才能切出训练时的样子。

# %% [markdown] tags=["en"]
# The first things learned are not characters but parts of them: `e8 89` are the first two bytes of 色, and the third makes it whole. Merging sees bytes and knows no borders of characters, so quite a few tokens remain that begin or end inside one. Later tokens get longer, and at the end whole questions are one token: 有多少个物体？ is "how many objects are there?".
#
# ## 3. Encoding
#
# To encode a new text is to replay the merges in the **order of learning**: of all neighbouring pairs, the one that was learned first is merged first. Later merges build on earlier ones, as 色 builds on `e8 89`, so only this order cuts a text as it was cut in training.

# %%
rank = {pair: number for number, pair in enumerate(merges)}


def encode(text, limit=len(merges)):
    """Text → tokens, with the first `limit` merges."""
    tokens = [bytes([byte]) for byte in text.encode()]
    while True:
        known = [pair for pair in pairwise(tokens) if rank.get(pair, limit) < limit]
        if not known:
            return tokens
        tokens = merge(tokens, min(known, key=rank.get))


for line in (text, "Describe the picture.", "图中有一只猫", "🙂"):
    print(f"{len(line.encode()):3} bytes → {len(encode(line)):2} tokens:",
          " | ".join(map(readable, encode(line))))  # fmt: skip

# %%
made, axes = draw.figure(1, rows=5, height=4.0)
for axis, limit in zip(axes, (0, 32, 200, 300, 384)):
    shown = [readable(token) for token in encode(text, limit)]
    parts = ["word" if re.fullmatch("[0-9a-f ]+", one) else "right" for one in shown]
    draw.tokens(axis, shown, parts)
    axis.set_title(f"after {limit} merges: {len(shown)}", fontsize=9, loc="left")
draw.show(made, "The same four characters after more and more merges")

# %% [markdown] tags=["zh"]
# 绿色的是完整的字，灰色的还是字节。「描述图片」在语料里常见，最后成了一个 token；「图中有一只猫」里的「只」「猫」从没出现过，只好退回字节，但**仍然写得出来**。
#
# 先后次序能不能省？换成看上去更聪明的办法：从左边起，每次取词表里最长的 token。

# %% [markdown] tags=["en"]
# Green are whole characters, grey are bytes. 描述图片 is frequent in the corpus and ends up as one token. In 图中有一只猫 ("there is a cat in the image") the characters 只 and 猫 never occurred; they fall back to bytes, but **they can still be written**.
#
# Does the order matter? Here is what looks like a cleverer way: from the left, always take the longest token of the vocabulary.


# %%
def encode_longest(text):
    """A plausible mistake: from the left, the longest token that fits."""
    raw, tokens = text.encode(), []
    while raw:
        length = next(n for n in range(len(raw), 0, -1) if raw[:n] in ids)
        tokens.append(raw[:length])
        raw = raw[length:]
    return tokens


differ = [line for line in unseen if encode_longest(line) != encode(line)]
print(len(differ), "of", len(unseen), "lines are cut in another way, such as")
for way in (encode, encode_longest):
    print("  ", " | ".join(map(readable, way(differ[0]))))

# %% [markdown] tags=["zh"]
# 两种切法解码出来是同样的文字，所以「编码再解码，看是否还原」这种测试发现不了。但编号不同，而模型训练时只见过其中一种；第七节会看到后果。
#
# 合并学多少次合适？量一量每个 token 平均装下几个字节；数越大，同样的文字占的位置越少。三种文字：学过的语料、新的问答、与玩具世界无关的三句话。

# %% [markdown] tags=["en"]
# Both decode to the same text, so the usual test, encode and decode and compare, does not notice. But the ids differ, and in training the model saw only one of the two. Section 7 shows what comes of it.
#
# How many merges are right? Measure how many bytes a token holds on average; the more, the less room a text takes. There are three kinds of text: the corpus, new questions, and three sentences that have nothing to do with the toy world:

# %%
elsewhere = [
    "窗台上趴着一只晒太阳的猫。",
    "春天来了，河边的柳树发了芽。",
    "A cat sleeps in the warm sun.",
]
texts = {"corpus": corpus[:60], "new questions": unseen[:60], "other text": elsewhere}
lines = {}
for name, some in texts.items():
    split = [[bytes([byte]) for byte in line.encode()] for line in some]
    total, lines[name] = sum(map(len, split)), [1.0]
    for pair in merges:  # in the order of learning, on the whole text at once
        split = [merge(tokens, pair) for tokens in split]
        lines[name].append(total / sum(map(len, split)))
    assert split == [encode(line) for line in some]  # the same as lowest rank first

# %%
made, axis = draw.figure(1, height=3.0)
draw.curves(axis, lines, x="merges", y="bytes a token", parts=["right", "language", "wrong"])
axis.set_ylim(bottom=0)
draw.show(made, "A vocabulary is short on what it was learned from, and only there")
print("bytes a token:", {name: round(values[-1], 1) for name, values in lines.items()})

# %% [markdown] tags=["zh"]
# 绿线和蓝线一路升到每个 token 5 个字节以上，红线停在 1.4：这个词表只对玩具世界划算。所以真实模型的词表用海量、多语言的文字来学，也大得多：Qwen2.5 的有 151,936 行。大词表让序列变短，代价是嵌入表变大：151,936 × 896（0.5B 模型的宽度）约 1.36 亿个参数，而这里只有 640 × 192 约 12 万个。
#
# ## 四、与库代码核对
#
# 库里的 `BytePairEncoder` 用堆和链表，快得多，规则相同。它的词表文件要求每个字节写成一个可见字符（空格写成 `Ġ`），`bytes_to_token` 负责转写。编号是整数，所以要求**完全相等**，没有容差可言。

# %% [markdown] tags=["en"]
# The red line ends at 1.4 bytes a token, the other two above 5 (printed above): this vocabulary pays on the toy world alone. Real ones are learned from huge amounts of text in many languages and are far larger: Qwen2.5's has 151,936 rows. A large vocabulary makes sequences short, and the embedding table large: 151,936 × 896 (the width of the 0.5B model) is about 136 million parameters. Here it is 640 × 192, about 120 thousand.
#
# ## 4. Proven equal
#
# The package's `BytePairEncoder` uses a heap and a linked list. It is much faster and has the same rules. Its vocabulary files write every byte as one printable character (a space is `Ġ`), which `bytes_to_token` does. Ids are whole numbers, so they have to be **equal**; there is no tolerance.

# %%
from nanovlm.tokenizer.merges import BytePairEncoder, bytes_to_token

spelled = {bytes_to_token(token): number for token, number in ids.items()}
pairs = [(bytes_to_token(left), bytes_to_token(right)) for left, right in merges]
theirs = BytePairEncoder(spelled, pairs)
for line in corpus + unseen + elsewhere + ["🙂 naïve €5"]:
    assert [ids[token] for token in encode(line)] == theirs.encode(line), line
print("equal on", len(corpus + unseen) + 4, "lines, such as", theirs.encode("图中有一只猫"))

# %% [markdown] tags=["zh"]
# 还差一步：真实的分词器先用一条正则表达式把文字切成「词」，合并不跨越词的边界。否则就会像我们这样学出 `形的右边吗？` 甚至整句的 token，标点和词粘在一起。下面先打印我们最长的几个，再看 Qwen 怎样切。在 Qwen 的结果里留意两处：数字一位一切；`。What` 连在一起，因为它的正则允许一个词前面带一个标点或空格。

# %% [markdown] tags=["en"]
# One step is missing. Real tokenizers first cut a text into "words" with a regular expression, and no merge crosses a border. Otherwise tokens come out as ours did, `形的右边吗？` and whole sentences, with punctuation glued to words. The cell prints our longest, then Qwen's cuts. Note two things in these: digits are cut one by one, and `。What` stays together, because Qwen's expression lets a word begin with one mark or space.

# %%
from nanovlm.tokenizer.pretokenize import QWEN_PATTERN, pre_tokenize, translate_pattern

whole = [token.decode() for token in vocabulary[256:] if token not in partial]
print("our longest:", sorted(whole, key=len)[-4:])
print(
    "Qwen's cuts:",
    pre_tokenize("描述图片。What's in it? 2025年", [translate_pattern(QWEN_PATTERN)]),
)

# %% [markdown] tags=["zh"]
# ## 五、SentencePiece
#
# 模型自带的词表是另一个家族：SentencePiece（LLaMA 一系）。合并的办法与第二节相同，起点不同：**从字符开始**，空格写成 `▁`，词表里没有的字符才退回字节。词表一共 640 个：6 个特殊 token，256 个字节，378 个片段。

# %% [markdown] tags=["en"]
# ## 5. SentencePiece
#
# The vocabulary that ships with the model is of another family, SentencePiece, as LLaMA's. It merges in the same way from another start: **from characters**. A space is written `▁`, and only a character outside the vocabulary falls back to bytes. It has 640 entries: 6 special tokens, 256 bytes, 378 pieces.

# %%
from sentencepiece import SentencePieceProcessor

model = load_model(f"{ASSETS}/tiny-vlm").float().eval()
tokenizer = model.tokenizer
file = SentencePieceProcessor(model_file=f"{ASSETS}/tiny-vlm/tokenizer.model")
pieces = [file.id_to_piece(number) for number in range(file.get_piece_size())]
BYTE_0 = pieces.index("<0x00>")  # the 256 bytes follow one another
print("special:", tokenizer.special_tokens)
print("bytes:  ", pieces[BYTE_0], "…", pieces[BYTE_0 + 255])
print("pieces: ", pieces[BYTE_0 + 256 : BYTE_0 + 276])
ordinary = {piece: number for number, piece in enumerate(pieces) if number >= BYTE_0 + 256}


# %%
def encode_pieces(text):
    """Text → ids of the shipped vocabulary. A piece that was learned earlier has a lower id."""
    parts = list(text.replace(" ", "▁"))
    while True:
        known = [pair for pair in pairwise(parts) if "".join(pair) in ordinary]
        if not known:
            break
        best = min(known, key=lambda pair: ordinary["".join(pair)])
        place = next(n for n, pair in enumerate(pairwise(parts)) if pair == best)
        parts[place : place + 2] = ["".join(best)]
    found = []
    for part in parts:
        as_bytes = [BYTE_0 + byte for byte in part.encode()]
        found += [ordinary[part]] if part in ordinary else as_bytes
    return found


# %%
checked = corpus + unseen + elsewhere + ["图中有一只猫", "🙂 naïve €5"]
for line in checked:
    assert encode_pieces(line) == tokenizer.encode(line), line
print("equal to the package on", len(checked), "lines")
shown = {line: [pieces[number] for number in encode_pieces(line)] for line in (text, corpus[1])}
for line, split in shown.items():
    print(len(split), "tokens:", " | ".join(split))

# %% [markdown] tags=["zh"]
# 「红色」和「圆环」这样的颜色和形状是分开的两个 token，从不合成「红色圆环」。这是训练词表时特意加的边界：模型要能说出训练里没见过的颜色与形状的组合。**词表怎么切，也是模型设计的一部分。**
#
# 现在可以回答第一组问题了。先看第一行：「描述图片」是 4 个字、12 个字节，自己的 BPE 和自带的词表都只要 1 个 token。再按列读：字节什么都能写，但最长；自己的 BPE 在玩具世界的句子上很短；自带的词表在那里也短，遇到一句写春天的话就同样没有办法：42 个字节，要花 29 和 34 个 token。

# %% [markdown] tags=["en"]
# A colour and a shape, such as 红色 (red) and 圆环 (ring), are always two tokens and never one 红色圆环. These borders were added on purpose when the vocabulary was made, because the model has to name pairs of colour and shape that it never saw in training. **How the text is cut is part of the model's design.**
#
# Now the first questions can be answered: 描述图片 takes 12 bytes, 1 token of our own BPE, and 1 of the shipped vocabulary. Read the table below by columns: bytes never fail and are long; our own BPE is short on the toy world's phrases; the shipped vocabulary is nearly as short there, and no better on the fourth line, a sentence about spring.

# %%
print(f"{'':26} characters  bytes  own BPE  shipped")
for line in (text, "Describe the picture.", "图中有一只猫", elsewhere[1], "🙂"):
    numbers = len(line), len(line.encode()), len(encode(line)), len(tokenizer.encode(line))
    width = 26 - sum(ord(letter) > 0x2E7F for letter in line)  # Chinese is twice as wide
    print(f"{line:{width}} {numbers[0]:9} {numbers[1]:6} {numbers[2]:8} {numbers[3]:8}")

# %% [markdown] tags=["zh"]
# ## 六、故意弄坏：半个字
#
# 生成时 token 一个一个地来。如果来一个就解码一个，会怎样？「图中有一只猫」是 8 个 token：前两个装着完整的字，后六个各是一个字节。

# %% [markdown] tags=["en"]
# ## 6. Broken on purpose: half a character
#
# While a model generates, tokens come one at a time. What happens if each is decoded as it comes? 图中有一只猫 is 8 tokens: the first two hold whole characters, the other six one byte each.

# %%
cat = tokenizer.encode("图中有一只猫")
print("one at a time:", "".join(tokenizer.decode([number]) for number in cat))
print("all together: ", tokenizer.decode(cat))

# %%
made, axes = draw.figure(1, rows=3, height=3.2)
own, byte_parts = encode("图中有一只猫"), [tokenizer.decode_bytes([number]) for number in cat]
alone = [tokenizer.decode([number]) for number in cat]
rows = (("own BPE", own), ("shipped", byte_parts))
for axis, (name, split) in zip(axes, rows):
    shown = [readable(token) for token in split]
    parts = ["word" if re.fullmatch("[0-9a-f ]+", one) else "right" for one in shown]
    draw.tokens(axis, shown, parts)
    axis.set_title(name, fontsize=9, loc="left")
draw.tokens(axes[2], ["?" if "\ufffd" in one else one for one in alone],
            ["wrong" if "\ufffd" in one else "right" for one in alone])  # fmt: skip
axes[2].set_title("shipped, each token decoded alone (? is U+FFFD)", fontsize=9, loc="left")
draw.show(made, "A character's bytes may lie in different tokens")

# %% [markdown] tags=["zh"]
# 「只」「猫」各占三个 token，每个 token 单独都不是合法的 UTF-8，于是变成替换字符 U+FFFD（�）。模型没有错，错在解码的时机：应当先攒**字节**，凑成整字再输出。
#
# ## 七、同样的文字，不同的编号
#
# 回到最后一个问题。下面把问题 `描述图片` 换四种切法喂给模型，解码出来都是同样四个字；对 16 张图各问一次，数一数用中文说对的物体。

# %% [markdown] tags=["en"]
# 只 and 猫 take three tokens each, and none of them is valid UTF-8 alone, so each becomes the replacement character U+FFFD (�). The model is right; the moment of decoding is wrong. Collect **bytes**, and write out whole characters.
#
# ## 7. The same text, other ids
#
# Back to the last question. The question `描述图片` is given to the model in four ways that all decode to the same four characters. Ask about 16 images each, and count the objects that are named in Chinese.


# %%
def ask(images, question):
    """Answers about images to a question that is given as ids."""
    asked, shown = [[Message("user", [IMAGE, text])]] * len(images), [[one] for one in images]
    batch = prepare(model, asked, shown, add_generation_prompt=True)
    ids, usual = batch.input_ids, tokenizer.encode(text)
    place = ids.shape[1] - 2 - len(usual)  # end of turn and the assistant's token follow
    assert ids[0, place:-2].tolist() == usual
    middle = torch.tensor([question] * len(images))
    changed = torch.cat([ids[:, :place], middle, ids[:, -2:]], dim=1)
    rows, columns = batch.image_positions // ids.shape[1], batch.image_positions % ids.shape[1]
    moved = rows * changed.shape[1] + columns
    batch = replace(batch, input_ids=changed, image_positions=moved, attention_mask=None)
    return [tokenizer.decode(answer) for answer in generate(model, batch, 70)]


# %%
scenes = [random_scene(Random(seed)) for seed in range(16)]
images = [draw_scene(scene) for scene in scenes]
ways = {
    "shipped": tokenizer.encode(text),
    "two words": tokenizer.encode("描述") + tokenizer.encode("图片"),
    "characters": [ordinary[letter] for letter in text],
    "bytes": [BYTE_0 + byte for byte in raw],
}
share = {}
for name, question in ways.items():
    said = ask(images, question)
    hits = [COLOURS[one.colour] + SHAPES[one.shape] in answer
            for answer, scene in zip(said, scenes) for one in scene.objects]  # fmt: skip
    share[f"{name}\n({len(question)})"] = 100 * sum(hits) / len(hits)
    print(f"{name:10} {question[:4]} decodes to {tokenizer.decode(question)}: {said[0]}")

# %%
made, axis = draw.figure(1, height=2.8)
draw.bars(axis, share, "", "% named in Chinese", ["right", "word", "word", "wrong"])
draw.show(made, "One text, four ways to cut it (tokens): the model knows one")

# %% [markdown] tags=["zh"]
# 文字一模一样，回答却变了。看打印的这张图：切成「描述」「图片」两个词，模型改用**英文**作答，而且答对了；切成单字或字节，它就胡言乱语。16 张图合起来，用中文说对的物体从 100% 掉到 28% 至 38%。对模型来说，`描述图片` 是词表里的**某一行向量**，而不是四个字；训练时它只见过自带的那种切法，别的切法对它就是另一个问题，甚至是从没见过的东西。
#
# 所以：换分词器、升级分词库、在提示前后多加一个空格，都可能让模型变差而不报任何错。检查的办法是比较**编号**，不是比较文字：同一句话，两边各编一次，应当一个不差。最后看一眼模型真正读到的东西，每个编号在嵌入表里的那一行：

# %% [markdown] tags=["en"]
# The text is the same, and the answers change. Cut into two words, the question about the first image gets a right answer **in English**. Cut into characters or bytes, it gets a mixture of both languages that means nothing. In Chinese, 100% of the objects are named with the shipped ids, and 28% to 38% with the others. To the model, `描述图片` is not four characters but **one row of its table**. In training it saw one way of cutting; any other is a different question, or one that it has never met.
#
# So a changed tokenizer, a new version of its library, or one more space around a prompt may make a model worse, without any error. Compare **ids**, not texts: encode the same sentence on both sides, and not one id may differ. Last, what the model reads, a row of the embedding table for each id:

# %%
table = model.language_model.embed_tokens.weight  # (V, C)
vectors = table[torch.tensor(tokenizer.encode(text))]  # (T, C): what the model reads
print("embedding table:", tuple(table.shape), " 描述图片 →", tokenizer.encode(text), "→",
      tuple(vectors.shape), vectors[0, :3].numpy().round(3))  # fmt: skip

# %% [markdown] tags=["zh"]
# ## 练习

# %% [markdown] tags=["en"]
# ## Exercises

# %% [markdown] tags=["zh"]
# **04.1 补一行。** 写出我们自己的 BPE 的解码：`tokens` 是一串字节串，变回文字。

# %% [markdown] tags=["en"]
# **04.1 Fill in a line.** Decode our own BPE: turn `tokens`, a list of byte strings, back into text.

# %% tags=["exercise"]
tokens = encode("图中有一只猫 🙂")
decoded = ...
check("04.1", decoded, "图中有一只猫 🙂")

# %% [markdown] tags=["zh"]
# **04.2 换一种行为。** 让合并不跨越标点 `。？，：、`：训练之前先把每一行切开（标点自成一段），得到一个字符串列表 `words`；全部接起来仍是原文。提示：`re.findall`。

# %% [markdown] tags=["en"]
# **04.2 Change a behaviour.** Let no merge cross the punctuation `。？，：、`: before training, cut every line so that each such mark stands alone, into `words`. Hint: `re.findall`.


# %% tags=["exercise"]
def crossing(lines):
    """How many of 64 merged tokens hold punctuation and something else."""
    learned = [left + right for left, right in learn(lines, 64)]
    return sum(mark.encode() in token and token != mark.encode()
               for token in learned for mark in "。？，：、")  # fmt: skip


words = ...
print("uncut:", crossing(corpus))
done = words is not ... and (crossing(words), "".join(words) == "".join(corpus))
check("04.2", done or ..., (0, True))

# %% [markdown] tags=["zh"]
# **04.3 找错。** 流式输出：每来一个 token，输出它补完的文字。现在会吐出 �。改好它，让不完整的字节留到下一次。

# %% [markdown] tags=["en"]
# **04.3 Find the bug.** Streaming: for each token that comes, give the text that it completes. Now it gives �. Mend it so that incomplete bytes wait for the next token.


# %% tags=["exercise"]
def stream(numbers):
    waiting, given = b"", []
    for number in numbers:
        waiting += tokenizer.decode_bytes([number])
        given.append(waiting.decode(errors="replace"))
        waiting = b""
    return given


check("04.3", stream(cat), ["图中有", "一", "", "", "只", "", "", "猫"])

# %% [markdown] tags=["zh"]
# ## 别人在这里摔过跤
#
# [QwenLM/Qwen#92](https://github.com/QwenLM/Qwen/issues/92)：流式接口有时在末尾冒出乱码，提问的人追到 51461 号 token：单独解码是 �，后面再接一个 token 就正常了。维护者回答这不是 bug：单个 token 不一定对应任何字词，有时要几个合起来才合法；如果全部生成完还有乱码，那才是 bug。提问的人最后打印出它的字节：`b' \xe6\xa0'`，一个空格加上半个字。
#
# 怎么发现：用词表里没有的字（生僻字、表情符号）测试流式输出，比较拼接的结果和一次解码的结果。
#
# ## 到库里看看
#
# - [`nanovlm/tokenizer/merges.py`](../../nanovlm/tokenizer/merges.py)，`merge` 与 `BytePairEncoder`：O(n log n) 的合并，以及为什么中文可以先切开再合并。
# - [`nanovlm/tokenizer/sentence_piece.py`](../../nanovlm/tokenizer/sentence_piece.py)，`SentencePieceTokenizer`：用户打出 `<image>` 时，为什么只是普通文字（第 05 课）。
# - [`nanovlm/tokenizer/streaming.py`](../../nanovlm/tokenizer/streaming.py)，`TextStreamer`：练习 04.3 的正式版本。
#
# 论文：Sennrich 等，2016，*Neural Machine Translation of Rare Words with Subword Units*，[arXiv:1508.07909](https://arxiv.org/abs/1508.07909)；Kudo 与 Richardson，2018，*SentencePiece*，[arXiv:1808.06226](https://arxiv.org/abs/1808.06226)。

# %% [markdown] tags=["en"]
# ## In the wild
#
# [QwenLM/Qwen#92](https://github.com/QwenLM/Qwen/issues/92): streamed answers sometimes ended in garbage. The reporter traced it to token 51461: decoded alone it gave �, and with one more token behind it the text was right. A maintainer answered that this is no bug: a token need not be any character or word, and sometimes several together are valid; garbage that remains when generation has ended would be one. The reporter then printed the token's bytes: `b' \xe6\xa0'`, a space and the first part of a character.
#
# How would you notice? Test streaming with characters outside the vocabulary, rare ones and emoji, and compare what was streamed with the whole decoded at once.
#
# ## Look in the package
#
# - [`nanovlm/tokenizer/merges.py`](../../nanovlm/tokenizer/merges.py), `merge` and `BytePairEncoder`: merging in O(n log n), and why Chinese text can be cut before it is merged.
# - [`nanovlm/tokenizer/sentence_piece.py`](../../nanovlm/tokenizer/sentence_piece.py), `SentencePieceTokenizer`: why an `<image>` typed by a user stays text (lesson 05).
# - [`nanovlm/tokenizer/streaming.py`](../../nanovlm/tokenizer/streaming.py), `TextStreamer`: exercise 04.3 in earnest.
#
# The papers: Sennrich et al. 2016, *Neural Machine Translation of Rare Words with Subword Units*, [arXiv:1508.07909](https://arxiv.org/abs/1508.07909); Kudo and Richardson 2018, *SentencePiece*, [arXiv:1808.06226](https://arxiv.org/abs/1808.06226).
