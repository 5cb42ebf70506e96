# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["zh"]
# # 07 · 语言模型（二）：旋转位置编码
#
# 第 06 课留下了一件事：注意力怎么知道谁在前、谁在后、隔多远？这一课补上 `rotary`，再把分组查询放进层里，语言模型就完整了。
#
# **进来的**：一层里的查询 `(1, 4, T, 48)` 和键 `(1, 2, T, 48)`，`float32`。**出去的**：形状不变，但每个向量按自己的位置转了一个角度，于是查询和键的内积知道了两者的距离。

# %% [markdown] tags=["en"]
# # 07 · The language model II: rotary positions
#
# Lesson 06 left one thing open: how does attention know who comes first, and how far apart two tokens are? This lesson supplies `rotary`, puts grouped queries into the block, and the language model is complete.
#
# **In**: the queries `(1, 4, T, 48)` and keys `(1, 2, T, 48)` of a block, in `float32`. **Out**: the same shapes, each vector turned by an angle that its position gives, so that the inner product of a query and a key knows their distance.

# %% tags=["setup"]
import math
import sys

sys.path.insert(0, "../..")  # the repository: nanovlm and the drawing helpers

from random import Random

import torch
import torch.nn.functional as F

from data_tools import scenes_world as world
from data_tools.scenes_text import questions
from lessons import draw
from lessons.check import check
from nanovlm import IMAGE, Message, load_model, open_image, prepare

ASSETS = "../../nanovlm/assets"
draw.strip("hidden states")

# %% [markdown] tags=["zh"]
# ## 先猜一猜
#
# 自带模型回答 48 个关于随机场景的问题，几乎全对。序列不到 120 个 token，训练时见过的也大致这么长。现在只改位置编号，别的一概不动：
#
# 1. **所有**位置都加 1,000。
# 2. 图片的位置不动，图片**之后**的位置都加 1,000，问题和图片之间就隔开了一大段。
#
# 48 个问题各还能对几个？先写下两个数，再往下看。

# %% [markdown] tags=["en"]
# ## Predict
#
# The shipped model answers 48 questions about random scenes, nearly all of them right. Its sequences have fewer than 120 tokens, and it saw none much longer in training. Now only the numbers of the positions change:
#
# 1. **All** positions are raised by 1,000.
# 2. The image stays where it is, and all positions **after** it are raised by 1,000, so that a large gap opens between image and question.
#
# How many of the 48 are still right in each case? Write two numbers down.

# %% [markdown] tags=["zh"]
# ## 一、注意力不认识顺序
#
# 先确认问题存在。随便取 4 个 token 的查询、键和值，看最后一个 token 的输出；再把前三个 token 打乱。

# %% [markdown] tags=["en"]
# ## 1. Attention knows no order
#
# First, is there a problem? Take queries, keys and values of 4 tokens and look at the output of the last; then shuffle the first three.

# %%
torch.manual_seed(0)
queries, keys, values = torch.randn(3, 4, 48)  # (T, D) each
order = torch.tensor([2, 0, 1, 3])  # the last token stays
outputs = []
for k, v in ((keys, values), (keys[order], values[order])):
    weights = (queries[-1] @ k.T / math.sqrt(48)).softmax(dim=-1)  # (T,)
    outputs.append(weights @ v)
print("largest difference after the shuffle:", f"{(outputs[0] - outputs[1]).abs().max():.1e}")

# %% [markdown] tags=["zh"]
# 差别只在最后一位：「红色圆环、蓝色五角星」和「蓝色圆环、红色五角星」对它是同一袋 token。位置要另外告诉它。
#
# 第 03 课的办法是学一张位置表，加在向量上。它有两个缺点：表以外的位置没有向量；「相隔 3 个」在开头和在末尾是两回事，要分别去学。下面的办法把「相隔几个」直接写进内积。
#
# ## 二、转一对数
#
# 办法是**转**。把向量里的两个数看成平面上的一支箭头，位置每加 1，就多转一个固定的角度。两支箭头的内积只看长度和夹角，所以一起多转几圈也不变，变的只有两者位置之**差**。

# %% [markdown] tags=["en"]
# The difference is in the last digit. "Red ring, blue star" and "blue ring, red star" are the same bag of tokens to it. Positions have to be told some other way.
#
# The way of lesson 03 is a learned position table, added to the vectors. It has two drawbacks: beyond the table there is no vector; and "3 apart" at the beginning and at the end are two different things, each to be learned. What follows writes "how far apart" straight into the inner product.
#
# ## 2. Turning two numbers
#
# The way is to **turn**. Take two numbers of a vector as an arrow in the plane, and turn it by a fixed angle for each position. The inner product of two arrows depends on their lengths and on the angle between them. Turned together it stays; what changes it is the **difference** of their positions. A query and a key are turned each by its own position, so their inner product knows how far apart they are.


# %%
def rotate_pair(pair, position, frequency):
    x, y = pair
    cos, sin = math.cos(position * frequency), math.sin(position * frequency)
    return torch.stack((x * cos - y * sin, x * sin + y * cos))


arrow = torch.tensor([1.0, 0.0])
turned = torch.stack([rotate_pair(arrow, position, 0.5) for position in range(8)])  # (8, 2)
products = turned @ turned.T  # (8, 8)
made, axes = draw.figure(2, height=3.4)
for position, (x, y) in enumerate(turned.tolist()):
    axes[0].annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "->", "color": draw.LANGUAGE})
    axes[0].text(1.15 * x, 1.15 * y, str(position), ha="center", va="center")
axes[0].set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), aspect="equal", title="at positions 0 … 7")
draw.heat(axes[1], products, "inner products", ".2f", "Blues", limits=(-1.0, 1.6))
axes[1].set(xlabel="position of the key", ylabel="position of the query")
draw.show(made, "Along each diagonal one number: only the difference counts")

# %% [markdown] tags=["zh"]
# 右边的表里，同一条对角线上的数都相同：第 0 行第 2 列和第 5 行第 7 列都是 0.54，因为相隔都是 2。写成式子，查询在位置 m、键在位置 n，两支箭头原来的夹角是 a，每个位置转 ω，那么
#
# > 转过之后的内积 = 两者长度之积 × cos(a + (m − n) ω)
#
# m 和 n 只以差的形式出现。
#
# ## 三、24 对数，24 种转速
#
# 一个头有 48 维，配成 24 对。只用一种转速不行：转得快，多转一圈就分不清；转得慢，相邻两个几乎没有差别。所以每对一种，从每个位置 1 弧度，慢到每个位置约 0.00015 弧度。像钟表的秒针、分针和时针，合起来既看得清相邻，又认得出远近。最慢的一对有多慢，由底数 `rope_theta` 决定：底数越大，转得越慢，分得清的距离越远。长文本的模型常把它调大，例如 Qwen2.5 用 1,000,000。

# %% [markdown] tags=["en"]
# Along a diagonal of the right table all numbers are equal: row 0, column 2 and row 5, column 7 both hold 0.54, because both are 2 apart. As a formula, with the query at position m, the key at n, an angle a between the two arrows at first, and a turn of ω for each position:
#
# > inner product once turned = product of the lengths × cos(a + (m − n) ω)
#
# m and n come as a difference and in no other way.
#
# ## 3. 24 pairs, 24 speeds
#
# A head has 48 dimensions, paired into 24. One speed would not do: a fast one repeats itself after a turn, a slow one hardly differs from one token to the next. So each pair has its own, from 1 radian a position down to about 0.00015. Like the hands of a clock, together they tell neighbours apart and far from near. How slow the slowest is depends on the base, `rope_theta`: the larger, the slower, and the farther distances can be told. Models for long texts raise it; Qwen2.5's is 1,000,000.

# %%
model = load_model(f"{ASSETS}/tiny-vlm").float().eval()  # the file holds bfloat16
language_model, config = model.language_model, model.config.language_model
D, theta = config.head_dim, config.rope_theta
frequencies = theta ** (-torch.arange(0, D, 2) / D)  # (D/2,): radians a position
print(tuple(frequencies.shape), "from", frequencies[0].item(), f"to {frequencies[-1]:.6f}")

# %%
angles = torch.arange(120)[:, None] * frequencies  # (T, D/2)
full_turns = angles[-1] / (2 * math.pi)
made, axes = draw.figure(2, height=3.0)
draw.heat(axes[0], angles.cos().T, "cosine of the angle", "", "RdBu", limits=(-1, 1))
axes[0].set(xlabel="position", ylabel="pair")
axes[0].set_xticks(range(0, 120, 20), range(0, 120, 20))
axes[1].bar(range(D // 2), full_turns, color=draw.LANGUAGE)
axes[1].axhline(1, color=draw.WRONG, linestyle="--")
axes[1].text(23, 1.2, "one full turn", ha="right", color=draw.WRONG)
axes[1].set(yscale="log", xlabel="pair", title="turns within 120 positions")
draw.show(made, "Fast pairs tell neighbours apart, slow ones near from far")
print(int((full_turns < 1).sum()), "of", D // 2, "pairs do not complete a turn")

# %% [markdown] tags=["zh"]
# 右图先记住：120 个位置以内，24 对里有 16 对**一圈都没转完**。第七节要用到。
#
# 哪两维配成一对？这里（以及 Qwen、LLaMA 的 transformers 版本）把头对半分，第 i 维和第 i + 24 维一对。平面上的旋转就是复数乘法，所以可以一次转完：

# %% [markdown] tags=["en"]
# Remember the right picture: within 120 positions 16 of the 24 pairs **do not complete one turn**. Section 7 needs it.
#
# Which two dimensions make a pair? Here, as for Qwen and LLaMA in transformers, a head is cut into halves, and dimension i goes with i + 24. To turn in the plane is to multiply complex numbers, so all pairs can be turned at once:


# %%
def rotate(heads, positions):
    """(B, H, T, D) at positions (T,), or (T, D/2) to give each pair its own → (B, H, T, D)."""
    first, second = heads.chunk(2, dim=-1)
    angles = positions.view(len(positions), -1) * frequencies  # (T, D/2)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), dim=-1)


one = torch.arange(D, dtype=torch.float32).view(1, 1, 1, D)
pair = rotate_pair(one[0, 0, 0, [3, 27]], 5, frequencies[3].item())
print("by the pair:", pair)
print("all at once:", rotate(one, torch.tensor([5]))[0, 0, 0, [3, 27]])

# %% [markdown] tags=["zh"]
# ## 四、放进一层：分组查询
#
# 自带模型有 4 个查询头，却只有 2 个键头和值头：相邻两个查询头共用一个（第 02 课）。这样做是为了推理：KV 缓存只存键和值，头数减半，缓存也减半（第 10 课）。旋转只作用于查询和键；**值不转**，取出来的内容不该随位置变样。
#
# 下面是整个注意力，按自带权重的名字写。`q_norm` 和 `k_norm` 是对每个头的 48 个数做的 RMSNorm（第 06 课），很多模型没有。留意形状：查询是 `(1, 4, T, 48)`，键和值是 `(1, 2, T, 48)`，要各重复一次，才和查询的 4 个头对得上；先转再重复，可以少转一半。

# %% [markdown] tags=["en"]
# ## 4. Into a block: grouped queries
#
# The shipped model has 4 query heads but only 2 heads of keys and values; two neighbouring query heads share one (lesson 02). This pays at inference: the KV cache keeps keys and values alone, so half the heads make half the cache (lesson 10). The rotation is for queries and keys. **Values are not turned**: what is fetched should not change with its place.
#
# This is all of attention, with the names of the shipped weights. `q_norm` and `k_norm` are RMSNorms (lesson 06) over the 48 numbers of each head; many models leave them out. Queries are `(1, 4, T, 48)`, keys and values `(1, 2, T, 48)`, and these are repeated to match the 4 heads. The keys are turned before they are repeated, which saves half of the turns.


# %%
def attention(module, hidden_states, positions, rotation):
    """(1, T, C) → (1, T, C), and the weights (1, H, T, T)."""
    split = lambda projected: projected.unflatten(-1, (-1, D)).transpose(1, 2)
    queries = module.q_norm(split(module.q_proj(hidden_states)))  # (1, 4, T, D)
    keys = module.k_norm(split(module.k_proj(hidden_states)))  # (1, 2, T, D)
    values = split(module.v_proj(hidden_states))  # (1, 2, T, D)
    queries, keys = rotation(queries, positions), rotation(keys, positions)
    shared = queries.shape[1] // keys.shape[1]
    keys, values = (heads.repeat_interleave(shared, dim=1) for heads in (keys, values))
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(D)  # (1, 4, T, T)
    scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
    weights = scores.softmax(dim=-1)
    return module.out_proj((weights @ values).transpose(1, 2).flatten(2)), weights


# %%
@torch.no_grad()
def run(embeddings, positions, rotation=rotate):
    """The language model of lesson 06: (1, T, C) → logits (T, V)."""
    hidden_states = embeddings
    for block in language_model.blocks:
        normed = block.attention_norm(hidden_states)
        hidden_states = hidden_states + attention(block.attention, normed, positions, rotation)[0]
        hidden_states = hidden_states + block.mlp(block.mlp_norm(hidden_states))
    return language_model.logits(language_model.norm(hidden_states))[0]


# %% [markdown] tags=["zh"]
# 老规矩，同一张图、同一个问题。先看一眼旋转之后的头喜欢什么**距离**：固定第一层里一个 token 的查询和键，让查询站在不同的位置上，分数随距离变化。看图时先找每条线的最高点，那是这个头最喜欢的距离。

# %% [markdown] tags=["en"]
# The same image and question as ever. First a look at which **distance** a rotated head likes: take query and key of one token in the first block, let the query stand at different positions, and watch the score change with the distance. The highest point of each curve is the distance that this head likes most.

# %%
image = open_image(f"{ASSETS}/scene.png")
answer = "图中有三个物体，从左到右是：大的红色圆环、大的蓝色五角星、小的橙色三角形。"
turns = [Message("user", (IMAGE, "描述图片")), Message("assistant", (answer,))]
batch = prepare(model, [turns], [[image]])
with torch.no_grad():
    embeddings = model.embed(batch)  # (1, T, C)
    first = language_model.blocks[0]
    normed = first.attention_norm(embeddings)
    query = first.attention.q_norm(first.attention.q_proj(normed).unflatten(-1, (-1, D)))[0, -2]
    key = first.attention.k_norm(first.attention.k_proj(normed).unflatten(-1, (-1, D)))[0, -2]
print("query", tuple(query.shape), "key", tuple(key.shape))


# %%
def score_at(distance, offset):
    """The score of each query head, `distance` after a key at position `offset`."""
    turned = rotate(query[None, :, None], torch.tensor([offset + distance]))[0, :, 0]  # (4, D)
    against = rotate(key[None, :, None], torch.tensor([offset]))[0, :, 0]  # (2, D)
    return (turned * against.repeat_interleave(2, dim=0)).sum(dim=-1) / math.sqrt(D)


near = torch.stack([score_at(distance, 0) for distance in range(64)])  # (64, 4)
far = torch.stack([score_at(distance, 1000) for distance in range(64)])
torch.testing.assert_close(near, far, rtol=1e-3, atol=1e-3)
made, axes = draw.figure(1, height=2.8)
names = [f"query head {head},\nkey head {head // 2}" for head in range(4)]
draw.curves(axes, dict(zip(names, near.T)), "", "distance", "score")
axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
draw.show(made, "What one query and key score at each distance, wherever they stand")

# %% [markdown] tags=["zh"]
# 键放在位置 0 和放在位置 1,000，曲线相同（上面的 `assert_close`；角度是 `float32`，位置越大末位误差越大，所以容差取 1e-3）。同一对内容，分数随距离起伏：旋转没有替头规定「越近越好」，学出来的投影自己决定在哪个距离上对齐。
#
# ## 五、故意弄坏：配错了对
#
# 还有一种同样常见的配法：相邻的两维一对，`(0, 1)`、`(2, 3)`……两种都是正确的旋转编码，但权重是按其中一种学的。拿错了会怎样？

# %% [markdown] tags=["en"]
# A key at position 0 and one at 1,000 give the same curve (the `assert_close` above; angles are `float32`, whose last digits get worse as positions grow, hence a tolerance of 1e-3). For the same contents the score rises and falls with the distance. The rotation does not say "the nearer the better": the learned projections decide at which distance things line up.
#
# ## 5. Broken on purpose: the wrong pairs
#
# Another way of pairing is as common: neighbouring dimensions, `(0, 1)`, `(2, 3)` and so on. Both are right rotary positions, but the weights were learned with one of them. What if the other is used?


# %%
def interleaved(heads, positions):
    even, odd = heads[..., ::2], heads[..., 1::2]
    angles = positions[:, None] * frequencies
    turned = torch.complex(even, odd) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(-2)


positions = torch.arange(embeddings.shape[1])
logits = run(embeddings, positions)  # (T, V)
wrong = run(embeddings, positions, interleaved)
without = run(embeddings, positions, lambda heads, positions: heads)
for name, given in (("halves", logits), ("neighbours", wrong), ("no rotation", without)):
    chosen = given[batch.target_positions]
    text = model.tokenizer.decode(chosen.argmax(dim=-1).tolist())
    print(f"{name:12} loss {F.cross_entropy(chosen, batch.targets):6.4f}  {text}")
print("difference at positions 0, 1, 2, 70:", (logits - wrong).abs().amax(dim=1)[[0, 1, 2, 70]])

# %% [markdown] tags=["zh"]
# 打印的是在标准答案的每个位置上最可能的下一个 token。形状全对，不报任何错；位置 0 的角度是零，两种配法在那里**完全相同**，越往后差得越多。所以这种错的样子是：开头像话，后面胡说。完全不转也是词都认得，却分不清谁配谁、谁先谁后；配错了对（损失 1.92）在这里竟比完全不转（1.66）还糟。
#
# ## 六、与库代码核对
#
# 核对三层：旋转、一层的注意力、整个语言模型的 logits。`float32` 的求和次序不同，logits 有几十那么大，容差取 1e-3。

# %% [markdown] tags=["en"]
# Printed is the likeliest next token at each position of the right answer. All shapes are right and nothing complains. At position 0 all angles are zero and both pairings are **the same**; further on they differ more. So this is what the mistake looks like: sense at first, nonsense later. With a loss of 1.92, the wrong pairs are even worse here than no rotation at all (1.66).
#
# ## 6. Proven equal
#
# At three levels: the rotation, the attention of a block, and the logits of the whole language model. Sums are taken in another order in `float32`, and logits reach some tens, so the tolerance is 1e-3.

# %%
from nanovlm.model import rotary
from nanovlm.model.attention import AttentionInputs

torch.testing.assert_close(frequencies, rotary.rotary_frequencies(D, theta))
tables = rotary.rotary_embedding(positions[None], frequencies)  # cosines, sines: (1, 1, T, D)
heads = torch.randn(1, 4, len(positions), D)
theirs = rotary.rotate(heads, tables)
torch.testing.assert_close(rotate(heads, positions), theirs, rtol=1e-4, atol=1e-4)
with torch.no_grad():
    mine, weights = attention(first.attention, normed, positions, rotate)
    theirs = first.attention(normed, AttentionInputs(is_causal=True, rotary=tables))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)
    theirs = language_model.logits(language_model.hidden_states(embeddings))[0]
torch.testing.assert_close(logits, theirs, rtol=1e-4, atol=1e-3)
print("weights", tuple(weights.shape), " logits", tuple(logits.shape), " equal to the package's")

# %% [markdown] tags=["zh"]
# ## 七、只看距离，但距离要见过
#
# 现在回答开头的问题。48 个随机场景，各画一张图、问一个问题；「对」是指给定标准答案的前文，每个 token 都是最可能的那个；这样一次前向就能判完一题，不用逐个生成。

# %% [markdown] tags=["en"]
# ## 7. Only differences matter, up to those never seen
#
# Back to the question at the top. 48 random scenes, each with an image and a question; "right" means that every token of the right answer, given those before it, is the likeliest one. So one forward pass marks a question, without writing the answer token by token.

# %%
random, asked = Random(1), []
for _ in range(48):
    scene = world.random_scene(random)
    question = random.choice(questions(scene, random, language="zh"))
    turns = [Message("user", (IMAGE, question.text)), Message("assistant", (question.answer,))]
    one = prepare(model, [turns], [[world.draw(scene)]])
    with torch.no_grad():
        asked.append((one, model.embed(one)))
print("longest sequence:", max(one.input_ids.shape[1] for one, _ in asked), "tokens")


# %%
def right(renumber):
    """How many of the 48 are right, and the loss per token, with other positions."""
    correct, loss, count = 0, 0.0, 0
    for one, embeddings in asked:
        positions = renumber(torch.arange(embeddings.shape[1]).float())
        chosen = run(embeddings, positions)[one.target_positions]
        correct += bool((chosen.argmax(dim=-1) == one.targets).all())
        loss += F.cross_entropy(chosen, one.targets, reduction="sum").item()
        count += len(one.targets)
    return correct, loss / count


# %%
AFTER = 1 + model.image_length  # <user>, the image, and then the question
BY = (30, 100, 300, 1000, 3000)
slow = (full_turns < 1).float()  # (D/2,): the pairs that never complete a turn


def gap(by, pairs):
    """`by` is added after the image, in the chosen pairs only."""
    return right(lambda positions: positions[:, None] + by * (positions >= AFTER)[:, None] * pairs)


results = {
    "all positions": {by: right(lambda positions: positions + by) for by in (0, 1000, 100000)},
    "after the image": {by: gap(by, torch.ones(D // 2)) for by in BY},
    "… slow pairs only": {by: gap(by, slow) for by in BY},
    "… fast pairs only": {by: gap(by, 1 - slow) for by in BY},
}

# %%
made, axes = draw.figure(1, height=3.0)
places = [str(by) for by in (0, *BY, 100000)]
styles = ("-o", "--s", ":v", "-.^")
colours = (draw.RIGHT, draw.WRONG, draw.VISION, draw.PROJECTOR)
for style, colour, (name, found) in zip(styles, colours, results.items()):
    correct = [count for count, _ in found.values()]
    at = [places.index(str(by)) for by in found]
    axes.plot(at, correct, style, color=colour, label=name, clip_on=False)
    print(f"{name:18}", *(f"+{by}: {count} ({loss:.2f})" for by, (count, loss) in found.items()))
axes.set_xticks(range(len(places)), places)
axes.set(xlabel="raised by", ylabel="right, of 48", ylim=(0, 50))
axes.legend(frameon=False, loc="lower left")
draw.show(made, "A shift of everything is free; a distance never seen is not")

# %% [markdown] tags=["zh"]
# （括号里是每个 token 的损失。）所有位置一起加 1,000、加 100,000，48 个一个也不少：token 之间的距离没变，注意力就看不出来。图片之后加一段空隙却不行，空隙越大错得越多：加 1,000 时只剩 24 个。
#
# 错在哪里？看后两条线：空隙只加在**快**的对上，几乎没有影响，它们反正转了很多圈，什么角度都见过；只加在**慢**的对上，和加在全部上差不多一样坏（加 1,000 时对 23 个和 24 个）。慢的对在训练时从没转到过这么大的角度（第三节右图），权重不知道怎么读。这就是「**超出训练长度**」的意思：旋转编码在任何位置上都有定义，不等于在那里学过。
#
# 有一个常见的补救办法叫位置插值（position interpolation）：把所有位置等比例压缩，让最大的距离回到见过的范围。不再训练，直接压，行吗？

# %% [markdown] tags=["en"]
# (In brackets is the loss per token.) Raise all positions by 1,000 or 100,000 and all 48 answers stay right: differences are the same, so attention cannot tell. A gap of 1,000 after the image is another matter: 24 are right. The larger the gap, the more goes wrong.
#
# What is it that goes wrong? Look at the last two lines. A gap in the **fast** pairs alone hardly matters: they have made many turns and seen every angle. A gap in the **slow** pairs alone is about as bad as one in all, 23 right instead of 24. They were never turned that far in training (section 3, right picture), and the weights cannot read what they see. That is what **beyond the trained length** means: rotary positions are defined everywhere, which is not to have been learned everywhere.
#
# A common remedy is position interpolation: press all positions together until the largest distance is one that has been seen. Without training on, does it work?

# %%
for by in (100, 1000):

    def squeezed(positions, by=by):
        length = len(positions)
        return (positions + by * (positions >= AFTER)) * length / (length + by)

    plain, pressed = results["after the image"][by], right(squeezed)
    print(f"gap {by:4}: {plain[0]} right, loss {plain[1]:.2f};  ", end="")
    print(f"pressed together: {pressed[0]} right, loss {pressed[1]:.2f}")

# %% [markdown] tags=["zh"]
# 看上面的数：不再训练，压缩帮不上什么忙：空隙为 1,000 时，对的从 24 个变成 22 个；空隙只有 100 时反而从 43 个掉到 25 个。最大的距离回到了见过的范围，**最小的距离却没了**：相邻 token 从相隔 1 变成相隔零点几，这也是没见过的。论文里压缩之后都要再训练一小段，正是为此；只压慢的对、不动快的对（LLaMA 3.1 的做法）也是为此。
#
# ## 练习

# %% [markdown] tags=["en"]
# Without further training pressing does not help. With the gap of 1,000, 22 are right instead of 24; with that of 100 it does harm, 25 instead of 43. The largest distance is back, but **the smallest is gone**. Neighbours were 1 apart and now are a fraction, which has not been seen either. That is why the paper trains on for a little after pressing, and why LLaMA 3.1 slows down the slow pairs only.
#
# ## Exercises

# %% [markdown] tags=["zh"]
# **07.1 补一行。** 每一对转完整一圈各要多少个位置？由 `frequencies` 写出形状为 `(24,)` 的答案。

# %% [markdown] tags=["en"]
# **07.1 Fill in a line.** How many positions does each pair need for one full turn? From `frequencies`, write the answer of shape `(24,)`.

# %% tags=["exercise"]
full_turn = ...
check("07.1", full_turn, 2 * math.pi * theta ** (torch.arange(0, D, 2) / D), tolerance=1e-4)

# %% [markdown] tags=["zh"]
# **07.2 改一个行为。** 假设手里有一份按相邻配对学出来的权重，而代码是对半配对的。代码不用改，只要把每个头的维重新排列，`rotate` 就能得到与 `interleaved` 相同的内积。写出排列 `order`（48 个下标），使 `rotate(x[..., order], p)` 等于 `interleaved(x, p)[..., order]`。

# %% [markdown] tags=["en"]
# **07.2 Change a behaviour.** Suppose you are given weights that were learned with neighbours paired, while your code pairs halves. No code has to change: reorder the dimensions of each head, and `rotate` gives the inner products of `interleaved`. Write the `order`, 48 indices, for which `rotate(x[..., order], p)` equals `interleaved(x, p)[..., order]`.

# %% tags=["exercise"]
order = ...
with torch.no_grad():
    reordered = order if order is ... else rotate(heads[..., order], positions)
    pairs = interleaved(heads, positions).unflatten(-1, (-1, 2))  # (B, H, T, D/2, 2)
    check("07.2", reordered, torch.cat(pairs.unbind(-1), dim=-1))

# %% [markdown] tags=["zh"]
# **07.3 找错。** 这个函数想让相邻的两个查询头共用一个键头，形状也对，头却配错了。改好它。

# %% [markdown] tags=["en"]
# **07.3 Find the bug.** This function is to let two neighbouring query heads share one key head. Its shape is right, its heads are not. Mend it.


# %% tags=["exercise"]
def share(keys, num_heads):
    """(B, H_kv, T, D) → (B, num_heads, T, D)."""
    return keys.repeat(1, num_heads // keys.shape[1], 1, 1)


two_heads = torch.arange(2.0).view(1, 2, 1, 1)
check("07.3", share(two_heads, 4).flatten(), torch.tensor([0.0, 0.0, 1.0, 1.0]))

# %% [markdown] tags=["zh"]
# ## 别人在这里摔过跤
#
# [NeuraLegion/shainet#111](https://github.com/NeuraLegion/shainet/pull/111)：真实的 LLaMA 权重，前一两个 token 正常，随后变成乱码。原因正是第五节：代码用相邻配对 `(2i, 2i+1)`，而 Hugging Face 的 LLaMA 是对半配对。位置 0 两者没有差别，小位置上角度也小，所以开头看不出来。
#
# [huggingface/transformers#31859](https://github.com/huggingface/transformers/issues/31859)：有人发现 transformers 的旋转和 Meta 的原始代码不一样，问为什么结果还能对。回答是：转换脚本里已经把查询和键的权重重新排列过了，也就是练习 07.2。怎么发现配错？比较第二个 token 以后的 logits，只比第一个是看不出来的。
#
# ## 到库里看看
#
# - [`nanovlm/model/rotary.py`](../../nanovlm/model/rotary.py)，`rotary_frequencies`、`rotate`、`llama3_frequencies` 与 `ntk_theta`：后两个是超出训练长度的两种办法。
# - [`nanovlm/model/attention.py`](../../nanovlm/model/attention.py)，`Attention` 与 `attend`：本课的注意力，外加 KV 缓存和 PyTorch 的融合算子。
# - [`nanovlm/model/language_model.py`](../../nanovlm/model/language_model.py)，`LanguageModel.hidden_states`：填充和打包时位置从哪里来，一个 token 的位置是它前面看得见的 token 数。
#
# 论文：Su 等，2021，*RoFormer*，[arXiv:2104.09864](https://arxiv.org/abs/2104.09864)；Ainslie 等，2023，*GQA*，[arXiv:2305.13245](https://arxiv.org/abs/2305.13245)；Chen 等，2023，*Extending Context Window of Large Language Models via Positional Interpolation*，[arXiv:2306.15595](https://arxiv.org/abs/2306.15595)。

# %% [markdown] tags=["en"]
# ## In the wild
#
# [NeuraLegion/shainet#111](https://github.com/NeuraLegion/shainet/pull/111): with real LLaMA weights one or two tokens were fine, then came garbage. The cause is section 5. The code paired neighbours, `(2i, 2i+1)`, and Hugging Face's LLaMA pairs halves. At position 0 there is no difference, and at small positions angles are small, so the beginning shows nothing.
#
# [huggingface/transformers#31859](https://github.com/huggingface/transformers/issues/31859): someone sees that the rotation in transformers is not that of Meta's own code, and asks how the result can be right. The answer: the conversion script has already reordered the weights of queries and keys, which is exercise 07.2. How would you notice wrong pairs? Compare the logits after the second token; those of the first alone show nothing.
#
# ## Look in the package
#
# - [`nanovlm/model/rotary.py`](../../nanovlm/model/rotary.py), `rotary_frequencies`, `rotate`, `llama3_frequencies` and `ntk_theta`: the last two are two ways beyond the trained length.
# - [`nanovlm/model/attention.py`](../../nanovlm/model/attention.py), `Attention` and `attend`: the attention of this lesson, with a KV cache and PyTorch's fused kernels.
# - [`nanovlm/model/language_model.py`](../../nanovlm/model/language_model.py), `LanguageModel.hidden_states`: where positions come from with padding and packing; a token's is the number of tokens before it that it can see.
#
# The papers: Su et al. 2021, *RoFormer*, [arXiv:2104.09864](https://arxiv.org/abs/2104.09864); Ainslie et al. 2023, *GQA*, [arXiv:2305.13245](https://arxiv.org/abs/2305.13245); Chen et al. 2023, *Extending Context Window of Large Language Models via Positional Interpolation*, [arXiv:2306.15595](https://arxiv.org/abs/2306.15595).
