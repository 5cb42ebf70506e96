# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["zh"]
# # 17 · 诚实地测量
#
# 模型已经训练好了，它有多好？这一课把三种常用的分数亲手写一遍，看一句「保险的话」怎样骗过其中一种，再算一算：一个分数里有多少是本领，多少是运气。
#
# **进来的**：100 张没见过的图，每张一个模型写的描述和一个标准答案，都是字符串。**出去的**：三个数（完全正确率、BLEU-4、CIDEr-D），以及第一个数的误差范围。

# %% [markdown] tags=["en"]
# # 17 · Measuring honestly
#
# The model is trained. How good is it? This lesson writes three common scores by hand, shows how one "safe sentence" fools one of them, and then asks how much of a score is skill and how much is luck.
#
# **In**: 100 unseen images, and for each a description that the model wrote and a reference, both strings. **Out**: three numbers (exact match, BLEU-4, CIDEr-D), and how far the first of them may be off.

# %% tags=["setup"]
import sys

sys.path.insert(0, "../..")  # the repository: nanovlm and the drawing helpers

import json
import math
import re
import unicodedata
from collections import Counter
from random import Random

import torch

from data_tools.scenes_text import describe
from data_tools.scenes_world import COLOURS, random_scene
from data_tools.scenes_world import draw as draw_scene
from lessons import draw
from lessons.check import check
from nanovlm import IMAGE, Message, generate, load_model, prepare
from nanovlm.evaluation import metrics

ASSETS = "../../nanovlm/assets"
draw.strip("answer")

# %% [markdown] tags=["zh"]
# ## 先猜一猜
#
# 有一个「模型」从不看图：不管什么图，永远回答同一句描述。我们挑一句最占便宜的，拿去给 100 张图打分。
#
# BLEU-4 的满分是 1。这句话能得多少？它说对的物体占几成？两个数都先写下来。

# %% [markdown] tags=["en"]
# ## Predict
#
# Here is a "model" that never looks: whatever the image, it gives one and the same description. We pick the sentence that scores best on other images, and hand it in for all of 100 new ones.
#
# BLEU-4 goes up to 1. How much does the sentence get? And what share of the objects that it names is right? Write both numbers down.

# %% [markdown] tags=["zh"]
# ## 一、考卷
#
# 先准备 100 个新场景。玩具世界会给出唯一的标准描述，所以这里不用请人来写答案。模型对每张图回答「描述图片」。

# %% [markdown] tags=["en"]
# ## 1. The exam
#
# First, 100 new scenes. The toy world writes the one right description of each, so nobody has to be paid for references. The model answers 描述图片 for every image.

# %%
model = load_model(f"{ASSETS}/tiny-vlm").float().eval()  # the file holds bfloat16
scenes = [random_scene(Random(f"exam {number}")) for number in range(100)]
images = [draw_scene(scene) for scene in scenes]
references = [describe(scene, "zh") for scene in scenes]


# %%
def answer(images):
    answers, question = [], [Message("user", [IMAGE, "描述图片"])]
    for start in range(0, len(images), 50):
        part = [[image] for image in images[start : start + 50]]
        batch = prepare(model, [question] * len(part), part, add_generation_prompt=True)
        ids = generate(model, batch, 64)
        answers += [model.tokenizer.decode(each, skip_special=True).strip() for each in ids]
    return answers


answers = answer(images)
wrong = [n for n in range(100) if answers[n] != references[n]] or [0]
print(f"{len(answers)} answers, {len(wrong)} of them differ from the reference, the first:")
print("answer:   ", answers[wrong[0]])
print("reference:", references[wrong[0]])

# %% [markdown] tags=["zh"]
# ## 二、完全正确率
#
# 最严格的分数：回答和标准答案一样才算对，**完全正确率**（exact match）就是对的比例。唯一要小心的是「一样」两个字。大小写、全角半角、句尾的标点都不该算错，所以比较之前先规整一遍：

# %% [markdown] tags=["en"]
# ## 2. Exact match
#
# The strictest score: an answer counts when it equals the reference, and **exact match** is the share that does. The one thing to settle is the word "equals". Case, full or half width and a full stop at the end should not matter, so both sides are tidied first:


# %%
def tidy(text):
    text = unicodedata.normalize("NFKC", text).lower()  # full width → half width
    text = " ".join(text.split())
    return text.rstrip(".,!?;:。、 ")


pairs = [("Yes.", "yes"), ("３个。", "3个"), ("红色圆环。", "红色圆环"), ("两个。", "2个。")]
for one, other in pairs:
    mine = tidy(one) == tidy(other)
    assert mine == metrics.exact_match(one, [other])
    print(f"{one:8} {other:8} raw {one == other!s:6} tidied {mine}")
right = torch.tensor([float(tidy(a) == tidy(r)) for a, r in zip(answers, references)])  # (100,)
print(f"exact match of {tuple(right.shape)} answers: {right.mean():.2f}")

# %% [markdown] tags=["zh"]
# 最后一行「两个」和「2 个」意思相同，却判了错。**规则越严，分数越低，但不会虚高**；规则必须事先写定，不能看着答案改。nanovlm 对描述还放宽一处：物体的先后次序不论（`same_items`）。
#
# 完全正确率有一个缺点：30 个字里错一个字，和通篇胡说，得分都是 0。要给「差不多对」打分，就要看句子的局部。
#
# ## 三、BLEU：数一数共有的片段
#
# 把回答切成 token（中文一字一个，去掉标点），取出所有连续的 1、2、3、4 个 token，叫 n 元组（n-gram）。**BLEU** 问：回答里的 n 元组，有多大比例也出现在标准答案里？

# %% [markdown] tags=["en"]
# The two sides of the last pair both mean "two", and still it is marked wrong. **A strict rule gives a low score, never a flattering one**; what matters is that it is fixed beforehand, not while looking at the answers. For descriptions nanovlm is milder in one respect: the order of the objects does not count (`same_items`).
#
# Exact match has one drawback: one wrong word in thirty scores 0, as nonsense does. To grade "almost right" one has to look at pieces.
#
# ## 3. BLEU: count the pieces in common
#
# Cut the answer into tokens (a Chinese character each, no punctuation) and take all runs of 1, 2, 3 and 4 tokens, the n-grams. **BLEU** asks: what share of the answer's n-grams is in the reference, too?


# %%
def ngrams(tokens, order):
    return Counter(zip(*(tokens[start:] for start in range(order))))


tokens = [metrics.tokenize(text) for text in answers]
reference_tokens = [metrics.tokenize(text) for text in references]
mine, right_one = tokens[wrong[0]], reference_tokens[wrong[0]]
for order in (1, 2, 3, 4):
    given, wanted = ngrams(mine, order), ngrams(right_one, order)
    print(f"{order}-grams: {(given & wanted).total()} of {given.total()} are in the reference")
parts = ["right" if pair else "wrong" for pair in map(ngrams(right_one, 1).get, zip(mine))]
made, axes = draw.figure(rows=2, height=2.4)
draw.tokens(axes[0], mine, parts, "the answer; red, if any: nowhere in the reference")
draw.tokens(axes[1], right_one, ["word"] * len(right_one), "the reference")
draw.show(made, "BLEU counts runs of tokens in common")

# %% [markdown] tags=["zh"]
# 上面打印的每一行是说：回答里一共有多少个 n 元组，其中多少个也在标准答案里。两个 `Counter` 的 `&` 取较小的次数，这叫**截断**（clipping）：回答里写了五遍的词，标准答案里只有一个，就只算一个。四个比例取几何平均，再乘一个**过短惩罚**（brevity penalty），就是 BLEU-4。注意：次数是**全部回答加在一起**数的，不是每句算一个 BLEU 再平均。

# %% [markdown] tags=["en"]
# Each line printed says how many n-grams the answer has, and how many of them are in the reference, too. `&` of two `Counter`s keeps the smaller count: **clipping**. A word that the answer has five times and the reference once counts once. The geometric mean of the four shares, times a **brevity penalty**, is BLEU-4. Note that the counts are summed **over all answers** first; it is not a mean of one BLEU for each sentence.


# %%
def bleu(answers, references, longest=4, clip=True, brevity=True):
    score = 1.0
    for order in range(1, longest + 1):
        hits = guesses = 0
        for mine, reference in zip(answers, references):
            given, wanted = ngrams(mine, order), ngrams(reference, order)
            common = given & wanted if clip else {g: given[g] for g in given if g in wanted}
            hits += sum(common.values())
            guesses += given.total()
        score *= (hits / max(guesses, 1)) ** (1 / longest)
    ratio = sum(map(len, answers)) / sum(map(len, references))
    return score * (math.exp(1 - 1 / ratio) if brevity and ratio < 1 else 1)


print(f"BLEU-4 of the shipped model: {bleu(tokens, reference_tokens):.3f}")

# %% [markdown] tags=["zh"]
# > BLEU = exp(min(0, 1 − r/c)) · (p₁ p₂ p₃ p₄)^¼
#
# pₙ 是 n 元组的比例，c 和 r 是回答和标准答案的总长度。
#
# ## 四、故意弄坏
#
# 截断和过短惩罚看上去像细枝末节。各去掉一个，再交两份作弊的答卷：一份通篇是「的」，一份只写「图中有」。后者每份只有三个 token，没有 4 元组，所以算 BLEU-3。

# %% [markdown] tags=["en"]
# > BLEU = exp(min(0, 1 − r/c)) · (p₁ p₂ p₃ p₄)^¼
#
# pₙ is the share of n-grams, c and r are the total lengths of answers and references.
#
# ## 4. Broken on purpose
#
# Clipping and the brevity penalty look like details. Take one away each time, and hand in two sets of answers that cheat: one holds nothing but 的 (a particle, the most common Chinese character), the other nothing but 图中有 ("the image shows"). The second has three tokens an answer and so no 4-grams: its score is BLEU-3.

# %%
only_de = [["的"] * len(reference) for reference in reference_tokens]
only_start = [list("图中有")] * len(references)
print("的的的…  BLEU-1  without clipping", f"{bleu(only_de, reference_tokens, 1, clip=False):.2f}",
      f"  with {bleu(only_de, reference_tokens, 1):.2f}")  # fmt: skip
print("图中有   BLEU-3  without penalty ",
      f"{bleu(only_start, reference_tokens, 3, brevity=False):.2f}",
      f"  with {bleu(only_start, reference_tokens, 3):.2f}")  # fmt: skip

# %% [markdown] tags=["zh"]
# 少了任何一个，什么都没说的答卷得满分。分数定义里的细枝末节，往往是为了堵住前人发现的一种作弊。
#
# ## 五、CIDEr-D：少见的片段更值钱
#
# 「图中有」在每一句里都出现，说对它不说明什么；「圆环」才说明看见了东西。下图里，「图」「中」「有」的柱子高度为 0，颜色和形状的字最高。**CIDEr-D** 给每个 n 元组一个权重：它出现在 N 个标准答案中的 m 个里，权重就是 log(N/m)。每句里都有的片段，权重是 log 1 = 0；哪一句里都没有的，权重是 log N。

# %% [markdown] tags=["en"]
# Without clipping the first gets full marks, without the penalty the second, and neither says anything. Such details of a score are often there because someone found a cheat.
#
# ## 5. CIDEr-D: rare pieces are worth more
#
# 图中有 is in every reference, so saying it proves nothing; 圆环 ("ring") is in few, and saying it in the right place tells more. **CIDEr-D** gives each n-gram a weight: if it is in m of the N references, log(N/m). A piece that is in all of them weighs log 1 = 0; one that is in none weighs log N. In the picture below, 图, 中 and 有 have no height, and the characters of colours and shapes stand highest.

# %%
seen_in = Counter()  # n-gram → in how many references
for reference in reference_tokens:
    for order in (1, 2, 3, 4):
        seen_in.update(ngrams(reference, order).keys())
weights = {gram: math.log(len(references) / count) for gram, count in seen_in.items()}
shown = list(dict.fromkeys(reference_tokens[wrong[0]]))[:16]
made, axes = draw.figure(height=2.4)
axes.bar(range(len(shown)), [weights[(token,)] for token in shown], color=draw.WORD)
axes.set_xticks(range(len(shown)), shown, fontsize=11)
axes.set(ylabel="log(N / m)", xlabel="token of the reference above")
draw.show(made, "Words that stand in every reference weigh nothing")

# %% [markdown] tags=["zh"]
# 于是每句话变成四个很长的稀疏向量（1 到 4 元组各一个），分数是回答与标准答案的**余弦相似度**，四个取平均，再乘 10。D 是改进版，多了两条防作弊：回答的分量超过标准答案的部分不算（又是截断），长度不同要罚（高斯函数，σ = 6 个 token）。

# %% [markdown] tags=["en"]
# Each sentence becomes four long sparse vectors, one for each order. The score is the **cosine** between answer and reference, averaged over the four and multiplied by 10. The D stands for a version with two guards against cheating: an n-gram counts for at most its weight in the reference (clipping again), and an answer longer or shorter than the reference is marked down (a Gaussian, σ = 6 tokens).


# %%
def vector(tokens, order):
    counts = ngrams(tokens, order).items()
    return {gram: count * weights.get(gram, math.log(len(references))) for gram, count in counts}


def length(vector):
    return math.sqrt(sum(value**2 for value in vector.values()))


# %%
def cider_d(answers, references):
    total = 0.0
    for mine, reference in zip(answers, references):
        penalty = math.exp(-((len(mine) - len(reference)) ** 2) / (2 * 6**2))
        for order in (1, 2, 3, 4):
            a, r = vector(mine, order), vector(reference, order)
            product = sum(min(value, r[gram]) * r[gram] for gram, value in a.items() if gram in r)
            both = length(a) * length(r)
            total += penalty * product / both / 4 if both else 0.0
    return 10 * total / len(references)


print(f"CIDEr-D of the shipped model: {cider_d(tokens, reference_tokens):.2f} of 10")

# %% [markdown] tags=["zh"]
# ## 六、与库代码核对
#
# `nanovlm.evaluation.metrics` 的两个函数又与 `pycocoevalcap`（论文里通用的实现）核对过。库里允许一个问题有几个标准答案，所以这里各包一层列表。容差取 1e-6：库里的 BLEU 在分母上加了 1e-9，以免除以零。

# %% [markdown] tags=["en"]
# ## 6. Proven equal
#
# The package's functions in `nanovlm.evaluation.metrics` are in turn tested against `pycocoevalcap`, the implementation in common use. They take several references for a question, hence the extra list. The tolerance is 1e-6, because the package adds 1e-9 to denominators so as never to divide by zero.

# %%
grouped = [[each] for each in reference_tokens]
for name, mine, theirs in (
    ("BLEU-4 ", bleu(tokens, reference_tokens), metrics.bleu(tokens, grouped)),
    ("CIDEr-D", cider_d(tokens, reference_tokens), metrics.cider_d(tokens, grouped)),
):
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    print(name, f"mine {mine:.6f}, the package's {theirs:.6f}")

# %% [markdown] tags=["zh"]
# ## 七、一句保险的话
#
# 现在揭晓开头的问题。从 60 句描述里挑出 BLEU 最高的一句，挑的时候用**另外** 60 个场景，这样不算偷看考卷。与它一起打分的还有两份对照：**打乱对照**（模型认真描述，但描述的是别人的图），和一份「色盲」答卷：照抄标准答案，但每个颜色都换成另一个，所以几乎没有一个物体是对的。

# %% [markdown] tags=["en"]
# ## 7. One safe sentence
#
# Now for the question at the top. Out of 60 descriptions we take the one with the highest BLEU, measured on **another** 60 scenes, so that nobody has peeked at the exam. Two more sets of answers are scored beside it: the **shuffled control** (the model describes carefully, but another image), and one that is "colour-blind": the reference itself with every colour replaced by another, so that hardly an object is right.

# %%
others = [describe(random_scene(Random(f"other {number}")), "zh") for number in range(120)]
practice = [metrics.tokenize(text) for text in others[60:]]
safe = max(others[:60], key=lambda text: bleu([metrics.tokenize(text)] * 60, practice))
print("the safe sentence:", safe)
following = dict(zip(COLOURS.values(), [*COLOURS.values()][1:] + [*COLOURS.values()][:1]))
sheets = {
    "the model": answers,
    "colour-blind": [re.sub("|".join(following), lambda m: following[m[0]], r)
                     for r in references],
    "safe sentence": [safe] * 100,
    "shuffled": answer(images[1:] + images[:1]),
}  # fmt: skip

# %%
rows = {"objects right": {}, "BLEU-4": {}, "CIDEr-D / 10": {}}
for name, sheet in sheets.items():
    split = [metrics.tokenize(text) for text in sheet]
    wrong_share = metrics.wrong_objects(sheet, [[r] for r in references])["chair_i"]
    rows["objects right"][name] = 1 - wrong_share
    rows["BLEU-4"][name] = bleu(split, reference_tokens)
    rows["CIDEr-D / 10"][name] = cider_d(split, reference_tokens) / 10
made, axes = draw.figure(3, height=3.1, sharey=True)
for axis, (title, values) in zip(axes, rows.items()):
    draw.bars(axis, values, title, "", ["right", "wrong", "wrong", "wrong"], ".2f")
    axis.set_xticks(range(4), [name.replace(" ", "\n", 1).replace("-", "-\n") for name in values],
                    fontsize=8)  # fmt: skip
draw.show(made, "BLEU pays for the form of a sentence")

# %% [markdown] tags=["zh"]
# 开头要猜的两个数，都在第三根柱子（safe sentence）上：中间一栏是 BLEU-4，0.43；左边一栏是说对的物体，3%。「色盲」答卷里的物体只对 2%，BLEU 反而更高，0.77，因为句式、大小、形状都对。CIDEr-D 压低了保险的话（0.10），但对「色盲」仍然宽容（0.56）：它只知道哪些字少见，不知道哪些字**要紧**。
#
# 为什么会这样？玩具世界的描述有固定的格式。拿那句保险的话来数：不算标点 25 个字，「图中有两个物体从左到右是」就占了 12 个，人人都写得对。真实的图片描述也差不多：「一个人站在……」「照片里有……」，套话占的比例不小。分数奖励的是与标准答案**像**，而我们关心的是与图片**合**。
#
# 怎么办？**先问地板在哪里。** 一个分数只有和「不看图能得多少」放在一起才有意义：保险的一句话、置空、打乱（第 00 课），都是地板。能用完全正确率的地方就用它；描述另外数一数说错的物体（CHAIR）。
#
# ## 八、100 道题的误差
#
# 换 100 张图再考一次，分数会变多少？不必真的再考：从这 100 个结果里**有放回地**抽 100 个，算一次平均；重复 2,000 次，看平均数散得多开。这叫**自助法**（bootstrap），中间 95% 的范围就是误差范围。

# %% [markdown] tags=["en"]
# Your two numbers are the bars of "safe sentence": BLEU-4 in the middle, 0.43, and objects right on the left, 3%. The colour-blind answers, with 2% of the objects right, earn even more BLEU, 0.77, since the form, the sizes and the shapes are right. CIDEr-D marks the safe sentence down (0.10) and stays lenient with the colour-blind answers (0.56): it knows which words are rare, not which ones **matter**.
#
# Why? Descriptions in the toy world have a fixed form, and its words, the same for everyone, make up about half of the sentence: 12 of the 25 characters of the safe one, 图中有两个物体从左到右是. Captions of photographs are not so different: "a man standing in …", "a picture of …". The score rewards being **like the reference**, while we care about being **true of the image**.
#
# What to do? **Ask where the floor is.** A score means something beside the score of not looking: a safe sentence, blind, shuffled (lesson 00). Where exact match can be used, use it. For descriptions also count the wrong objects (CHAIR).
#
# ## 8. How far 100 questions can be off
#
# With another 100 images, how different would the score be? There is no need to sit another exam. Draw 100 of these 100 results **with replacement** and take their mean; do it 2,000 times and see how far the means spread. This is the **bootstrap**, and the middle 95% is the interval.


# %%
def bootstrap(right, seed=0, times=2000):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(right), (times, len(right)), generator=generator)
    return right[drawn].mean(dim=1)  # (times,)


means = bootstrap(right)
low, high = means.quantile(0.025), means.quantile(0.975)
print(tuple(means.shape), f"exact match {right.mean():.2f}, interval {low:.2f} to {high:.2f}")
made, axes = draw.figure(height=2.4)
axes.hist(means, bins=[n / 100 - 0.005 for n in range(80, 102)], color=draw.LANGUAGE, rwidth=0.9)
axes.axvspan(low, high, color=draw.PALE["right"], zorder=0, label="middle 95%")
axes.set(xlabel="exact match", ylabel="of 2,000 draws")
axes.legend(frameon=False)
draw.show(made, "One exam of 100 questions leaves this much open")

# %% [markdown] tags=["zh"]
# 两个模型只差两三个百分点时，100 道题分不出高下。范围的宽度按 1/√n 缩小：要窄一半，题目得是原来的四倍。有现成公式的时候（练习 17.1）自助法只是多此一举；它的好处是对任何分数都管用，BLEU 和 CIDEr-D 没有这样的公式。公开基准的分数（`python -m nanovlm.evaluation --benchmark pope`）都带着这样的范围，同一张图的几道题总是一起抽出。
#
# ## 九、五个种子（录制）
#
# 自助法只回答「换一批题会怎样」，不回答「换一个种子再训练一遍会怎样」。要回答后者，只有真的再训练几遍。下面的结果是**录制**的：第 1 阶段的短训练，只有 80 步（预设是 335 步），两种设置各用五个种子，只差一个开关：取视觉编码器最后的归一化之前还是之后（`--vision-norm`）。十个模型答同样的 256 道验证题。

# %% [markdown] tags=["en"]
# Where two models differ by two or three points, 100 questions cannot tell them apart. The width shrinks as 1/√n: half the width takes four times the questions. For a share there is a formula (exercise 17.1) and no need of the bootstrap. Its merit is that it works for any score; BLEU and CIDEr-D have no such formula. The scores of published benchmarks (`python -m nanovlm.evaluation --benchmark pope`) come with such an interval, for which questions about one image are always drawn together.
#
# ## 9. Five seeds (recorded)
#
# The bootstrap asks what other questions would have done. It does not ask what another seed would have done; for that one has to train again. What follows is **recorded**: short runs of stage 1, 80 steps where the preset takes 335, five seeds of two settings that differ in one switch, whether the projector gets what the vision encoder gives before its final norm or after (`--vision-norm`). All ten models answer the same 256 questions of the validation set.

# %%
recorded = json.load(open("../recorded/17.json", encoding="utf-8"))
print("recorded with:", recorded["command"], "|", recorded["machine"])
runs = recorded["results"]["runs"]
results = torch.tensor(  # (settings, seeds, questions)
    [[[float(c) for c in run["right"]] for run in runs if run["vision_norm"] == norm]
     for norm in (False, True)]
)  # fmt: skip
print(tuple(results.shape))
accuracy = results.mean(dim=-1)  # (settings, seeds)
for name, row in zip(("before the norm", "after the norm "), accuracy):
    print(name, [f"{value:.3f}" for value in row], f"mean {row.mean():.3f}, std {row.std():.3f}")

# %%
difference = accuracy[1] - accuracy[0]  # (seeds,): both settings share seed and questions
half = 2.776 * difference.std() / math.sqrt(5)  # Student's t, 4 degrees of freedom, 95%
print(f"difference {difference.mean():+.3f} ± {half:.3f} (95%, over seeds)")

# %%
made, axes = draw.figure(2, height=3.0, width_ratios=(1.4, 1))
for setting, (name, colour) in enumerate((("before", draw.VISION), ("after", draw.PROJECTOR))):
    spread = [bootstrap(row).quantile(torch.tensor([0.025, 0.975])) for row in results[setting]]
    bars = (accuracy[setting] - torch.stack(spread).T).abs().numpy()
    places = torch.arange(5) + 0.2 * setting - 0.1
    axes[0].errorbar(places, accuracy[setting], bars, fmt="os"[setting], color=colour, label=name)
axes[0].set(title="bars: 95% over questions", xlabel="seed", ylabel="exact match")
axes[0].margins(y=0.2)
axes[0].legend(frameon=False, ncols=2, loc="upper right")
axes[1].bar(range(5), difference, color=draw.WORD)
axes[1].axhline(0, color=draw.INK, lw=0.8)
axes[1].set(title="after − before", xlabel="seed")
draw.show(made, "Five seeds of two settings")

# %% [markdown] tags=["zh"]
# 假如只跑了种子 0：「归一化之后」高出 14 个百分点，两条误差线毫不重叠，任谁都会写进论文。假如只跑了种子 3：低了 6 个百分点，结论正好相反。五个种子合起来是 +4.5 ± 9 个百分点（95%），范围里包含 0：**看不出差别**。同一种设置换一个种子，成绩的标准差是 0.038 到 0.048，和要测的差别 0.045 一样大。
#
# 误差有两层，别弄混：自助法说的是「换一批题」，种子说的是「再训练一遍」。题目加到一万道，左图的误差线会缩短，五个种子仍然各说各的。这里还帮了自己一把：两种设置用同样的种子、同样的题，**成对**相减，题目难易的影响就抵消了大半。
#
# 也要说清测的是什么：这是第 80 步的成绩，学得快不等于最后学得好。完整训练之后，两种设置同样没有明显差别（`nanovlm/assets/README.md`）。
#
# ## 练习
#
# 每格最后一行的 `check` 会告诉你差多少。

# %% [markdown] tags=["en"]
# With seed 0 alone, "after the norm" is 14 points higher, the bars do not overlap, and anyone would publish it. With seed 3 alone it is 6 points lower: the opposite conclusion. Five seeds together give +4.5 ± 9 points (95%), and 0 is in that range: **no difference can be seen**. Between seeds of one setting the standard deviation is 0.038 to 0.048: luck is as large as the thing to be measured, 0.045.
#
# Two kinds of error are easily confused. The bootstrap is about other questions, seeds are about training again. With ten thousand questions the bars on the left would shrink, and the five seeds would disagree as before. One thing helped here: both settings share seeds and questions, and the difference is taken **in pairs**, so that most of what makes the questions easy or hard cancels.
#
# Say also what was measured: the score at step 80. Learning faster is not ending better. After full training the two settings show no clear difference either (`nanovlm/assets/README.md`).
#
# ## Exercises
#
# The `check` at the end of each cell says how far off an answer is.

# %% [markdown] tags=["zh"]
# **17.1 补一行。** 比例的标准误有现成的公式：√(p(1 − p)/n)。400 道题对了九成，标准误是多少？（95% 的范围大约是它的两倍，往两边。）

# %% [markdown] tags=["en"]
# **17.1 Fill in a line.** For a share there is a formula of its standard error: √(p(1 − p)/n). Of 400 questions 90% are right; what is it? (The 95% interval is about twice that, to either side.)

# %% tags=["exercise"]
share, count = 0.9, 400
standard_error = ...
check("17.1", standard_error, 0.015)

# %% [markdown] tags=["zh"]
# **17.2 换一种做法。** 短回答常常不足 4 个 token，所以也有人报 BLEU-2。用上面的 `bleu` 算出来。

# %% [markdown] tags=["en"]
# **17.2 Another way.** Short answers often have fewer than 4 tokens, and some report BLEU-2. Compute it with `bleu` from above.

# %% tags=["exercise"]
bleu_2 = ...
check("17.2", bleu_2, metrics.bleu(tokens, grouped, n=2), tolerance=1e-6)

# %% [markdown] tags=["zh"]
# **17.3 找错。** 这个自助法算出的标准差总是 0，好像分数毫无误差。改好它。（核对用的是 100 道对一半的题，标准差应当约为 0.05。）

# %% [markdown] tags=["en"]
# **17.3 Find the bug.** This bootstrap always finds a standard deviation of 0, as if the score could not be off at all. Mend it. (It is checked on 100 questions of which half are right; the answer is about 0.05.)

# %% tags=["exercise"]
half_right = (torch.arange(100) % 2).float()


def spread(right, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(len(right), generator=generator) for _ in range(200)]
    return torch.stack([right[each].mean() for each in drawn]).std()


check("17.3", spread(half_right), 0.05, tolerance=0.01)

# %% [markdown] tags=["zh"]
# ## 别人在这里摔过跤
#
# [tylin/coco-caption#9](https://github.com/tylin/coco-caption/issues/9)：有人只拿一张图试评测代码，回答与标准答案一字不差，BLEU、METEOR、ROUGE 都是满分，CIDEr 却是 0。CIDEr 的作者解释：它的权重是从全部图片的句子里统计出来的，只有一张图就用不了。用本课的公式看：N = 1 时，每个 n 元组的权重都是 log(1/1) = 0。同样的道理，**题目不同，CIDEr 就不能互相比较**。
#
# ## 到库里看看
#
# - [`nanovlm/evaluation/metrics.py`](../../nanovlm/evaluation/metrics.py)，`exact_match`、`same_items`、`bleu`、`cider_d`、`wrong_objects`：本课略去了多个标准答案和英文分词。
# - [`nanovlm/evaluation/answers.py`](../../nanovlm/evaluation/answers.py)，`answer_records` 与 `other_images`：置空与打乱两种对照。
# - [`nanovlm/evaluation/__main__.py`](../../nanovlm/evaluation/__main__.py)，`score`：`python -m nanovlm.evaluation` 打印的那一行。
# - [`nanovlm/evaluation/gallery.py`](../../nanovlm/evaluation/gallery.py)，`draw_gallery`：`--gallery out.html` 把每张图和它的回答排成一页，最差的在前。分数之外，总要亲眼看看回答。
# - [`nanovlm/evaluation/benchmarks/bootstrap.py`](../../nanovlm/evaluation/benchmarks/bootstrap.py)，`resample`：第八节的自助法，几列成对地抽。
#
# 论文：Vedantam 等，2014，*CIDEr: Consensus-based Image Description Evaluation*，[arXiv:1411.5726](https://arxiv.org/abs/1411.5726)。

# %% [markdown] tags=["en"]
# ## In the wild
#
# [tylin/coco-caption#9](https://github.com/tylin/coco-caption/issues/9): someone tried the scorer on a single image. The answer equalled the reference; BLEU, METEOR and ROUGE gave full marks, and CIDEr gave 0. An author of CIDEr explained that it takes its weights from the sentences of the whole set, so one image is not enough. In this lesson's formula: with N = 1 every n-gram weighs log(1/1) = 0. For the same reason **CIDEr over different sets of questions cannot be compared**.
#
# ## Look in the package
#
# - [`nanovlm/evaluation/metrics.py`](../../nanovlm/evaluation/metrics.py), `exact_match`, `same_items`, `bleu`, `cider_d`, `wrong_objects`: this lesson left out several references for a question and how English is cut into words.
# - [`nanovlm/evaluation/answers.py`](../../nanovlm/evaluation/answers.py), `answer_records` and `other_images`: the blind and the shuffled control.
# - [`nanovlm/evaluation/__main__.py`](../../nanovlm/evaluation/__main__.py), `score`: the line that `python -m nanovlm.evaluation` prints.
# - [`nanovlm/evaluation/gallery.py`](../../nanovlm/evaluation/gallery.py), `draw_gallery`: `--gallery out.html` puts every image and its answer on one page, the worst first. Beside any score, look at the answers.
# - [`nanovlm/evaluation/benchmarks/bootstrap.py`](../../nanovlm/evaluation/benchmarks/bootstrap.py), `resample`: the bootstrap of section 8, with several columns drawn in pairs.
#
# The paper: Vedantam et al. 2014, *CIDEr: Consensus-based Image Description Evaluation*, [arXiv:1411.5726](https://arxiv.org/abs/1411.5726).
