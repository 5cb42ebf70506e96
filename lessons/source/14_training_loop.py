# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["zh"]
# # 14 · 训练循环
#
# 前面的课给了我们损失，也给了梯度。剩下的问题是：拿到梯度以后，参数到底该动多少？这一课手写 AdamW、学习率预热（warm-up）、余弦下降和梯度裁剪，再把它们装进一个十来行的循环，从零训练一个小的视觉语言模型。
#
# **进来的**：一个批次，和每个可训练参数一份同形状的梯度。**出去的**：挪动了一小步的参数。一次这样的更新叫一个优化步（optimizer step）。

# %% [markdown] tags=["en"]
# # 14 · The training loop
#
# Earlier lessons gave us the loss and its gradient. What remains is the question how far each parameter should move. This lesson writes AdamW, warm-up, the cosine schedule and gradient clipping by hand, puts them into a loop of about ten lines, and trains a small vision-language model from zero with it.
#
# **In**: a batch, and for every trainable parameter a gradient of the same shape. **Out**: the parameters, moved a little. One such update is an optimizer step.

# %% tags=["setup"]
import copy
import dataclasses
import math
import sys
from random import Random

sys.path.insert(0, "../..")  # the repository: nanovlm and the drawing helpers

import torch
from torch import nn

from data_tools.scenes_text import questions
from data_tools.scenes_world import draw as draw_scene
from data_tools.scenes_world import random_scene
from lessons import draw
from lessons.check import check
from nanovlm import IMAGE, Message, VisionLanguageModel, load_model, open_image, prepare

ASSETS = "../../nanovlm/assets"
torch.manual_seed(0)
draw.strip("visual tokens", "sequence", "hidden states", "logits")

# %% [markdown] tags=["zh"]
# ## 先猜一猜
#
# AdamW 把梯度除以它自己的大小，所以不论梯度多大，一步里每个参数大约只挪动一个学习率的距离。
#
# 训练途中混进**一个**坏批次：标签是乱的，梯度比平常大几百倍。之后的批次全都正常，学习率不变。验证损失在坏批次之后第几步最糟？是当步（0），还是更晚？写下一个数，第八节来量。

# %% [markdown] tags=["en"]
# ## Predict
#
# AdamW divides a gradient by its own size. So one step moves each parameter by about one learning rate, however large the gradient is.
#
# Now **one** bad batch slips in: its labels are random, and its gradient is several hundred times larger than usual. All later batches are fine, and the learning rate stays the same. How many steps after the bad one is the validation loss at its worst? At once (0), or later? Write the number down. Section 8 measures it.

# %% [markdown] tags=["zh"]
# ## 一、一个几秒钟就能训练的模型
#
# 视觉编码器用自带的，冻结；它对每张图的输出不会变，算一次存起来就行。投影层和语言模型全新：16 个视觉 token，两层，宽 64。数据是随机场景，每个场景一问一答。

# %% [markdown] tags=["en"]
# ## 1. A model that trains in seconds
#
# The vision encoder is the shipped one, frozen. Its output for an image never changes, so it is computed once and kept. Projector and language model are new: 16 visual tokens, two blocks, width 64. The data are random scenes, each with one question and its answer.

# %%
shipped = load_model(f"{ASSETS}/tiny-vlm").float().eval()  # the file holds bfloat16
smaller = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, head_dim=16)
config = dataclasses.replace(
    shipped.config,
    language_model=dataclasses.replace(shipped.config.language_model, **smaller),
    projector=dataclasses.replace(shipped.config.projector, kind="pixel_shuffle"),
)


def new_model(seed):
    torch.manual_seed(seed)
    model = VisionLanguageModel(config, shipped.tokenizer)
    model.vision_encoder = shipped.vision_encoder.requires_grad_(False)
    return model


# %%
def make_batch(random, size):
    scenes = [random_scene(random) for _ in range(size)]
    asked = [questions(scene, random)[0] for scene in scenes]
    conversations = [
        [Message("user", [IMAGE, one.text]), Message("assistant", [one.answer])] for one in asked
    ]
    batch = prepare(model, conversations, [[draw_scene(scene)] for scene in scenes])
    with torch.no_grad():
        batch.patches, batch.pixels = model.vision_features(batch.pixels), None
    return batch


# %%
model, random = new_model(0), Random(0)
batches = [make_batch(random, 8) for _ in range(40)]
validation = make_batch(random, 32)
trainable = [each for each in model.parameters() if each.requires_grad]
print("ids (B, T):", batches[0].input_ids.shape, " patches:", batches[0].patches.shape)
print("trainable:", sum(each.numel() for each in trainable), "numbers,", len(trainable), "tensors")

# %% [markdown] tags=["zh"]
# 最小的训练循环只有三行：求损失，求梯度，让每个参数朝梯度的反方向走一点。走多少由学习率决定。这叫随机梯度下降（SGD）。

# %% [markdown] tags=["en"]
# The smallest training loop has three lines: compute the loss, compute its gradient, move every parameter a little against it. The learning rate says how little. This is stochastic gradient descent (SGD).

# %%
for step in range(6):
    loss = model(batches[step]) / len(batches[step].targets)  # `model` returns a sum
    loss.backward()
    with torch.no_grad():
        for parameter in trainable:
            parameter -= 0.3 * parameter.grad
            parameter.grad = None
    print(f"step {step}: loss {loss.item():.3f}")
print(f"knowing nothing: ln 640 = {math.log(640):.3f}")

# %%
loss = model(batches[6]) / len(batches[6].targets)
loss.backward()
sizes = {
    name: parameter.grad.square().mean().sqrt().item()  # root mean square
    for name, parameter in model.named_parameters() if parameter.requires_grad
}  # fmt: skip
ordered = sorted(sizes, key=sizes.get)
made, axis = draw.figure(height=4.6)
parts = [draw.PROJECTOR if name.startswith("projector") else draw.LANGUAGE for name in ordered]
axis.barh(range(len(ordered)), [sizes[name] for name in ordered], color=parts)
labels = [name.replace("language_model.", "").replace(".weight", "") for name in ordered]
axis.set_yticks(range(len(ordered)), labels, fontsize=7.5)
axis.set(xscale="log", xlabel="root mean square of the gradient")
ratio = sizes[ordered[-1]] / sizes[ordered[0]]
draw.show(made, f"Gradients differ {ratio:.0f}-fold between tensors")

# %% [markdown] tags=["zh"]
# 六步里损失从 6.5 降到 5.5 左右，但图里有个麻烦：各个张量的梯度大小最多相差 213 倍（橙色是投影层，蓝色是语言模型）。同一个学习率，对一个张量太大，对另一个又太小；只好迁就最大的那个，其余的就都学得慢。
#
# ## 二、AdamW：给每个数自己的尺度
#
# Adam 为每个参数记两个滑动平均，合称动量（moments）：梯度的平均 `average`，和梯度平方的平均 `square`。前者除以后者的平方根，得到的量与梯度的单位无关。`beta1` 是 0.9，大约记得最近 1/(1 − 0.9) = 10 步；`beta2` 是 0.95，大约记得最近 20 步。先看一个数：

# %% [markdown] tags=["en"]
# The loss falls, from 6.5 to about 5.5 in six steps, but the picture shows a difficulty: gradients of different tensors differ in size up to 213-fold (orange is the projector, blue the language model). One learning rate is too large for some and too small for others. It has to suit the largest, and the others learn slowly.
#
# ## 2. AdamW: each number gets its own scale
#
# Adam keeps two running averages for every parameter, its moments: `average` of the gradient and `square` of the squared gradient. The first divided by the root of the second no longer depends on the gradient's unit. With `beta1` = 0.9 the first remembers about the last 1/(1 − 0.9) = 10 steps, with `beta2` = 0.95 the second about 20. For a single number:

# %%
beta1, beta2, eps = 0.9, 0.95, 1e-8


def updates(gradients, correct=True):
    """The update of each step, in learning rates."""
    average, square, result = 0.0, 0.0, []
    for step, gradient in enumerate(gradients, start=1):
        average = beta1 * average + (1 - beta1) * gradient
        square = beta2 * square + (1 - beta2) * gradient**2
        first = average / (1 - beta1**step) if correct else average
        second = square / (1 - beta2**step) if correct else square
        result.append(first / (math.sqrt(second) + eps))
    return result


# %%
for gradient in (5.0, 0.001):
    with_it, without = (updates([gradient] * 30, correct) for correct in (True, False))
    print(f"gradient {gradient}: step 1 {with_it[0]:.3f}, step 30 {with_it[-1]:.3f};", end=" ")
    print(f"uncorrected, step 1 {without[0]:.3f}, worst {max(without):.3f} learning rates")

# %% [markdown] tags=["zh"]
# 梯度是 5 还是 0.001，走的都是一个学习率。除以 $1-\beta^t$ 叫偏差修正：两个平均从 0 起步，头几步偏小，偏小的程度又不一样。不修正的话，第一步只有 0.447，后来又会走过头，超过 1。
#
# 写成公式，$m$、$v$ 就是 `average` 与 `square`，$t$ 是第几步，$\eta$ 是学习率，$\lambda$ 是权重衰减：
#
# $$w \leftarrow (1-\eta\lambda)\,w - \eta\,\frac{m/(1-\beta_1^t)}{\sqrt{v/(1-\beta_2^t)}+\epsilon}.$$
#
# 衰减直接作用在权重上，不混进梯度，这就是 AdamW 里的 W。只有矩阵衰减，归一化的系数和偏置不衰减。

# %% [markdown] tags=["en"]
# A gradient of 5 or of 0.001: both move by one learning rate. The division by $1-\beta^t$ is the bias correction. Both averages start at 0 and are too small in the first steps, one more than the other. Without it the first step is only 0.447, and later ones overshoot 1.
#
# As a formula, with $m$ and $v$ for `average` and `square`, $t$ for the number of the step, $\eta$ for the learning rate and $\lambda$ for weight decay:
#
# $$w \leftarrow (1-\eta\lambda)\,w - \eta\,\frac{m/(1-\beta_1^t)}{\sqrt{v/(1-\beta_2^t)}+\epsilon}.$$
#
# The decay acts on the weight itself and is not mixed into the gradient: that is the W in AdamW. Only matrices decay; norms and biases do not.


# %%
class AdamW:
    def __init__(self, parameters, weight_decay=0.05):
        self.parameters, self.weight_decay, self.count = parameters, weight_decay, 0
        self.moments = [(torch.zeros_like(each), torch.zeros_like(each)) for each in parameters]

    @torch.no_grad()
    def step(self, lr):
        self.count += 1
        for parameter, (average, square) in zip(self.parameters, self.moments):
            average.lerp_(parameter.grad, 1 - beta1)  # beta1 · average + (1 − beta1) · gradient
            square.mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
            spread = (square / (1 - beta2**self.count)).sqrt() + eps
            if parameter.dim() >= 2:
                parameter.mul_(1 - lr * self.weight_decay)
            parameter.sub_(lr / (1 - beta1**self.count) * average / spread)
            parameter.grad = None


# %% [markdown] tags=["zh"]
# ## 三、学习率的一生：预热，再下降
#
# 第一步修正之后的 $m/\sqrt{v}$ 恰好是梯度的**符号**：每个参数都走满一个学习率，不管它的梯度是信号还是噪声。所以头几步让学习率从小升到峰值，这叫预热；此后沿余弦降到零，让最后的步子小到足以停稳。

# %% [markdown] tags=["en"]
# ## 3. The life of a learning rate: up, then down
#
# In step 1, the corrected $m/\sqrt{v}$ is the **sign** of the gradient: every parameter moves by a full learning rate, whether its gradient is signal or noise. So over the first steps the rate rises to its peak, the warm-up. Then it follows a cosine down to zero, and the last steps are small enough to settle.


# %%
def schedule(step, total, warmup=0.1, min_lr=0.0):
    """The rate of step `step`, counted from 0, as a share of its peak."""
    warmup_steps = max(1, round(warmup * total))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total - warmup_steps)
    return min_lr + (1 - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


# %% [markdown] tags=["zh"]
# ## 四、裁剪
#
# 把所有梯度看成一个长向量，求它的长度（范数，norm）。超过 `largest` 就整体缩短。所有参数乘的是同一个系数，所以方向不变；各裁各的，方向就歪了。下面左图是学习率的一生，右图是裁剪：长度不到 1 的原样放行，超过 1 的一律缩到 1。

# %% [markdown] tags=["en"]
# ## 4. Clipping
#
# Take all gradients together as one long vector and compute its length, the norm. If it exceeds `largest`, all of them shrink by the same factor, so the direction stays; clipped one by one, it would not. In the picture below, on the left, is the life of a learning rate; on the right, norms below 1 pass as they are, and larger ones become 1.


# %%
@torch.no_grad()
def clip_gradients(parameters, largest):
    norm = torch.stack([each.grad.square().sum() for each in parameters]).sum().sqrt()
    for parameter in parameters:
        parameter.grad *= (largest / (norm + 1e-6)).clamp(max=1)
    return norm.item()


made, axes = draw.figure(2, height=2.6)
draw.curves(axes[0], {"share of the peak": [schedule(step, 40) for step in range(40)]}, x="step")
before = [0.2, 0.6, 1.0, 2.0, 5.0, 500.0]
axes[1].plot(before, [min(norm, 1.0) for norm in before], "o-", color=draw.RIGHT)
axes[1].set(xscale="log", ylim=(0, 1.1), xlabel="norm before", ylabel="norm after clipping at 1")
draw.show(made, "Warm-up and cosine; clipping shortens only what is too long")

# %% [markdown] tags=["zh"]
# ## 五、循环
#
# 全部装在一起。次序不能乱：前向、反向、裁剪、走一步、清零。裁剪要在反向之后、走步之前，清零要在下一次反向之前。`model(batch)` 返回损失之和，所以先除以标签数（第 13 课）。

# %% [markdown] tags=["en"]
# ## 5. The loop
#
# All together, in an order that matters: forward, backward, clip, step, clear. Clip after the backward pass and before the step; clear before the next backward pass. `model(batch)` returns a sum, so it is divided by the number of labels first (lesson 13):


# %%
def train(seed, peak_lr, steps=40, warmup=0.1, clip=1.0, kind=AdamW):
    model = new_model(seed)
    optimizer = kind([each for each in model.parameters() if each.requires_grad])
    losses, norms = [], []
    for step in range(steps):
        batch = batches[step % len(batches)]
        loss = model(batch) / len(batch.targets)  # forward
        loss.backward()
        norms.append(clip_gradients(optimizer.parameters, clip))
        optimizer.step(peak_lr * schedule(step, steps, warmup))  # also forgets the gradients
        losses.append(loss.item())
    return model, losses, norms


# %%
@torch.no_grad()
def validate(model):
    return model(validation).item() / len(validation.targets)


trained, losses, norms = train(0, 1e-2)
print(f"loss {losses[0]:.2f} → {losses[-1]:.2f}, on new scenes {validate(trained):.2f}")

# %% [markdown] tags=["zh"]
# 40 步之后，损失从 6.47（ln 640 附近）降到 1.30，在新场景上是 1.13；两个数来自不同的题，不一定谁高谁低。这几十步学会的，多半是语言：有哪些问法、答案长什么样；看图要久得多。
#
# **故意弄坏。** `AdamW.step` 的最后一行把梯度清掉。忘了它会怎样？

# %% [markdown] tags=["en"]
# After 40 steps the loss is 1.30, a fifth of the ln 640 where it began, and on new scenes 1.13; the two come from different questions, so either may be the lower one. What is learned so fast is most likely language: which questions there are and what answers look like. Seeing takes much longer.
#
# **Broken on purpose.** The last line of `AdamW.step` clears the gradient. What if it is left out?


# %%
class Forgetful(AdamW):
    def step(self, lr):
        kept = [each.grad for each in self.parameters]
        super().step(lr)
        for parameter, gradient in zip(self.parameters, kept):
            parameter.grad = gradient  # the next backward pass adds to it


_, leaking, _ = train(0, 1e-2, kind=Forgetful)
_, leaking_unclipped, leaking_norms = train(0, 1e-2, clip=math.inf, kind=Forgetful)
for name, values in (
    ("right", losses),
    ("kept", leaking),
    ("kept, no clipping", leaking_unclipped),
):
    print(f"{name:18}", "  ".join(f"{value:.2f}" for value in values[3::6]))
print("norms, kept, no clipping:", "  ".join(f"{value:.1f}" for value in leaking_norms[3::6]))

# %% [markdown] tags=["zh"]
# 比较打印的前三行：没有报错，损失照样下降，只是更慢，最后是 1.66 而不是 1.30：每一步用的都是从头到现在全部梯度之和，早已过时的方向也一直在投票。裁剪甚至把症状盖住了一大半。这类错误只有和「对的」放在一起才看得出来，所以下一节不看曲线，而看数。
#
# ## 六、与库代码核对
#
# 库里的优化器由 `build_optimizer` 造出（PyTorch 的 fused AdamW，按部件分组），学习率来自 `schedule` 和 `set_learning_rates`。两份自带模型的副本，同样的图和问题，各走三步。优化步会放大舍入误差：梯度接近零的参数，更新只看符号。所以每一步把同样的梯度交给两边，容差 1e-6，约为 `float32` 在 1 附近间距的 8 倍。

# %% [markdown] tags=["en"]
# No error, and the loss still falls, only more slowly: 1.66 at the end instead of 1.30. Every step uses the sum of all gradients since the beginning, and directions long out of date keep their vote. Clipping even hides most of the symptom. Such a mistake shows only beside the right version, so the next section compares numbers instead of curves.
#
# ## 6. Proven equal
#
# The package's optimizer comes from `build_optimizer` (PyTorch's fused AdamW, grouped by part), its rates from `schedule` and `set_learning_rates`. Two copies of the shipped model take three steps on the scene of all lessons. An optimizer step magnifies rounding errors: where a gradient is nearly zero, only its sign counts. So both sides get the same gradients in each step. The tolerance is 1e-6, about 8 times the spacing of `float32` near 1.

# %%
from nanovlm.training.optim import optimizer as package
from nanovlm.training.settings import OptimizerSettings

scene = open_image(f"{ASSETS}/scene.png")
asked = [Message("user", [IMAGE, "描述图片"]), Message("assistant", ["图中有一个红色圆环。"])]
real = prepare(shipped, [asked], [[scene]])
theirs = copy.deepcopy(shipped)
their_optimizer = package.build_optimizer(theirs, OptimizerSettings(lr=1e-3, weight_decay=0.05))
mine = [each for each in shipped.parameters() if each.requires_grad]
yours = [each for each in theirs.parameters() if each.requires_grad]
optimizer = AdamW(mine)

# %%
for step in range(3):
    (theirs(real) / len(real.targets)).backward()
    for one, other in zip(mine, yours):
        one.grad = other.grad.clone()
    norm = clip_gradients(mine, 1.0)
    their_norm = nn.utils.clip_grad_norm_(yours, 1.0).item()
    torch.testing.assert_close(norm, their_norm, rtol=1e-5, atol=0)
    optimizer.step(1e-3 * schedule(step, 10, 0.3))
    share = package.schedule(step, 10, 0.3, 0.0)
    package.set_learning_rates(their_optimizer, share)
    their_optimizer.step()
    their_optimizer.zero_grad()
    torch.testing.assert_close(mine, yours, rtol=0, atol=1e-6)
    print(f"step {step}: share {share:.3f}, norm {norm:6.2f}, {len(mine)} tensors equal")

# %% [markdown] tags=["zh"]
# ## 七、学习率的阶梯
#
# 只有一个超参数非调不可的话，那就是学习率。每一级是上一级的约三倍，每级两个种子，各 40 步。

# %% [markdown] tags=["en"]
# ## 7. A ladder of learning rates
#
# If there is one setting that has to be tuned, it is the learning rate. Each rung is about three times the one before; two seeds for each, 40 steps.

# %%
rates = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
ladder = {rate: [validate(train(seed, rate)[0]) for seed in (0, 1)] for rate in rates}
made, axis = draw.figure(height=3.0)
for seed, marker in ((0, "o-"), (1, "s--")):
    values = [pair[seed] for pair in ladder.values()]
    axis.plot(rates, values, marker, color=draw.LANGUAGE, label=f"seed {seed}")
axis.set(xscale="log", xlabel="peak learning rate", ylabel="validation loss after 40 steps")
axis.legend(frameon=False)
draw.show(made, "Too small is slow, too large is restless; between them lies a valley")
print({f"{rate:g}": [round(value, 1) for value in pair] for rate, pair in ladder.items()})

# %% [markdown] tags=["zh"]
# 左边太慢：40 步还没走到。右边在谷的两侧跳来跳去，停不下来。看打印的数：谷底从 0.01 到 0.03，损失是 1.1 到 1.3；往下一级，0.003，是 2.5；往上一级，0.1，看种子，是 1.9 或 3.1。这也是为什么粗的阶梯值得先爬一遍。有了裁剪和 AdamW，学习率过大并没有变成 `nan`，只是悄悄变差。
#
# 这里的最佳值只属于这个模型、这个批次大小、这 40 步。自带模型用的是 5e-4 到 2e-3（`presets/tiny.toml`）。
#
# 一个没有结果的实验也值得一说：我们本以为 0.1 这一级去掉预热（`train(seed, 0.1, warmup=0)`）会更糟，试了几个种子，有的更糟，有的更好。40 步、两层的模型说明不了预热的价值；库里保留它，是因为大模型、长训练的头几步代价更高。
#
# ## 八、一个坏批次
#
# 回到开头的问题。先好好训练 30 步，存下模型和优化器；再从这里分出三支：没有坏批次、有坏批次但裁剪、有坏批次也不裁剪。坏批次的标签是随机 token，而且有人忘了除以标签数（第 13 课），梯度于是又大了上百倍。每走一步都量一次验证损失，三个种子。

# %% [markdown] tags=["en"]
# On the left training is too slow: 40 steps do not get there. On the right it jumps across the valley and cannot settle. In numbers (printed): the floor reaches from 0.01 to 0.03, where the loss is 1.1 to 1.3. One rung below, at 0.003, it is 2.5; one above, at 0.1, it is 1.9 or 3.1, depending on the seed. So a coarse ladder is worth climbing first. With clipping and AdamW too large a rate has not even become `nan`. It only gets worse, quietly.
#
# The best rate here belongs to this model, this batch size and these 40 steps. The shipped model used 5e-4 to 2e-3 (`presets/tiny.toml`).
#
# An experiment without a result is worth a word, too. We expected the rung 0.1 to get worse without warm-up, `train(seed, 0.1, warmup=0)`. Of the few seeds we tried, some got worse and some better. Two blocks and 40 steps say nothing about the worth of warm-up. The package keeps it because in a large model and a long run the first steps cost more.
#
# ## 8. One bad batch
#
# Back to the question at the top. Train for 30 good steps and keep model and optimizer. Three branches leave from there: no bad batch, a bad one that is clipped, a bad one that is not. The bad batch has random tokens as labels, and somebody forgot to divide by their number (lesson 13), which makes the gradient a hundred times larger again. The validation loss is measured after every step, on three seeds.


# %%
def branch(saved, bad, clip, steps=20):
    model, optimizer = copy.deepcopy(saved)
    curve = []
    for step, batch in enumerate(batches[:steps]):
        loss = model(batch) / len(batch.targets)
        if step == 3 and bad is not None:
            loss = model(bad)  # a sum
        loss.backward()
        norm = clip_gradients(optimizer.parameters, clip)
        optimizer.step(1e-2)
        curve.append(validate(model))
        peak = norm if step == 3 else 0.0 if step < 3 else peak
    return curve, peak


# %%
bad = copy.copy(batches[-1])
bad.targets = torch.randint(640, bad.targets.shape, generator=torch.Generator().manual_seed(0))


def good_start(seed):
    model = new_model(seed)
    optimizer = AdamW([each for each in model.parameters() if each.requires_grad])
    for step in range(30):
        (model(batches[step]) / len(batches[step].targets)).backward()
        clip_gradients(optimizer.parameters, 1.0)
        optimizer.step(1e-2 * min(1, (step + 1) / 4))
    return model, optimizer


# %%
made, axes = draw.figure(3, height=2.9, sharey=True)
for seed, axis in enumerate(axes):
    saved = good_start(seed)
    curves = {"no bad batch": branch(saved, None, 1.0)[0]}
    curves["clipped at 1"], _ = branch(saved, bad, 1.0)
    curves["not clipped"], norm = branch(saved, bad, math.inf)
    worst = curves["not clipped"].index(max(curves["not clipped"])) - 3
    steps, parts = range(-3, 17), ["word", "right", "wrong"]
    draw.curves(axis, curves, f"seed {seed}", "steps after the bad batch", "", steps, parts)
    axis.legend(frameon=False, loc="upper right", fontsize=8)
    ends = "  ".join(f"{name} {curve[-1]:.2f}" for name, curve in curves.items())
    print(f"seed {seed}: norm {norm:.0f}, worst {worst} steps later; at the end: {ends}")
axes[0].set(ylabel="validation loss", ylim=(0, None))
draw.show(made, "Clipped, one bad batch is a bump; unclipped, it rules for many steps")

# %% [markdown] tags=["zh"]
# 答案：不裁剪时，最糟的不是当步，而是 **3 到 4 步之后**，三个种子都如此；到图的右端也还没恢复，是 2.3 到 2.4，而不是 0.8。裁剪的那一支（绿线）只有一个小坎，与没有坏批次的几乎重合。AdamW 的单步确实不超过几个学习率，但坏梯度留在了两个动量里，要很多步才会淡去：每过一步，`average` 里的只打九折，`square` 里的只打九五折。用第二节的 `updates` 看一个数：正常梯度是 +1，第 20 步来一个 −500。

# %% [markdown] tags=["en"]
# The answer: without clipping the worst moment is not the bad step itself but comes **3 or 4 steps later**, on each of the seeds, and at the right end the loss has not recovered: 2.3 to 2.4 instead of 0.8. Clipped (green), it is a small bump, and then nearly the same as without the bad batch. A single AdamW step is indeed never more than a few learning rates, but the bad gradient stays in both moments and fades slowly, in `average` by a tenth a step, in `square` by a twentieth. Watch one number with the `updates` of section 2: the usual gradient is +1, and in step 20 comes a −500.

# %%
gradients = torch.ones(100)
gradients[20] = -500
unclipped, clipped = updates(gradients.tolist()), updates(gradients.clamp(min=-1).tolist())
made, axis = draw.figure(height=2.6)
lines = {"not clipped": unclipped, "clipped at 1": clipped}
draw.curves(axis, lines, x="step", y="update, in learning rates", parts=["wrong", "right"])
axis.axhline(0, color=draw.FAINT, linewidth=0.8)
draw.show(made, "One gradient of −500: first the wrong way, then hardly at all")
back = next(step for step in range(21, 100) if unclipped[step] > 0) - 20
print(f"the wrong way for {back} steps; at step 99 the update is {unclipped[-1]:.3f} instead of 1")

# %% [markdown] tags=["zh"]
# 先是 `average` 带着参数朝错误的方向走了 38 步；等它翻过零，`square` 里的 500² 又把每一步压到几乎没有。裁剪在动量**之前**拦住它，所以有用。这也回答了一个常见的疑问：「Adam 已经归一化了，为什么还要裁剪？」
#
# ## 练习

# %% [markdown] tags=["en"]
# First `average` carries the parameter in the wrong direction for 38 steps. When it has crossed zero, the 500² in `square` makes every step almost nothing. Clipping stops it **before** the moments, which is why it helps. That also answers a common question: "Adam normalises already, so why clip?"
#
# ## Exercises

# %% [markdown] tags=["zh"]
# **14.1 补一行。** 梯度恒为 1，`square` 从 0 开始，`beta2 = 0.95`。10 步之后 `square`（未修正）是多少？写成 `beta2` 的式子。

# %% [markdown] tags=["en"]
# **14.1 Fill in a line.** The gradient is always 1, `square` starts at 0, and `beta2 = 0.95`. What is `square`, uncorrected, after 10 steps? Write an expression of `beta2`.

# %% tags=["exercise"]
after_ten = ...
check("14.1", after_ten, 0.4012630607616211)

# %% [markdown] tags=["zh"]
# **14.2 改一个行为。** 把余弦换成梯形：20 步里，前 4 步预热（与 `schedule` 相同），然后保持 1，最后 5 步依次为 5/6、4/6、3/6、2/6、1/6。给出 20 个值的张量。

# %% [markdown] tags=["en"]
# **14.2 Change a behaviour.** Replace the cosine by a trapezium: of 20 steps, the first 4 warm up as in `schedule`, then the share stays 1, and the last 5 are 5/6, 4/6, 3/6, 2/6, 1/6. Give the tensor of the 20 values.

# %% tags=["exercise"]
trapezium = ...
expected = torch.tensor([3, 6, 9] + [12] * 12 + [10, 8, 6, 4, 2]) / 12
check("14.2", trapezium, expected)

# %% [markdown] tags=["zh"]
# **14.3 找错。** 这个函数想做 AdamW 的第一步，但和 PyTorch 的不一致。改好它。

# %% [markdown] tags=["en"]
# **14.3 Find the bug.** This function is to take the first step of AdamW, but differs from PyTorch's. Mend it.


# %% tags=["exercise"]
def first_step(weight, gradient, lr=0.1, decay=0.5):
    gradient = gradient + decay * weight
    average, square = (1 - beta1) * gradient, (1 - beta2) * gradient**2
    spread = (square / (1 - beta2)).sqrt() + eps
    return weight - lr * average / (1 - beta1) / spread


weight = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
weight.grad, before = torch.tensor([0.1, 0.1, -0.1]), weight.detach().clone()
torch.optim.AdamW([weight], lr=0.1, betas=(beta1, beta2), weight_decay=0.5).step()
check("14.3", first_step(before, weight.grad), weight.detach(), tolerance=1e-6)

# %% [markdown] tags=["zh"]
# ## 别人在这里摔过跤
#
# [YunYang1994/TensorFlow2.0-Examples#8](https://github.com/YunYang1994/TensorFlow2.0-Examples/issues/8)：训练到第 750 步左右损失变成 `nan`，日志里的学习率还在逐步上升。提问者后来自己找到了原因：预热按「10 个 epoch」设定，而他的数据集一个 epoch 有 1250 步，于是预热长达 12,500 步，学习率一直在升。怎么发现？把学习率和损失写在日志的同一行；开训之前先画一遍 `schedule`，看峰值落在第几步。
#
# ## 到库里看看
#
# - [`nanovlm/training/loop.py`](../../nanovlm/training/loop.py)，`train`：同一个循环，多了梯度累积、混合精度（第 15 课）、多进程、日志和检查点；损失或梯度里出现无穷或 `nan` 的那一步会跳过，不改变任何参数。
# - [`nanovlm/training/optim/optimizer.py`](../../nanovlm/training/optim/optimizer.py)，`build_optimizer`、`schedule` 与 `set_learning_rates`：每个部件可以有自己的学习率。
# - [`nanovlm/training/optim/adamw.py`](../../nanovlm/training/optim/adamw.py)，`adamw_` 与 `LeanAdamW`：手写的 AdamW，动量可以只占 8 比特。
#
# 论文：Kingma 与 Ba，2014，*Adam*，[arXiv:1412.6980](https://arxiv.org/abs/1412.6980)；Loshchilov 与 Hutter，2017，*Decoupled Weight Decay Regularization*，[arXiv:1711.05101](https://arxiv.org/abs/1711.05101)；余弦见 [arXiv:1608.03983](https://arxiv.org/abs/1608.03983)，裁剪见 Pascanu 等，[arXiv:1211.5063](https://arxiv.org/abs/1211.5063)。

# %% [markdown] tags=["en"]
# ## In the wild
#
# [YunYang1994/TensorFlow2.0-Examples#8](https://github.com/YunYang1994/TensorFlow2.0-Examples/issues/8): around step 750 the loss becomes `nan`, and in the log the learning rate is still rising. The person who asked found the reason: warm-up was set to 10 epochs, and with 1,250 steps in an epoch of that dataset it took 12,500 steps. The rate rose all the time. How would you notice? Write the learning rate into the same log line as the loss, and before a run draw `schedule` once to see in which step its peak lies.
#
# ## Look in the package
#
# - [`nanovlm/training/loop.py`](../../nanovlm/training/loop.py), `train`: the same loop with gradient accumulation, mixed precision (lesson 15), several processes, a log and checkpoints. A step with an infinity or a `nan` in its loss or gradients is skipped and changes no parameter.
# - [`nanovlm/training/optim/optimizer.py`](../../nanovlm/training/optim/optimizer.py), `build_optimizer`, `schedule` and `set_learning_rates`: every part can have a learning rate of its own.
# - [`nanovlm/training/optim/adamw.py`](../../nanovlm/training/optim/adamw.py), `adamw_` and `LeanAdamW`: AdamW written out, with moments that may take only 8 bits.
#
# The papers: Kingma and Ba 2014, *Adam*, [arXiv:1412.6980](https://arxiv.org/abs/1412.6980); Loshchilov and Hutter 2017, *Decoupled Weight Decay Regularization*, [arXiv:1711.05101](https://arxiv.org/abs/1711.05101). The cosine is from [arXiv:1608.03983](https://arxiv.org/abs/1608.03983), clipping from Pascanu et al., [arXiv:1211.5063](https://arxiv.org/abs/1211.5063).
