# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["zh"]
# # 03 · 视觉 Transformer
#
# 第 01 课有了图块向量，第 02 课有了注意力。这一课把整个视觉编码器（vision encoder）搭完：归一化、MLP、残差、class token、位置表，一共不到 40 行，然后一层一层地看它到底学会了什么。
#
# **进来的**：`(1, 3, 64, 64)` 的像素，`float32`，范围 −1 到 1。**出去的**：`(1, 64, 192)`，每个图块一个向量；这次它不只知道自己的像素，还知道自己属于哪个物体。

# %% [markdown] tags=["en"]
# # 03 · The vision transformer
#
# Lesson 01 made patch vectors, lesson 02 attention. This lesson builds the rest of the vision encoder: normalisation, MLP, residual connections, class token, position table, fewer than 40 lines together. Then it looks, layer by layer, at what the encoder has learned.
#
# **In**: pixels `(1, 3, 64, 64)`, `float32`, from −1 to 1. **Out**: `(1, 64, 192)`, one vector for each patch, which now knows more than its own pixels: it knows the object it belongs to.

# %% tags=["setup"]
import sys

sys.path.insert(0, "../..")  # the repository: nanovlm and the drawing helpers

import math
from functools import partial
from random import Random

import torch
import torch.nn.functional as F
from matplotlib.patches import Rectangle

from data_tools.scenes_world import COLOURS, SHAPES, random_scene
from data_tools.scenes_world import draw as draw_scene
from lessons import draw
from lessons.check import check
from nanovlm import IMAGE, Message, generate, load_model, open_image, prepare, preprocess

ASSETS = "../../nanovlm/assets"
torch.set_grad_enabled(False)
draw.strip("patches", "patch vectors")

# %% [markdown] tags=["zh"]
# ## 先猜一猜
#
# 拿一个物体中心的图块，只用它的向量，训练一个**线性**分类器（叫做线性探针，linear probe）：它是 8 种形状里的哪一种？又是 8 种颜色里的哪一种？瞎猜是 12.5%。
#
# 在第一层之前，形状能猜对百分之几？四层之后呢？颜色在这两处又各是多少？写下四个数。

# %% [markdown] tags=["en"]
# ## Predict
#
# Take the patch at the centre of an object, and from its vector alone train a **linear** classifier, one matrix and nothing else (a linear probe): which of 8 shapes is it, and which of 8 colours? Guessing gives 12.5%.
#
# Before the first block, what share of the shapes will it get right? And after four blocks? And the colours? Write down four numbers.

# %%
model = load_model(f"{ASSETS}/tiny-vlm").float().eval()  # the file holds bfloat16
vision = model.vision_encoder
image = open_image(f"{ASSETS}/scene.png")
pixels = preprocess(image, model.config.image)[None]  # (1, 3, 64, 64)
print(vision.config.num_hidden_layers, "blocks,", vision.config.num_attention_heads, "heads,",
      sum(weight.numel() for weight in vision.parameters()), "parameters")  # fmt: skip
for name, weight in vision.blocks[0].named_parameters():
    print(f"  {name:24} {tuple(weight.shape)}")

# %% [markdown] tags=["zh"]
# 上面是一层（block）的全部参数。注意力的四个矩阵上一课讲过，剩下的只有三样：两个 `norm`、一个 `mlp`、两个 `scale`。
#
# ## 一、位置表和 class token
#
# 注意力不管顺序：把 65 个 token 打乱，结果只是跟着打乱。所以要给每个图块向量加上一个表示位置的向量。这些向量不是设计的，是学出来的，64 个位置各一个，存成一张表，就是位置表（position table）。
#
# 表的最前面还多一行，给 class token：一个不对应任何图块、自己也是学出来的向量，放在序列最前面。ViT 和 DINOv2 用它汇总整张图。

# %% [markdown] tags=["en"]
# These are all parameters of one block. The four matrices of attention are known from lesson 02. Three things are left: two `norm`s, an `mlp`, and two `scale`s.
#
# ## 1. The position table and the class token
#
# Attention does not care about order: shuffle the 65 tokens, and the results are shuffled alike. So each patch vector gets a vector added that stands for its place. Nobody designed these vectors. They are learned, one for each of 64 places, and kept in the position table.
#
# The table has one more row in front, for the class token: a learned vector that belongs to no patch and stands first in the sequence. In ViT and DINOv2 it sums up the whole image.


# %%
def embed(pixels):
    """(N, 3, H, W) → (N, 1 + P, C): the class token, then the patches, with positions."""
    patches = vision.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (N, P, C), lesson 01
    cls = vision.cls_token.expand(len(pixels), -1, -1)  # (N, 1, C)
    return torch.cat([cls, patches], dim=1) + vision.position_embedding


hidden_states = embed(pixels)
print("position table:", tuple(vision.position_embedding.shape))
print("into the first block:", tuple(hidden_states.shape))


# %%
def alike(table, place):
    """How alike (cosine) the vector of one place is to those of all places: (P, C) → (P,)."""
    return F.cosine_similarity(table[place], table, dim=-1)


table = vision.position_embedding[0, 1:]  # (64, C), without the class token's row
made, axes = draw.figure(5, height=2.1)
for axis, place in zip(axes, (0, 12, 27, 40, 63)):
    grid = alike(table, place).view(8, 8)
    draw.heat(axis, grid, f"place {place}", colours="PuOr", limits=(-1, 1))
    axis.set_aspect("equal")
    corner = place % 8 - 0.5, place // 8 - 0.5
    axis.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=draw.WRONG, linewidth=2))
draw.show(made, "A learned map: places that are neighbours have similar vectors")

# %% [markdown] tags=["zh"]
# 每张小图里，红框是一个位置，颜色是它的向量和其他位置的相似度（紫色高，橙色低）。没有人告诉模型第 27 号的下面是第 35 号，它自己学出了一张地图。两个角（0 号和 63 号）和整圈边框都有些像，多半因为那里几乎从来没有东西。
#
# ## 二、LayerNorm
#
# 每一层都往向量里加东西，向量越加越大。LayerNorm 在每次运算之前把一个 token 的 192 个数拉回「均值 0、方差 1」，再乘上学到的 `weight`、加上 `bias`。每个 token 各算各的，与别的 token、别的图片无关。

# %% [markdown] tags=["en"]
# In each map the frame is one place, and the colours say how similar its vector is to the others (purple high, orange low). Nobody told the model that place 35 lies below place 27. It has drawn its own map. The corners, 0 and 63, also resemble the rest of the border, most likely because hardly anything ever lies there.
#
# ## 2. LayerNorm
#
# Every block adds to the vectors, and they grow. Before each operation, LayerNorm brings the 192 numbers of a token back to mean 0 and variance 1, then multiplies by a learned `weight` and adds a `bias`. Each token by itself; other tokens and other images play no part.


# %%
def layer_norm(hidden_states, norm):
    """(…, C) → (…, C)."""
    mean = hidden_states.mean(dim=-1, keepdim=True)  # (…, 1)
    variance = (hidden_states - mean).square().mean(dim=-1, keepdim=True)  # divided by C
    normalised = (hidden_states - mean) / (variance + norm.eps).sqrt()
    return normalised * norm.weight + norm.bias


first = vision.blocks[0]
mine = layer_norm(hidden_states, first.attention_norm)
torch.testing.assert_close(mine, first.attention_norm(hidden_states), rtol=1e-5, atol=1e-5)
print("equal to the package's LayerNorm:", tuple(mine.shape))

# %% [markdown] tags=["zh"]
# ## 三、MLP
#
# 注意力在 token **之间**搬运信息，MLP 在每个 token **内部**加工：192 维放大到 384 维，过一个 GELU，再缩回 192 维。为什么要放大？384 维里的每一维都是一个小检测器：它与输入做内积，得数为负，GELU 就把它压到接近零，得数为正就放行；缩回时再把放行的加权合到一起。没有 GELU，两个矩阵相乘还是一个矩阵（第 08 课）。GELU 是 x 乘以「标准正态变量小于 x 的概率」，像是圆滑的 ReLU。

# %% [markdown] tags=["en"]
# ## 3. MLP
#
# Attention moves information **between** tokens; the MLP works **within** each: from 192 numbers up to 384, through a GELU, and back to 192. Why up? Each of the 384 is a small detector: its inner product with the input is pressed to about zero by GELU where it is negative and passes where it is positive, and on the way back the detectors that fired are summed with weights. Without GELU, two matrices in a row would be one (lesson 08). GELU is a rounded ReLU: x times the probability that a standard normal variable is below x, which is what the line with `erf` computes.


# %%
def gelu(values):
    return values * 0.5 * (1 + torch.erf(values / math.sqrt(2)))


def mlp(hidden_states, part):
    wide = hidden_states @ part.up_proj.weight.T + part.up_proj.bias  # (…, 384)
    return gelu(wide) @ part.down_proj.weight.T + part.down_proj.bias  # (…, C)


mine = mlp(hidden_states, first.mlp)
torch.testing.assert_close(mine, first.mlp(hidden_states), rtol=1e-4, atol=1e-4)
print("equal to the package's MLP:", tuple(mine.shape))
print("gelu(-3, -1, 0, 1, 3) =", gelu(torch.tensor([-3.0, -1, 0, 1, 3])).numpy().round(3))

# %% [markdown] tags=["zh"]
# ## 四、一层，和整个编码器
#
# 一层只有两步：归一化、注意力、加回去；归一化、MLP、加回去。
#
# - **残差**：结果是**加**到原来的向量上的，不是替换它。
# - **先归一化**（pre-norm）：归一化放在运算之前，残差那条路上没有归一化，从头到尾畅通。
# - **LayerScale**：加回去之前，每一维先乘一个学到的系数。深的模型（DINOv2 有 40 层的）把它初始化得很小，训练一开始每层几乎什么都不做，会稳得多。

# %% [markdown] tags=["en"]
# ## 4. A block, and the whole encoder
#
# A block is two sentences: normalise, attend, add; normalise, MLP, add.
#
# - **Residual**: the result is **added** to the vector and does not replace it.
# - **Pre-norm**: the norm comes before the operation. The path of the residual has no norm on it and is open from end to end.
# - **LayerScale**: before the addition, each of the 192 numbers is multiplied by a learned factor. Deep models (DINOv2 goes to 40 blocks) start it very small, so that at first each block does almost nothing, and training is steadier.


# %%
def block(hidden_states, part):
    """(N, T, C) → (N, T, C)."""
    attended = part.attention(layer_norm(hidden_states, part.attention_norm))  # lesson 02
    hidden_states = hidden_states + part.attention_scale * attended
    worked = mlp(layer_norm(hidden_states, part.mlp_norm), part.mlp)
    return hidden_states + part.mlp_scale * worked


def encode(pixels):
    """The hidden states before the first block and after each: 5 × (N, 1 + P, C)."""
    states = [embed(pixels)]
    for part in vision.blocks:
        states.append(block(states[-1], part))
    return states


states = encode(pixels)
features = layer_norm(states[-1], vision.norm)[:, 1:]  # without the class token
print("patches:", tuple(features.shape))

# %%
norms = [*(part.attention_norm for part in vision.blocks), vision.norm]
normed = [layer_norm(state, norm) for state, norm in zip(states, norms)]
sizes = {
    "hidden states": [state.std(dim=-1).mean() for state in states],
    "after LayerNorm": [state.std(dim=-1).mean() for state in normed],
}
made, axis = draw.figure(1, height=2.7)
draw.curves(axis, sizes, x="blocks passed", y="std of a token's numbers", parts=["vision", "right"])
axis.set_xticks(range(5))
axis.set_ylim(bottom=0)
draw.show(made, "The vectors grow; what a block is given does not grow with them")
for name, values in sizes.items():
    print(f"{name:15}", *(f"{value:.1f}" for value in values))

# %% [markdown] tags=["zh"]
# 从第一层到最后，隐藏状态从 0.3 长到 3.5，十倍有余；每一层收到的却一直在 0.6 到 1.4 之间（打印的两行）。绿线不正好是 1，因为归一化之后还乘了学到的 `weight`。
#
# ## 五、与库代码核对
#
# 一层一层地比：进入第一层之前、每一层之后、最后的归一化之后。容差 1e-4：每层的误差会累积，向量的数值又在个位数，`float32` 还剩下 5 位左右可信。

# %% [markdown] tags=["en"]
# From the first block to the last, the hidden states grow from 0.3 to 3.5, more than tenfold; what the blocks are given stays between 0.6 and 1.4 (the printed lines). The green line is not exactly 1, because after the normalisation comes the learned `weight`.
#
# ## 5. Proven equal
#
# Compare layer by layer: before the first block, after each, and after the final norm. The tolerance is 1e-4: errors add up over the blocks, the numbers are of size 1 to 10, and about 5 digits of `float32` remain.

# %%
for layer, state in enumerate(states):
    theirs = vision.patches(pixels, layer=layer, norm=False)
    torch.testing.assert_close(state[:, 1:], theirs, rtol=1e-4, atol=1e-4)
    print(f"after {layer} blocks: largest difference {(state[:, 1:] - theirs).abs().max():.1e}")
torch.testing.assert_close(features, vision.patches(pixels), rtol=1e-4, atol=1e-4)
print("after the final norm: equal")

# %% [markdown] tags=["zh"]
# ## 六、故意弄坏
#
# 八种写错的编码器，每一种输出的形状都对。（最后的归一化用不用，由模型的设置 `vision_norm` 决定，默认是用；自带的模型不用，所以投影层拿到的是 `states[-1]`，不是第四节的 `features`。第八种错误是选反了。）对 12 张图各问一次「描述图片」，数说对了多少物体，同时看输出和正确的相差多少。先看表，再解释。

# %% [markdown] tags=["en"]
# ## 6. Broken on purpose
#
# Eight encoders with a mistake, each with the right shape at the end. (Whether the final norm is applied is a setting of the model, `vision_norm`. It is on by default; the shipped model has it off, so its projector gets `states[-1]` and not the `features` of section 4. The eighth mistake is the other choice.) Each describes 12 images; count the objects that are named, and see how far the output is from the right one. First the table, then the explanation.


# %%
def wrong_block(mistake, states, part):
    first, second = part.attention_scale, part.mlp_scale
    if mistake == "no residual":
        return part.mlp(part.mlp_norm(part.attention(part.attention_norm(states))))
    if mistake == "no norm":
        states = states + first * part.attention(states)
        return states + second * part.mlp(states)
    if mistake == "norm after the sum":
        states = part.attention_norm(states + first * part.attention(states))
        return part.mlp_norm(states + second * part.mlp(states))
    first, second = (1, 1) if mistake == "no LayerScale" else (first, second)
    states = states + first * part.attention(part.attention_norm(states))
    wide = part.mlp.up_proj(part.mlp_norm(states))
    wide = wide.relu() if mistake == "ReLU for GELU" else gelu(wide)
    return states + second * part.mlp.down_proj(wide)


# %%
def wrong_encoder(mistake, pixels):
    states = embed(pixels)
    if mistake == "rows and columns swapped":
        swapped = table.view(8, 8, -1).transpose(0, 1).flatten(0, 1)
        states[:, 1:] += swapped - table
    for part in vision.blocks:
        states = wrong_block(mistake, states, part)
    other = mistake == "other choice of final norm"
    states = vision.norm(states) if model.config.vision_norm != other else states
    return states[:, :-1] if mistake == "class token kept" else states[:, 1:]


# %%
def named(images, scenes, encoder):
    """What share of the objects the model names, with another vision encoder."""
    vision.patches = lambda pixels, *which: encoder(pixels)
    questions = [[Message("user", [IMAGE, "描述图片"])] for _ in images]
    batch = prepare(model, questions, [[one] for one in images], add_generation_prompt=True)
    said = [model.tokenizer.decode(ids) for ids in generate(model, batch, 70)]
    del vision.patches  # the package's method is back
    hits = [
        COLOURS[one.colour] + SHAPES[one.shape] in text
        for text, scene in zip(said, scenes) for one in scene.objects
    ]  # fmt: skip
    return sum(hits) / len(hits)


# %%
scenes = [random_scene(Random(seed)) for seed in range(400)]
images = [draw_scene(scene) for scene in scenes]
mistakes = ["none", "no residual", "no norm", "norm after the sum", "rows and columns swapped"]
mistakes += ["class token kept", "no LayerScale", "ReLU for GELU", "other choice of final norm"]
right = vision.patches(pixels, model.config.vision_layer, model.config.vision_norm)
for mistake in mistakes:
    off = (wrong_encoder(mistake, pixels) - right).abs().max()
    share = named(images[:12], scenes[:12], partial(wrong_encoder, mistake))
    print(f"{mistake:27} objects named {share:4.0%}   largest difference {off:.0e}")
scales = torch.cat([torch.cat((part.attention_scale, part.mlp_scale)) for part in vision.blocks])
print(f"factors of LayerScale: from {scales.min():.1f} to {scales.max():.1f}")

# %% [markdown] tags=["zh"]
# 右边一列，除第一行外，数都不小；中间一列却分成两类。
#
# 前三种把模型弄瞎了。没有残差，原来的内容被替换掉；没有归一化，运算面对的是从没见过的大小；归一化放错位置，残差那条路被截断。
#
# 后面五种**几乎看不出来**，物体仍能说对九成到全部。LayerScale 的系数在 0.5 到 1.2 之间（打印的最后一行），GELU 和 ReLU 只在 0 附近不同；最后的归一化主要改变向量的大小，后面的投影层和语言模型受得了。最值得琢磨的是 `class token kept`：取了前 64 个而不是后 64 个 token，所有图块错开一位。表里它毫无影响（100%），说明位置已经写进了每个向量**里面**，语言模型读的是内容，不太在意次序（第 09 课再试）。
#
# 教训：「模型还能回答」不等于「写对了」。只有逐层比较数值才说得清，所以第五节才是真正的检验。

# %% [markdown] tags=["en"]
# The right column is large in every row but the first. The middle column falls into two kinds: 0%, and 90% or more.
#
# The first three make the model blind. Without the residual, what was there is replaced. Without norms, the operations meet sizes that they have never seen. With the norm in the wrong place, the path of the residual is cut.
#
# The others **hardly show**. The factors of LayerScale lie between 0.5 and 1.2 in this model (the last line printed), GELU and ReLU differ only near 0, and the final norm mostly changes the size of the vectors, which the projector and the language model tolerate. The most curious is `class token kept`: the first 64 tokens instead of the last 64, every patch shifted by one place. It still names 100%. So the place has been written **into** each vector, and the language model reads that and cares little about the order (lesson 09 tests it).
#
# The moral: "the model still answers" does not mean "the code is right". Only numbers compared layer by layer tell, and so section 5 is the real test.

# %% [markdown] tags=["zh"]
# ## 七、图片大小变了怎么办
#
# 除去 class token 那一行，位置表有 8×8 = 64 行。来一张 96×96 的图，就有 12×12 = 144 个图块，表不够长。办法是把表当成一张 8×8、有 192 个通道的「图片」，用双三次插值（bicubic）放大。这样得来的表不是学出来的，但邻居仍像邻居，编码器马上能用，微调一小段就更好。

# %% [markdown] tags=["en"]
# ## 7. Images of another size
#
# The position table has 8×8 = 64 rows. An image of 96×96 has 12×12 = 144 patches, and the table is too short. The remedy: treat the table as an "image" of 8×8 with 192 channels, and resize it with bicubic interpolation. Such a table was not learned, but neighbours still resemble neighbours: the encoder works with it at once, and better after a little fine-tuning.

# %%
from nanovlm.model.layers import resize_positions


def resize(table, side, rows, columns):
    """(side², C) → (rows · columns, C)."""
    grid = table.view(side, side, -1).permute(2, 0, 1)[None]  # (1, C, side, side)
    grid = F.interpolate(grid, (rows, columns), mode="bicubic")
    return grid[0].permute(1, 2, 0).flatten(0, 1)


larger, smaller = resize(table, 8, 12, 12), resize(table, 8, 6, 6)
torch.testing.assert_close(larger, resize_positions(table[None], 8, 12, 12)[0])
big = F.interpolate(pixels, (96, 96), mode="bicubic")
print("resized:", tuple(larger.shape), tuple(smaller.shape), " patches of 96×96:",
      tuple(vision.patches(big).shape))  # fmt: skip

# %%
made, axes = draw.figure(4, height=2.4)
shown = (("8×8, as learned", table, 8, 27), ("resized to 12×12", larger, 12, 65),
         ("resized to 6×6", smaller, 6, 20),
         ("first 36 rows: wrong", table[:36], 6, 20))  # fmt: skip
for axis, (title, values, side, place) in zip(axes, shown):
    grid = alike(values, place).view(side, side)
    draw.heat(axis, grid, title, colours="PuOr", limits=(-1, 1))
    axis.set_aspect("equal")
    corner = place % side - 0.5, place // side - 0.5
    axis.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=draw.WRONG, linewidth=2))
draw.show(made, "Resized, the map stays a map; cut off, it wraps around")

# %% [markdown] tags=["zh"]
# 放大、缩小之后，邻居仍是邻居。最右边是「截取前 36 行」：原来每行 8 个，现在每行 6 个，地图就错位了。形状照样是 `(36, 192)`。
#
# ## 八、一层一层地看
#
# 现在回到开头。先用颜色看：编码 401 张图（例图和 400 个随机场景），对前 201 张的所有图块做主成分分析（PCA），取差别最大的三个方向，当成红、绿、蓝。同一列里颜色相同，就是向量相近。

# %% [markdown] tags=["en"]
# Enlarged or reduced, neighbours stay neighbours. On the right are the first 36 rows: a row held 8 places and now holds 6, so the map is torn. Its shape is still `(36, 192)`.
#
# ## 8. Layer by layer
#
# Back to the beginning. First with colours: encode 401 images (the lesson's own and 400 random scenes), take all patches of the first 201, find the three directions in which they differ most (PCA), and use them as red, green and blue. Within a column, equal colours are similar vectors.

# %%
batch = torch.stack([preprocess(one, model.config.image) for one in images])  # (400, 3, 64, 64)
layers = [state[:, 1:] for state in encode(torch.cat([pixels, batch]))]  # 5 × (401, P, C)


def colours(vectors):
    """(N, P, C) → (N, 3, 8, 8): the three main directions as red, green and blue."""
    flat = vectors.flatten(0, 1) - vectors.flatten(0, 1).mean(dim=0)  # (N · P, C)
    main = torch.linalg.eigh(flat.T @ flat).eigenvectors[:, -3:]  # (C, 3)
    main = main * main.sum(dim=0).sign()  # a direction has no sign of its own
    values = flat @ main
    low, high = torch.quantile(values[:6400], torch.tensor([0.01, 0.99]), dim=0)
    values = ((values - low) / (high - low)).clamp(0, 1)
    return values.view(len(vectors), 8, 8, 3).permute(0, 3, 1, 2)


# %%
def show_layers(layers, title):
    made, axes = draw.figure(6, rows=2, height=3.2)
    for row, number in enumerate((0, 9)):
        shown = image if number == 0 else images[number - 1]
        draw.picture(axes[row, 0], shown, "image" if row == 0 else "")
    for column, vectors in enumerate(layers):
        painted = colours(vectors[:201])
        for row, number in enumerate((0, 9)):
            name = f"{column} blocks" if row == 0 else ""
            draw.picture(axes[row, column + 1], painted[number], name)
    draw.show(made, title)


show_layers(layers, "Three main directions of the patch vectors, layer by layer")

# %% [markdown] tags=["zh"]
# 中间几列，两张不同的图看上去差不多：最主要的方向是**位置**，左上一种颜色，右下另一种。后面几列里物体渐渐浮出来，最后一列里一个物体大致是一种颜色；背景仍然花花绿绿，那是位置还在里面。
#
# 把位置的影响去掉再看一次：每个位置减去 401 张图在这个位置上的平均。

# %% [markdown] tags=["en"]
# In the middle columns the two images look alike: the main directions are **where** a patch is, one colour at the upper left and another at the lower right. In the later columns the objects come out, and in the last each is mostly of one colour. The background stays colourful: the places are still in it.
#
# Now without the places: from each place subtract its mean over all 401 images.

# %%
without_places = [vectors - vectors.mean(dim=0) for vectors in layers]
show_layers(without_places, "The same, less the mean of each place")

# %% [markdown] tags=["zh"]
# 第 0 列是像素的颜色，物体和背景已经分开，但那只是颜色。再往后，边缘和中心分开，最后同一个物体的图块趋于一致。
#
# 图可以骗人，数字好一些。线性探针：取物体中心所在的图块，300 张图训练，100 张测试；为了看出运气的大小，换 5 种随机划分。线性分类器用岭回归（ridge regression）：解一个线性方程组就得到矩阵，不用一步一步地迭代。

# %% [markdown] tags=["en"]
# Column 0 is the colour of the pixels: object and background differ, in colour alone. Further on, edges and middles separate, and at the end the patches of one object tend to agree.
#
# Pictures may deceive; numbers are better. The linear probe takes the patch that holds an object's centre, 300 images to fit and 100 to test, in 5 random splits that show how much is luck. The classifier is ridge regression: least squares with a penalty on large weights, which is solved in one line and needs no training loop.

# %%
centres = [  # (scene, patch, shape, colour) of every object
    (number, int(one.y // 8) * 8 + int(one.x // 8), list(SHAPES).index(one.shape),
     list(COLOURS).index(one.colour))
    for number, scene in enumerate(scenes) for one in scene.objects
]  # fmt: skip
number, patch, shape, colour = torch.tensor(centres).T  # one for each object


def probe(vectors, classes, is_train):
    """The share of test objects whose class a linear map reads off their vectors (M, C)."""
    inputs = (vectors - vectors[is_train].mean(dim=0)) / (vectors[is_train].std(dim=0) + 1e-6)
    targets = F.one_hot(classes, 8).float() - 1 / 8
    given = inputs[is_train]
    matrix = torch.linalg.solve(given.T @ given + 30 * torch.eye(C), given.T @ targets[is_train])
    right = (inputs @ matrix).argmax(dim=-1) == classes
    return right[~is_train].float().mean()


# %%
C = vision.config.hidden_size
found = {"shape": torch.zeros(5, 5), "colour": torch.zeros(5, 5)}  # (split, layer)
for split in range(5):
    random = torch.Generator().manual_seed(split)
    is_train = (torch.randperm(400, generator=random) < 300)[number]  # by scene, not by object
    for layer, vectors in enumerate(layers):
        chosen = vectors[1:][number, patch]  # (M, C); image 0 is the lesson's own scene
        found["shape"][split, layer] = probe(chosen, shape, is_train)
        found["colour"][split, layer] = probe(chosen, colour, is_train)
for name, share in found.items():
    texts = [f"{low:.0%}–{high:.0%}" for low, high in zip(share.amin(0), share.amax(0))]
    print(f"{name:6} after 0…4 blocks, over 5 splits:", ", ".join(texts))

# %%
made, axis = draw.figure(1, height=3.0)
lines = {name: 100 * share.mean(dim=0) for name, share in found.items()}
lines["guessing"] = [12.5] * 5
draw.curves(axis, lines, x="blocks passed", y="% read off by a linear map",
            parts=["vision", "projector", "word"])  # fmt: skip
for name, colour_of in (("shape", draw.VISION), ("colour", draw.PROJECTOR)):
    axis.fill_between(range(5), 100 * found[name].amin(0), 100 * found[name].amax(0),
                      color=colour_of, alpha=0.2)  # fmt: skip
axis.set_xticks(range(5))
axis.set_ylim(0, 104)
draw.show(made, "Colour is there almost at once; shape is built block by block")

# %% [markdown] tags=["zh"]
# 这就是答案。颜色在单个图块里，进入第一层之前就能读对八成多，一层之后是 100%；形状在图块**之间**，要靠注意力一层一层地聚起来。进入第一层之前，形状只有两成上下，略高于瞎猜（一个中心图块是实心还是空心，多少透露一点形状），然后一路升到 100%。
#
# 语言模型拿到的是最后一层：那里，两样东西都能用一个矩阵读出来。这正是投影层需要的。
#
# ## 练习

# %% [markdown] tags=["en"]
# That is the answer: shape goes from about 20% to 100%, colour from about 84% to 100%. Colour lies within a patch, and most of it can be read off after the first matrix. Shape lies **between** patches, and attention gathers it block by block. At layer 0, shape is a little above guessing (a solid or an empty middle gives away something), and then it rises.
#
# The language model gets the last layer, where both can be read off by one matrix. That is what the projector needs.
#
# ## Exercises

# %% [markdown] tags=["zh"]
# **03.1 补一行。** 带寄存器（registers）的 DINOv2：518×518 的图，14×14 的图块，1 个 class token，4 个寄存器 token。每一层要处理多少个 token？写成式子。

# %% [markdown] tags=["en"]
# **03.1 Fill in a line.** DINOv2 with registers: an image of 518×518, patches of 14×14, 1 class token and 4 register tokens. How many tokens pass each block? Write an expression.

# %% tags=["exercise"]
side, patch_size, registers = 518, 14, 4
count = ...
check("03.1", count, 1374)

# %% [markdown] tags=["zh"]
# **03.2 换一种行为。** 有的模型不插值，而是取「最近」的一行：新网格第 r 行对应旧网格第 `r * 8 // 12` 行，列也一样。由 `table` 算出 `(144, 192)` 的 `nearest`。

# %% [markdown] tags=["en"]
# **03.2 Change a behaviour.** Some models take the nearest row instead of interpolating: row r of the new grid takes row `r * 8 // 12` of the old one, and columns alike. Compute `nearest`, `(144, 192)`, from `table`.

# %% tags=["exercise"]
old = torch.arange(12) * 8 // 12  # (12,)
nearest = ...
check("03.2", nearest, resize_positions(table[None], 8, 12, 12, "nearest")[0])

# %% [markdown] tags=["zh"]
# **03.3 找错。** 这个 LayerNorm 看起来没问题，相对误差只有千分之几，训练也能收敛，但读别人的权重时层层累积。改好它。

# %% [markdown] tags=["en"]
# **03.3 Find the bug.** This LayerNorm looks right and is off by a few parts in a thousand. A model trained with it converges; with someone else's weights the error adds up over the blocks. Mend it.


# %% tags=["exercise"]
def my_norm(x, weight, bias, eps):
    x = x - x.mean(dim=-1, keepdim=True)
    return x / (x.var(dim=-1, keepdim=True) + eps).sqrt() * weight + bias


norm = vision.norm
expected = F.layer_norm(states[-1], (C,), norm.weight, norm.bias, norm.eps)
check("03.3", my_norm(states[-1], norm.weight, norm.bias, norm.eps), expected)

# %% [markdown] tags=["zh"]
# ## 别人在这里摔过跤
#
# [facebookresearch/dinov2#378](https://github.com/facebookresearch/dinov2/pull/378)：位置表的放大，原来给的是**比例**而不是目标大小，取整之后有时会少一行。例如 224 像素的模型、16 像素的图块、976 像素的图，应当有 61 行，插值出来却是 60 行；早先的代码靠给比例加一个小偏移来躲过去（[facebookresearch/dino#8](https://github.com/facebookresearch/dino/issues/8)），后来改成直接给大小。下面一行可以重现：

# %% [markdown] tags=["en"]
# ## In the wild
#
# [facebookresearch/dinov2#378](https://github.com/facebookresearch/dinov2/pull/378): the position table was resized by a **ratio** instead of to a size, and rounding sometimes lost a row. With a model of 224 pixels, patches of 16 and an image of 976, 61 rows are needed and 60 come out. Earlier code dodged it by adding a small offset to the ratio ([facebookresearch/dino#8](https://github.com/facebookresearch/dino/issues/8)); the change passes the size itself. One line reproduces it:

# %%
ratio = 61 / 14
print("wanted:", 976 // 16, " from the ratio:", math.floor(14 * ratio), " because:", 14 * ratio)

# %% [markdown] tags=["zh"]
# 怎么发现：遍历所有会用到的图片大小，断言图块数等于位置数，不要只试一种大小。
#
# ## 到库里看看
#
# - [`nanovlm/model/vision_encoder.py`](../../nanovlm/model/vision_encoder.py)，`VisionEncoder` 与 `VisionBlock`：本课的全部，再加上寄存器、SwiGLU 以及 SigLIP、CLIP 等家族的差别；`patches` 的 `layer` 参数就是 LLaVA 的 `vision_feature_layer`。
# - [`nanovlm/model/layers.py`](../../nanovlm/model/layers.py)，`LayerNorm` 与 `resize_positions`：库里用两次矩阵乘法做插值，数值和 `F.interpolate` 相同。
#
# 论文：Dosovitskiy 等，2020，*An Image is Worth 16x16 Words*，[arXiv:2010.11929](https://arxiv.org/abs/2010.11929)；Oquab 等，2023，*DINOv2*，[arXiv:2304.07193](https://arxiv.org/abs/2304.07193)；LayerScale：Touvron 等，2021，[arXiv:2103.17239](https://arxiv.org/abs/2103.17239)。

# %% [markdown] tags=["en"]
# How would you notice? Go through all image sizes that you will use and assert that there are as many positions as patches. One size is not enough.
#
# ## Look in the package
#
# - [`nanovlm/model/vision_encoder.py`](../../nanovlm/model/vision_encoder.py), `VisionEncoder` and `VisionBlock`: all of this lesson, with registers, SwiGLU, and what differs in SigLIP, CLIP and others. The `layer` of `patches` is LLaVA's `vision_feature_layer`.
# - [`nanovlm/model/layers.py`](../../nanovlm/model/layers.py), `LayerNorm` and `resize_positions`: the package interpolates by two products of matrices, with the same numbers as `F.interpolate`.
#
# The papers: Dosovitskiy et al. 2020, *An Image is Worth 16x16 Words*, [arXiv:2010.11929](https://arxiv.org/abs/2010.11929); Oquab et al. 2023, *DINOv2*, [arXiv:2304.07193](https://arxiv.org/abs/2304.07193); LayerScale: Touvron et al. 2021, [arXiv:2103.17239](https://arxiv.org/abs/2103.17239).
