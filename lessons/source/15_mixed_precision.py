# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["zh"]
# # 15 · 混合精度
#
# 显卡算 16 位的矩阵乘法，比 32 位快得多，也省一半内存。但 16 位的数要么不够细，要么不够宽。这一课先看清 fp32、fp16、bf16 各有哪些数，再手写让训练照样成功的四样东西：fp32 主权重、自动混合精度（autocast）、损失缩放（loss scaling）和随机舍入（stochastic rounding）。
#
# **进来的**：`float32` 的权重和一个批次。**出去的**：用 16 位算出的损失，和一份仍然可用的 `float32` 梯度。

# %% [markdown] tags=["en"]
# # 15 · Mixed precision
#
# GPUs multiply matrices of 16-bit numbers much faster than of 32-bit ones, in half the memory. But 16-bit numbers are either not fine enough or do not reach far enough. This lesson looks at which numbers fp32, fp16 and bf16 have. Then it writes by hand the four things that make training work all the same: fp32 weights, autocast, loss scaling and stochastic rounding.
#
# **In**: `float32` weights and a batch. **Out**: a loss computed in 16 bits, and a `float32` gradient that can still be used.

# %% tags=["setup"]
import math
import sys

sys.path.insert(0, "../..")  # the repository: nanovlm and the drawing helpers

import torch
import torch.nn.functional as F
from matplotlib.patches import Rectangle

from lessons import draw
from lessons.check import check
from nanovlm import IMAGE, Message, load_model, open_image, prepare

ASSETS = "../../nanovlm/assets"
torch.manual_seed(0)
draw.strip("hidden states", "logits")

# %% [markdown] tags=["zh"]
# ## 先猜一猜
#
# 从 1.0 开始，加 0.001，加一千次，每次的和都存成 bf16。结果是多少？精确的答案是 2。先写下一个数，第二节揭晓。

# %% [markdown] tags=["en"]
# ## Predict
#
# Start at 1.0 and add 0.001, a thousand times. Each sum is stored in bf16. What is the result? The exact one is 2. Write a number down; section 2 tells.

# %% [markdown] tags=["zh"]
# ## 一、三种格式的比特
#
# 浮点数是二进制的科学记数法：一位符号，几位指数，几位尾数。指数的位数决定够得多远，尾数的位数决定有多细。把内存里的比特原样读出来：

# %% [markdown] tags=["en"]
# ## 1. The bits of three formats
#
# A floating-point number is scientific notation in binary: one bit for the sign, some for the exponent, some for the fraction. The exponent's bits decide how far the format reaches, the fraction's how fine it is. Read the bits as they lie in memory:

# %%
FORMATS = {  # dtype, an integer type of the same size, bits of the exponent
    "fp32": (torch.float32, torch.int32, 8),
    "fp16": (torch.float16, torch.int16, 5),
    "bf16": (torch.bfloat16, torch.int16, 8),
}


def bits(value, name):
    dtype, integer, _ = FORMATS[name]
    size = torch.finfo(dtype).bits
    pattern = torch.tensor(value).to(dtype).view(integer).item() % 2**size
    return format(pattern, f"0{size}b")


for name, (dtype, _, _) in FORMATS.items():
    info, stored = torch.finfo(dtype), torch.tensor(0.1).to(dtype).item()
    print(f"{name}: largest {info.max:.3g}, smallest normal {info.tiny:.2g},", end=" ")
    print(f"step at 1: {info.eps:.2g}, 0.1 is stored as {stored:.10f}")

# %%
made, axis = draw.figure(height=2.2)
for row, (name, (_, _, exponent)) in enumerate(FORMATS.items()):
    axis.text(-0.4, -row + 0.35, name, ha="right", va="center", fontweight="bold")
    for place, bit in enumerate(bits(0.1, name)):
        part = "word" if place == 0 else "projector" if place <= exponent else "language"
        box = Rectangle((place, -row), 0.9, 0.7, fc=draw.PALE[part], ec=draw.STRONG[part])
        axis.add_patch(box)
        axis.text(place + 0.45, -row + 0.33, bit, ha="center", va="center", fontsize=8)
axis.set(xlim=(-3, 32.2), ylim=(-2.2, 1.0))
axis.axis("off")
draw.show(made, "0.1 in memory: sign (grey), exponent (orange), fraction (blue)")

# %% [markdown] tags=["zh"]
# 先读一个数。第三行的指数 01111011 是 123，减去 127 得 −4；尾数 1001101 是 77；所以存下的是 2⁻⁴ × (1 + 77/128) = 0.10009766，正是上面打印的 0.1 的 bf16。
#
# 再看第一行和第三行：**bf16 就是 fp32 砍掉低 16 位**（外加舍入），指数一样长，所以够得一样远，但尾数只有 7 位。fp16 的尾数有 10 位，细 8 倍，可指数只有 5 位：大于 65504 就溢出；最小的正数约 6e-8，不到它一半的就成了零。一个不够细，一个不够宽。
#
# 用整数运算手写 fp32 → bf16：留下高 16 位，低 16 位过半就进一（恰好一半时取偶）。

# %% [markdown] tags=["en"]
# Read one number first. In the third row the exponent 01111011 is 123, less 127 makes −4; the fraction 1001101 is 77; so what is stored is 2⁻⁴ × (1 + 77/128) = 0.10009766, the 0.1 of bf16 printed above.
#
# Compare the first row and the third: **bf16 is fp32 with its lower 16 bits cut off** (and rounded). The exponent is as long, so it reaches as far, but only 7 bits of fraction are left. fp16 has 10, which is 8 times finer, but only 5 bits of exponent: above 65504 it overflows; its smallest positive number is about 6e-8, and what is less than half of that becomes 0. One is not fine enough, the other not wide enough.
#
# Rounding from fp32 to bf16 by hand, with whole numbers: keep the upper 16 bits, and carry one if the lower 16 are more than half (at exactly half, to even).


# %%
def to_bf16(values):
    pattern = values.view(torch.int32)
    to_even = (pattern >> 16) & 1
    rounded = (pattern + 0x7FFF + to_even) & -(2**16)  # the lower 16 bits become zero
    return rounded.view(torch.float32)


values = torch.randn(100_000) * torch.logspace(-20, 20, 100_000)
torch.testing.assert_close(to_bf16(values), values.bfloat16().float(), rtol=0, atol=0)
print(tuple(values.shape), "numbers from 1e-20 to 1e20: to_bf16 is .bfloat16(), to the last bit")

# %% [markdown] tags=["zh"]
# ## 二、加一千次 0.001
#
# 现在揭晓开头的问题。同时试一种奇怪的舍入：不取最近的，而是**随机**向上或向下，离哪边近，取哪边的机会就大。例如 1.001 夹在 1.0 和 1.0078 之间，走了约 13% 的路，就有 13% 的机会进到 1.0078；平均起来正好是 1.001。做法很巧：给低 16 位加一个 0 到 65535 的随机数，再砍掉，进位就以恰好的概率发生，一次判断也不用做。

# %% [markdown] tags=["en"]
# ## 2. Adding 0.001 a thousand times
#
# Now the question at the top. Beside it, a strange way of rounding: not to the nearest number but up or down **at random**, the more often to a side the nearer it is. 1.001 lies between 1.0 and 1.0078, about 13% of the way, so it has a chance of 13% to become 1.0078; on average it is 1.001. The trick is short. Add a random number from 0 to 65535 to the lower 16 bits and cut them off. The carry happens with exactly the right probability.


# %%
def stochastic_round(values):
    noise = torch.randint(2**16, values.shape, dtype=torch.int32)
    return ((values.view(torch.int32) + noise) & -(2**16)).view(torch.float32).bfloat16()


def add_up(store, steps=1000):
    total, totals = torch.tensor([1.0]), []
    for _ in range(steps):
        total = store(total + 0.001).float()  # the sum itself in fp32, then stored
        totals.append(total.item())
    return totals


curves = {"fp32": add_up(torch.Tensor.float), "fp16": add_up(torch.Tensor.half)}
curves["bf16, nearest"] = add_up(torch.Tensor.bfloat16)
for seed in range(5):
    torch.manual_seed(seed)
    curves[f"bf16, stochastic {seed}"] = add_up(stochastic_round)
print({name: round(values[-1], 4) for name, values in curves.items()})

# %%
made, axis = draw.figure(height=3.0)
shown = ["word", "projector", "wrong", *["right"] * 5]
for (name, values), part in zip(curves.items(), shown):
    first = "stochastic" not in name or name.endswith("0")
    label = name.removesuffix(" 0") if first else None
    axis.plot(values, color=draw.STRONG[part], label=label, linewidth=2 if part == "wrong" else 1.2)
axis.set(xlabel="additions of 0.001", ylabel="sum")
axis.legend(frameon=False)
draw.show(made, "In bf16 the sum never leaves 1.0; rounded at random it is right on average")

# %% [markdown] tags=["zh"]
# 最近舍入的 bf16 **一步也没动**：1 上方的下一个 bf16 数是 1.0078，两者的中点是 1.0039，加 0.001 还没到中点，每次都退回 1.0。误差不是慢慢积累的，而是更新被整个吞掉，所以答案是 1.0。fp16 够细，只是每步都偏一点，而且全偏向同一侧。随机舍入的每一步都很粗，但平均不偏，五个种子散布在 2 的两侧，从 1.91 到 2.16。
#
# 训练里的更新正是这样的小数加在大数上。AdamW 的一步约等于学习率（第 14 课）。如果权重只用 bf16 存放，自带模型有多少权重会纹丝不动？

# %% [markdown] tags=["en"]
# The answer is 1.0. Rounded to nearest, bf16 **did not move once**. The next bf16 number above 1 is 1.0078, and 0.001 is less than half of the way, so each sum falls back to 1.0. This is no error that slowly adds up; the update is swallowed whole. fp16 is fine enough, but each of its steps is off a little, always to the same side. Stochastic rounding is coarse in every single step and unbiased on average: the five seeds scatter around 2, from 1.91 to 2.16.
#
# Training is exactly this, small updates added to larger weights. A step of AdamW is about one learning rate (lesson 14). If weights were kept in bf16 alone, how many of the shipped model's would not move at all?

# %%
model = load_model(f"{ASSETS}/tiny-vlm").float().eval()  # the file holds bfloat16
matrices = [each for each in model.language_model.parameters() if each.dim() == 2]
weights = torch.cat([each.detach().flatten() for each in matrices])  # (n,)
print("weights (n,):", tuple(weights.shape), f"typical size {weights.abs().median():.3f}")
signs = torch.randint(2, weights.shape) * 2 - 1.0  # up or down by one learning rate
still = {}
for lr in (1e-5, 1e-4, 1e-3):
    still[f"lr {lr:g}\nnearest"] = 100 * (to_bf16(weights + lr * signs) == weights).float().mean()
    moved = (stochastic_round(weights + lr * signs).float() - weights) * signs
    print(f"lr {lr:g}: mean move with stochastic rounding {moved.mean():.2e}")
made, axis = draw.figure(height=2.7)
draw.bars(axis, still, "", "% of weights", ["wrong"] * 3, ".1f")
draw.show(made, "Weights that one AdamW step would not move, if they were kept in bf16")

# %% [markdown] tags=["zh"]
# 学习率 1e-5（微调大模型时常用），97.7% 的权重根本不动；随机舍入下，平均移动约等于学习率（打印的三行）。所以通常的办法是：**可训练的参数用 fp32 存放，只在做乘法时临时转成 16 位**。更新加在 fp32 上，不会整个丢掉。
#
# 账要算清楚。全用 fp32 时，每个可训练参数要 4 字节存自己、4 字节存梯度、8 字节存 AdamW 的两个动量，共 16 字节。autocast 并不减少这 16 字节：它省的是激活（activation）的内存，快的是矩阵乘法。要减少参数本身的内存，得把权重存成 bf16，那时梯度也是 bf16，共 2 + 2 + 8 = 12 字节，代价是必须随机舍入。冻结的参数没有更新可丢，直接存成 16 位即可。
#
# ## 三、手写 autocast
#
# 「临时转成 16 位」就是 autocast：存的是 fp32，算的是 16 位。拿语言模型第一层的 MLP 来试：每个矩阵乘法之前，输入和权重都转成 bf16。转换本身可导，梯度回来时又成为 fp32，所以优化器不用改一个字。

# %% [markdown] tags=["en"]
# At 1e-5, a usual rate for fine-tuning large models, 97.7% of the weights do not move at all. With stochastic rounding the mean move is the learning rate. The usual answer is therefore: **trainable parameters stay in fp32 and are cast to 16 bits only for each product**. Updates are added in fp32, and none is swallowed.
#
# What does it cost? All in fp32, a trainable parameter takes 4 bytes for itself, 4 for its gradient and 8 for AdamW's two moments: 16 in all. Autocast does not lower these 16. It saves memory of activations, and time in matrix products. To save memory of parameters, weights have to be kept in bf16; then gradients are bf16, too, which makes 2 + 2 + 8 = 12 bytes, and rounding has to be stochastic. Frozen parameters have no updates to lose and are stored in 16 bits right away.
#
# ## 3. Autocast by hand
#
# "Cast only for each product" is autocast. Take the MLP of the language model's first block. Before every matrix product, input and weight are cast to bf16. The cast is differentiable, and on its way back the gradient becomes fp32 again, so not a word of the optimizer has to change.

# %%
mlp = model.language_model.blocks[0].mlp


def linear(inputs, layer, dtype=torch.bfloat16):
    return F.linear(inputs.to(dtype), layer.weight.to(dtype))


def mlp_by_hand(inputs):
    return linear(
        F.silu(linear(inputs, mlp.gate_proj)) * linear(inputs, mlp.up_proj), mlp.down_proj
    )


hidden_states = torch.randn(1, 8, 192)
mine = mlp_by_hand(hidden_states)
with torch.autocast("cpu", dtype=torch.bfloat16):
    theirs = mlp(hidden_states)
torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
mine.float().square().sum().backward()
print("equal to the last bit:", tuple(mine.shape), mine.dtype)
print("weight:", mlp.up_proj.weight.dtype, " its gradient:", mlp.up_proj.weight.grad.dtype)

# %% [markdown] tags=["zh"]
# 这里容差为零：做的是同样的运算，连舍入的位置都一样。打印的最后一行是这个办法的要点：权重是 fp32，它的梯度也是 fp32。autocast 主要管矩阵乘法。归一化里的平方和、损失里的 log-sum-exp 这类把许多数加起来的运算，仍在 fp32 里做：第二节说过，大的和再加小的数，正是 16 位最怕的事。
#
# ## 四、fp16：消失的梯度
#
# 换成 fp16 会怎样？拿那张熟悉的图，问「描述图片」，答案全对。先看 fp32 的梯度有多大：

# %% [markdown] tags=["en"]
# The tolerance is zero here: the operations are the same and round in the same places. The last line printed is the point: the weight is fp32, and so is its gradient. Autocast is mostly about matrix products. What adds up many numbers, such as the squares in a norm or the log-sum-exp of the loss, is still done in fp32: section 2 showed that a small number added to a large sum is what 16 bits do worst.
#
# ## 4. fp16: gradients that vanish
#
# And in fp16? Take the scene of all lessons, ask 描述图片 ("describe the image"), and give the right answer. First, how large are the gradients in fp32?

# %%
model.vision_encoder.requires_grad_(False)
parameters = [each for each in model.parameters() if each.requires_grad]
answer = "图中有三个物体，从左到右是：大的红色圆环、大的蓝色五角星、小的橙色三角形。"
asked = [Message("user", [IMAGE, "描述图片"]), Message("assistant", [answer])]
batch = prepare(model, [asked], [[open_image(f"{ASSETS}/scene.png")]])


def gradients(dtype, scale=1.0):
    for parameter in parameters:
        parameter.grad = None
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        loss = model(batch) / len(batch.targets)
    (loss * scale).backward()
    return torch.cat([each.grad.flatten() for each in parameters])


exact = gradients(torch.float32)
print("all gradients in one vector:", tuple(exact.shape), f"norm {exact.norm():.2e}")

# %%
made, axis = draw.figure(height=2.8)
axis.hist(exact.abs().clamp(min=1e-14).log10(), bins=80, color=draw.LANGUAGE)
top = axis.get_ylim()[1] * 0.93
for exponent, name, side in (
    (-24, "smallest fp16 ", "right"),
    (-14, " smallest normal fp16", "left"),
):
    axis.axvline(exponent * math.log10(2), color=draw.WRONG, linestyle="--")
    axis.text(exponent * math.log10(2), top, name, color=draw.WRONG, ha=side)
axis.set(xlabel="log10 of the size of a gradient", ylabel="parameters", xlim=(-14, -1))
draw.show(made, "A well-trained model has small gradients, too small for fp16")

# %%
for dtype in (torch.bfloat16, torch.float16):
    got = gradients(dtype)
    zeros, error = (got == 0).float().mean(), (got - exact).norm() / exact.norm()
    print(f"{dtype}: {zeros:6.1%} of the gradients are zero, relative error {error:.3f}")

# %% [markdown] tags=["zh"]
# 注意左边那条线左侧的部分：它们在 fp16 里没有对应的数，不到那条线一半的舍成零，过半的凑成最小的那个数。打印的 19.9% 就是成了零的。参数的梯度虽然存成 fp32，却是由 fp16 的中间结果算出来的；中间结果一旦成了零，转回 fp32 也还是零。于是没有任何报错，反向却悄悄坏了。前向的数大多在 1 上下，fp16 装得下；太小的是反向的数。结果是：一大批梯度变成零，剩下的有不少落在两条线之间，成了「非正规数」，丢了精度。相对误差是 0.68，bf16 只有 0.05。模型训练得越好，损失越小，梯度越小，这个问题就越严重；所以它常在训练顺利时才出现。bf16 没有这个问题，它够得和 fp32 一样远；它的误差来自粗糙，与大小无关。
#
# ## 五、损失缩放
#
# 反向传播是线性的：损失乘以 S，所有梯度都乘以 S。于是先乘后除，让小数越过门槛。S 用 2 的幂：乘它、除它都只改指数，尾数一位也不动，没有新的舍入误差。S 取多大？从 1 试到 2 的 36 次方：

# %% [markdown] tags=["en"]
# Look at the part left of the left line: fp16 has no numbers there, and rounds what is below half of that line to zero, the rest up to its smallest number. Gradients of parameters are stored in fp32, but they are computed from intermediate results in fp16, and a zero stays a zero when it is cast back. So the backward pass is quietly broken, and nothing complains; the numbers of the forward pass are mostly near 1, where fp16 is at ease. 19.9% of the gradients became zero, and many others lost digits between the two lines, below the smallest normal number. The relative error is 0.68, against 0.05 with bf16. The better a model is trained, the smaller its loss and its gradients, and the worse this gets. It can appear late, in a run that goes well. bf16 has no such trouble, since it reaches as far as fp32. Its error comes from coarseness, whatever the size.
#
# ## 5. Loss scaling
#
# The backward pass is linear: multiply the loss by S, and every gradient is multiplied by S. So multiply first and divide afterwards, and small numbers clear the threshold. S is a power of two, because then both change the exponent alone, without another rounding. How large is a good S? From 1 to 2 to the power of 36:

# %%
powers = list(range(0, 37, 3))
errors = []
for power in powers:
    got = gradients(torch.float16, 2.0**power) / 2.0**power
    errors.append(((got - exact).norm() / exact.norm()).item())  # nan after an overflow
fine = [power for power, error in zip(powers, errors) if math.isfinite(error)]
made, axis = draw.figure(height=2.8)
axis.plot(powers, errors, "o-", color=draw.LANGUAGE)
axis.axvspan(fine[-1] + 1.5, 37, color=draw.PALE["wrong"])
axis.text(36.5, max(errors[:3]), "overflow", color=draw.WRONG, ha="right", va="top")
axis.set(xlabel="log2 of the scale", ylabel="relative error of the gradient", yscale="log")
draw.show(made, "Too small a scale loses gradients, too large a scale overflows")
small = [power for power, error in zip(powers, errors) if error < 0.005]
print(f"error below 0.5%: from 2^{small[0]} to 2^{small[-1]}")

# %% [markdown] tags=["zh"]
# 从 2 的 9 次方到 27 次方，误差都不到 0.5%，可取的范围很宽。难处在于训练中梯度的大小会变，边界也跟着动。所以让 S 自己去找：溢出就扔掉这一步、S 减半；连续若干步没事就加倍。

# %% [markdown] tags=["en"]
# A wide range in the middle works, here from 2⁹ to 2²⁷, with an error below 0.5%. The difficulty is that gradients change in size during training, and the borders move. So let S find its own value: after an overflow drop the step and halve S; after a number of good steps double it.


# %%
class LossScaler:
    def __init__(self, scale=2.0**16, growth_interval=1000):
        self.scale, self.growth_interval, self.good_steps = scale, growth_interval, 0

    @torch.no_grad()
    def unscale(self, parameters):  # True if the step may be taken
        for parameter in parameters:
            parameter.grad /= self.scale
        finite = all(bool(parameter.grad.isfinite().all()) for parameter in parameters)
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.scale = max(self.scale / 2, 1.0)
        elif self.good_steps % self.growth_interval == 0:
            self.scale *= 2
        return finite


# %% [markdown] tags=["zh"]
# ## 六、与库代码核对
#
# 从过大的 2 的 36 次方出发，每两步加倍（好让它在几步里露出全部行为；库的默认是 1000 步），与库的 `LossScaler` 并排走 14 步。除以 2 的幂没有舍入，所以容差为零。随机舍入也用同一个种子核对。

# %% [markdown] tags=["en"]
# ## 6. Proven equal
#
# Start at 2 to the power of 36, too large, and double after every 2 good steps, so that a few steps show all of its behaviour (the package waits for 1,000). It runs for 14 steps beside the package's `LossScaler`. Dividing by a power of two changes the exponent alone, so the tolerance is zero. Stochastic rounding is compared with the same seed.

# %%
from nanovlm.training import precision
from nanovlm.training.optim import adamw

scaler, other, scales, taken = LossScaler(2.0**36, 2), precision.LossScaler(2.0**36, 2), [], []
for _ in range(14):
    scales.append(scaler.scale)
    scaled = gradients(torch.float16, scaler.scale)
    copies = [torch.nn.Parameter(each.detach().clone()) for each in parameters]
    for copied, parameter in zip(copies, parameters):
        copied.grad = parameter.grad.clone()
    taken.append(scaler.unscale(parameters))
    assert taken[-1] == other.unscale(copies) and vars(scaler) == vars(other)
    both = ([each.grad for each in group] for group in (parameters, copies))
    torch.testing.assert_close(*both, rtol=0, atol=0, equal_nan=True)

# %%
torch.manual_seed(7)
rounded = stochastic_round(weights)
torch.manual_seed(7)
assert torch.equal(rounded, adamw.stochastic_round(weights))
print("scaler, gradients and stochastic rounding: equal to the package's")

# %%
made, axis = draw.figure(height=2.5)
heights = [math.log2(scale) for scale in scales]
axis.step(range(14), heights, where="mid", color=draw.FAINT, linewidth=0.8)
for good, marker, colour in ((True, "o", draw.RIGHT), (False, "x", draw.WRONG)):
    chosen = [step for step in range(14) if taken[step] == good]
    label = "step taken" if good else "overflow, step dropped"
    axis.plot(chosen, [heights[step] for step in chosen], marker, color=colour, label=label)
axis.set(xlabel="step", ylabel="log2 of the scale")
axis.legend(frameon=False)
draw.show(made, "The scaler falls to where nothing overflows, and tries higher from time to time")

# %% [markdown] tags=["zh"]
# 被扔掉的步不是故障。每次加倍都是一次试探，试过了头就白算一步，换来的是尽可能大的缩放。连续几十步都在溢出，才是真出了事：缩放一路减半到 1，还在溢出，那就是梯度本身已经不是有限的数了。另外，每一步都要问一遍「有没有溢出」，显卡就得停下来等这个答案；bf16 不需要缩放，也就不需要等，这是它如今更常用的原因之一。怎样选？显卡支持 bf16 就用 bf16；只支持 fp16 的老卡，才要配上损失缩放。
#
# **故意弄坏：先裁剪，后还原。** 缩放过的梯度要先除回来，才能裁剪（第 14 课）。把两步颠倒：

# %% [markdown] tags=["en"]
# A dropped step is no fault: the scaler tries a larger scale, loses one step, and so keeps the scale as large as it can be. Dozens of overflows in a row would be a fault: when the scale has been halved down to 1 and still overflows, the gradients themselves are not finite. And each step has to ask whether there was an overflow, so the GPU waits for the answer. bf16 needs no scaling and no waiting, one reason why it is used more often today. Which to choose? bf16 where the GPU has it; fp16 with a scaler on older ones that have nothing else.
#
# **Broken on purpose: clip first, unscale later.** Scaled gradients have to be divided again before they are clipped (lesson 14). The other way round:


# %%
def clip(gradient, largest=1.0):
    return gradient * (largest / gradient.norm()).clamp(max=1)


scale = 2.0**16
scaled = gradients(torch.float16, scale)
print(f"norm of the true gradient:  {exact.norm():.2e}")
print(f"unscale, then clip:         {clip(scaled / scale).norm():.2e}")
print(f"clip, then unscale:         {(clip(scaled) / scale).norm():.2e}")

# %% [markdown] tags=["zh"]
# 缩放过的梯度，范数是原来的 65,536 倍，几乎总是超过阈值 1，于是先被裁到 1，再除一次，不管原来多大，都只剩 1/65536。AdamW 会把它放大回来，所以训练照样进行，只是每一步都被「裁」了，`eps` 也不再可以忽略；换成 SGD 就几乎不动。没有任何报错。
#
# ## 练习

# %% [markdown] tags=["en"]
# The scaled gradient has 65,536 times the norm and nearly always exceeds the threshold of 1. So it is clipped to 1 and then divided: in the wrong order the norm comes out as 1/65536, however large the gradient was. AdamW magnifies it again, so training goes on. But now every step is "clipped", and `eps` no longer counts for nothing. With SGD hardly anything would move. Nothing complains.
#
# ## Exercises

# %% [markdown] tags=["zh"]
# **15.1 补一行。** bf16 在 1 处的间距是 `torch.finfo(torch.bfloat16).eps`，即 1/128。1000 附近的间距是多少？（1000 在 512 与 1024 之间。）

# %% [markdown] tags=["en"]
# **15.1 Fill in a line.** The step of bf16 at 1 is `torch.finfo(torch.bfloat16).eps`, 1/128. How large is the step near 1000? (1000 lies between 512 and 1024.)

# %% tags=["exercise"]
step_at_1000 = ...
check("15.1", step_at_1000, 4.0)

# %% [markdown] tags=["zh"]
# **15.2 改一个行为。** 还有一种不靠随机的办法：另存一个 bf16 的数 `lost`，记下舍入丢掉的部分，下次加回去（Kahan 求和）。补上一行，让一千次之后得到 2。

# %% [markdown] tags=["en"]
# **15.2 Change a behaviour.** There is a way without chance: a second bf16 number, `lost`, remembers what rounding dropped, and adds it the next time (Kahan summation). Complete the line so that a thousand additions give 2.

# %% tags=["exercise"]
total, lost = torch.tensor(1.0).bfloat16(), torch.tensor(0.0).bfloat16()
for _ in range(1000):
    wanted = total.float() + (0.001 + lost.float())
    total = wanted.bfloat16()
    lost = torch.tensor(0.0).bfloat16()  # here
check("15.2", total.float(), 2.0, tolerance=0.01)

# %% [markdown] tags=["zh"]
# **15.3 找错。** 这个函数要判断这一步能不能走，并返回还原后的梯度；可遇到溢出它也说「能走」。改好它。

# %% [markdown] tags=["en"]
# **15.3 Find the bug.** The function is to say whether a step may be taken, and to return the unscaled gradient. On an overflow it says yes, too. Mend it.


# %% tags=["exercise"]
def unscale(gradient, scale):
    gradient = gradient / scale
    return bool((gradient.abs() != 65504).all()), gradient


overflowed = torch.tensor([1.0, 70000.0, -2.0]).half().float()
results = [unscale(each, 2.0)[0] for each in (overflowed, torch.tensor([1.0, 131008.0]))]
check("15.3", results, [False, True])

# %% [markdown] tags=["zh"]
# ## 别人在这里摔过跤
#
# [milesial/Pytorch-UNet#468](https://github.com/milesial/Pytorch-UNet/issues/468)：有人发现训练脚本在还原梯度之前就裁剪，建议先调用 `scaler.unscale_(optimizer)`；随后的 [#470](https://github.com/milesial/Pytorch-UNet/pull/470) 照此改了。怎么发现？把裁剪前的范数写进日志：正常约为 1 的数若总在几万，就是没有还原。
#
# [Nerogar/OneTrainer#996](https://github.com/Nerogar/OneTrainer/issues/996) 是第二节的翻版：权重衰减在 bf16 里做，系数 0.01 再乘学习率，远小于 bf16 能表示的相对间距（约 0.008），于是衰减从来没有发生过。
#
# ## 到库里看看
#
# - [`nanovlm/training/precision.py`](../../nanovlm/training/precision.py)，`Precision` 与 `LossScaler`：可训练参数留在 fp32，冻结的只转换一次；多进程时溢出要大家一起知道。
# - [`nanovlm/training/optim/adamw.py`](../../nanovlm/training/optim/adamw.py)，`stochastic_round` 与 `LeanAdamW`：`--stochastic-rounding` 时权重只存 bf16；无穷和 `nan` 原样保留。
#
# 论文：Micikevicius 等，2017，*Mixed Precision Training*，[arXiv:1710.03740](https://arxiv.org/abs/1710.03740)；随机舍入见 Gupta 等，2015，[arXiv:1502.02551](https://arxiv.org/abs/1502.02551)。

# %% [markdown] tags=["en"]
# ## In the wild
#
# [milesial/Pytorch-UNet#468](https://github.com/milesial/Pytorch-UNet/issues/468): someone notices that the training script clips gradients before they are unscaled, and asks for `scaler.unscale_(optimizer)` before it; [#470](https://github.com/milesial/Pytorch-UNet/pull/470) then changed it. How would you notice? Log the norm before clipping. If a number that should be around 1 is always in the tens of thousands, nothing has been unscaled.
#
# [Nerogar/OneTrainer#996](https://github.com/Nerogar/OneTrainer/issues/996) is section 2 again: weight decay was applied in bf16. With a decay of 0.01 times the learning rate it is far below the smallest relative difference of bf16, about 0.008, so no decay ever happened.
#
# ## Look in the package
#
# - [`nanovlm/training/precision.py`](../../nanovlm/training/precision.py), `Precision` and `LossScaler`: trainable parameters stay in fp32, frozen ones are cast once; of several processes all have to learn of an overflow.
# - [`nanovlm/training/optim/adamw.py`](../../nanovlm/training/optim/adamw.py), `stochastic_round` and `LeanAdamW`: with `--stochastic-rounding` weights are kept in bf16 alone; infinity and `nan` stay what they are.
#
# The papers: Micikevicius et al. 2017, *Mixed Precision Training*, [arXiv:1710.03740](https://arxiv.org/abs/1710.03740). Stochastic rounding: Gupta et al. 2015, [arXiv:1502.02551](https://arxiv.org/abs/1502.02551).
