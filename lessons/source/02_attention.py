# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["zh"]
# # 02 · 亲手写注意力
#
# 上一课的 64 个图块向量互不相识：每个只知道自己那 8×8 个像素。要认出五角星，几个图块得互相看一看。让它们互相看的运算就是注意力（attention），视觉编码器和语言模型用的是同一个。
#
# **进来的**：`(1, 65, 192)`，65 个 token、每个 192 维（64 个图块，前面再加一个第 03 课才讲的 class token）。**出去的**：形状相同，只是每个向量里混进了别的向量的内容。

# %% [markdown] tags=["en"]
# # 02 · Attention by hand
#
# The 64 patch vectors of lesson 01 know nothing of each other: each has seen its own 8×8 pixels. To recognise a star, several patches have to look at one another. The operation that lets them is attention, and the vision encoder and the language model use the same one.
#
# **In**: `(1, 65, 192)`, 65 tokens of 192 numbers (64 patches, and before them a class token that lesson 03 explains). **Out**: the same shape, where each vector has taken something from the others.

# %% tags=["setup"]
import sys

sys.path.insert(0, "../..")  # the repository: nanovlm and the drawing helpers

import math
from random import Random

import torch
import torch.nn.functional as F
from matplotlib.patches import Rectangle
from torch import nn

from lessons import draw
from lessons.check import check
from nanovlm import IMAGE, Message, generate, load_model, open_image, prepare, preprocess

ASSETS = "../../nanovlm/assets"
torch.manual_seed(0)
torch.set_grad_enabled(False)
draw.strip("patch vectors", "hidden states")

# %% [markdown] tags=["zh"]
# ## 先猜一猜
#
# 注意力给每个 token 发 65 个权重，和为 1，表示它看别的 token 各看多少。权重来自 48 维向量的内积，内积要先**除以 √48 ≈ 6.9**，再做 softmax。
#
# 假如向量都是随机数，又忘了除，一个 token 实际上大约看着几个 token？（全部均匀地看是 65 个，只盯一个是 1 个。）再猜一个：训练好的模型如果忘了除，16 张图里的物体还能说对百分之几？把两个数写下来。

# %% [markdown] tags=["en"]
# ## Predict
#
# Attention gives each token 65 weights that sum to 1: how much it looks at each of the others. They come from inner products of vectors with 48 numbers, which are **divided by √48 ≈ 6.9** before the softmax.
#
# Take vectors of random numbers. If the division is left out, how many tokens does a token look at, in effect? (65 if it looks at all alike, 1 if at a single one.) And a second guess: the shipped model names the objects in 16 images. What share does it still name when the division is left out? Write both numbers down.

# %% [markdown] tags=["zh"]
# ## 一、一个 token 怎样看别人
#
# 先从模型里截一份真实的输入：给每一层的注意力挂一个钩子（hook），把进来的和出去的都记下来。这里用第 2 层（从 0 数起）的；出去的那份留着最后对答案。

# %% [markdown] tags=["en"]
# ## 1. How one token looks at the others
#
# First a real input. A hook on the attention of each block keeps what goes in and what comes out. We take block 2, counted from 0: what comes out there is the answer that we have to reach.

# %%
model = load_model(f"{ASSETS}/tiny-vlm").float().eval()  # the file holds bfloat16
image = open_image(f"{ASSETS}/scene.png")
pixels = preprocess(image, model.config.image)[None]  # (1, 3, 64, 64), lesson 01
blocks, kept = model.vision_encoder.blocks, {}
for number, block in enumerate(blocks):
    block.attention.register_forward_hook(
        lambda module, given, result, number=number: kept.update({number: (given[0], result)})
    )
model.vision_encoder(pixels)
theirs = blocks[2].attention
hidden_states, expected = kept[2]  # (1, 65, 192) each
print("in:", tuple(hidden_states.shape), " out:", tuple(expected.shape))
print("heads:", theirs.num_heads, " numbers a head:", theirs.head_dim)

# %% [markdown] tags=["zh"]
# 每个 token 从自己的向量里做出三样东西，各是一次矩阵乘法：
#
# - **查询**（query）：我在找什么；
# - **键**（key）：我有什么可供别人找；
# - **值**（value）：别人找到我，能拿走什么。
#
# 查询和键的内积是**分数**（score），分数过一遍 softmax 就是**权重**。下面用最笨的循环，算第 21 号图块（蓝色五角星的中间）的结果。192 维里先只用第一个头（head）的 48 维，也就是矩阵的前 48 行。

# %% [markdown] tags=["en"]
# From its vector, each token makes three things, by one product with a matrix each:
#
# - the **query**: what I am looking for;
# - the **key**: what I offer to be found by;
# - the **value**: what is taken from me by whoever finds me.
#
# The inner product of a query and a key is a **score**, and the softmax of the scores gives the **weights**. Here is the plainest loop, for patch 21 in the middle of the blue star. Of the 192 numbers it uses only the 48 of the first head: the first 48 rows of each matrix.

# %%
D = theirs.head_dim
tokens = hidden_states[0]  # (T, C)
T, C = tokens.shape
STAR = 1 + 21  # the class token is token 0, so patch 21 is token 22


def project(linear, token):
    return linear.weight[:D] @ token + linear.bias[:D]  # (D,)


query = project(theirs.q_proj, tokens[STAR])
scores = []
for token in tokens:
    scores.append(query @ project(theirs.k_proj, token) / math.sqrt(D))
print("query:", tuple(query.shape), f" scores: from {min(scores):.1f} to {max(scores):.1f}")

# %%
total = sum(math.exp(score) for score in scores)
weights = [math.exp(score) / total for score in scores]
attended = torch.zeros(D)
for weight, token in zip(weights, tokens):
    attended += weight * project(theirs.v_proj, token)
print("sum of the weights:", round(sum(weights), 4), " result:", tuple(attended.shape))
best = sorted(range(T), key=lambda number: -weights[number])[:4]
print("looks most at patches", [number - 1 for number in best])


# %%
def mark(axis, patch, scale=8):
    """A frame around a patch of an image, or of a map of patches (scale 1)."""
    row, column = divmod(patch, 8)
    corner = column * scale - 0.5, row * scale - 0.5
    axis.add_patch(Rectangle(corner, scale, scale, fill=False, edgecolor=draw.WRONG, linewidth=2))


made, axes = draw.figure(3, height=2.9)
draw.picture(axes[0], image, "who looks: patch 21")
mark(axes[0], 21)
for axis, values, title in ((axes[1], scores, "scores"), (axes[2], weights, "weights (sum 1)")):
    shown = draw.heat(axis, torch.tensor(values[1:]).view(8, 8), f"{title} of 64 patches")
    axis.set_aspect("equal")
    mark(axis, 21, 1)
    made.colorbar(shown, ax=axis, shrink=0.7)
draw.show(made, "One row of attention: a query against all keys")

# %% [markdown] tags=["zh"]
# 分数有高有低，铺得很开；softmax 把差距放大，剩下的主要是分数最高的几个图块。
#
# ## 二、循环变成矩阵乘法
#
# 65 个查询叠成一个矩阵，65 个键叠成一个矩阵，所有内积就是一次矩阵乘法。对每个查询做一遍，结果是 65×65 的表：**行是谁在看，列是看谁**。

# %% [markdown] tags=["en"]
# The scores are spread out. The softmax enlarges their differences, and a few patches with the highest scores take most of the weight.
#
# ## 2. The loop becomes a product of matrices
#
# Stack 65 queries into a matrix and 65 keys into another: all inner products are one product. The result is a table of 65×65. **Its rows are who looks, its columns who is looked at.**

# %%
queries = tokens @ theirs.q_proj.weight[:D].T + theirs.q_proj.bias[:D]  # (T, D)
keys = tokens @ theirs.k_proj.weight[:D].T + theirs.k_proj.bias[:D]  # (T, D)
values = tokens @ theirs.v_proj.weight[:D].T + theirs.v_proj.bias[:D]  # (T, D)
scores = queries @ keys.T / math.sqrt(D)  # (T, T)
table = scores.softmax(dim=-1)  # (T, T)
one_head = table @ values  # (T, D)
print("weights:", tuple(table.shape), " result:", tuple(one_head.shape))
torch.testing.assert_close(one_head[STAR], attended, rtol=1e-4, atol=1e-5)
print("row", STAR, "= the loop")

# %%
made, axes = draw.figure(2, height=3.7)
for axis, values, title in zip(axes, (scores, table.clamp(max=0.4)), ("scores", "weights")):
    shown = draw.heat(axis, values, f"{title} (65×65)")
    axis.set(xlabel="looked at", ylabel="who looks", aspect="equal")
    axis.add_patch(Rectangle((-0.5, STAR - 0.5), T, 1, fill=False, edgecolor=draw.WRONG))
    made.colorbar(shown, ax=axis, shrink=0.8)
draw.show(made, "All of attention in one table; framed, the row of patch 21")

# %% [markdown] tags=["zh"]
# 深色的斜线，是每个 token 都在看与自己相隔固定距离的位置：主对角线是自己，往左平移 8 格是正上方的图块。一小段深色的竖条，则是好几个 token 都在看的同一个图块。右表每一行加起来都是 1；大于 0.4 的权重画成 0.4，免得几个最大的盖过其余。写成公式，Q、K、V 就是代码里的 `queries`、`keys`、`values`：
#
# > **softmax(Q Kᵀ / √D) · V**
#
# ## 三、四个头
#
# 一张权重表只能表达一种「看法」。所以把 192 维分成 4 份，每份 48 维，各自做一遍上面的运算，这就是多头（multi-head）。4 个头的结果接起来又是 192 维，最后乘一个输出矩阵，把各头的发现混到一起。
#
# 代码里头是一个维度：`(1, T, 192)` 先拆成 `(1, T, 4, 48)`，再把头挪到前面。

# %% [markdown] tags=["en"]
# A dark diagonal means that every token looks at a fixed distance: the main diagonal is the token itself, and 8 columns to the left lies the patch above. A short dark vertical stroke is one patch that several look at. Each row of the right table sums to 1; weights above 0.4 are drawn as 0.4, or the few largest would hide the rest. As a formula, where Q, K and V are `queries`, `keys` and `values`:
#
# > **softmax(Q Kᵀ / √D) · V**
#
# ## 3. Four heads
#
# One table of weights can express one way of looking. So the 192 numbers are cut into 4 parts of 48, and each part does the above by itself: these are the heads. Their four results, put side by side, are 192 numbers again, and a last matrix mixes what the heads have found.
#
# In code, heads are a dimension: `(1, T, 192)` is split into `(1, T, 4, 48)`, and the heads are moved to the front.


# %%
class MyAttention(nn.Module):
    def __init__(self, theirs, scale):
        super().__init__()
        self.theirs, self.scale = theirs, scale  # `theirs` has the four matrices

    def split(self, projected):  # (B, T, C) → (B, H, T, D)
        return projected.unflatten(-1, (-1, D)).transpose(1, 2)

    def join(self, attended):  # (B, H, T, D) → (B, T, C)
        return attended.transpose(1, 2).flatten(2)

    def weights(self, hidden_states):  # (B, H, T, T)
        queries, keys = self.theirs.q_proj(hidden_states), self.theirs.k_proj(hidden_states)
        return (self.split(queries) @ self.split(keys).mT * self.scale).softmax(dim=-1)

    def forward(self, hidden_states):
        values = self.split(self.theirs.v_proj(hidden_states))
        return self.theirs.out_proj(self.join(self.weights(hidden_states) @ values))


# %%
mine = MyAttention(theirs, D**-0.5)
weights = mine.weights(hidden_states)
print("weights of all heads:", tuple(weights.shape), " result:", tuple(mine(hidden_states).shape))
torch.testing.assert_close(weights[0, 0], table, rtol=1e-4, atol=1e-6)

# %%
made, axes = draw.figure(5, height=2.3)
draw.picture(axes[0], image, "patch 21 looks")
mark(axes[0], 21)
for head in range(4):
    draw.heat(axes[head + 1], weights[0, head, STAR, 1:].view(8, 8), f"head {head}")
    axes[head + 1].set_aspect("equal")
    mark(axes[head + 1], 21, 1)
draw.show(made, "Four heads look to different places")

# %% [markdown] tags=["zh"]
# 比一比四张图：深色的格子在红框的哪一边？0 号头看自己和上面，1 号头看左右，2 号头看右边和右下，3 号头看下面。同一个图块，四个头看的地方不同，轮廓就是这样一点一点拼出来的。
#
# ## 四、故意弄坏
#
# 三个改动：合并头时不转置；softmax 弄错维度；所有分数乘以 0。先看结果，再解释。每次都换掉视觉编码器全部 4 层的注意力，然后让整个模型描述图片。

# %% [markdown] tags=["en"]
# Compare the four maps: on which side of the frame are the dark squares? Head 0 looks at the patch itself and up, head 1 to the left and right, head 2 to the right and lower right, head 3 down. One patch, and four heads that look at different places. This is how an outline is put together from pieces.
#
# ## 4. Broken on purpose
#
# Three changes: join the heads without the transpose, take the softmax over the wrong dimension, multiply all scores by 0. First what they do, then why. Each time, the attention of all 4 blocks of the vision encoder is replaced, and the whole model describes the image.


# %%
class NoTranspose(MyAttention):
    def join(self, attended):
        return attended.reshape(len(attended), -1, C)  # the shape is right


class OverQueries(MyAttention):
    def weights(self, hidden_states):
        queries, keys = self.theirs.q_proj(hidden_states), self.theirs.k_proj(hidden_states)
        return (self.split(queries) @ self.split(keys).mT * self.scale).softmax(dim=-2)


# %%
originals = [block.attention for block in blocks]


def answers(images, kind=MyAttention, scale=D**-0.5):
    """What the whole model says of images when its vision encoder attends in another way."""
    for block, original in zip(blocks, originals):
        block.attention = kind(original, scale)
    questions = [[Message("user", [IMAGE, "描述图片"])] for _ in images]
    batch = prepare(model, questions, [[one] for one in images], add_generation_prompt=True)
    said = [model.tokenizer.decode(ids) for ids in generate(model, batch, 70)]
    for block, original in zip(blocks, originals):
        block.attention = original
    return said


# %%
print("by hand:               ", *answers([image]))
print("join without transpose:", *answers([image], NoTranspose))
print("softmax over queries:  ", *answers([image], OverQueries))
print("all weights alike:     ", *answers([image], scale=0.0))
for kind in (NoTranspose, OverQueries):
    result = kind(theirs, D**-0.5)(hidden_states)
    off = (result - expected).abs().max()
    print(f"{kind.__name__}: shape {tuple(result.shape)}, off by {off:.1f}")

# %% [markdown] tags=["zh"]
# 没有一个报错，形状也都对。
#
# - **合并头时忘了 `transpose`**：内存里先放完 0 号头的 65 个 token，才轮到 1 号头。直接 `reshape`，一个 token 拿到的是同一个头里四个相邻 token 的结果。
# - **softmax 的维度错了**：`dim=-2` 让每一**列**的和为 1。一个 token 看到的权重之和可以远大于 1，也可以接近 0。
# - **权重全都一样**：每个 token 拿到的都是全图的平均，谁也看不见形状。
#
# 检查的办法：打印 `weights.sum(-1)`，应当处处是 1；再和一个可信的实现比较，例如下一节。
#
# ## 五、与库代码核对
#
# `expected` 是第一节里从模型自己的注意力截下来的。库代码调用 PyTorch 的融合算子 `F.scaled_dot_product_attention`，几步并成一步，从不保存整张 65×65 的表，求和顺序也不同，所以容差取 1e-4：输出大约是 1 的量级，`float32` 有 7 位有效数字，几百次乘加会用掉其中两三位。

# %% [markdown] tags=["en"]
# Nothing raised an error, and all shapes were right.
#
# - **Joining heads without `transpose`**: memory holds all 65 tokens of head 0 before head 1 begins. A bare `reshape` hands one token the results of four neighbouring tokens of a single head.
# - **Softmax over the wrong dimension**: with `dim=-2` each **column** sums to 1. The weights that one token looks with may sum to far more than 1, or to almost 0.
# - **All weights alike**: every token gets the mean of the whole image, and nobody can see a shape.
#
# To notice it, print `weights.sum(-1)`, which has to be 1 everywhere, and compare with an implementation that you trust, as the next section does.
#
# ## 5. Proven equal
#
# `expected` came from the model's own attention in section 1. The package calls a fused kernel of PyTorch, `F.scaled_dot_product_attention`, which never keeps the whole table of 65×65 and adds up in another order. So the tolerance is 1e-4: the outputs are of size 1, `float32` has 7 digits, and a few hundred products and sums use up two or three of them.

# %%
torch.testing.assert_close(mine(hidden_states), expected, rtol=1e-4, atol=1e-4)
difference = (mine(hidden_states) - expected).abs().max()
print(f"equal to the package's Attention (largest difference {difference:.1e})")

# %% [markdown] tags=["zh"]
# ## 六、分组查询
#
# 语言模型里有一处不同：查询有 4 个头，键和值只有 2 个头，**两个相邻的查询头共用一个键头和一个值头**。这叫分组查询注意力（grouped-query attention, GQA）。生成文字时，前面所有 token 的键和值都要存着（KV 缓存，第 10 课），头数减半，存的东西也就减半。
#
# 做法是把每个键头原地重复两次：0, 0, 1, 1。`repeat_interleave` 正是这样，而 `repeat` 给出的是 0, 1, 0, 1。

# %% [markdown] tags=["en"]
# ## 6. Grouped queries
#
# The language model does one thing differently: it has 4 heads of queries and only 2 of keys and values. **Two neighbouring query heads share a key head and a value head.** This is grouped-query attention. While text is generated, the keys and values of all earlier tokens are kept (the KV cache, lesson 10), so half the heads means half the memory.
#
# Each key head is repeated in place: 0, 0, 1, 1. That is `repeat_interleave`; `repeat` would give 0, 1, 0, 1.

# %%
grouped = model.language_model.blocks[0].attention
ids = torch.tensor([model.tokenizer.encode("图中有三个物体，从左到右是：大的红色圆环")])
words = model.language_model.blocks[0].attention_norm(model.language_model.embed_tokens(ids))


def grouped_attention(words, repeat):
    queries = grouped.q_norm(grouped.q_proj(words).unflatten(-1, (-1, D)).transpose(1, 2))
    keys = grouped.k_norm(grouped.k_proj(words).unflatten(-1, (-1, D)).transpose(1, 2))
    values = grouped.v_proj(words).unflatten(-1, (-1, D)).transpose(1, 2)
    keys, values = repeat(keys), repeat(values)  # (B, 2, T, D) → (B, 4, T, D)
    weights = (queries @ keys.mT / math.sqrt(D)).softmax(dim=-1)
    return grouped.out_proj((weights @ values).transpose(1, 2).flatten(2))


right = grouped_attention(words, lambda heads: heads.repeat_interleave(2, dim=1))
wrong = grouped_attention(words, lambda heads: heads.repeat(1, 2, 1, 1))
torch.testing.assert_close(right, grouped(words), rtol=1e-4, atol=1e-4)
print("words:", tuple(words.shape), "→", tuple(right.shape), " equal to the package")
print(f"with repeat instead: off by {(wrong - right).abs().max():.2f}")

# %%
made, axis = draw.figure(1, height=2.2)
for row, (owners, part, name) in enumerate(
    (((0, 1, 2, 3), "language", "query head"), ((0, 0, 1, 1), "projector", "repeat_interleave"),
     ((0, 1, 0, 1), "wrong", "repeat (wrong)"))
):  # fmt: skip
    axis.text(-0.15, -row, name, ha="right", va="center")
    for column, owner in enumerate(owners):
        box = Rectangle((column + 0.05, -row - 0.35), 0.9, 0.7, facecolor=draw.PALE[part],
                        edgecolor=draw.STRONG[part])  # fmt: skip
        axis.add_patch(box)
        label = f"query {owner}" if row == 0 else f"key {owner}"
        axis.text(column + 0.5, -row, label, ha="center", va="center")
axis.set(xlim=(-2, 4.2), ylim=(-2.5, 0.5))
axis.axis("off")
draw.show(made, "Four query heads, two key heads: who shares with whom")

# %% [markdown] tags=["zh"]
# 语言模型的注意力还有两样东西，这里原样调用、没有解释：`q_norm` 和 `k_norm`（第 06 课的 RMSNorm，每个头各做一次），以及真正生成时的因果掩码和旋转位置编码（第 06、07 课）。
#
# ## 七、为什么除以 √D
#
# 回到开头的问题。取随机的查询和键，每个数的方差为 1，看权重散得多开。「实际看着几个」用熵（entropy）H = −Σ w ln w 来量：e 的 H 次方在均匀分布时等于 65，在只看一个时等于 1。

# %% [markdown] tags=["en"]
# The language model's attention has two more things, which are called here without a word: `q_norm` and `k_norm` (RMSNorm of lesson 06, once for each head), and, in real use, the causal mask and rotary positions (lessons 06 and 07).
#
# ## 7. Why √D
#
# Back to the question at the top. Take random queries and keys whose numbers have variance 1, and see how far the weights spread. "How many, in effect" is measured by the entropy H = −Σ w ln w: e to the power of H is 65 when all weights are alike and 1 when a single token has them all.


# %%
def effective(weights):
    """e^entropy of each row: how many tokens are looked at. (…, T) → (…)."""
    return torch.special.entr(weights).sum(dim=-1).exp()  # entr(w) = -w ln w


counts = effective(mine.weights(hidden_states)[0]).mean(dim=-1)  # (H,)
print("the heads above:", [round(count, 1) for count in counts.tolist()])

# %%
WIDTHS, looked = (4, 16, 48, 128, 512), {"divided by √D": [], "not divided": []}
for width in WIDTHS:
    random = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, 5, 65, width, generator=random)  # 5 draws of 65 tokens
    scores = queries @ keys.mT  # (5, 65, 65)
    print(f"D = {width:3}: std of the scores {scores.std():4.1f}, √D {width**0.5:4.1f}", end="")
    for name, scale in (("divided by √D", width**-0.5), ("not divided", 1.0)):
        counts = effective((scores * scale).softmax(-1)).mean(-1)  # (5,), one for each draw
        looked[name].append(counts.mean().item())
        print(f" | {name}: {counts.min():4.1f} to {counts.max():4.1f} tokens", end="")
    print()

# %% [markdown] tags=["zh"]
# 上面那四个头，平均看着 8 到 14 个 token。随机的查询和键又怎样？先看分数的标准差：它跟着 √D 走。原因是 D 个独立的、方差为 1 的乘积相加，方差就是 D。除以 √D，分数的标准差回到 1，与 D 无关。
#
# 那又怎样？一开始就只盯着一个随便的 token，会学得慢。下面是一个小任务：查询是 16 个向量之一加上噪声，注意力要找出是哪一个。查询矩阵和键矩阵从随机开始训练 100 步，5 个种子。

# %% [markdown] tags=["en"]
# The four heads above look at 8 to 14 tokens on average. And random queries and keys? The standard deviation of the scores follows √D, because a sum of D independent products of variance 1 has variance D. Divided by √D, the scores have spread 1 whatever D is.
#
# Why does that matter? Whoever starts by staring at one arbitrary token learns slowly. A small task: the query is one of 16 vectors with noise added, and attention has to find which. The query and key matrices start at random and are trained for 100 steps, with 5 seeds.


# %%
@torch.enable_grad()
def learn(scale, seed, width=48, steps=100):  # the weight on the right one of 16, at each step
    torch.manual_seed(seed)
    q_matrix, k_matrix = (nn.Parameter(torch.randn(64, width) / 8) for _ in range(2))
    optimizer, found = torch.optim.AdamW([q_matrix, k_matrix], lr=3e-3), []
    for _ in range(steps):
        inputs = torch.randn(64, 16, 64)  # in each of 64 examples, number 0 is the right one
        asked = inputs[:, 0] + torch.randn(64, 64)  # with noise
        scores = (inputs @ k_matrix @ (asked @ q_matrix)[..., None]).squeeze(-1) * scale
        weight = scores.softmax(dim=-1)[:, 0].mean()
        optimizer.zero_grad()
        (1 - weight).backward()
        optimizer.step()
        found.append(weight.item())
    return found


# %%
learned = {}
for name, scale in (("divided by √D", 48**-0.5), ("not divided", 1.0)):
    runs = torch.tensor([learn(scale, seed) for seed in range(5)])  # (seeds, steps)
    learned[name] = runs.mean(dim=0)
    early = runs[:, 18:23].mean(dim=1)
    print(f"{name}: around step 20 {early.min():.2f} to {early.max():.2f} over 5 seeds, "
          f"at the end {runs[:, 95:].mean():.2f}")  # fmt: skip

# %%
made, axes = draw.figure(2, height=3.2)
parts = ["right", "wrong"]
draw.curves(axes[0], looked, "random queries and keys", "D", "tokens looked at", WIDTHS, parts)
axes[0].set_xscale("log", base=2)
axes[0].set_ylim(0, 65)
draw.curves(axes[1], learned, "learning to find one of 16", "step", "weight on the right one",
            parts=parts)  # fmt: skip
draw.show(made, "Undivided, attention starts out staring, and learns later")

# %% [markdown] tags=["zh"]
# 原因在 softmax 的导数里：权重 w 对自己的分数求导是 w(1 − w)，对别人的分数求导是 −w·w′（w′ 是别人的权重）。一个权重是 1、其余是 0 时，这些导数全是 0，梯度就传不回来。第 20 步前后，不除的只给对的那个 0.16 到 0.23 的权重，除了的给 0.30 到 0.34。它终究还是会学会（最后是 0.89 对 0.94），只是晚一些。
#
# ## 八、训练好的模型呢
#
# 训练好的权重已经不是随机的了。我们对 16 张新图各问一次「描述图片」，数答案里说对了多少个物体（颜色和形状都要对），把分数乘上不同的系数。

# %% [markdown] tags=["en"]
# The reason is the derivative of the softmax: that of a weight w by its own score is w(1 − w), by another's score −w·w′, where w′ is the other's weight. Where one weight is 1 and the others 0, all of these are 0, and no gradient comes back. Around step 20 the undivided one has 0.16 to 0.23 on the right vector, the divided one 0.30 to 0.34. It does learn in the end (0.89 against 0.94), but later.
#
# ## 8. And the trained model?
#
# Trained weights are no longer random. Ask for a description of 16 new images, count the objects that are named with the right colour and shape, and multiply the scores by other factors.

# %%
from data_tools.scenes_world import COLOURS, SHAPES, random_scene
from data_tools.scenes_world import draw as draw_scene

scenes = [random_scene(Random(seed)) for seed in range(16)]
drawn = [draw_scene(scene) for scene in scenes]
things = [[COLOURS[one.colour] + SHAPES[one.shape] for one in scene.objects] for scene in scenes]
factors = {"0": 0.0, "1/D": 1 / D, "1/√C": C**-0.5, "1/√D\n(trained)": D**-0.5}
factors["1\n(undivided)"] = 1.0
share, sharp = {}, {}
for name, scale in factors.items():
    said = answers(drawn, scale=scale)
    hits = [thing in text for text, named in zip(said, things) for thing in named]
    share[name] = 100 * sum(hits) / len(hits)
    weights = torch.stack([MyAttention(originals[n], scale).weights(kept[n][0]) for n in range(4)])
    sharp[name] = effective(weights).mean().item()

# %%
made, axes = draw.figure(2, height=3.3)
colours = ["wrong", "wrong", "vision", "right", "vision"]
draw.bars(axes[0], sharp, "tokens looked at (mean of all heads)", "tokens of 65", colours, ".1f")
draw.bars(axes[1], share, "objects named correctly", "% of all objects", colours)
for axis in axes:
    axis.tick_params(axis="x", labelsize=8)
draw.show(made, "A trained model stands sharper weights better than flatter ones")

# %% [markdown] tags=["zh"]
# 第一个问题的答案在第七节的输出里：D = 48 时，除以 √D，一个 token 大约看着 40 个；忘了除，只看着 2 到 3 个。
#
# 第二个问题的答案多半出乎意料：不除，物体照样说对 100%，**训练好的模型照样看得见**，虽然一个 token 平均只看 2.7 个，不再是 18.9 个。本来分数高的图块还是分数最高，权重更尖而已。反过来，权重一抹平（左边两根柱，只说对 31% 和 38%），位置和形状的信息就被平均掉了。所以 √D 首先是为**训练**准备的，并不是「少了它就算错」。但不要由此得出「用哪个都行」：模型是按 1/√D 训练的，读别人的权重时，只有这一个系数是对的。
#
# ## 练习

# %% [markdown] tags=["en"]
# The answer to the first question is printed in section 7: with D = 48, about forty tokens with the division, two or three without.
#
# The second answer may surprise you: **without the division, the trained model still sees**, 100% of the objects, although each token looks at 2.7 others instead of 18.9. The patches that had the highest scores still have them; the weights are only sharper. Flat weights average place and shape away: the two bars on the left name 31% and 38%. So √D is there for **training** first of all; leaving it out does not make everything wrong at once. Do not conclude that any factor will do: the model was trained with 1/√D, and with someone else's weights only that factor gives their results.
#
# ## Exercises

# %% [markdown] tags=["zh"]
# **02.1 补一行。** 语言模型里，一个 token 只许看自己和前面的 token。给 `scores` 里不许看的位置填上 −∞（提示：`torch.triu` 与 `masked_fill`）。

# %% [markdown] tags=["en"]
# **02.1 Fill in a line.** In a language model a token may look only at itself and earlier tokens. Put −∞ into `scores` wherever a token may not look (hint: `torch.triu` and `masked_fill`).

# %% tags=["exercise"]
queries, keys, values = torch.randn(3, 1, 4, 6, D, generator=torch.Generator().manual_seed(2))
scores = queries @ keys.mT / math.sqrt(D)  # (1, 4, 6, 6)
masked = ...
causal = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
check("02.1", ... if masked is ... else masked.softmax(-1) @ values, causal)

# %% [markdown] tags=["zh"]
# **02.2 换一种写法。** 不复制键和值，也能做分组查询：把 4 个查询头拆成 `(1, 2, 2, T, D)`，让键和值在新维度上广播。写出 `shared`，形状为 `(1, 4, 6, D)`。

# %% [markdown] tags=["en"]
# **02.2 Change a behaviour.** Grouped queries need no copies: view the 4 query heads as `(1, 2, 2, T, D)` and let keys and values broadcast over the new dimension. Compute `shared`, of shape `(1, 4, 6, D)`.

# %% tags=["exercise"]
few_keys, few_values = keys[:, :2], values[:, :2]  # (1, 2, 6, D)
shared = ...
copied = [heads.repeat_interleave(2, dim=1) for heads in (few_keys, few_values)]
check("02.2", shared, F.scaled_dot_product_attention(queries, *copied))

# %% [markdown] tags=["zh"]
# **02.3 找错。** 下面的函数能运行，形状也对，结果却和库里的不同。错在一个字符。

# %% [markdown] tags=["en"]
# **02.3 Find the bug.** This function runs and its shape is right, yet its result is not the package's. One character is wrong.


# %% tags=["exercise"]
def attend(queries, keys, values):  # (B, H, T, D) each
    scale = queries.shape[1] ** -0.5
    weights = (queries @ keys.mT * scale).softmax(dim=-1)
    return weights @ values


check("02.3", attend(queries, keys, values), F.scaled_dot_product_attention(queries, keys, values))

# %% [markdown] tags=["zh"]
# ## 别人在这里摔过跤
#
# [lucidrains/vit-pytorch#65](https://github.com/lucidrains/vit-pytorch/issues/65)：代码里的系数是 `dim ** -0.5`，用了整个模型的宽度；提问的人指出应该是每个头的宽度 `dim_head ** -0.5`。作者当天就改了，还说自己写了将近一年注意力，仍会犯新手的错误。[karpathy/ng-video-lecture#6](https://github.com/karpathy/ng-video-lecture/pull/6) 修的是同一个地方。
#
# 这种错为什么能藏那么久？上面的柱状图说明了：`1/√C` 把权重从 18.9 个 token 抹平到 32.3 个，在这里一个物体也没少说对；从零训练的模型更能适应它。怎么发现：载入别人的权重，逐层比较输出，就像第五节那样。
#
# ## 到库里看看
#
# - [`nanovlm/model/attention.py`](../../nanovlm/model/attention.py)，`Attention` 与 `attend`：本课的全部内容，再加上掩码、KV 缓存，以及何时用融合算子、何时把公式写开。
# - [`nanovlm/model/attention.py`](../../nanovlm/model/attention.py)，`causal_mask`：一行里有填充、分支和多个样本时，谁能看谁。
#
# 论文：Vaswani 等，2017，*Attention Is All You Need*，[arXiv:1706.03762](https://arxiv.org/abs/1706.03762)；Ainslie 等，2023，*GQA*，[arXiv:2305.13245](https://arxiv.org/abs/2305.13245)。

# %% [markdown] tags=["en"]
# ## In the wild
#
# [lucidrains/vit-pytorch#65](https://github.com/lucidrains/vit-pytorch/issues/65): the factor in the code was `dim ** -0.5`, from the width of the whole model. The report says that it should be `dim_head ** -0.5`, from the width of a head. The author mended it the same day and wrote that after nearly a year of coding attention he still made rookie mistakes. [karpathy/ng-video-lecture#6](https://github.com/karpathy/ng-video-lecture/pull/6) mends the same line.
#
# How can it stay hidden? The bars above tell: `1/√C` flattens the weights from 18.9 tokens to 32.3 and costs nothing here, and a model trained from zero adapts to that. How would you notice? Load somebody's weights and compare outputs layer by layer, as section 5 does.
#
# ## Look in the package
#
# - [`nanovlm/model/attention.py`](../../nanovlm/model/attention.py), `Attention` and `attend`: all of this lesson, with masks, the KV cache, and when the fused kernel or the written-out formula is faster.
# - [`nanovlm/model/attention.py`](../../nanovlm/model/attention.py), `causal_mask`: who may look at whom when a row holds padding, branches or several samples.
#
# The papers: Vaswani et al. 2017, *Attention Is All You Need*, [arXiv:1706.03762](https://arxiv.org/abs/1706.03762); Ainslie et al. 2023, *GQA*, [arXiv:2305.13245](https://arxiv.org/abs/2305.13245).
