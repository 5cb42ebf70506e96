# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["zh"]
# # 01 · 一张图片变成图块
#
# 模型读的是向量，不是图片。这一课走完最前面的一段路：一个 PNG 文件怎样变成 64 个图块（patch），图块又怎样变成 64 个向量。
#
# **进来的**：一个文件，64×64 像素，每个像素 3 个字节。**出去的**：形状为 `(1, 64, 192)` 的 `float32` 张量，即 64 个图块、每个 192 维。

# %% [markdown] tags=["en"]
# # 01 · An image becomes patches
#
# The model reads vectors, not images. This lesson walks the first part of the way: how a PNG file becomes 64 patches, and how the patches become 64 vectors.
#
# **In**: a file of 64×64 pixels, 3 bytes each. **Out**: a `float32` tensor of shape `(1, 64, 192)`: 64 patches, 192 numbers for each.

# %% tags=["setup"]
import sys

sys.path.insert(0, "../..")  # the repository: nanovlm and the drawing helpers

import torch
import torch.nn.functional as F
from PIL import Image

from lessons import draw
from lessons.check import check
from nanovlm import load_model, open_image, preprocess

ASSETS = "../../nanovlm/assets"
torch.manual_seed(0)
draw.strip("image", "patches", "patch vectors")

# %% [markdown] tags=["zh"]
# ## 先猜一猜
#
# 模型自带的图上有一个红色圆环、一颗蓝色五角星和一个橙色三角形。我们把它切成 64 个图块，**打乱顺序**，再拼回去，然后要求模型「描述图片」。
#
# 三个物体里，它还能说对几个？先把数字写下来，最后一节揭晓。

# %% [markdown] tags=["en"]
# ## Predict
#
# The scene that ships with the model shows a red ring, a blue star and an orange triangle. We will cut it into 64 patches, **shuffle** them, put them together again, and ask the model to describe the image.
#
# Of the three objects, how many will it still name correctly? Write the number down now. The last section tells.

# %% [markdown] tags=["zh"]
# ## 一、从文件到数字
#
# 图片解码之后就是一张数字表：每个像素三个 0 到 255 的整数，依次是红、绿、蓝。表的形状是 `(H, W, 3)`，先行后列：`values[18, 44]` 是从上往下第 18 行、从左往右第 44 列，都从 0 数起。

# %% [markdown] tags=["en"]
# ## 1. From a file to numbers
#
# Once decoded, an image is a table of numbers: three whole numbers from 0 to 255 for each pixel, in the order red, green, blue. Its shape is `(H, W, 3)`, rows before columns: `values[18, 44]` is row 18 from the top and column 44 from the left, both counted from 0.

# %%
image = Image.open(f"{ASSETS}/scene.png").convert("RGB")
values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
values = values.view(image.height, image.width, 3)  # (H, W, 3): row, column, colour
print(values.shape, values.dtype)
print("the pixel in row 18, column 44:", values[18, 44].tolist())

# %%
made, axes = draw.figure(4, height=2.3)
draw.picture(axes[0], image, "the image")
for number, name in enumerate(("red", "green", "blue")):
    draw.heat(
        axes[number + 1], values[..., number], f"{name}, 0…255", colours="Greys_r", limits=(0, 255)
    )
    axes[number + 1].set_aspect("equal")
draw.show(made, "An image is three tables of numbers")

# %% [markdown] tags=["zh"]
# 第 18 行第 44 列在蓝色五角星里：红很小，蓝很大。
#
# 整数不适合做输入。网络在训练时习惯了「大致以 0 为中心、幅度约为 1」的数，所以先除以 255，再减去均值、除以标准差。均值和标准差都取 0.5 时，0 变成 −1，255 变成 1。均值和标准差是模型文件的一部分：本模型的三个通道都是 0.5 和 0.5，DINOv2（后面常提到的一个公开的大视觉编码器）用的则是 ImageNet 的统计值。**用错这两组数不会报错**，只会让答案变差。
#
# 还有一处换位：PyTorch 的网络习惯把颜色放在最前面，所以 `(H, W, 3)` 要换成 `(3, H, W)`，再在最前面加上批次这一维。

# %% [markdown] tags=["en"]
# Row 18, column 44 lies inside the blue star: little red, much blue.
#
# Whole numbers make poor inputs. A network is used to numbers around 0 and of about size 1, so each value is divided by 255, then a mean is subtracted and the result divided by a standard deviation. Both belong to the model's files. Here they are 0.5 and 0.5 for all three channels, so 0 becomes −1 and 255 becomes 1. DINOv2, a large public vision encoder that returns in later lessons, uses the statistics of ImageNet. **The wrong pair raises no error**; the answers get worse, that is all.
#
# Networks in PyTorch want the colours first, so `(H, W, 3)` becomes `(3, H, W)`, and a dimension for the batch goes before it.

# %%
mean, std = 0.5, 0.5
pixels = values.permute(2, 0, 1).float()  # (3, H, W): networks want the colours first
pixels = (pixels / 255 - mean) / std
pixels = pixels[None]  # (1, 3, H, W): a batch of one
print(pixels.shape, f"from {pixels.min():.2f} to {pixels.max():.2f}, mean {pixels.mean():.2f}")

# %% [markdown] tags=["zh"]
# ## 二、切成图块
#
# Transformer 处理的是向量序列，所以要把二维的图变成一维的序列。为什么不让每个像素自成一个向量？64×64 是 4096 个像素，注意力要比较每一对（第 02 课），就是一千六百多万对；64 个图块只有 4096 对。ViT 的办法正是切成小方块，这里是 8×8 像素，从左到右、从上到下排成一列。
#
# 64 像素除以 8 是 8，所以一共 8×8 = 64 个图块。每个图块里仍是三个颜色、8 行、8 列。先用最笨的两重循环：

# %% [markdown] tags=["en"]
# ## 2. Cutting into patches
#
# A transformer takes a sequence of vectors, so the grid of pixels has to become a row. The vision transformer does it in the plainest way: it cuts squares of 8×8 pixels and lines them up, left to right and top to bottom.
#
# Why not take each pixel as a vector? The sequence would have 4,096 items instead of 64, and attention (lesson 02) compares every item with every other: 16.8 million pairs instead of 4,096.
#
# First with two loops:

# %%
SIZE = 8  # pixels on a side of a patch
rows, columns = pixels.shape[2] // SIZE, pixels.shape[3] // SIZE
patches = []
for row in range(rows):
    for column in range(columns):
        top, left = row * SIZE, column * SIZE
        patches.append(pixels[:, :, top : top + SIZE, left : left + SIZE])
patches = torch.stack(patches, dim=1)  # (1, P, 3, SIZE, SIZE)
print(patches.shape, "→ a patch is", patches[0, 0].numel(), "numbers")

# %%
made, axes = draw.figure(8, rows=8, height=5.2)
for number, patch in enumerate(patches[0]):
    draw.picture(axes.flat[number], patch * std + mean)
    axes.flat[number].set_title(str(number), fontsize=6, pad=1, color=draw.FAINT)
draw.show(made, "64 patches, in the order in which the model reads them")

# %% [markdown] tags=["zh"]
# 五角星占着图块 5、12 到 14、20 到 22、28 到 30 的一部分，21 号整块都是蓝的。编号除以 8，商是行，余数是列：21 号在第 2 行第 5 列。图块的编号就是它在序列里的位置，**位置信息此刻只存在于顺序之中**。
#
# 循环可以换成三步张量运算，一步一步地看形状：
#
# - `view`：把高拆成「8 行图块 × 块内 8 行像素」，宽也一样，得到 `(1, 3, 8, 8, 8, 8)`，依次是批次、颜色、图块的行、块内的行、图块的列、块内的列。
# - `permute`：挪成批次、图块的行、图块的列、颜色、块内的行、块内的列。
# - `flatten(1, 2)`：图块的行和列合成一维，就是图块的编号。
#
# 光拆不挪是不够的，第四节会看到为什么。

# %% [markdown] tags=["en"]
# The star covers parts of patches 5, 12 to 14, 20 to 22 and 28 to 30; patch 21 is all blue. A patch's number divided by 8 gives its row, and the remainder its column: 21 lies in row 2, column 5, counted from 0. The number is its place in the sequence, and for now **order is the only thing that tells where a patch was**.
#
# The loops can be replaced by three operations on the whole tensor:
#
# - `view` splits the height into 8 rows of patches by 8 rows of pixels, and the width alike: `(1, 3, 8, 8, 8, 8)`, which are batch, colour, row of patches, row of pixels, column of patches, column of pixels.
# - `permute` moves them to batch, row of patches, column of patches, colour, row of pixels, column of pixels.
# - `flatten(1, 2)` joins row and column of patches into one number, the patch's.

# %%
grid = pixels.view(1, 3, rows, SIZE, columns, SIZE)
reshaped = grid.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # (1, P, 3, SIZE, SIZE)
torch.testing.assert_close(reshaped, patches, rtol=0, atol=0)
print("loop = reshape, to the last bit")

# %% [markdown] tags=["zh"]
# ## 三、图块变成向量
#
# 一个图块是 3×8×8 = 192 个数。把它拉平，乘一个矩阵，加一个偏置，就得到它的向量。矩阵是学出来的，所有图块共用同一个：不论图块在左上角还是右下角，都用同样的方式去看。如果每个位置各用一个矩阵，参数就要 64 倍，而且在左上角学会认红色，到了右下角还得从头再学。
#
# 本模型的向量恰好也是 192 维，这只是巧合，两个 192 没有关系。DINOv2 的基础款（ViT-B/14）把 3×14×14 = 588 个数变成 768 维的向量。

# %% [markdown] tags=["en"]
# ## 3. From patches to vectors
#
# A patch is 3×8×8 = 192 numbers. Flattened, multiplied by a matrix and shifted by a bias, it becomes its vector. The matrix is learned, and all patches share it. One matrix a place would take 64 times the parameters, and what the upper left had learned about red, the lower right would have to learn again.
#
# Here the vector has 192 numbers too. That is a coincidence: the first 192 is 3×8×8, the second is the model's width C. In DINOv2's base model, 3×14×14 = 588 numbers become 768.

# %%
model = load_model(f"{ASSETS}/tiny-vlm").float().eval()  # the file holds bfloat16
embedding = model.vision_encoder.patch_embedding
weight, bias = embedding.weight.detach(), embedding.bias.detach()
print("the weights in the file:", tuple(weight.shape))
matrix = weight.flatten(1)  # (C, 3 · SIZE · SIZE)
vectors = patches.flatten(2) @ matrix.T + bias  # (1, P, C)
print("64 vectors:", tuple(vectors.shape), " first numbers:", vectors[0, 0, :3])

# %% [markdown] tags=["zh"]
# 文件里的权重是四维的 `(192, 3, 8, 8)`，因为各家实现都把这一步写成**步长等于核大小的卷积**：卷积核每次跳 8 个像素，正好每个图块只看一次，和「切开再乘矩阵」是同一个运算。

# %% [markdown] tags=["en"]
# In the file the weights have four dimensions, `(192, 3, 8, 8)`, because everyone writes this step as a **convolution whose stride equals its kernel size**. The kernel jumps by 8 pixels, sees each patch once, and so computes the same as cutting and multiplying.

# %%
convolved = F.conv2d(pixels, weight, bias, stride=SIZE)  # (1, C, rows, columns)
convolved = convolved.flatten(2).transpose(1, 2)  # (1, P, C)
print("largest difference, convolution against matrix:", f"{(convolved - vectors).abs().max():.1e}")
torch.testing.assert_close(convolved, vectors, rtol=1e-4, atol=1e-5)

# %%
filters = weight[weight.flatten(1).norm(dim=1).argsort(descending=True)[:24]]
low, high = filters.amin((1, 2, 3), keepdim=True), filters.amax((1, 2, 3), keepdim=True)
made, axes = draw.figure(12, rows=2, height=1.7)
for axis, kernel in zip(axes.flat, (filters - low) / (high - low)):
    draw.picture(axis, kernel)
draw.show(made, "What the matrix looks for: its 24 largest rows as 8×8 images")

# %% [markdown] tags=["zh"]
# 图里的 24 个小方块是矩阵的 24 行：每一行有 192 个数，恰好能摆成一个 8×8 的彩色小图案。图块与它越像，内积越大，那一维的数就越大。大模型里常能看到清楚的色块和边缘；这个小模型的图案很杂，单看一行看不出它在找什么，信息分散在 192 行里。
#
# ## 四、故意弄坏
#
# 最容易犯、又最难发现的错：直接 `reshape`，忘了 `permute`。形状完全正确，不报任何错。

# %% [markdown] tags=["en"]
# The picture shows 24 rows of the matrix. The 192 numbers of a row make a small coloured pattern of 8×8 pixels: the more a patch looks like it, the larger that number of its vector. Large models often show clear colours and edges here. This small one does not: single rows look like noise, and what they find is spread over all 192.
#
# ## 4. Broken on purpose
#
# The easiest mistake and the hardest to notice: a bare `reshape`, without the `permute`. The shape is right, and nothing complains.

# %%
wrong = pixels.reshape(1, rows * columns, 3, SIZE, SIZE)
print("shape of the wrong patches:", tuple(wrong.shape), "— the same as the right ones")
made, axes = draw.figure(16, rows=2, height=1.5)
for number in range(16):
    draw.picture(axes[0, number], patches[0, number + 16] * std + mean)
    draw.picture(axes[1, number], wrong[0, number + 16] * std + mean)
draw.show(made, "Patches 16 to 31: right (above), a bare reshape (below)")

# %% [markdown] tags=["zh"]
# 图的下面一行，每个「图块」其实是同一个颜色通道里 192 个相邻的数，也就是连着的三行像素：`reshape` 只按内存里的顺序切段，而内存里先放完一整个颜色通道，才轮到下一个。于是它把三行像素分别当成了一个图块的红、绿、蓝。训练照样能跑，损失也会下降，只是模型拿到的是一堆碎条。最省事的检查办法就是上面这样：切完之后，把图块画出来看一眼再往下走。上面一行认得出五角星的中段和圆环的上沿，下面一行只有横条。
#
# ## 五、与库代码核对
#
# `nanovlm` 里做同一件事的是 `preprocess` 和视觉编码器的 `patch_embedding`。两边用同样的文件、同样的权重。像素的容差取 1e-6：两边只做了除以 255、减均值、除以标准差这三步。向量的容差是 1e-5 再加上数值的 1e-4：卷积与矩阵乘法的求和顺序不同，`float32` 在最后几位会有差别。

# %% [markdown] tags=["en"]
# Each lower "patch" holds 192 neighbouring numbers of a single colour, three whole rows of pixels: `reshape` cuts the numbers in their order in memory, and there one whole colour comes before the next. It takes the three rows for the red, green and blue of one patch. Training would run, and the loss would fall; what the model gets are shreds. Draw the patches after cutting, as here: above one sees the middle of the star and the top of the ring, below nothing but stripes.
#
# ## 5. Proven equal
#
# In the package, `preprocess` and the vision encoder's `patch_embedding` do this. Both sides get the same file and the same weights. The pixels have to agree within 1e-6, the vectors within 1e-5 plus 1e-4 of their size: a convolution and a product of matrices add up in different orders, which changes the last digits of `float32`.

# %%
theirs = preprocess(open_image(f"{ASSETS}/scene.png"), model.config.image)[None]
torch.testing.assert_close(pixels, theirs, rtol=0, atol=1e-6)
with torch.no_grad():
    expected = embedding(theirs).flatten(2).transpose(1, 2)
torch.testing.assert_close(vectors, expected, rtol=1e-4, atol=1e-5)
print("pixels and patch vectors equal those of the package")

# %% [markdown] tags=["zh"]
# ## 六、打乱图块
#
# 现在回到开头的问题。先写一个函数 `assemble`，把图块放回原位。它是第二节那三步的逆运算：先拆开图块的行和列，再挪，再合并。再写一个 `describe`，让整个模型看图说话。`prepare` 和 `generate` 是库里的函数，这里先当作黑盒：前者把问题和图片备成一个批次（第 05 课），后者一个 token 一个 token 地写出回答（第 10 课）。每次只换 `batch.pixels`，问题不变，所以回答的变化只能来自图片。

# %% [markdown] tags=["en"]
# ## 6. Shuffle the patches
#
# Back to the question at the top. First a function that puts patches back into an image (the reverse of section 2), then the model's answers. `prepare` and `generate`, which ask the model, are the subject of lessons 05 and 10; here they only have to work. The question stays, and only `batch.pixels` changes, so a change in the answer can come from the image alone.
#
# The model answers in Chinese. You need these: 描述图片 "describe the image"; 图中有三个物体 "there are three objects in the image"; 从左到右是 "from left to right"; 大的 big, 小的 small; 红色圆环 red ring, 蓝色五角星 blue star, 橙色三角形 orange triangle.

# %%
from nanovlm import IMAGE, Message, generate, prepare


def assemble(patches):
    """(1, P, 3, SIZE, SIZE) → (1, 3, H, W)."""
    grid = patches.unflatten(1, (rows, columns))
    return grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def describe(pixels):
    question = [Message("user", [IMAGE, "描述图片"])]
    batch = prepare(model, [question], [[image]], add_generation_prompt=True)
    batch.pixels = pixels
    return model.tokenizer.decode(generate(model, batch, 60)[0])


assert torch.equal(assemble(patches), pixels)
order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
shuffled = assemble(patches[:, order])
print("whole:   ", describe(pixels))
print("shuffled:", describe(shuffled))

# %% [markdown] tags=["zh"]
# 图块一个不少，颜色一个不差，只是位置变了。一次打乱可能是运气，所以换 20 个随机种子，数一数三个物体平均说对几个。另外再试一种破坏：图不动，把**位置表**清零。位置表给每个位置一个向量，加在图块向量上；编码器只靠它知道一个图块「在哪里」。

# %% [markdown] tags=["en"]
# Every patch is still there, every colour too; only the places changed. One shuffle may be luck, so here are 20 seeds, and the mean number of objects named right. The shuffled answer above, with seed 1, has a red ring, which is right, and a blue ring and a blue triangle, which are not. And one more way to break it: leave the image alone and set the **position table** to zero. The table holds one vector for each place, which is added to the patch's vector; it is all that tells the encoder where a patch lies.


# %%
def named(answer):
    return sum(thing in answer for thing in ("红色圆环", "蓝色五角星", "橙色三角形"))


counts = []
for seed in range(20):
    order = torch.randperm(64, generator=torch.Generator().manual_seed(seed))
    answer = describe(assemble(patches[:, order]))
    counts.append(named(answer))
    if seed < 3:
        print(f"seed {seed}: {counts[-1]} of 3  {answer}")
print("objects named right, seeds 0 to 19:", counts)

# %%
table = model.vision_encoder.position_embedding
kept = table.detach().clone()
with torch.no_grad():
    table.zero_()
without_positions = describe(pixels)
with torch.no_grad():
    table.copy_(kept)
print(f"no position table: {named(without_positions)} of 3  {without_positions}")

# %%
means = {
    "whole": named(describe(pixels)),
    "shuffled,\n20 seeds": sum(counts) / 20,
    "no position\ntable": named(without_positions),
}
made, axes = draw.figure(3, height=2.9, width_ratios=(1, 1, 2))
draw.picture(axes[0], pixels[0] * std + mean, "whole")
draw.picture(axes[1], shuffled[0] * std + mean, "shuffled")
draw.bars(axes[2], means, "objects named right", "of 3", ["right", "wrong", "wrong"], ".2f")
draw.show(made, "The same patches in another order are another image")

# %% [markdown] tags=["zh"]
# 答案如上：完整的图说对 3 个；打乱之后，20 个种子一共说对 23 个，平均约 1 个，多数种子恰好是 1 个。形状是图块之间的**关系**，颜色在单个图块里就能看到，所以打乱以后颜色常常还在，形状却变了：打印出来的三个回答里，颜色都是图中有的，12 个物体却有 7 个的形状配不上它的颜色。说对的也不全是看出来的：三个回答里都有「红色圆环」，也许只是它爱这么说。没有位置表时像素一个没动，编码器却分不清图块各在哪里，结果同样很糟：只说对 1 个。
#
# 请注意最后的 19 号种子，20 次里就它 3 个全对。只试一个种子，碰巧就可能得出「打乱也没关系」的结论，所以这门课里凡是靠运气的数，都多试几次。
#
# ## 练习
#
# 每格最后一行的 `check` 会告诉你差多少：`exact`（完全一致）、`close`（接近）或 `not yet`（还没有）。它从不中断运行。

# %% [markdown] tags=["en"]
# That is the answer: 3 for the whole image, and 1.15 on average once shuffled (23 hits in 20 shuffles). Even that is partly luck: all three answers printed above say "red ring", so some of the hits may be habit. And seed 19 gets all three. Whoever had tried that seed alone would have concluded that the order does not matter; this is why, in these lessons, what depends on chance is tried several times. A shape is a **relation** between patches, while a colour can be seen within one. So in the three answers every colour is one of the image's, and 7 of the 12 shapes do not go with it. Without the position table not one pixel changed, yet the encoder cannot tell where each patch lies, and the answer is as bad: 1 of 3.
#
# ## Exercises
#
# The `check` at the end of each cell says how far off an answer is: `exact`, `close` or `not yet`. It never stops the notebook.

# %% [markdown] tags=["zh"]
# **01.1 补一行。** DINOv2 用 14×14 的图块。边长 224 像素的图会变成多少个图块？用 `side` 和 `patch` 写成一个式子。

# %% [markdown] tags=["en"]
# **01.1 Fill in a line.** DINOv2 takes patches of 14×14. How many patches does an image of 224×224 become? Write it as an expression of `side` and `patch`.

# %% tags=["exercise"]
side, patch = 224, 14
count = ...
check("01.1", count, 256)

# %% [markdown] tags=["zh"]
# **01.2 换一种写法。** `F.unfold` 可以一次取出所有滑动窗口，返回 `(1, 3·8·8, P)`，只要核与步长都取 `SIZE`。用它得到 `vectors`。

# %% [markdown] tags=["en"]
# **01.2 Another way.** `F.unfold` takes out all windows at once and returns `(1, 3·8·8, P)`, when its kernel and its stride are both `SIZE`. Compute `vectors` with it.

# %% tags=["exercise"]
by_unfold = ...
check("01.2", by_unfold, vectors, tolerance=1e-4)

# %% [markdown] tags=["zh"]
# **01.3 找错。** 下面的函数想把归一化还原成 0 到 255 的整数，但还原出来的数不对，最多差了一百多。改好它。

# %% [markdown] tags=["en"]
# **01.3 Find the bug.** This function is to undo the normalisation and give whole numbers from 0 to 255, but its numbers are off, some by more than a hundred. Mend it.


# %% tags=["exercise"]
def to_bytes(pixels):
    return (pixels * std * 255 + mean).round().to(torch.uint8)


check("01.3", to_bytes(pixels)[0].permute(1, 2, 0), values)

# %% [markdown] tags=["zh"]
# ## 别人在这里摔过跤
#
# [haotian-liu/LLaVA#591](https://github.com/haotian-liu/LLaVA/issues/591)：有人问 LLaVA-1.5 把裁剪换成补边以后，推理时是不是也必须补边。作者的回答是：训练和评测都补边，免得裁掉有用的信息；代价是整张图被缩得更小，那是另一种信息损失。怎么发现这种不一致？把训练和推理各自送进编码器的 `pixels` 存下来画一画，或者直接比较：同一张图，两条路，应当处处相等，就像第五节那样。
#
# ## 到库里看看
#
# - [`nanovlm/inputs/image.py`](../../nanovlm/inputs/image.py)，`open_image` 与 `preprocess`：本课略去了损坏的文件、透明度、EXIF 方向和缩放。
# - [`nanovlm/model/vision_encoder.py`](../../nanovlm/model/vision_encoder.py)，`VisionEncoder`：位置表加在哪里、图片大小变了怎么办（第 03 课）。
#
# 论文：Dosovitskiy 等，2020，*An Image is Worth 16x16 Words*，[arXiv:2010.11929](https://arxiv.org/abs/2010.11929)。

# %% [markdown] tags=["en"]
# ## In the wild
#
# [haotian-liu/LLaVA#591](https://github.com/haotian-liu/LLaVA/issues/591): LLaVA-1.5 had changed from cropping images to padding them, and someone asked whether inference has to pad too. The author's answer: both training and evaluation pad, so that nothing useful is cut off; the price is an image scaled down further, another loss of information. How would you notice that the two sides differ? Save the `pixels` that each sends to the encoder and compare them, as section 5 does: one image, two ways, equal everywhere.
#
# ## Look in the package
#
# - [`nanovlm/inputs/image.py`](../../nanovlm/inputs/image.py), `open_image` and `preprocess`: this lesson left out damaged files, transparency, EXIF orientation and resizing.
# - [`nanovlm/model/vision_encoder.py`](../../nanovlm/model/vision_encoder.py), `VisionEncoder`: where the position table is added, and what happens when the image has another size (lesson 03).
#
# The paper: Dosovitskiy et al. 2020, *An Image is Worth 16x16 Words*, [arXiv:2010.11929](https://arxiv.org/abs/2010.11929).
