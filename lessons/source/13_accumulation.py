# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["zh"]
# # 13 · 梯度累积
#
# 显存只放得下 4 个样本，论文的批次却是 64。办法是梯度累积（gradient accumulation）：把 64 个样本分成 16 个小批次（micro-batch），逐个前向、反向，把梯度加起来，最后走一个优化步。这件事看上去只有一行代码，却在几个最流行的训练库里一直错到 2024 年 10 月。
#
# **进来的**：k 个小批次，每个有 nᵢ 个标签。**出去的**：一个梯度，与把它们放进一个大批次时**完全一样**。

# %% [markdown] tags=["en"]
# # 13 · Gradient accumulation
#
# The memory holds 4 samples, and the paper's batch has 64. The way out is gradient accumulation: cut the 64 samples into 16 micro-batches, run each forward and backward, add up the gradients, and make one optimizer step. It looks like one line of code, and until October 2024 it was wrong in some of the most popular training libraries.
#
# **In**: k micro-batches with nᵢ labels each. **Out**: one gradient, **exactly** that of all of them in one large batch.

# %% tags=["setup"]
import sys

sys.path.insert(0, "../..")  # the repository: nanovlm and the drawing helpers

from random import Random

import torch
import torch.nn.functional as F
from torch import nn

from lessons import draw
from lessons.check import check
from nanovlm import IMAGE, Message, VisionLanguageModel, load_model, open_image, prepare

ASSETS = "../../nanovlm/assets"
torch.manual_seed(0)
draw.strip("logits")

# %% [markdown] tags=["zh"]
# ## 先猜一猜
#
# 关于那张图有四段对话，每段是一个小批次。描述的答案有 22 个标签，其余三个短答案各有 3 到 4 个。最常见的写法是：每个小批次取损失的**平均**，再对小批次取平均。
#
# 这样一来，最短答案里的一个 token，分量是描述里一个 token 的**几倍**？写下数字。

# %% [markdown] tags=["en"]
# ## Predict
#
# There are four conversations about the scene, each a micro-batch. The description has 22 labels, the three short answers have 3 or 4 each. The most common code takes the **mean** loss of each micro-batch, then the mean over micro-batches.
#
# In that scheme, **how many times** as much does one token of the shortest answer count as one token of the description? Write down a number.

# %% [markdown] tags=["zh"]
# ## 一、`backward` 做的是加法
#
# 梯度累积不需要新机制。`backward()` 从不覆盖 `.grad`，它往上**加**；平时之所以看不出来，是因为每步之后都清零。下面先反向 3w，再反向 5w：梯度先是 3，然后是 3 + 5 = 8。所以累积不用另写代码，晚一点清零就行。

# %% [markdown] tags=["en"]
# ## 1. `backward` adds
#
# Gradient accumulation needs no new machinery. `backward()` never overwrites `.grad`; it **adds** to it. Usually one does not notice, because every step ends by clearing it. Below, 3w goes backward and then 5w: the gradient is 3, then 3 + 5 = 8. So to accumulate, clear it later, and that is all.

# %%
weight = torch.tensor([1.0, 2.0], requires_grad=True)
(3 * weight).sum().backward()
print("after one backward: ", weight.grad)
(5 * weight).sum().backward()
print("after two:          ", weight.grad)
weight.grad = None  # what optimizer.zero_grad() does
print("after zero_grad:    ", weight.grad)

# %% [markdown] tags=["zh"]
# ## 二、四段对话
#
# 同一张图，四个问题，答案一长三短。用 `double`（64 位浮点）来做，舍入误差小到约 1e-15，差别再大就不能怪舍入了。

# %% [markdown] tags=["en"]
# ## 2. Four conversations
#
# One image, four questions: describe it; how many objects ("three"); what colour is the star ("blue"); is there a red ring ("there is"). We compute in `double` (64-bit floats). Then equal means equal, and no difference can be blamed on rounding.

# %%
model = load_model(f"{ASSETS}/tiny-vlm").double().eval()
image = open_image(f"{ASSETS}/scene.png")
truth = "图中有三个物体，从左到右是：大的红色圆环、大的蓝色五角星、小的橙色三角形。"
talks = [
    ("描述图片", truth),
    ("图里有几个物体？", "三个。"),
    ("五角星是什么颜色的？", "蓝色。"),
    ("图里有红色圆环吗？", "有。"),
]


def batch_of(talks):
    messages = [[Message("user", [IMAGE, ask]), Message("assistant", say)] for ask, say in talks]
    return prepare(model, messages, [[image]] * len(talks))


# %%
large = batch_of(talks)
micro_batches = [batch_of([talk]) for talk in talks]
counts = [len(batch.targets) for batch in micro_batches]
print("one large batch: ids", tuple(large.input_ids.shape), "labels", len(large.targets))
for batch in micro_batches:
    answer = [model.tokenizer.decode([index]) for index in batch.targets.tolist()]
    print("micro-batch:     ids", tuple(batch.input_ids.shape), "labels", len(answer), answer[-3:])

# %% [markdown] tags=["zh"]
# 大批次里短的几行填充到同样长度，填充的位置没有标签，所以总共仍是 32 个标签。标准答案就是大批次的梯度：32 个损失之和除以 32。后面的每一种写法，都拿「相对误差」来比：两个梯度之差的长度，除以标准答案的长度。

# %% [markdown] tags=["en"]
# In the large batch the short rows are padded. Padding has no labels, so there are 32 in all. The right answer is the gradient of the large batch: the sum of 32 losses, divided by 32. Every scheme that follows is compared with it by its relative error: the length of the difference of the two gradients, divided by the length of the right one.


# %%
def summed_loss(model, batch):
    def cross_entropy(hidden_states, head, targets):  # lesson 11, in the model's own precision
        return F.cross_entropy(hidden_states @ head.T, targets, reduction="sum")

    return model(batch, cross_entropy)


def take_gradient(model):  # all parameters in one vector; cleared for the next time
    parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return torch.cat(parts)


(summed_loss(model, large) / len(large.targets)).backward()
right = take_gradient(model)
print("the gradient:", tuple(right.shape), f"length {right.norm():.4f}")

# %% [markdown] tags=["zh"]
# ## 三、故意弄坏：平均的平均
#
# 现在逐个小批次来。这是很多教程里的写法：

# %% [markdown] tags=["en"]
# ## 3. Broken on purpose: the mean of means
#
# Now one micro-batch at a time. This is the code of many tutorials:


# %%
def relative_error(gradient, right):
    return ((gradient - right).norm() / right.norm()).item()


for batch in micro_batches:
    mean_loss = summed_loss(model, batch) / len(batch.targets)
    (mean_loss / len(micro_batches)).backward()
mean_of_means = take_gradient(model)
print(f"relative error of the gradient: {relative_error(mean_of_means, right):.1%}")

# %% [markdown] tags=["zh"]
# 误差 72%：错的不是末几位，而是梯度本身的一大部分。没有任何报错，损失照样下降，只是训练的**已经是另一个目标**。
#
# 看一看每个 token 的分量就明白了。正确的权重是每个 token 都占 1/32，约 0.031；平均的平均里，第 i 个小批次的 token 得到 1/(k·nᵢ)。描述里的是 1/(4 × 22)，约 0.011；最短答案里的是 1/(4 × 3)，约 0.083。下图灰的是描述，红的是三个短答案：

# %% [markdown] tags=["en"]
# The error is not in the last digits; it is 72% of the gradient's own length. Nothing complains and the loss falls. It is just **another objective** that is being trained.
#
# The weight of each token explains it. The right weight is 1/32 for everyone. In the mean of means, a token of micro-batch i gets 1/(k·nᵢ): one of the description 1/(4 × 22), about 0.011, one of the shortest answer 1/(4 × 3), about 0.083. In the picture the description is grey, the three short answers are red:

# %%
k, total = len(counts), sum(counts)
texts, parts, below = [], [], []
for batch, count in zip(micro_batches, counts):
    texts += [model.tokenizer.decode([index]) for index in batch.targets.tolist()]
    parts += ["word" if count == max(counts) else "wrong"] * count
    below += [f"{1 / (k * count):.3f}"] * count
made, axis = draw.figure(height=2.5)
draw.tokens(axis, [text.replace("</s>", "end") for text in texts], parts, below=below)
draw.show(made, f"Weight of each token in the mean of means; right would be {1 / total:.3f}")
print(f"{1 / (k * min(counts)):.4f} / {1 / (k * max(counts)):.4f} =",
      f"{max(counts) / min(counts):.1f} times")  # fmt: skip

# %%
made, axes = draw.figure(2, height=2.7, sharey=True)
names = ["describe", "how many", "colour", "is there"]
by_tokens = {name: 100 * count / total for name, count in zip(names, counts)}
draw.bars(axes[0], by_tokens, "sum over tokens", "share of the weight, %", ["right"] * k)
draw.bars(axes[1], dict.fromkeys(names, 100 / k), "mean of means", "", ["wrong"] * k)
draw.show(made, "How much of the step each conversation decides")

# %% [markdown] tags=["zh"]
# 这就是开头的答案：22 / 3，约 7.3 倍。描述本来占 69%，现在只占 25%；一个「有。」和一整段描述同样重要。要是某个小批次里只有一个标签，它就能左右整步的四分之一。
#
# 这样也不是毫无道理：「每段对话一样重要」是一个可以选择的目标。毛病在于没有人选过它，它**随小批次怎么切而变**：同样的数据、同样的步数，`batch_size=4` 和 `batch_size=1 × 累积 4` 训练出不同的模型。
#
# ## 四、先数标签，再反向
#
# 改法只有一个除数：用**整个优化步的标签总数**，而不是自己这一份的。所以要先拿到全部 k 个小批次，数完，再开始反向。

# %% [markdown] tags=["en"]
# That is the answer to the prediction: 22 / 3, about 7.3 times. The description should decide 69% of the step and decides 25%. One 有。 ("there is") weighs as much as a whole description. A micro-batch with a single label would decide a quarter of the step with it.
#
# That is not absurd in itself: "every conversation counts the same" is an objective one may choose. The trouble is that nobody chose it, and that it **depends on how the batch is cut**. With the same data and the same steps, `batch_size=4` and `batch_size=1` with 4 accumulations train different models.
#
# ## 4. Count the labels, then go backward
#
# Only the divisor changes: the number of labels **of the whole optimizer step**, not of one's own part. So all k micro-batches have to be at hand and counted before the first backward pass.

# %%
target_count = sum(len(batch.targets) for batch in micro_batches)  # first
for batch in micro_batches:
    (summed_loss(model, batch) / target_count).backward()
accumulated = take_gradient(model)
print(f"mean of means:    {relative_error(mean_of_means, right):.1e}")
print(f"sum over tokens:  {relative_error(accumulated, right):.1e}")
torch.testing.assert_close(accumulated, right, rtol=1e-9, atol=1e-12)

# %% [markdown] tags=["zh"]
# 误差归零，只剩 64 位浮点的舍入。因为求导是线性的，和的梯度就是梯度的和，前提是大家除以**同一个数**。记第 i 个小批次的损失之和为 $L_i$，标签数为 $n_i$：
#
# $$\nabla \frac{\sum_i L_i}{\sum_i n_i} = \sum_i \nabla \frac{L_i}{\sum_j n_j}, \qquad \text{但} \qquad \frac{1}{k}\sum_i \frac{L_i}{n_i} \ne \frac{\sum_i L_i}{\sum_i n_i}.$$
#
# 换成一份成绩单就不会算错：22 道题错 11 道，3 道题错 3 道，合起来 25 道错 14 道，错了 56%；50% 与 100% 再平均，却是 75%。
#
# 先数后算并不费内存：等着的只是 k 份数据（id、标签和像素），还没有任何激活。训练日志里的损失也要同样算：损失之和与标签数分别累加，最后相除一次；验证集的损失也是如此。
#
# 这也是库里的 `forward` 返回损失之**和**的原因：除以多少，由知道总数的人（训练循环）决定。
#
# ## 五、为什么要累积：数一数内存
#
# 另一种写法也能得到正确的梯度：把各小批次的损失加起来，最后只反向一次。用第 11 课的办法，数一数为反向留了多少字节：

# %% [markdown] tags=["en"]
# The error is gone, down to the rounding of 64-bit floats, because differentiation is linear. With $L_i$ for the summed loss of micro-batch i and $n_i$ for its labels:
#
# $$\nabla \frac{\sum_i L_i}{\sum_i n_i} = \sum_i \nabla \frac{L_i}{\sum_j n_j}, \qquad \text{but} \qquad \frac{1}{k}\sum_i \frac{L_i}{n_i} \ne \frac{\sum_i L_i}{\sum_i n_i}.$$
#
# On a school report nobody makes this mistake: 11 wrong of 22 and 3 wrong of 3 are 14 wrong of 25, 56%; the mean of 50% and 100% would be 75%.
#
# Counting first costs little memory: what waits are k batches of data (ids, labels, pixels), and no activations yet. The loss in the log has to be computed alike: add up losses and labels separately, and divide once at the end. So has the loss of a validation set.
#
# This is also why the package's `forward` returns a **sum**: the divisor is chosen by whoever knows the total, the training loop.
#
# ## 5. Why accumulate: count the memory
#
# There is another way to the right gradient: add up the losses of the micro-batches and go backward once at the end. Count the bytes kept for the backward pass, as in lesson 11:


# %%
def bytes_kept(batches):  # in MB, without the parameters
    kept, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        losses = [summed_loss(model, batch) for batch in batches]  # all graphs are alive
    del losses
    return sum(size for memory, size in kept.items() if memory not in own) / 1e6


# %%
megabytes = {
    "one large batch": bytes_kept([large]),
    "4 losses added,\none backward": bytes_kept(micro_batches),
    "backward after\neach micro-batch": max(bytes_kept([batch]) for batch in micro_batches),
}
made, axis = draw.figure(height=2.7)
draw.bars(axis, megabytes, "", "MB", ["wrong", "wrong", "right"], ".1f")
draw.show(made, "Activations kept at once (64-bit)")

# %% [markdown] tags=["zh"]
# 一个大批次反而最费：短的几行填充到 90，填充的位置同样留下激活。只有**每个小批次之后就反向**才省内存，15 MB 对 59 和 55 MB：它的激活用完即丢，同时活着的只有一份。把损失攒起来最后反向，梯度是对的，累积却白做了。（15.1 MB 是四份里最大的一份，即描述那一份；它最长，一份就占了总数 54.6 MB 的四分之一强。）换句话说，内存由最大的那个小批次决定。累积省的是内存，不是时间：四次前向和四次反向，一次也少不了。
#
# ## 六、与库代码核对
#
# 库里的训练循环 `train` 写的是 `loss / max(target_count, 1)`，然后 `backward`；`max` 防的是一个标签也没有的优化步，那时除以 0 会得到 `nan`。现在用 `float32`、自带的权重和库自己的分块损失（第 11 课）：左边逐个小批次，右边一个大批次。容差：相对误差 1e-4。两边求和的次序不同，而训练好的模型在这些答案上梯度很小，是大数相减剩下的，所以舍入显得大一些。

# %% [markdown] tags=["en"]
# One large batch takes most: short rows are padded to 90 places, and padding keeps activations, too. Only **backward after each micro-batch** saves memory, 15 MB instead of 59 or 55: its activations are dropped when they have been used, and one set is alive at a time. With the losses saved up, the gradient is right, and the accumulation was for nothing. (The 15.1 MB are the largest of the four, the description, a bit over a quarter of the 54.6 MB.) So the largest micro-batch decides the memory. Accumulation saves memory, not time: four forward and four backward passes have to be computed all the same.
#
# ## 6. Proven equal
#
# The package's training loop, `train`, computes `loss / max(target_count, 1)`, then `backward`; the `max` is for a step without a single label, where a division by 0 would give `nan`. Now in `float32`, with the shipped weights and the package's own chunked loss (lesson 11): micro-batches on one side, one large batch on the other. The tolerance is a relative error of 1e-4. The two sides add up in different orders, and a trained model's gradient on these answers is small, what remains of large numbers that cancel; so rounding weighs more.

# %%
model = model.float()
for batch in micro_batches:
    (model(batch) / max(target_count, 1)).backward()
mine = take_gradient(model)
(model(large) / len(large.targets)).backward()
theirs = take_gradient(model)
error = torch.tensor(relative_error(mine, theirs))
torch.testing.assert_close(error, torch.tensor(0.0), rtol=0, atol=1e-4)
print(f"relative error {error:.1e}: micro-batches and the large batch agree")

# %% [markdown] tags=["zh"]
# ## 七、答案越不等长，错得越多
#
# 最后的实验：两个小批次，一个总是 4 个物体的描述，另一个越来越短。模型是刚初始化的（训练开始时的样子）：这时每个 token 的梯度都不小，看得清长度带来的差别。先各算一次**损失之和**的梯度 g₁、g₂，两种写法都能由它们拼出来：正确的是 (g₁ + g₂)/(n₁ + n₂)，平均的平均是 (g₁/n₁ + g₂/n₂)/2。每种长度试六对随机场景。

# %% [markdown] tags=["en"]
# ## 7. The less equal the answers, the larger the error
#
# The last experiment: two micro-batches, one always the description of 4 objects, the other shorter and shorter. The model is newly initialised, as at the start of training: then every token has a sizeable gradient, and the effect of length shows. Compute the gradients g₁ and g₂ of the **summed** losses once; both schemes can be put together from them: the right one is (g₁ + g₂)/(n₁ + n₂), the mean of means (g₁/n₁ + g₂/n₂)/2. Six pairs of random scenes for each length.

# %%
from data_tools.scenes_text import describe  # the toy world, on which the model was trained
from data_tools.scenes_world import draw as draw_scene
from data_tools.scenes_world import random_scene

scenes = [random_scene(Random(seed)) for seed in range(60)]
torch.manual_seed(0)
new = VisionLanguageModel(model.config, model.tokenizer)


def gradient_and_count(scene, ask, say):
    messages = [Message("user", [IMAGE, ask]), Message("assistant", say)]
    batch = prepare(new, [messages], [[draw_scene(scene)]])
    new(batch).backward()  # summed
    return take_gradient(new), len(batch.targets)


# %%
def described(objects):
    some = [scene for scene in scenes if len(scene.objects) == objects]
    return [gradient_and_count(scene, "描述图片", describe(scene, "zh")) for scene in some[-6:]]


long = described(4)
others = [described(4)[::-1], described(3), described(2), described(1)]
some = [scene for scene in scenes if len(scene.objects) == 4][:6]
others.append([gradient_and_count(scene, "图里有几个物体？", "四个。") for scene in some])

# %%
errors = {}
for short in others:
    of_ratio = []
    for (g1, n1), (g2, n2) in zip(long, short):
        exact, wrong = (g1 + g2) / (n1 + n2), (g1 / n1 + g2 / n2) / 2
        of_ratio.append(relative_error(wrong, exact))
    errors[f"{n1} : {n2}"] = of_ratio
    print(f"{n1} : {n2:2} labels, errors", " ".join(f"{error:.3f}" for error in of_ratio))

# %%
made, axis = draw.figure(height=3.0)
for place, found in enumerate(errors.values()):
    axis.scatter([place] * len(found), found, color=draw.WRONG, s=18, alpha=0.6)
middle = [sum(found) / len(found) for found in errors.values()]
axis.plot(middle, color=draw.WRONG, label="mean of means")
axis.axhline(0, color=draw.RIGHT, label="sum over tokens")
axis.set_xticks(range(len(errors)), errors)
axis.set(xlabel="labels of the two micro-batches", ylabel="relative error of the gradient")
axis.legend(frameon=False)
draw.show(made, "Equal lengths hide the mistake; unequal answers show it")

# %% [markdown] tags=["zh"]
# 从左往右看，红点越来越高：等长时误差为零，27 比 4 时却到了 79% 至 97%。错误正是这样藏起来的：纯文本预训练的每行都切成同样长，每个位置都有标签，平均的平均**恰好**就是平均。到了对话微调，尤其是视觉语言模型，一问一个词和一段描述混在一起，错误才出现。
#
# ## 八、忘了除呢
#
# 另一个常见的错误是根本不除：累积 4 次，梯度就大 4 倍。AdamW 会把它藏起来：

# %% [markdown] tags=["en"]
# At equal lengths the error is zero, and that is how it hides; at 27 to 4 it is 79% to 97% of the gradient. In pretraining on text all rows are cut to one length and every position has a label; there the mean of means **happens** to be the mean. Only in fine-tuning on conversations, and with vision-language models above all, do one-word answers meet descriptions, and the mistake appears.
#
# ## 8. And if one forgets to divide?
#
# Another common mistake is not to divide at all: with 4 accumulations the gradient is 4 times too large. AdamW hides it:

# %%
gradient = torch.randn(1000, generator=torch.Generator().manual_seed(0))
moved = {}
for factor in (1, 4):
    parameter = nn.Parameter(torch.zeros(1000))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3)
    parameter.grad = factor * gradient
    norm = nn.utils.clip_grad_norm_([parameter], 1e9)  # measures; 1e9 never clips
    optimizer.step()
    moved[factor] = parameter.detach()
    print(f"gradient × {factor}: norm {norm:6.1f}, first weights {parameter.detach()[:3]}")
print(f"largest difference of the steps: {(moved[1] - moved[4]).abs().max():.1e}")
cosine = F.cosine_similarity(wrong, exact, dim=0)  # of the last pair of section 7
print(f"mean of means at {n1} : {n2}: cosine with the right gradient {cosine:.2f}")

# %% [markdown] tags=["zh"]
# AdamW 用梯度除以它自己的大小，整体的倍数约掉了。但记录下来的梯度范数是 4 倍，裁剪（clipping，第 14 课）的阈值也就相当于缩到四分之一。怎么发现？同样的样本，把累积次数从 1 改成 4，日志里的梯度范数应当不变。反过来，平均的平均**不会**被约掉：它连方向也改了。最后一行是第七节最后一对小批次的余弦：方向相同才是 1，这里只有 0.71，夹角约 45 度。
#
# ## 练习

# %% [markdown] tags=["en"]
# AdamW divides a gradient by its own size, so a common factor cancels. But the logged gradient norm is 4 times too large, and the threshold of clipping (lesson 14) is in effect a quarter of what it says. How would you notice? Take the same samples with 1 accumulation and with 4: the logged norm has to stay. The mean of means, on the other hand, does **not** cancel: it changes the direction too. The last line is the cosine for the last pair of section 7, 0.71, an angle of about 45 degrees; only the same direction gives 1.
#
# ## Exercises

# %% [markdown] tags=["zh"]
# **13.1 补一行。** 由 `counts` 算出平均的平均里每段对话的一个 token 的权重，得到 k 个数的张量。

# %% [markdown] tags=["en"]
# **13.1 Fill in a line.** From `counts`, compute the weight of one token of each conversation in the mean of means: a tensor of k numbers.

# %% tags=["exercise"]
token_weights = ...
check("13.1", token_weights, torch.tensor([1 / 88, 1 / 16, 1 / 12, 1 / 12]))

# %% [markdown] tags=["zh"]
# **13.2 改一个行为。** 很多库只肯给你平均损失。已知每个小批次的平均损失 `means` 和标签数 `counts`，还原整个大批次的平均损失。

# %% [markdown] tags=["en"]
# **13.2 Change a behaviour.** Many libraries only hand out mean losses. Given the mean loss of each micro-batch, `means`, and `counts`, recover the mean loss of the large batch.

# %% tags=["exercise"]
with torch.no_grad():
    means = torch.stack([new(batch) / len(batch.targets) for batch in micro_batches])
    expected = new(large) / len(large.targets)
large_mean = ...
check("13.2", large_mean, expected)

# %% [markdown] tags=["zh"]
# **13.3 找错。** 这个函数返回累积的梯度，可结果只像最后一个小批次的。改好它。

# %% [markdown] tags=["en"]
# **13.3 Find the bug.** This function is to return the accumulated gradient, but the result looks like that of the last micro-batch alone. Mend it.


# %% tags=["exercise"]
def accumulate(model, batches):
    target_count = sum(len(batch.targets) for batch in batches)
    for batch in batches:
        model.zero_grad()
        (model(batch) / target_count).backward()
    return take_gradient(model)


(new(large) / len(large.targets)).backward()
of_large = take_gradient(new)
check("13.3", accumulate(new, micro_batches), of_large)

# %% [markdown] tags=["zh"]
# ## 别人在这里摔过跤
#
# [huggingface/transformers#34191](https://github.com/huggingface/transformers/pull/34191) 和 [meta-pytorch/torchtune#1875](https://github.com/meta-pytorch/torchtune/pull/1875)，都在 2024 年 10 月着手修正这个错误。torchtune 的作者开玩笑说，这是「机器学习界第一次发现 (x1/n1) + (x2/n2) ≠ (x1 + x2)/(n1 + n2)」的日子。他的第一版把各小批次的损失攒起来，除以 token 总数，最后只反向一次，正是第五节里不省内存的那种；后续的 [#1917](https://github.com/meta-pytorch/torchtune/pull/1917) 恢复为每个小批次之后就反向，走步之前再把梯度乘以 1/token 总数。transformers 的那一版合并以后，也有人在讨论里报告：自己定义损失的训练器，损失和梯度范数突然变大。怎么发现？同样的 8 个样本，切成 1、2、4、8 份，梯度应当处处相等。
#
# ## 到库里看看
#
# - [`nanovlm/training/loop.py`](../../nanovlm/training/loop.py)，`train`：先取齐 k 个小批次，`monitor.count` 数出**所有进程**的标签，再逐个反向。多个进程之间是同一个问题：各自取平均再平均，就又错了。
# - [`nanovlm/model/vlm.py`](../../nanovlm/model/vlm.py)，`VisionLanguageModel.forward`：返回损失之和。
#
# 论文：Goyal 等，2017，*Accurate, Large Minibatch SGD*，[arXiv:1706.02677](https://arxiv.org/abs/1706.02677)，讨论了多机训练时应当除以整个大批次的大小，而不是每台机器自己的。

# %% [markdown] tags=["en"]
# ## In the wild
#
# [huggingface/transformers#34191](https://github.com/huggingface/transformers/pull/34191) and [meta-pytorch/torchtune#1875](https://github.com/meta-pytorch/torchtune/pull/1875) took up this mistake in the same month, October 2024. The author of the latter jokes about "the day the ML community first discovered the fact that (x1 / n1) + (x2 / n2) != (x1 + x2) / (n1 + n2)". That first version saved up the losses, divided them by the number of tokens and went backward once: the way of section 5 that saves no memory. The follow-up [#1917](https://github.com/meta-pytorch/torchtune/pull/1917) restored the backward pass after each micro-batch and scaled the gradients by 1 / number of tokens before the step. After the change in transformers, people report in its thread that with a trainer that has its own loss, loss and gradient norm suddenly grew. How would you notice? Cut the same 8 samples into 1, 2, 4 and 8 parts: the gradients have to be equal everywhere.
#
# ## Look in the package
#
# - [`nanovlm/training/loop.py`](../../nanovlm/training/loop.py), `train`: all k micro-batches are fetched first, `monitor.count` counts the labels **of all processes**, then each goes backward. Between processes it is the same problem: if each takes its own mean, the mean of those is wrong again.
# - [`nanovlm/model/vlm.py`](../../nanovlm/model/vlm.py), `VisionLanguageModel.forward`: returns the summed loss.
#
# The paper: Goyal et al. 2017, *Accurate, Large Minibatch SGD*, [arXiv:1706.02677](https://arxiv.org/abs/1706.02677), which says that with many workers one divides by the size of the whole minibatch, not of each worker's own.
