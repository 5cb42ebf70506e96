# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["zh"]
# # 08 · 投影层：从图块向量到视觉 token
#
# 视觉编码器说的是一种「语言」，语言模型读的是另一种。把两者接起来的小网络叫投影层（projector）。它还决定一件花钱的事：一张图在语言模型里占几个位置。
#
# **进来的**：视觉编码器的图块向量，形状 `(1, 64, 192)`，`float32`。**出去的**：视觉 token（visual token），形状 `(1, K, 192)`。本模型的 K 是 64，这一课会把它变成 16、4 和 1。
#
# 左右两个 192 相等只是巧合：前一个是视觉编码器的宽度，后一个是语言模型的宽度。换成 DINOv2 和 Qwen2.5-0.5B，就是 768 和 896。

# %% [markdown] tags=["en"]
# # 08 · Projectors: from patch vectors to visual tokens
#
# The vision encoder writes one kind of vector, and the language model reads another. A small network joins them: the projector. It also decides something that costs money, namely how many places an image takes in the language model's sequence.
#
# **In**: the vision encoder's patch vectors, shape `(1, 64, 192)`, `float32`. **Out**: visual tokens, shape `(1, K, 192)`. In the shipped model K is 64; this lesson makes it 16, 4 and 1.
#
# That both widths are 192 is a coincidence: the first belongs to the vision encoder, the second to the language model. With DINOv2 and Qwen2.5-0.5B they are 768 and 896.

# %% tags=["setup"]
import sys

sys.path.insert(0, "../..")  # the repository: nanovlm and the drawing helpers

from random import Random

import torch
import torch.nn.functional as F

from data_tools.scenes_world import draw as draw_scene
from data_tools.scenes_world import TRAIN_PAIRS, random_scene
from lessons import draw
from lessons.check import check
from nanovlm import IMAGE, Message, ProjectorConfig, generate
from nanovlm import load_model, open_image, prepare, preprocess
from nanovlm.model.projector import build_projector

ASSETS = "../../nanovlm/assets"
torch.manual_seed(0)
torch.set_grad_enabled(False)
draw.strip("patch vectors", "visual tokens")

# %% [markdown] tags=["zh"]
# ## 先猜一猜
#
# 把 64 个图块向量按方块取平均，变成 16 个、4 个，最后只剩 1 个。每种情况都训练一个最简单的读出器（一个矩阵），让它从这些向量里读出图中有哪些物体，颜色和形状都要对。
#
# 在没见过的图上，64 个向量时它能读对百分之几的物体？只剩 1 个向量时呢？写下这两个数。

# %% [markdown] tags=["en"]
# ## Predict
#
# Average the 64 patch vectors over squares until 16, then 4, then 1 are left. For each, fit the plainest reader there is, one matrix, that reads off which objects the image shows, colour and shape.
#
# On images it has not seen, what share of the objects does it get right from 64 vectors? And from a single one? Write both numbers down.

# %% [markdown] tags=["zh"]
# ## 一、最小的投影层：一个矩阵
#
# 这一种投影层对每个图块做同样的事，图块之间互不影响。先用循环写：取一个图块向量，每个输出数都是它与矩阵一行的内积，再加偏置。

# %% [markdown] tags=["en"]
# ## 1. The smallest projector: one matrix
#
# A projector of this kind does the same to every patch, and no patch affects another. First as a loop: take one patch vector; each output number is its inner product with one row of a matrix, plus a bias.

# %%
model = load_model(f"{ASSETS}/tiny-vlm").float().eval()  # the file holds bfloat16
image = open_image(f"{ASSETS}/scene.png")
pixels = preprocess(image, model.config.image)[None]  # (1, 3, 64, 64), lesson 01
patches = model.vision_features(pixels)  # (1, P, C_vision), lesson 03
print("patches:", tuple(patches.shape), patches.dtype, " first numbers:", patches[0, 0, :3])

linear = build_projector(ProjectorConfig(kind="linear"), 192, 192)  # random weights
weight, bias = linear.linear.weight, linear.linear.bias
token = [sum(weight[row] * patches[0, 0]) + bias[row] for row in range(192)]
tokens = patches @ weight.T + bias  # all patches at once
torch.testing.assert_close(torch.stack(token), tokens[0, 0], rtol=1e-4, atol=1e-5)
torch.testing.assert_close(tokens, linear(patches), rtol=1e-4, atol=1e-5)
print("tokens: ", tuple(tokens.shape), " loop = matrix = LinearProjector")

# %% [markdown] tags=["zh"]
# LLaVA 的第一版就是这样：整座桥只有一个矩阵。容差取 1e-5，因为求和顺序不同，`float32` 的最后几位会有差别。
#
# ## 二、两个矩阵，中间一个激活函数
#
# LLaVA-1.5 换成了两个矩阵，中间夹一个 GELU。nanovlm 自带的模型用的就是它，所以这里可以用**训练好的**权重核对。

# %% [markdown] tags=["en"]
# The first LLaVA did just this: the whole bridge was one matrix. The tolerance is 1e-5, because another order of summing changes the last digits of `float32`.
#
# ## 2. Two matrices with an activation between
#
# LLaVA-1.5 took two matrices with a GELU between them. The model that ships with nanovlm has such a projector, so here the **trained** weights can be compared.

# %%
trained = model.projector
up, down = trained.up, trained.down


def mlp(patches, activation=F.gelu):
    return activation(patches @ up.weight.T + up.bias) @ down.weight.T + down.bias


visual_tokens = mlp(patches)  # (1, K, C_text)
torch.testing.assert_close(visual_tokens, trained(patches), rtol=1e-4, atol=1e-4)
words = model.language_model.embed_tokens.weight  # (V, C_text)
print("visual tokens:", tuple(visual_tokens.shape), " equal to the shipped projector's")
vectors = {"patches": patches[0], "visual tokens": visual_tokens[0], "words": words}
for name, rows in vectors.items():
    print(f"mean length of {name:14} {rows.norm(dim=-1).mean():6.2f}")


# %%
def as_colours(vectors):  # (64, C) → (8, 8, 3): the three main directions as red, green, blue
    centred = vectors - vectors.mean(dim=0)
    main = centred @ torch.linalg.svd(centred, full_matrices=False)[2][:3].T
    low, high = main.amin(dim=0), main.amax(dim=0)
    return ((main - low) / (high - low)).view(8, 8, 3)


made, axes = draw.figure(3, height=2.9)
draw.picture(axes[0], image, "the image")
draw.picture(axes[1], as_colours(patches[0]), "64 patch vectors")
draw.picture(axes[2], as_colours(visual_tokens[0]), "64 visual tokens")
draw.show(made, "A token for each patch: like colours are like vectors")

# %% [markdown] tags=["zh"]
# 中间和右边两张图各自把 192 维压成三种颜色（做法见第 03 课），所以两张图之间的颜色不能互相比较，只能在同一张图里看谁和谁相近。物体所在的地方与背景颜色不同，位置没有动：第 n 个视觉 token 仍然来自第 n 个图块。
#
# 再看上面打印的三个长度。视觉 token 虽然和词嵌入排在同一个序列里，却并不像任何一个词：它们有词的 18 倍长。语言模型受得了，因为每一层的第一步都是 RMSNorm（第 06 课），只看方向，不看长度。
#
# 激活函数能不能省？没有它，两个矩阵相乘还是一个矩阵：
#
# > W₂(W₁x + b₁) + b₂ = (W₂W₁)x + (W₂b₁ + b₂)
#
# 我们在训练好的模型里把它拿掉，看看答案。

# %% [markdown] tags=["en"]
# The two maps squeeze 192 numbers into three colours each (lesson 03 says how), so colours can be compared within a map, not between the two. Where an object lies, the colours differ from the background's, and nothing has moved: visual token n still comes from patch n.
#
# Look at the three lengths printed above. Visual tokens stand in one sequence with the words, but they are not like any word: they are 18 times as long. The language model can bear it, because every block begins with an RMSNorm (lesson 06), which looks at the direction and not at the length.
#
# Could the activation be left out? Without it, two matrices are one. Check that, and look at the answer of the trained model without it.


# %%
def describe(visual_tokens):
    question = [Message("user", [IMAGE, "描述图片"])]
    batch = prepare(model, [question], [[image]], add_generation_prompt=True)
    kept, model.projector = model.projector, torch.nn.Identity()
    batch.pixels, batch.patches = None, visual_tokens  # in place of what the encoder gives
    answer = model.tokenizer.decode(generate(model, batch, 60)[0])
    model.projector = kept
    return answer


without = mlp(patches, activation=lambda values: values)
one_matrix = patches @ (down.weight @ up.weight).T + down.weight @ up.bias + down.bias
torch.testing.assert_close(without, one_matrix, rtol=1e-3, atol=1e-3)
print("with GELU:   ", describe(visual_tokens))
print("without GELU:", describe(without))

# %% [markdown] tags=["zh"]
# 拿掉 GELU，橙色三角形不见了，三个物体只剩两个。一个矩阵也能当投影层（第一节），但这两个矩阵是连同 GELU 一起训练出来的，拿掉它就不再是学到的那个函数。
#
# ## 三、像素重排：四个并成一个
#
# 语言模型里每个视觉 token 都和一个字一样要算注意力、占缓存。LLaVA-1.5 一张图 576 个 token，问题常常不到 20 个。于是人们想办法减少 token。
#
# 第一个办法叫**像素重排**（pixel shuffle）：每 2×2 个相邻的图块，首尾相接成一个长向量，再用一个矩阵投影。64 个变成 16 个，一个数也没有丢，只是挪进了更长的向量里。先用循环：

# %% [markdown] tags=["en"]
# Without the GELU the orange triangle is gone: two objects instead of three. As a formula, where `up` and `down` stand for the two weights, a and b for their biases, and x for a patch vector:
#
# > down (up x + a) + b = (down up) x + (down a + b)
#
# One matrix can be a projector too (section 1), but these two were trained with the GELU between them, and without it they are no longer the function that was learned.
#
# ## 3. Pixel shuffle: four become one
#
# In the language model a visual token costs as much as a word: attention, and room in the cache. An image takes 576 tokens in LLaVA-1.5, where a question often takes fewer than 20. So people look for fewer.
#
# The first way is **pixel shuffle**: each square of 2×2 patches is laid end to end as one long vector, and a matrix projects it. 64 become 16. No number is lost; they move into longer vectors. First as a loop:


# %%
def shuffle_loop(patches, scale):
    side = int(patches.shape[1] ** 0.5)
    grid, merged = patches.unflatten(1, (side, side)), []  # (1, side, side, C)
    for row in range(0, side, scale):
        for column in range(0, side, scale):
            square = grid[:, row : row + scale, column : column + scale]
            merged.append(square.flatten(1))  # (1, scale · scale · C)
    return torch.stack(merged, dim=1)


def pixel_shuffle(patches, scale):
    batch, count, width = patches.shape
    side = int(count**0.5)
    squares = patches.reshape(batch, side // scale, scale, side // scale, scale, width)
    squares = squares.transpose(2, 3)  # both sides of a square next to each other
    return squares.reshape(batch, count // scale**2, scale**2 * width)


# %%
merged = pixel_shuffle(patches, 2)
torch.testing.assert_close(merged, shuffle_loop(patches, 2), rtol=0, atol=0)
theirs = build_projector(ProjectorConfig(kind="pixel_shuffle", scale=2), 192, 192)
mine = merged @ theirs.linear.weight.T + theirs.linear.bias
torch.testing.assert_close(mine, theirs(patches), rtol=1e-4, atol=1e-5)
print("merged:", tuple(merged.shape), " projected:", tuple(mine.shape), " = PixelShuffleProjector")

# %% [markdown] tags=["zh"]
# ## 四、故意弄坏：忘了 transpose
#
# 形状已经对了，`transpose` 那一行看起来可有可无。去掉它，不会报错。为了看清楚谁和谁并到了一起，我们让图块的「向量」就是它自己的编号。

# %% [markdown] tags=["en"]
# ## 4. Broken on purpose: without the transpose
#
# The shapes fit already, and the line with `transpose` looks like something one could leave out. Nothing complains when it goes. To see who is merged with whom, let each patch's "vector" be its own number.


# %%
def no_transpose(patches, scale):
    return patches.reshape(len(patches), patches.shape[1] // scale**2, -1)


numbers = torch.arange(64).view(1, 64, 1)
print("token 5, right:", pixel_shuffle(numbers, 2)[0, 5].tolist())
print("token 5, wrong:", no_transpose(numbers, 2)[0, 5].tolist())


def regions(axis, merge, scale, title):  # the image with the outline of each token's patches
    draw.picture(axis, image, title)
    for token, members in enumerate(merge(numbers, scale)[0].tolist()):
        rows, columns = [n // 8 for n in members], [n % 8 for n in members]
        x, y = 8 * min(columns) - 0.5, 8 * min(rows) - 0.5
        size = 8 * (max(columns) - min(columns) + 1), 8 * (max(rows) - min(rows) + 1)
        box = draw.Rectangle((x, y), *size, fill=False, edgecolor=draw.PROJECTOR, linewidth=1.4)
        axis.add_patch(box)
        axis.text(x + 1.2, y + 1, token, va="top", fontsize=7, color=draw.INK)


# %%
made, axes = draw.figure(4, height=2.5)
regions(axes[0], pixel_shuffle, 2, "right: 16 squares")
regions(axes[1], no_transpose, 2, "wrong: 16 rows")
regions(axes[2], pixel_shuffle, 4, "right: 4 squares")
regions(axes[3], no_transpose, 4, "wrong: 4 strips")
draw.show(made, "Which patches make a token, with the transpose and without")

# %% [markdown] tags=["zh"]
# 少了 `transpose`，并在一起的是**同一行**里相邻的四个图块；`scale` 为 4 时，干脆是横贯全图的长条。这样的投影层照样能训练，只是每个 token 看到的东西更零碎：一个物体被切到更多的 token 里，同一个 token 里又更容易混进两个物体。
#
# 零碎多少？造 600 张随机场景，数一数每个物体的面积分散在几个 token 里（不到 2% 的碎屑不算）。后面的实验也要用这些场景。

# %% [markdown] tags=["en"]
# Without the `transpose`, four neighbours **of one row** are merged; at scale 4 a token is a strip across the whole image. Such a projector can still be trained. But each token sees something more scattered: an object is cut into more tokens, and two objects end up in one token more often.
#
# By how much? Make 600 random scenes and count over how many tokens the area of each object is spread (crumbs below 2% are not counted). The experiment below uses these scenes again.

# %%
scenes = [random_scene(Random(seed)) for seed in range(600)]
names = {pair: number for number, pair in enumerate(TRAIN_PAIRS)}  # 56 pairs of colour and shape
y, x = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(64) + 0.5, indexing="ij")
areas = torch.zeros(len(scenes), 64, len(names))  # share of each object's disc in each patch
for scene, area in zip(scenes, areas):
    for thing in scene.objects:
        disc = ((x - thing.x) ** 2 + (y - thing.y) ** 2 < thing.radius**2).float()
        disc = disc.unflatten(0, (8, 8)).unflatten(2, (8, 8)).sum((1, 3)).flatten()  # (64,)
        area[:, names[thing.colour, thing.shape]] = disc / disc.sum()
shown = areas.sum(1) > 0.5  # (scenes, 56): which pairs are in a scene
print("areas:", tuple(areas.shape), " objects:", int(shown.sum()))


# %%
def in_tokens(merge, scale):  # (scenes, K, 56): share of each object in each token
    return merge(areas, scale).unflatten(2, (scale**2, -1)).sum(2)


for scale in (2, 4):
    for name, merge in (("squares", pixel_shuffle), ("rows", no_transpose)):
        touched = (in_tokens(merge, scale) > 0.02).sum(1)[shown].float().mean()
        print(f"{64 // scale**2:2} tokens, {name:8} an object lies in {touched:.2f} of them")

# %% [markdown] tags=["zh"]
# 16 个 token 时相差无几（3.17 与 3.22），4 个时就明显了（1.53 与 1.85）。方块胜过长条不是运气：面积相同的矩形里，方块的周长最短，切到的物体最少。
#
# ## 五、双线性缩小：取平均
#
# 第二个办法更省：把 8×8 的图块网格当成一张 192 个通道的小图，**缩小**到 4×4，再过 MLP。不用新参数。缩小就是加权平均，权重是一个三角形：离新格子中心越近，权重越大。两个方向分开做，各是一个 4×8 的矩阵。

# %% [markdown] tags=["en"]
# With 16 tokens the difference is small (3.17 against 3.22), with 4 it is plain (1.53 against 1.85). The order is no accident: of all rectangles of one area, a square has the shortest outline, so it cuts the fewest objects.
#
# ## 5. Bilinear: averaging
#
# The second way is cheaper. Take the 8×8 grid of patches as a small image with 192 channels, **scale it down** to 4×4, then apply the MLP. It needs no parameters of its own. Scaling down is a weighted mean, and the weights are a triangle: the closer to the centre of the new cell, the larger. Each direction has its own 4×8 matrix.


# %%
def triangle(old, new):
    step = old / new  # old cells per new one
    centres = (torch.arange(new) + 0.5) * step - 0.5  # of the new cells, counted in old ones
    weights = (1 - (torch.arange(old) - centres[:, None]).abs() / step).clamp(min=0)
    return weights / weights.sum(dim=1, keepdim=True)  # (new, old), rows sum to 1


weights = triangle(8, 4)
grid = patches.unflatten(1, (8, 8))  # (1, 8, 8, C)
small = torch.einsum("ir,jc,nrcd->nijd", weights, weights, grid).flatten(1, 2)  # (1, 16, C)
bilinear = build_projector(ProjectorConfig(kind="bilinear", grid=4), 192, 192)
bilinear.up, bilinear.down = up, down  # the trained MLP
torch.testing.assert_close(mlp(small), bilinear(patches), rtol=1e-4, atol=1e-4)
print("small:", tuple(small.shape), " MLP of it = BilinearProjector")

# %%
made, axis = draw.figure(1, height=2.4)
rows = [f"new {row}" for row in range(4)]
draw.heat(axis, weights, numbers=".2f", colours="Oranges", rows=rows)
axis.set_xlabel("old row or column, 0 to 7")
draw.show(made, "How much of each old cell goes into a new one")

# %% [markdown] tags=["zh"]
# 每个新格子主要取中间两格，也从两侧各取一点。平均是丢信息的：相加之后分不清谁是谁。
#
# ## 六、可学习的查询
#
# 第三个办法不管网格：准备 K 个**可学习的查询**（learned queries），每个去看全部 64 个图块，取回一份加权平均。这是第 02 课的注意力，只是查询不来自图片，而是参数，所以叫交叉注意力（cross-attention）。BLIP-2 的 Q-Former、Qwen-VL 的重采样器（resampler）都是这一类。K 由你定，与图块数无关。
#
# 手写它的核心，一个头接一个头：

# %% [markdown] tags=["en"]
# Each new cell takes mostly the two in the middle, and a little from both sides. A mean loses something: once added up, the parts cannot be told apart.
#
# ## 6. Learned queries
#
# The third way ignores the grid. It has K **learned queries**; each looks at all 64 patches and brings back a weighted mean. This is the attention of lesson 02, but the queries do not come from the image: they are parameters. It is called cross-attention. The Q-Former of BLIP-2 and the resampler of Qwen-VL belong here. K is your choice, whatever the number of patches.
#
# The core by hand, one head after another:

# %%
resampler = build_projector(ProjectorConfig(kind="resampler", num_queries=16), 192, 192)
attention, D = resampler.attention, resampler.attention.head_dim


def look(patches):
    queries = attention.q_proj(resampler.queries)  # (K, C): the same for every image
    keys, values = attention.k_proj(patches[0]), attention.v_proj(patches[0])  # (P, C)
    found = []
    for head in range(attention.num_heads):
        part = slice(head * D, (head + 1) * D)
        scores = queries[:, part] @ keys[:, part].T / D**0.5  # (K, P)
        found.append(scores.softmax(dim=-1) @ values[:, part])  # (K, D)
    return attention.out_proj(torch.cat(found, dim=-1))[None]  # (1, K, C)


# %%
theirs = attention(resampler.queries[None], patches, patches)
torch.testing.assert_close(look(patches), theirs, rtol=1e-4, atol=1e-5)
order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
print("looked up:", tuple(look(patches).shape), " = CrossAttention")
for name, projector in (("mlp", trained), ("resampler", resampler)):
    change = (projector(patches[:, order]) - projector(patches)).abs().max()
    print(f"{name:9}  patch vectors in another order change its tokens by up to {change:.1e}")

# %% [markdown] tags=["zh"]
# 最后两行是关键的差别。MLP 的输出跟着图块一起换位置；重采样器的输出**根本不变**（4e-07 是舍入误差）。它是对一个集合求加权平均，看不到次序。「在哪里」只能靠图块向量自己带来：编码器早已把位置加进去了（第 03 课）。
#
# 五种投影层放在一起。左边是本模型的 8×8 网格，右边是 LLaVA-1.5 的 24×24：

# %% [markdown] tags=["en"]
# The last two lines hold the difference that matters. The MLP's tokens move along with the patches. The resampler's tokens **do not change at all** (what is printed, less than 1e-6, is rounding): it averages over a set and cannot see an order. "Where" has to come with the patch vectors themselves, to which the encoder has added it (lesson 03).
#
# All five projectors side by side, for the 8×8 grid of this model and the 24×24 grid of LLaVA-1.5:

# %%
kinds = {
    "linear": ProjectorConfig(kind="linear"),
    "mlp": ProjectorConfig(kind="mlp"),
    "pixel_shuffle": ProjectorConfig(kind="pixel_shuffle", scale=2),
    "bilinear": ProjectorConfig(kind="bilinear", grid=4),
    "resampler": ProjectorConfig(kind="resampler", num_queries=16),
}
print(f"{'':14} {'parameters':>11} {'K of 8×8':>9} {'K of 24×24':>11}")
for name, config in kinds.items():
    made = build_projector(config, 192, 192)
    count = sum(parameter.numel() for parameter in made.parameters())
    print(f"{name:14} {count:11,} {made.num_tokens(64):9} {made.num_tokens(576):11}")

# %% [markdown] tags=["zh"]
# `linear` 和 `mlp` 的 K 等于图块数；`pixel_shuffle` 按比例减少；`bilinear` 和 `resampler` 的 K 固定，图再大也不变。
#
# ## 七、能读出多少
#
# 回到开头的问题。语言模型用**同一组**矩阵读每个视觉 token，我们的读出器也这样：一个矩阵，把一个 token 变成 56 个分数，每种「颜色＋形状」一个；一种物体在整张图里的得分，取所有 token 中最高的。矩阵用岭回归（ridge regression）求，目标是这个 token 里有该物体面积的几成。图里有 n 个物体，就看得分最高的 n 个里对了几个。
#
# 450 张图用来求矩阵，150 张用来打分，随机划分三次。

# %% [markdown] tags=["en"]
# `linear` and `mlp` keep one token a patch; `pixel_shuffle` divides their number; with `bilinear` and `resampler` K is fixed, however large the image.
#
# ## 7. How much can be read off
#
# Back to the question at the top. A language model reads every visual token with the **same** matrices, and so does this reader: one matrix turns a token into 56 scores, one for each pair of colour and shape. The score of a pair in an image is its highest over all tokens. The matrix comes from ridge regression; its target is the share of the object's area in that token. Where an image has n objects, look at the n highest scores and count how many are right.
#
# 450 images make the matrix, 150 are scored, and the split is drawn three times.

# %%
drawn = torch.stack([preprocess(draw_scene(scene), model.config.image) for scene in scenes])
features = torch.cat([model.vision_features(part) for part in drawn.split(60)])
print("features:", tuple(features.shape))


def ridge(inputs, targets):  # (M, C), (M, 56) → (C, 56), by the smaller of two equal systems
    small = inputs.shape[1] <= len(inputs)
    gram = inputs.T @ inputs if small else inputs @ inputs.T
    gram += torch.eye(len(gram))  # the ridge: what keeps the matrix small
    right = inputs.T @ targets if small else targets
    found = torch.linalg.solve(gram, right)
    return found if small else inputs.T @ found


# %%
def read(tokens, targets):  # (scenes, K, C), (scenes, K, 56) → percent of objects, three splits
    results = []
    for seed in range(3):
        order = torch.randperm(600, generator=torch.Generator().manual_seed(seed))
        fit, test = order[:450], order[450:]
        inputs, aims = tokens[fit].flatten(0, 1), targets[fit].flatten(0, 1)
        centre, scale = inputs.mean(0), inputs.std(0).norm()
        matrix = ridge((inputs - centre) / scale, aims - aims.mean(0))
        scores = ((tokens[test] - centre) / scale @ matrix).amax(dim=1)  # (150, 56)
        count = shown[test].sum(1, keepdim=True)
        rank = scores.argsort(dim=1, descending=True).argsort(dim=1)
        results.append(100 * ((rank < count) & shown[test]).sum() / count.sum())
    return torch.stack(results)


# %%
def average(scale):  # (scenes, 64 / scale², C): the package's bilinear step, of all scenes
    weights = triangle(8, 8 // scale)
    grid = features.unflatten(1, (8, 8))
    return torch.einsum("ir,jc,nrcd->nijd", weights, weights, grid).flatten(1, 2)


results = {"averaged": [], "pixel shuffle": [], "no transpose": []}
for scale in (1, 2, 4, 8):
    squares = in_tokens(pixel_shuffle, scale)
    results["averaged"].append(read(average(scale), squares))
    results["pixel shuffle"].append(read(pixel_shuffle(features, scale), squares))
    strips = in_tokens(no_transpose, scale)
    results["no transpose"].append(read(no_transpose(features, scale), strips))
projected = read(trained(features), areas)
for name, found in results.items():
    print(f"{name:14}", "  ".join(f"{one.mean():.0f} ± {one.std():.0f} %" for one in found))
print(f"{'trained MLP':14} {projected.mean():.0f} ± {projected.std():.0f} %  (64 tokens)")

# %%
made, axis = draw.figure(1, height=3.4)
parts = ["projector", "right", "wrong"]
lines = {name: [one.mean() for one in found] for name, found in results.items()}
draw.curves(axis, lines, x="visual tokens", y="objects read off, %", at=[64, 16, 4, 1], parts=parts)
for found, part in zip(results.values(), parts):
    for count, one in zip((64, 16, 4, 1), found):
        axis.scatter([count] * 3, one, s=12, color=draw.STRONG[part])
axis.scatter([64] * 3, projected, s=30, marker="D", color=draw.LANGUAGE, label="trained MLP")
axis.set_xscale("log", base=2)
axis.invert_xaxis()
axis.set_xticks([64, 16, 4, 1], ["64", "16", "4", "1"])
axis.set_ylim(0, 100)
axis.legend(frameon=False, loc="lower left")
draw.show(made, "What one matrix reads off, by number of tokens; a dot is one split")

# %% [markdown] tags=["zh"]
# 沿着橙色的线从左往右看，两端就是开头那两个数：64 个向量时读对 66%，只剩 1 个时读对 42%。减到 16 个、4 个，几乎不吃亏（66%、68%、64%，而三次划分之间的起伏就有 3 到 4）：16 个 token 时一格是 16×16 像素，4 个时是 32×32，而这个小世界里一张图最多四个物体，一格里多半只有一两个。只剩 1 个向量时，所有物体都叠在一起，哪个颜色配哪个形状就难读了。别由此推断真实的图片有 4 个 token 就够：一页文字里要分清的东西多得多。
#
# 有两处也许出乎意料：
#
# - **像素重排比平均还低。** 它一个数都没丢，按理不该更差。可是它的读出矩阵也大了 4 到 64 倍，450 张图不够把这么多数定下来。信息还在，代价转移到了学习上：要定下来的数多了，需要的数据也多。真实的模型有上百万张图来学这个矩阵，所以这条线不能当作「像素重排不好」的证据。
# - **训练好的 MLP（蓝色菱形）比编码器的原始输出高**，81% 对 66%。投影层没有新的信息来源，却让信息更好读：训练把它调成了一个矩阵就能读懂的样子。
#
# 红线与绿线的差别，就是一个 `transpose` 的价钱：16 个 token 时 57% 对 58%，比三次划分之间的起伏还小；4 个时 46% 对 52%，才看得出来。在两端（64 和 1），两种写法是同一回事。
#
# 重采样器不在图上：它的 token 不对应图上的任何地方，而且没有训练过的查询只会胡乱地看，用这个读出器比不公平。
#
# ## 练习

# %% [markdown] tags=["en"]
# Follow the orange line: its two ends are your two numbers, 66% from 64 vectors and 42% from one. From 64 to 16 and to 4, little is lost (66, 68 and 64%, with a spread of 3 to 4). With 16 tokens a cell has 16×16 pixels, with 4 it has 32×32, and in this small world an image has at most four objects, so that a cell mostly holds one or two. In a single vector all objects lie on top of each other, and which colour goes with which shape is hard to read. Do not conclude that 4 tokens are enough for a photo: a page of text has far more to tell apart.
#
# Two things may surprise:
#
# - **Pixel shuffle is below the mean.** It has not lost a single number. But its reader has 4 to 64 times as many weights, and 450 images are too few to settle them. The information is there; the price has moved to learning. A real model learns this matrix from millions of images, so this line is no proof that pixel shuffle is bad.
# - **The trained MLP (blue diamonds) is above the encoder's own vectors**, 81% against 66%. A projector has no other source of information, yet it makes what is there easier to read: training has turned it into something that one matrix understands.
#
# The gap between green and red is the price of one `transpose`. With 16 tokens it is 1 point and drowns in the spread of 3 to 4; with 4 tokens it is 6 points, 52 against 46. At both ends, 64 and 1, the two ways are the same.
#
# The resampler is not in the picture. Its tokens belong to no place in the image, and queries that have not been trained look at random, so this reader would not be fair to it.
#
# ## Exercises

# %% [markdown] tags=["zh"]
# **08.1 补一行。** 一张 448×448 的图，图块 14×14，`scale` 为 2 的像素重排。语言模型里它占几个 token？

# %% [markdown] tags=["en"]
# **08.1 Fill in a line.** An image of 448×448, patches of 14×14, pixel shuffle with scale 2: how many tokens does it take in the language model?

# %% tags=["exercise"]
side, patch, scale = 448, 14, 2
count = ...
check("08.1", count, 256)

# %% [markdown] tags=["zh"]
# **08.2 改变行为。** 「一个数也没有丢」应当能证明：写出 `pixel_shuffle` 的逆运算，把 `merged` 变回 `patches`。

# %% [markdown] tags=["en"]
# **08.2 Change a behaviour.** "No number is lost" should be provable: write the reverse of `pixel_shuffle`, which turns `merged` back into `patches`.


# %% tags=["exercise"]
def undo(merged, scale):
    return ...


check("08.2", undo(merged, 2), patches)

# %% [markdown] tags=["zh"]
# **08.3 找错。** 这个版本的 token 里图块是对的，token 的**次序**却不对：图片被沿对角线翻转了。改好它。

# %% [markdown] tags=["en"]
# **08.3 Find the bug.** Each token of this version holds the right patches, but the tokens come in the wrong **order**: the image is flipped along its diagonal. Mend it.


# %% tags=["exercise"]
def shuffle(patches, scale):
    grid = patches.unflatten(1, (8 // scale, scale, 8 // scale, scale))
    return grid.permute(0, 3, 1, 2, 4, 5).flatten(1, 2).flatten(2)


check("08.3", shuffle(patches, 2), merged)

# %% [markdown] tags=["zh"]
# ## 别人在这里摔过跤
#
# [OpenGVLab/InternVL#962](https://github.com/OpenGVLab/InternVL/issues/962)：有人问，InternVL-2.5 为什么要先变成二维网格再做像素重排，而不是把 `[N, L, C]` 直接 reshape 成 `[N, L/4, 4C]`。维护者答：那些 reshape 和 permute 保证重排发生在图片的每个局部小块里；直接 reshape 则会沿着图片的每一行进行。这正是第四节的两种画法。怎么发现？像第四节那样，用编号代替向量，打印一个 token 的成员。
#
# ## 到库里看看
#
# - [`nanovlm/model/projector.py`](../../nanovlm/model/projector.py)，`PROJECTORS` 与 `pixel_shuffle`：本课略去了网格不能整除时的报错，重采样器后面的残差 MLP，和换到语言模型宽度的两个矩阵。
# - [`nanovlm/model/resampler.py`](../../nanovlm/model/resampler.py)，`CrossAttention` 与 `Resampler`：后者是 Qwen-VL 的版本，查询和键上还加了位置。
#
# 论文：Liu 等，2023，*Visual Instruction Tuning*（LLaVA），[arXiv:2304.08485](https://arxiv.org/abs/2304.08485)；Li 等，2023，*BLIP-2*，[arXiv:2301.12597](https://arxiv.org/abs/2301.12597)。

# %% [markdown] tags=["en"]
# ## In the wild
#
# [OpenGVLab/InternVL#962](https://github.com/OpenGVLab/InternVL/issues/962): someone asked why InternVL-2.5 goes back to a two-dimensional grid before its pixel shuffle, when `[N, L, C]` could be reshaped straight into `[N, L/4, 4C]`. The answer: the reshapes and permutes make sure that each local patch of the image is shuffled; a direct reshape would work along each line of the image. These are the two pictures of section 4. How would you notice? As there: put numbers in the place of vectors, and print the members of one token.
#
# ## Look in the package
#
# - [`nanovlm/model/projector.py`](../../nanovlm/model/projector.py), `PROJECTORS` and `pixel_shuffle`: this lesson left out the errors for grids that cannot be divided, and the residual MLP and head that follow the resampler's attention.
# - [`nanovlm/model/resampler.py`](../../nanovlm/model/resampler.py), `CrossAttention` and `Resampler`: the latter is Qwen-VL's, which also adds positions to queries and keys.
#
# The papers: Liu et al. 2023, *Visual Instruction Tuning* (LLaVA), [arXiv:2304.08485](https://arxiv.org/abs/2304.08485); Li et al. 2023, *BLIP-2*, [arXiv:2301.12597](https://arxiv.org/abs/2301.12597).
