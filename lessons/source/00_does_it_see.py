# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["zh"]
# # 00 · 它看得见吗？
#
# 这个仓库自带一个小小的视觉语言模型（vision-language model，VLM）：给它一张图和一个问题，它用文字回答。后面每一课拆开它的一个零件；这一课先把它当作黑盒，只问一件事：**它的回答真的来自图片吗？**
#
# **进来的**：一张 64×64 像素的图和一个问题，例如「描述图片」。**出去的**：一句话，以及一个让人放心的理由。

# %% [markdown] tags=["en"]
# # 00 · Does it see?
#
# A small vision-language model (VLM) ships with this repository: give it an image and a question, and it answers in words. Each later lesson opens one of its parts. This one takes it as a black box and asks a single thing: **do its answers come from the image?**
#
# **In**: an image of 64×64 pixels and a question, such as 描述图片 ("describe the image"). **Out**: a sentence, and a reason to trust it.

# %% tags=["setup"]
import sys

sys.path.insert(0, "../..")  # the repository: nanovlm and the drawing helpers

import re
import tempfile
import textwrap
from collections import Counter, defaultdict
from pathlib import Path
from random import Random

import torch
from PIL import Image

from data_tools.scenes_text import questions
from data_tools.scenes_world import COLOURS, RGB, SHAPES, random_scene
from data_tools.scenes_world import draw as draw_scene
from lessons import draw
from lessons.check import check
from nanovlm import IMAGE, Message, generate, load_model, open_image, prepare, preprocess
from nanovlm.data.records import Record
from nanovlm.evaluation.answers import answer_records, other_images
from nanovlm.evaluation.metrics import exact_match
from nanovlm.model.projector import build_projector

ASSETS = "../../nanovlm/assets"
draw.strip("image", "answer")

# %% [markdown] tags=["zh"]
# 上面这条路会出现在每一课的开头，亮着的是当天的站。今天只亮两头：图片进去，回答出来。
#
# ## 先猜一猜
#
# 我们出两百多道小题：什么颜色、什么形状、有几个、谁在左边……然后**把图全部换成一片灰色**，再问同样的问题。
#
# 一个看不见图的模型还能答对百分之几？先写下来。

# %% [markdown] tags=["en"]
# The way above stands at the top of every lesson, with the day's stations lit. Today only its ends are: an image goes in, an answer comes out.
#
# ## Predict
#
# We will set more than two hundred small questions: what colour, what shape, how many, which is on the left. Then we **replace every image by plain grey** and ask the same again.
#
# What share does a model that cannot see get right? Write it down first.

# %% [markdown] tags=["zh"]
# ## 一、问几句
#
# 载入模型，把图和问题放进一段对话，让它写回答。函数 `ask` 分三步：`prepare` 把问题变成编号，把图变成像素，备成一个批次（第 05 课）；`generate` 一个 token 一个 token 地续写，最多 40 个（第 10 课）；`decode` 把编号变回文字。token 是模型读写文字的单位，一个 token 常常是一个词（第 04 课）。`ask` 收多少题都行，每 64 题跑一批。

# %% [markdown] tags=["en"]
# ## 1. Ask
#
# Load the model, put image and question into a conversation, have it write the answer. The function `ask` takes three steps. `prepare` turns questions into numbers and images into pixels, as one batch (lesson 05). `generate` continues the text token by token, 40 at most (lesson 10); a token is the unit in which the model reads and writes, often a word (lesson 04). `decode` turns numbers back into text. `ask` takes any number of questions and runs 64 of them at a time.

# %%
model = load_model(f"{ASSETS}/tiny-vlm").float().eval()  # the file holds bfloat16
image = open_image(f"{ASSETS}/scene.png")
print("parameters:", f"{sum(p.numel() for p in model.parameters()):,}", " image:", image.size)


def ask(images, asked, blind=False):
    answers = []
    for start in range(0, len(asked), 64):  # 64 questions at a time
        turns = [[Message("user", [IMAGE, text])] for text in asked[start : start + 64]]
        pictures = [[picture] for picture in images[start : start + 64]]
        batch = prepare(model, turns, pictures, add_generation_prompt=True)
        if blind:
            batch.pixels.zero_()  # (N, 3, H, W); zero is grey, as section 3 shows
        ids = generate(model, batch, 40)
        answers += [model.tokenizer.decode(each, skip_special=True).strip() for each in ids]
    return answers


# %%
for text in ("描述图片", "最左边的物体是什么？", "图里有几个物体？", "What colour is the star?"):
    print(f"{text:26}", ask([image], [text])[0])
made, axes = draw.figure(height=2.2)
draw.picture(axes, image)
draw.show(made, "scene.png travels through all lessons")

# %% [markdown] tags=["zh"]
# 它有不到三百万个参数，分成三个零件：**视觉编码器**（vision encoder）把图变成 64 个向量，**投影层**（projector）把它们变成语言模型收得下的 64 个视觉 token，**语言模型**（language model）把这些 token 和问题排成一队，接着往下写。第 01 到 03 课讲第一个零件，第 08 课讲第二个，第 04 到 07 课讲第三个，第 09、10 课把三个合起来。现在还不需要懂任何一个。
#
# 那么，它在看图吗？几句答对的话还不能说明什么。三个物体、红色圆环，也许只是它最爱说的。要弄清楚，先要有一张卷子，再想办法把图**拿走**。
#
# ## 二、一张卷子
#
# 玩具世界能画出无穷多的场景，并且知道每道题唯一的正确答案。画 40 个模型没见过的场景，每个场景几道短题。不用「描述图片」来考：一句描述里有好几处可对可错，短题只有对和错。
#
# 判分用**完全正确率**（exact match）：回答与标准答案一致才算对，大小写和句尾的标点不计（第 17 课）。

# %% [markdown] tags=["en"]
# In English: asked to describe the image, it names a big red ring, a big blue star and a small orange triangle, from left to right. Asked which object is leftmost, it says "red ring"; asked how many there are, "three".
#
# The model has fewer than three million parameters, in three parts. The **vision encoder** turns the image into 64 vectors, the **projector** turns these into 64 visual tokens that a language model can take, and the **language model** lines them up with the question and continues the text, token by token. Lessons 01 to 03 are about the first part, 08 about the second, 04 to 07 about the third, and 09 and 10 put all three together. None of it is needed today.
#
# So does it look? A few right answers prove little. Three objects and a red ring may be what it likes to say. To find out, one needs an exam, and a way to **take the image away**.
#
# ## 2. An exam
#
# The toy world can draw any number of scenes and knows the one right answer to each question. Here are 40 scenes that the model has not seen, with several short questions each. There are no descriptions among them: a description can be right in some places and wrong in others, a short answer is either.
#
# The score is **exact match**: an answer counts if it equals the reference, apart from capitals and the full stop (lesson 17).

# %%
random, images, asked, references, kinds = Random("exam"), [], [], [], []
for _ in range(40):
    scene = random_scene(random)
    drawn = draw_scene(scene)
    for question in questions(scene, random)[1:]:  # the first one asks for a description
        images.append(drawn)
        asked.append(question.text)
        references.append(question.answer)
        kinds.append(question.kind)
print(len(asked), "questions:", dict(Counter(kinds)))

# %%
made, axes = draw.figure(4, height=3.2)
for axis, number in zip(axes, (0, 60, 120, 180)):
    text = textwrap.fill(asked[number], 24) + f"\n→ {references[number]}"
    draw.picture(axis, images[number], text)
    axis.title.set_fontsize(8)
draw.show(made, "Four questions of the exam, and their answers")


# %%
def score(answers):
    right = [exact_match(mine, [one]) for mine, one in zip(answers, references)]
    return torch.tensor(right).float()  # (questions,): 1 right, 0 wrong


results = {"with the image": score(ask(images, asked))}
print(f"with the image: {results['with the image'].mean():.1%} right")

# %% [markdown] tags=["zh"]
# 分数很高。可是如果大半的题不看图也能答对，这个分数就不值钱。
#
# ## 三、把图拿走
#
# **置空对照**（blind control）：问题不变，图换成一片灰。送进模型的像素是归一化过的，范围从 −1 到 1（第 01 课），0 就是中间的灰色：

# %% [markdown] tags=["en"]
# A high score. But if most questions could be answered without looking, it would be worth little.
#
# ## 3. Take the image away
#
# The **blind control**: the same questions with plain grey images. The pixels that the model gets are normalised to lie between −1 and 1 (lesson 01), so 0 is medium grey:

# %%
grey = preprocess(Image.new("RGB", (64, 64), (128, 128, 128)), model.config.image)
print("a grey image:", tuple(grey.shape), f"all values {grey.min():.3f}")
blind = ask(images, asked, blind=True)
results["blind"] = score(blind)
print(f"blind: {results['blind'].mean():.1%} right")
for number in (0, 60, 120):
    print(f"{asked[number]}  →  {blind[number]}")

# %% [markdown] tags=["zh"]
# 这就是开头那个问题的答案：三成多，不是零。看看它的回答：**看不见图，它照样一本正经地回答**，没有一句「我看不见」。答对的那些多半是蒙的，因为问题本身就把答案限定在几种里：「左边还是右边」只有两种可能，「有没有」也是。
#
# 灰图有一个毛病：训练时从没出现过，模型可能因为意外而失常，分数低也许只是这个缘故。所以还有第二种，**打乱对照**（shuffled control）：每道题配上**别的场景**的图。图都是正常的图，只是不对题。

# %% [markdown] tags=["en"]
# That is the answer to the question at the top: about a third, not zero. Look at what it says (the last line asks whether there is a heart, and the answer is "no"): **without an image it answers as confidently as before**, and never "I cannot see". What it still gets right is given away by the question: "left or right" has two possible answers, and so has "is there".
#
# Grey images have one flaw: training never showed any, and the model may be thrown off by the surprise. Hence a second one, the **shuffled control**: each question gets the image of **another scene**. The images are ordinary, only not the right ones.

# %%
different = [i for i in range(len(images)) if i == 0 or images[i] is not images[i - 1]]
scenes = [images[i] for i in different]
following = {id(one): other for one, other in zip(scenes, scenes[1:] + scenes[:1])}
shuffled = ask([following[id(picture)] for picture in images], asked)
results["shuffled"] = score(shuffled)
print(len(scenes), "scenes; shuffled:", f"{results['shuffled'].mean():.1%} right")

# %% [markdown] tags=["zh"]
# 两种对照的分数很接近，可见灰图并没有让模型失常。
#
# 最后一个对照根本不用模型：**最佳猜测**。它回答的是：单凭问法能得多少分？另取 4000 个场景的题，抹掉颜色和形状，只留问法；每种问法都猜其中最常见的答案。问「甲和乙，哪个……」时，就猜「前一个」或「后一个」。

# %% [markdown] tags=["en"]
# The two controls give nearly the same score, so grey did not throw the model off.
#
# The last control needs no model at all: the **best guess**. It tells what the wording alone is worth. Take the questions on 4,000 other scenes, remove the colours and shapes so that only the wording is left, and for each wording guess the most common answer. Where a question asks "which one, A or B?", the guess is "the first" or "the second".

# %%
WORDS = "|".join([*COLOURS, *SHAPES, *COLOURS.values(), *SHAPES.values()])
SHAPE = "|".join([*SHAPES, *SHAPES.values()])


def coded(text, answer):
    named, before = answer.strip("。.").lower(), re.split(" or |和", text.lower())[0]
    if re.search(SHAPE, named) and named in text.lower():
        return "the first" if named in before else "the second"
    return answer


seen, train = defaultdict(Counter), Random("train")
for _ in range(4000):
    for q in questions(random_scene(train), train)[1:]:
        seen[re.sub(WORDS, "_", q.text)][coded(q.text, q.answer)] += 1
guesses = [seen[re.sub(WORDS, "_", text)].most_common(1)[0][0] for text in asked]
hits = [guess == coded(text, one) for guess, text, one in zip(guesses, asked, references)]
results["best guess"] = torch.tensor(hits).float()
print(f"best guess: {results['best guess'].mean():.1%} right")

# %%
made, axes = draw.figure(2, height=3.1, width_ratios=(1, 1.6))
means = {n.replace(" ", "\n", 1): 100 * right.mean().item() for n, right in results.items()}
draw.bars(axes[0], means, "", "right, %", ["right", "wrong", "wrong", "word"])
axes[0].tick_params(axis="x", labelsize=8)
for name, colour, shift in (("with the image", draw.RIGHT, -0.2), ("blind", draw.WRONG, 0.2)):
    rates = [
        100 * results[name][torch.tensor([k == kind for k in kinds])].mean()
        for kind in dict(Counter(kinds).most_common())
    ]
    axes[1].bar(torch.arange(len(rates)) + shift, rates, 0.38, color=colour, label=name)
names = [kind.replace("_", "\n") for kind, _ in Counter(kinds).most_common()]
axes[1].set_xticks(range(len(names)), names, fontsize=8)
axes[1].legend(frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, 1.2))
draw.show(made, "Four bars tell whether it sees")

# %% [markdown] tags=["zh"]
# 看左图。三根对照的柱子都矮，那是**地板**；第一根高出地板的部分，才是从图里来的。三根柱子之间的差别不必当真：225 道题，三成上下的比例，误差有上下 6 个百分点（第 17 课算给你看）。右图按题型分开：二选一的题（左右、上下、大小、有没有），置空也有一半左右；「有几个」（count）有四种可能，置空约为四分之一；颜色和形状各有八种，`what` 要两样都说对，置空几乎全错。
#
# 所以只报一个数是不够的。「准确率六成」可能是真本领，也可能几乎全是猜的：在一张全是二选一的卷子上，闭着眼睛就有五成。以后每一次训练，都把两个数放在一起看：看图的，和置空的。
#
# ## 四、故意弄坏：投影层是随机的
#
# 图片要经过投影层才能到语言模型那里（第 08 课）。把投影层的权重换成随机数，会报错吗？用前 96 题，试三个种子：

# %% [markdown] tags=["en"]
# Look at the left. The three controls are low: that is the **floor**, and only what rises above it comes from the image. The differences between the three mean little: with 225 questions, a share near 30% may be off by six points either way (lesson 17 computes it). On the right, by kind of question: where there are two possible answers (left or right, above or below, larger or smaller, is there), blind gets about half; with four, as in counting, about a quarter. There are eight colours and eight shapes, and `what` asks for both: there blind gets almost nothing.
#
# So one number is not enough. "60% right" may be skill or nothing but guessing: on an exam of yes-or-no questions, blind guessing gets half. From now on, whenever a model is trained, look at two numbers side by side: with the image, and blind.
#
# ## 4. Broken on purpose: a random projector
#
# To reach the language model, an image has to pass the projector (lesson 08). Fill its weights with random numbers. Will anything complain? The first 96 questions, with three seeds:

# %%
kept = model.projector
for seed in range(3):
    torch.manual_seed(seed)
    model.projector = build_projector(model.config.projector, 192, 192)
    broken = ask(images[:96], asked[:96])
    print(f"seed {seed}: {score(broken).mean():.1%} right,", " ".join(broken[60:66]))
model.projector = kept

# %% [markdown] tags=["zh"]
# 没有报错，句子通顺，语法无误，分数回到地板。看打印的几个回答：问颜色就答颜色，问左右就答左右，只是与图无关。**流利不是看见的证据。** 一个语言模型不需要眼睛也能说得头头是道，所以光读几个回答发现不了这种故障，做一次对照就看得出来：看图和不看图的分数一样高。
#
# ## 五、与库代码核对
#
# 库里的 `answer_records` 有同样两种对照，`python -m nanovlm.evaluation --control blind` 用的就是它。核对是为了确认：上面亲手写的考试，和以后训练时自动跑的评测，是同一回事。`answer_records` 从文件读图，所以先把前 48 题的图存下来。两边的回答应当一字不差；像素也要相同，容差为 0：PNG 不丢信息。

# %% [markdown] tags=["en"]
# Nothing complains. The sentences are fluent, the grammar is right, and the score is back on the floor. Read the answers printed (橙色 orange, 紫色 purple, 黄色 yellow; 左边 left, 右边 right; 十字形 cross, 五角星 star; 一个, 两个, 三个 one, two, three): asked for a colour it names a colour, asked for a side it names a side, whatever the image shows. **Fluency is no evidence of seeing.** A language model talks well without seeing, so reading a few answers does not reveal such a fault. A control does at once.
#
# ## 5. Proven equal
#
# The package's `answer_records` has the same two controls; `python -m nanovlm.evaluation --control blind` uses it. Is the exam above the same thing as the evaluation that training will run? `answer_records` reads images from files, so those of the first 48 questions are saved. The answers of both sides have to be equal to the letter, and so have the pixels, with a tolerance of 0: PNG loses nothing.

# %%
with tempfile.TemporaryDirectory() as folder:
    records = []
    for number in range(48):
        path = Path(folder) / f"{different.index(max(d for d in different if d <= number)):02}.png"
        images[number].save(path)
        turns = Message("user", [IMAGE, asked[number]]), Message("assistant", [references[number]])
        records.append(Record(f"question {number}", (path,), turns, (), {}))
    config = model.config.image
    one, other = (preprocess(each, config) for each in (images[47], open_image(path)))
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    theirs = list(answer_records(model, records, batch_size=64, control="blind"))
    changed = other_images(records)
assert theirs == ask(images[:48], asked[:48], blind=True)
assert all(path != other for path, other in changed.items())
print("48 blind answers equal the package's; no image of the shuffled control stays in place")

# %% [markdown] tags=["zh"]
# ## 六、改一改图
#
# 对照说明「没有图不行」。反过来还可以问：**只改图里的一样东西，回答会不会只改那一处？** 把圆环的像素涂成别的颜色，其余一个像素也不动。怎样找到圆环的像素？图里只有它红得多，绿和蓝都少，比一比三个通道就行。第一张涂的仍是红色，用作对照。

# %% [markdown] tags=["en"]
# ## 6. Change the image
#
# The controls show that it does not work without the image. One can also ask the other way round: **if one thing in the image changes, does that one word of the answer change?** The ring's pixels are those with much red and little green and blue. Paint them in another colour, leave every other pixel alone (the first is painted red again, as a control), and ask 圆环是什么颜色的？ ("what colour is the ring?"). The right answers are 红色 red, 绿色 green, 蓝色 blue, 紫色 purple, 黄色 yellow and 白色 white:

# %%
pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(64, 64, 3)
ring = (pixels[..., 0] > 150) & (pixels[..., 1] < 90) & (pixels[..., 2] < 90)  # (64, 64), the red
painted = []
for colour in ("red", "green", "blue", "purple", "yellow", "white"):
    changed = pixels.clone()
    changed[ring] = torch.tensor(RGB[colour], dtype=torch.uint8)
    painted.append(Image.fromarray(changed.numpy()))
answers = ask(painted, ["圆环是什么颜色的？"] * 6)
made, axes = draw.figure(6, height=1.9)
for axis, picture, answer in zip(axes, painted, answers):
    draw.picture(axis, picture, answer)
draw.show(made, f"{int(ring.sum())} pixels change, and the answer to 圆环是什么颜色的？ follows")

# %% [markdown] tags=["zh"]
# 六张图只差这两百多个像素，回答跟着变。这是最强的一种证据：我们**动了原因，看见了结果**，而不只是看到两样东西一起出现。
#
# 那么它是怎么做到的？像素怎样变成向量，向量怎样混进一句话里，语言模型又怎样一个 token 一个 token 地写出回答？从第 01 课开始，一站一站走。
#
# 每一课的走法都和今天一样：先猜一个数，再亲手搭，然后故意弄坏，和库里的代码核对，用一个实验回答开头的问题。猜错了最好，猜错的地方正是要学的地方。
#
# ## 练习
#
# 每格最后一行的 `check` 会告诉你差多少：`exact`（完全一致）、`close`（接近）或 `not yet`（还没有）。它从不中断运行。

# %% [markdown] tags=["en"]
# The six images differ in the ring's pixels alone, and the answers follow. This is the strongest kind of evidence, because we **moved the cause and saw the effect**, and did not only see two things together.
#
# How does it do it? How do pixels become vectors, how do vectors get into a sentence, and how does the language model write an answer token by token? Lesson 01 starts the walk, station by station.
#
# Every lesson goes as today: guess a number, build the piece by hand, break it on purpose, compare it with the package, and answer the question with an experiment. A wrong guess is the best one; it shows where there is something to learn.
#
# ## Exercises
#
# The `check` at the end of each cell says how far off an answer is: `exact`, `close` or `not yet`. It never stops the notebook.

# %% [markdown] tags=["zh"]
# **00.1 补一行。** 一张卷子一半是二选一的题，一半是八选一的题。完全乱猜，平均能对多少（写成小数）？

# %% [markdown] tags=["en"]
# **00.1 Fill in a line.** Half of an exam has two possible answers to a question, the other half has eight. What share does guessing at random get right, on average, as a decimal?

# %% tags=["exercise"]
chance = ...
check("00.1", chance, 0.3125)

# %% [markdown] tags=["zh"]
# **00.2 换一种做法。** 有图时错、置空时反而对的题有几道？用 `results` 里的两个张量数出来。（这样的题多半是蒙对的。）

# %% [markdown] tags=["en"]
# **00.2 Another way.** How many questions are wrong with the image and right without? Count them from the two tensors in `results`. (Such answers are mostly luck.)

# %% tags=["exercise"]
with_image, without = results["with the image"], results["blind"]
lucky = ...
check("00.2", lucky, int(sum(w == 0 and b == 1 for w, b in zip(with_image, without))))

# %% [markdown] tags=["zh"]
# **00.3 找错。** 这个打乱对照有时把图放回了原来的题上，分数就虚高了。改好它：每一张都要换，并且每张正好用一次。

# %% [markdown] tags=["en"]
# **00.3 Find the bug.** This shuffled control sometimes leaves an image at its own question, which flatters the score. Mend it: every image has to move, and each is used once.


# %% tags=["exercise"]
def shuffle(count, seed):
    order = list(range(count))
    Random(seed).shuffle(order)
    return order  # question i gets image order[i]


orders = [shuffle(6, seed) for seed in range(20)]
in_place = sum(order[i] == i for order in orders for i in range(6))
complete = all(sorted(order) == list(range(6)) for order in orders)
check("00.3", (in_place, complete), (0, True))

# %% [markdown] tags=["zh"]
# ## 别人在这里摔过跤
#
# [AlibabaResearch/AdvancedLiterateMachinery#120](https://github.com/AlibabaResearch/AdvancedLiterateMachinery/issues/120)：有人在一个读文档图片的模型（GeoLayoutLM）上把图片换成全零的矩阵，准确率几乎不变，看起来图片对结果没有贡献。另一位读者在自己的任务上重复了一遍，结果相同；他只留下文本编码器，准确率也没有受影响，于是推测这个任务光靠文本就够了。发现这件事只需要一行代码，就是第三节的 `zero_()`。
#
# ## 到库里看看
#
# - [`nanovlm/evaluation/answers.py`](../../nanovlm/evaluation/answers.py)，`answer_records` 与 `other_images`：两种对照，一次回答许多问题。
# - [`data_tools/make_scenes.py`](../../data_tools/make_scenes.py)，`blind_rates`：最佳猜测，按题型给出。
# - [`infer.py`](../../infer.py)，`main`：在命令行里问它，`python infer.py nanovlm/assets/scene.png 描述图片`。
#
# 论文：Goyal 等，2016，*Making the V in VQA Matter*，说明看图问答的题目有多少能不看图就答对，[arXiv:1612.00837](https://arxiv.org/abs/1612.00837)。

# %% [markdown] tags=["en"]
# ## In the wild
#
# [AlibabaResearch/AdvancedLiterateMachinery#120](https://github.com/AlibabaResearch/AdvancedLiterateMachinery/issues/120): with a model that reads images of documents, GeoLayoutLM, someone replaced the image by a matrix of zeros. The accuracy hardly changed, as if the image contributed nothing. Another reader repeated it on their task with the same result; keeping nothing but the text encoder did no harm either, and they concluded that the task may be easy enough for text alone. It takes one line to find this out: the `zero_()` of section 3.
#
# ## Look in the package
#
# - [`nanovlm/evaluation/answers.py`](../../nanovlm/evaluation/answers.py), `answer_records` and `other_images`: both controls, many questions at once.
# - [`data_tools/make_scenes.py`](../../data_tools/make_scenes.py), `blind_rates`: the best guess, by kind of question.
# - [`infer.py`](../../infer.py), `main`: ask it on the command line, `python infer.py nanovlm/assets/scene.png 描述图片`.
#
# The paper: Goyal et al. 2016, *Making the V in VQA Matter*, on how many questions about images can be answered without them, [arXiv:1612.00837](https://arxiv.org/abs/1612.00837).
