# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["zh"]
# # 11 · 损失
#
# 前向走完，每个有标签的位置上都有一个隐藏状态（hidden state）。训练需要一个数，说明这些隐藏状态离正确答案有多远；还需要这个数的梯度。这一课手写两者：交叉熵（cross entropy）的前向和反向，以及词表很大时怎样分块计算。
#
# **进来的**：隐藏状态 `(M, C)`、输出层 `(V, C)`、标签 `(M,)`。M 是有标签的位置数，V 是词表大小。**出去的**：一个 `float32` 的数，即所有标签的损失之和，以及对隐藏状态和输出层的梯度。

# %% [markdown] tags=["en"]
# # 11 · The loss
#
# After the forward pass there is a hidden state at every position that has a label. Training needs one number that says how far these vectors are from the right answer, and the gradient of that number. This lesson writes both by hand: cross entropy forward and backward, then in chunks, for a vocabulary too large to hold all logits.
#
# **In**: hidden states `(M, C)`, the output head `(V, C)`, targets `(M,)`. M counts the labelled positions, V the tokens of the vocabulary. **Out**: one `float32` number, the loss summed over all labels, and its gradients with respect to hidden states and head.

# %% tags=["setup"]
import math
import sys

sys.path.insert(0, "../..")  # the repository: nanovlm and the drawing helpers

import torch
import torch.nn.functional as F

from lessons import draw
from lessons.check import check
from nanovlm import IMAGE, Message, VisionLanguageModel, load_model, open_image, prepare

ASSETS = "../../nanovlm/assets"
torch.manual_seed(0)
draw.strip("hidden states", "logits")

# %% [markdown] tags=["zh"]
# ## 先猜一猜
#
# Qwen 的词表有 151,936 行。设一个批次有 256 个有标签的 token，隐藏状态宽 64，全部是 `float32`，那么隐藏状态只占 0.07 MB。
#
# 用普通的写法 `F.cross_entropy(hidden_states @ head.T, targets)` 算出损失以后，PyTorch 为反向传播**另外留着**多少 MB？先写下一个数，第六节来量。（提示：一个 `float32` 占 4 个字节。）

# %% [markdown] tags=["en"]
# ## Predict
#
# Qwen's vocabulary has 151,936 rows. Say a batch has 256 labelled tokens and hidden states of width 64, all in `float32`: the hidden states take 0.07 MB.
#
# The ordinary line is `F.cross_entropy(hidden_states @ head.T, targets)`. After it has run, how many MB does PyTorch **keep on top** for the backward pass? Write down a number. Section 6 measures it.

# %% [markdown] tags=["zh"]
# ## 一、一个位置的损失
#
# 拿那张熟悉的图，问「描述图片」，但在参考答案里放一个错：图上的五角星是蓝色的，我们写成绿色。模型的 `forward` 允许换掉损失函数；换成 `lambda *inputs: inputs`，让它原样交出三个输入，正好得到本课的起点。

# %% [markdown] tags=["en"]
# ## 1. The loss at one position
#
# Take the scene of all lessons and the question 描述图片 ("describe the image"), but put one lie into the reference answer: the star is blue, and we write 绿色 ("green"). The model's `forward` accepts another loss function. Give it one that hands its three inputs back, `lambda *inputs: inputs`, and you have the starting point of this lesson.

# %%
model = load_model(f"{ASSETS}/tiny-vlm").float().eval()  # the file holds bfloat16
image = open_image(f"{ASSETS}/scene.png")
question = Message("user", [IMAGE, "描述图片"])
truth = "图中有三个物体，从左到右是：大的红色圆环、大的蓝色五角星、小的橙色三角形。"
answer = Message("assistant", truth.replace("蓝色", "绿色"))
batch = prepare(model, [[question, answer]], [[image]])
with torch.no_grad():
    hidden_states, head, targets = model(batch, lambda *inputs: inputs)
head = head.detach()
words = [model.tokenizer.decode([index]) for index in targets.tolist()]
print("hidden states (M, C):", tuple(hidden_states.shape))
print("output head   (V, C):", tuple(head.shape))
print("targets       (M,):  ", tuple(targets.shape), words)

# %% [markdown] tags=["zh"]
# 先看「绿色」那个位置。隐藏状态与输出层的每一行做内积，得到 V 个 logits；取指数、除以总和，成为概率；正确 token 的概率取负对数，就是损失。

# %% [markdown] tags=["en"]
# Start with the position of 绿色. The inner product of its hidden state and each row of the head is a logit; there are V of them. Exponentials divided by their sum are probabilities. Minus the logarithm of the target's probability is the loss.

# %%
place = words.index("绿色")
logits = hidden_states[place] @ head.T  # (V,)
probabilities = logits.exp() / logits.exp().sum()  # (V,), adds up to 1
loss_here = -probabilities[targets[place]].log()
print("logits:", tuple(logits.shape), f"from {logits.min():.1f} to {logits.max():.1f}")
best = probabilities.argsort(descending=True)[:3].tolist()
for index in [*best, int(targets[place])]:
    print(f"{model.tokenizer.decode([index]):6} probability {probabilities[index]:.2e}")
print(f"loss at this position: {loss_here:.2f}")

# %% [markdown] tags=["zh"]
# 损失是 0，表示概率为 1；概率是 0.5 时损失约 0.69，是 0.1 时约 2.3，以后损失每增加 2.3，概率再缩小到十分之一。为什么取对数？一句话的概率是各个 token 概率的乘积，取了对数就变成相加，损失也就可以一个 token 一个 token 地加。
#
# 模型几乎确定这里该是「蓝色」，于是我们写的「绿色」代价很高。
#
# 上面的写法有一个隐患：`exp` 在 `float32` 里到 88.7 就溢出。所有 logits 同加一个常数，概率本来不变，看看会怎样：

# %% [markdown] tags=["en"]
# A loss of 0 means probability 1; probability 0.5 costs about 0.69 and 0.1 about 2.3, and with every 2.3 more it is ten times smaller. Why the logarithm? The probability of a sentence is the product of its tokens' probabilities. Logarithms turn the product into a sum, so losses can be added token by token.
#
# The model is almost certain that 蓝色 comes here, so our 绿色 is expensive.
#
# The code above has a weak spot: in `float32`, `exp` overflows at 88.7. Adding one constant to all logits leaves the probabilities as they are. Or does it?

# %%
shifted = logits + 100
naive = -(shifted.exp() / shifted.exp().sum())[targets[place]].log()
highest = shifted.max()
log_sum = highest + (shifted - highest).exp().sum().log()  # the largest exponential is exp(0)
stable = log_sum - shifted[targets[place]]
print(f"naive: {naive}, stable: {stable:.4f}, before the shift: {loss_here:.4f}")

# %% [markdown] tags=["zh"]
# 无穷除以无穷得到 `nan`。先减去最大值再取指数，就不会溢出；概率也不必真的算出来，因为
#
# $$\text{loss} = -\log\frac{e^{z_t}}{\sum_v e^{z_v}} = \log\sum_v e^{z_v} - z_t .$$
#
# 式中 z 是 `logits`，t 是正确的 token。右边的第一项叫 log-sum-exp，PyTorch 的 `logsumexp` 就这样算。
#
# ## 二、所有位置
#
# 同样的两行，作用于 M 个位置。顺便算出困惑度（perplexity），即平均损失的指数：它好比是在说，模型平均每一步要在几个同样可能的 token 里挑。

# %% [markdown] tags=["en"]
# Infinity divided by infinity is `nan`. Subtract the largest value before taking exponentials, and nothing overflows. The probabilities need not be computed at all, because
#
# $$\text{loss} = -\log\frac{e^{z_t}}{\sum_v e^{z_v}} = \log\sum_v e^{z_v} - z_t ,$$
#
# where z is `logits` and t the target.
#
# The first term is called log-sum-exp; PyTorch's `logsumexp` computes it this way.
#
# ## 2. All positions
#
# The same, for M positions at once:

# %%
all_logits = hidden_states @ head.T  # (M, V)
of_targets = all_logits.gather(1, targets[:, None])[:, 0]  # (M,)
losses = all_logits.logsumexp(dim=1) - of_targets  # (M,)
print("logits", tuple(all_logits.shape), "→ losses", tuple(losses.shape))
print(f"sum {losses.sum():.3f}, mean {losses.mean():.3f}, perplexity {losses.mean().exp():.3f}")
torch.testing.assert_close(losses, F.cross_entropy(all_logits, targets, reduction="none"))

# %%
made, axis = draw.figure(height=3.0)
colours = [draw.WRONG if word == "绿色" else draw.LANGUAGE for word in words]
axis.bar(range(len(words)), losses, color=colours)
names = [f"{number}\ngreen" if number == place else f"{number}" for number in range(len(words))]
axis.set_xticks(range(len(words)), names)
axis.set(xlabel="labelled token of the answer", ylabel="loss, −ln p")
axis.text(place + 0.7, losses[place] * 0.9, f"{losses[place]:.1f}", color=draw.WRONG)
draw.show(made, "One wrong word in the reference carries nearly all of the loss")

# %% [markdown] tags=["zh"]
# 其余的词几乎不花代价，合起来只有 0.02，因为模型早已确信。平均值会把这一点掩盖掉：一个词全错、其余全对，和每个词都差一点，可以有相同的平均损失。所以看损失时，值得偶尔像这样按 token 打开看看：是每个 token 都差一点，还是几个 token 差得离谱？前者要接着训练，后者往往是数据写错了。
#
# ## 三、什么都不知道时：ln V
#
# 一个什么也没学过的模型，对 V 个 token 一视同仁，每个概率为 1/V，损失就是 ln V。这是训练开始时应该看到的数。五个随机种子：

# %% [markdown] tags=["en"]
# The other words cost almost nothing, 0.02 together: the model is sure of them. (The perplexity in the printed line is e to the power of the mean loss: among how many equally likely tokens the model would waver with such a loss.) A mean hides this. One word all wrong and the rest right can have the same mean as every word a little wrong. So it pays to open up a loss by token now and then, as here. If every token is a little off, train on. If a few are far off, it is often the data that is wrong.
#
# ## 3. Knowing nothing: ln V
#
# A model that has learned nothing treats all V tokens alike. Each has probability 1/V, and the loss is ln V. That is the number to see when training starts. Five random seeds:

# %%
print(f"ln {len(head)} = {math.log(len(head)):.3f}")
for seed in range(5):
    torch.manual_seed(seed)
    new = VisionLanguageModel(model.config, model.tokenizer).eval()  # random weights
    with torch.no_grad():
        rows, matrix, _ = new(batch, lambda *inputs: inputs)
        start = F.cross_entropy(rows @ matrix.T, targets)
        spread = (rows @ matrix.T).std()
    print(f"seed {seed}: loss {start:.3f}, logits spread by {spread:.2f} around their mean")
print(f"with Qwen's vocabulary: ln 151936 = {math.log(151936):.2f}")

# %% [markdown] tags=["zh"]
# 都在 ln V 附近，平均略高：logits 并不完全相等，随机的起伏有时让损失高一点，有时低一点，平均起来偏高，大约高出方差的一半。**起点比 ln V 高很多**，多半是初始化太大或标签错位；**训练很久仍在 ln V**，多半是权重没有装进去（第 12 课）或梯度没有传到。**一开始就远低于 ln V**，要么装了预训练权重，要么答案漏进了输入。
#
# ## 四、反向：概率减去 one-hot
#
# 对 $\log\sum e^{z_v} - z_t$ 求导，第一项给出概率，第二项在正确 token 处给出 −1：
#
# $$\frac{\partial\,\text{loss}}{\partial z_v} = p_v - [v = t].$$
#
# 不需要自动求导，两行就够：

# %% [markdown] tags=["en"]
# All are near ln V and on average a little above: random logits are not quite equal, which raises the loss at one seed and lowers it at another, but on average raises it, by about half their variance. **A start far above ln V** usually means too large an initialisation or shifted labels. **A loss that stays at ln V** usually means weights that were never loaded (lesson 12) or a gradient that does not arrive. **A start far below ln V** means pretrained weights, or an answer that leaks into the input.
#
# ## 4. Backward: probabilities minus one-hot
#
# How does the loss change when one logit changes? No automatic differentiation is needed to say it. Two lines compute the gradient, and autograd is asked only to check it:

# %%
gradient = torch.softmax(all_logits, dim=1)  # (M, V)
gradient[torch.arange(len(targets)), targets] -= 1
print("gradient of the logits:", tuple(gradient.shape))
print(f"largest sum of a row: {gradient.sum(dim=1).abs().max():.1e}")

by_autograd = all_logits.clone().requires_grad_()
F.cross_entropy(by_autograd, targets, reduction="sum").backward()
torch.testing.assert_close(gradient, by_autograd.grad, rtol=0, atol=1e-6)

# %%
shown = [words.index("红色"), place, words.index("橙色")]
columns = [int(targets[shown[0]]), best[0], int(targets[place]), int(targets[shown[2]])]
made, axis = draw.figure(height=2.1)
draw.heat(
    axis, gradient[shown][:, columns], numbers="+.4f", colours="RdBu_r", limits=(-2, 2),
    rows=["label: red", "label: green", "label: orange"],
    columns=["red", "blue", "green", "orange"],
)  # fmt: skip
draw.show(made, "Gradient of four logits at three positions: pull up (blue), push down (red)")

# %% [markdown] tags=["zh"]
# 在「绿色」的位置上，梯度要把绿色的 logit 抬高，把模型相信的蓝色压低，两者几乎相等、方向相反；另外两个位置几乎没有梯度。每一行的和都是 0：概率的总量不变，只能从一个 token 挪给另一个。
#
# logits 是 `hidden_states @ head.T`，所以往后再走一步，就是两次矩阵乘法。前一个梯度告诉语言模型，每个隐藏状态该往哪边动；后一个告诉输出层，每一行该往哪边动。输出层与词嵌入共享（tied）时，后一个也会加到词嵌入表的梯度上。

# %% [markdown] tags=["en"]
# At the position of 绿色, the gradient pulls the logit of green up and pushes blue, which the model believes, down by almost the same amount. The other two rows hold almost nothing. Each row adds up to 0: probability is only moved from one token to another.
#
# As a formula, differentiate $\log\sum e^{z_v} - z_t$. The first term gives the probabilities p, the second −1 at the target:
#
# $$\frac{\partial\,\text{loss}}{\partial z_v} = p_v - [v = t].$$
#
# The logits are `hidden_states @ head.T`, so one step further back there are two matrix products. The first tells the language model where each hidden state should move, the second tells the head where each of its rows should. Where the head is tied to the embeddings, the second is also added to the gradient of the embedding table:

# %%
grad_rows = gradient @ head  # (M, C), what the language model gets
grad_head = gradient.T @ hidden_states  # (V, C)
print("for the hidden states:", tuple(grad_rows.shape), " for the head:", tuple(grad_head.shape))

# %% [markdown] tags=["zh"]
# ## 五、分块，以及一种骗人的分块
#
# 两个梯度都比 `(M, V)` 的 logits 小得多：V 很大时，logits 是最大的张量，却只是过客。所以不妨一次只取几行，算完损失就丢。
#
# V = 151,936 时，一个位置的 logits 有 151,936 个数，隐藏状态却只有几百到几千个。
#
# 先**故意做错**：只把前向分块，反向交给自动求导。用 `saved_tensors_hooks` 数一数 PyTorch 为反向留了多少字节（不算隐藏状态和输出层本身）。

# %% [markdown] tags=["en"]
# ## 5. Chunks, and chunks that save nothing
#
# Both gradients are much smaller than the logits of shape `(M, V)`. With a large V the logits are the largest tensor of all, and only passing through. With V = 151,936 a single position has 151,936 logits, and a hidden state of some hundreds or thousands of numbers. So take a few rows at a time, and drop their logits once the loss is computed.
#
# First **broken on purpose**: the forward pass in chunks, the backward pass left to autograd. `saved_tensors_hooks` counts the bytes that PyTorch keeps for the backward pass, without hidden states and head themselves.


# %%
def whole(hidden_states, head, targets):
    return F.cross_entropy(hidden_states @ head.T, targets, reduction="sum")


def chunks_with_autograd(hidden_states, head, targets, size=32):
    parts = zip(hidden_states.split(size), targets.split(size))
    return sum(whole(rows, head, target) for rows, target in parts)


# %%
def bytes_kept(function, hidden_states, head, targets):
    kept = {}  # of each piece of memory, once

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = function(hidden_states, head, targets)  # alive while we count
    del loss
    inputs = {tensor.untyped_storage().data_ptr() for tensor in (hidden_states, head)}
    return sum(size for memory, size in kept.items() if memory not in inputs)


# %%
random = torch.Generator().manual_seed(0)
V, C, M = 151_936, 64, 256
large_head = torch.empty(V, C).normal_(std=0.02, generator=random).requires_grad_()
large_rows = torch.randn(M, C, generator=random).requires_grad_()
large_targets = torch.randint(V, (M,), generator=random)
large = large_rows, large_head, large_targets
for function in (whole, chunks_with_autograd):
    print(f"{function.__name__:21} keeps {bytes_kept(function, *large) / 1e6:6.1f} MB")

# %% [markdown] tags=["zh"]
# 一个字节也没省下。每一块的 log-softmax 都被计算图留着，等反向来用；8 块加起来，还是原来那么大。代码里看不出问题，损失也完全正确，只有量了内存才知道白忙一场。
#
# 出路在第四节：梯度就是「概率减去 one-hot」，在前向里、logits 还在手上的时候就能算完。于是每一块算出损失和两个梯度，然后丢掉 logits。`size` 是一块的行数：越小，临时的 logits 越小，矩阵乘法也越零碎；库里在 CPU 上取 128 行，对 151,936 的词表是 78 MB。

# %% [markdown] tags=["en"]
# Not one byte was saved. The graph keeps the log-softmax of every chunk for the backward pass, and 8 chunks are as large as the whole. The code looks right, and the loss is right; only measuring tells.
#
# The way out is in section 4: the gradient is "probabilities minus one-hot", and can be computed in the forward pass, while the logits are at hand. So each chunk yields its loss and both gradients, and its logits are dropped. `size` is the number of rows in a chunk. The smaller it is, the fewer logits exist at a time, and the more the products of matrices are chopped up. On a CPU the package takes 128 rows, 78 MB for a vocabulary of 151,936:


# %%
def loss_and_gradients(hidden_states, head, targets, size):
    loss, grad_rows, grad_head = torch.zeros(()), [], torch.zeros_like(head)
    for rows, target in zip(hidden_states.split(size), targets.split(size)):
        log_probabilities = torch.log_softmax(rows @ head.T, dim=1)  # (size, V)
        loss -= log_probabilities.gather(1, target[:, None]).sum()
        gradient = log_probabilities.exp_()  # in place: the only large tensor
        gradient[torch.arange(len(target)), target] -= 1
        grad_rows.append(gradient @ head)
        grad_head += gradient.T @ rows
    return loss, torch.cat(grad_rows), grad_head


print("whole, by hand:", f"{losses.sum():.4f}")
print("in chunks of 8:", f"{loss_and_gradients(hidden_states, head, targets, 8)[0]:.4f}")

# %% [markdown] tags=["zh"]
# 为什么可以在前向里就把梯度算好？因为损失是最后一步，反向传回来的只有一个数，乘上去就行。中间的层做不到：它们的梯度要等后面的层算完才知道。
#
# 剩下的是告诉自动求导：「这个函数的反向我自己算好了。」`forward` 存下两个梯度，`backward` 只需乘上传回来的 `grad_loss`。它不一定是 1：训练时损失还要除以标签总数（第 13 课）。

# %% [markdown] tags=["en"]
# Why can the gradient be computed in the forward pass at all? The loss is the last step, and a single number comes back to it, by which everything is multiplied. A layer in the middle cannot do it: its gradient is known only when the later layers have computed theirs.
#
# What remains is to tell autograd that this function brings its own backward pass. `forward` keeps the two gradients, and `backward` multiplies them with the `grad_loss` that comes back. That is not always 1: in training the loss is divided by the number of labels (lesson 13).


# %%
class ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, head, targets):
        loss, grad_rows, grad_head = loss_and_gradients(hidden_states, head, targets, 32)
        ctx.save_for_backward(grad_rows, grad_head)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_rows, grad_head = ctx.saved_tensors
        return grad_loss * grad_rows, grad_loss * grad_head, None


# %% [markdown] tags=["zh"]
# ## 六、与库代码核对，再量一次
#
# 库里的同一个函数是 `chunked_cross_entropy`。用自带的权重、同一个答案，比较损失与两个梯度。容差 1e-5：分块改变求和顺序，`float32` 的末几位会不同。

# %% [markdown] tags=["en"]
# ## 6. Proven equal, and measured again
#
# In the package this is `chunked_cross_entropy`. Compare the loss and both gradients on the shipped weights and our answer. The tolerance is 1e-5: chunks add up in another order, which changes the last digits of `float32`.

# %%
from nanovlm.model.loss import chunked_cross_entropy


def with_gradients(function, *inputs):
    rows, matrix, targets = inputs
    rows, matrix = rows.detach().requires_grad_(), matrix.detach().requires_grad_()
    loss = function(rows, matrix, targets)
    return loss.detach(), *torch.autograd.grad(loss / len(targets), (rows, matrix))


mine = with_gradients(ChunkedLoss.apply, hidden_states, head, targets)
theirs = with_gradients(chunked_cross_entropy, hidden_states, head, targets)
torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
torch.testing.assert_close(mine[0], model(batch).detach(), rtol=1e-5, atol=1e-5)
print("loss, gradient of the rows, gradient of the head: equal to the package's")

# %%
for one, other in zip(with_gradients(whole, *large), with_gradients(ChunkedLoss.apply, *large)):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
kept = {
    "whole": bytes_kept(whole, *large) / 1e6,
    "chunks,\nautograd": bytes_kept(chunks_with_autograd, *large) / 1e6,
    "chunks,\nby hand": bytes_kept(ChunkedLoss.apply, *large) / 1e6,
    "package": bytes_kept(chunked_cross_entropy, *large) / 1e6,
}
made, axis = draw.figure(height=3.0)
draw.bars(axis, kept, "", "MB", ["wrong", "wrong", "right", "right"], ".1f")
draw.show(made, "Kept for backward: 256 labels, a head of 151,936 rows, width 64")

# %% [markdown] tags=["zh"]
# 这就是开头的答案：256 × 151,936 × 4 字节 = 155.6 MB，是隐藏状态的两千多倍；而且这只是留下来的一份，计算的瞬间 logits 和 log-softmax 同时存在，还要再翻倍。手写版留下的约 39 MB 几乎全是**输出层自己的梯度**，不论哪种写法，反向之后都要有它。真正的区别在于谁随 M 增长。换成 Qwen2.5-0.5B 的宽度 896，按同样的公式画出来：

# %% [markdown] tags=["en"]
# That is the answer to the prediction: 256 × 151,936 × 4 bytes = 155.6 MB, more than two thousand times the hidden states. And that is only what stays: at the moment of computing, logits and log-softmax exist side by side, twice as much. The 39 MB of the version by hand are almost all **the gradient of the head itself**, which every version ends up with. What matters is which part grows with M. The same formulas at the width of Qwen2.5-0.5B, 896:

# %%
labels = torch.tensor([128, 512, 2048, 8192, 32768]).double()
width, size = 896, 128
gigabytes = {
    "whole: M · V · 4": labels * V * 4 / 1e9,
    "chunked: head's gradient, M · C · 4, a chunk of logits":
        (V * width + labels * width + size * V) * 4 / 1e9,
}  # fmt: skip
made, axis = draw.figure(height=3.1)
at = labels.tolist()
draw.curves(axis, gigabytes, x="labelled tokens M", y="GB", at=at, parts=["wrong", "right"])
axis.set(xscale="log", yscale="log")
axis.set_xticks(at, [f"{int(count):,}" for count in labels])
draw.show(made, "Whole logits grow with the batch; chunks hardly do")
print(f"32,768 labels: {gigabytes['whole: M · V · 4'][-1]:.1f} GB against",
      f"{list(gigabytes.values())[1][-1]:.2f} GB")  # fmt: skip

# %% [markdown] tags=["zh"]
# 标签很少时，普通写法反而更省，因为它还没有算输出层的梯度；大约 1000 个标签以后，分块的优势越来越大。还有一件事帮了忙：`forward` 只把**有标签的位置**送进输出层。图片占位、问题、填充，都不产生 logits。
#
# ## 练习

# %% [markdown] tags=["en"]
# With few labels the ordinary line even keeps less, because it has not yet computed the head's gradient. From about 1,000 labels on, chunks win by more and more. One more thing helps: `forward` sends only **labelled positions** through the head. Images, questions and padding make no logits.
#
# ## Exercises

# %% [markdown] tags=["zh"]
# **11.1 补一行。** 一张卡还剩 `free` 字节。用 `float32`、词表 `V`，最多能放下多少个标签的完整 logits（一份）？写成 `free` 和 `V` 的式子，取整数。

# %% [markdown] tags=["en"]
# **11.1 Fill in a line.** A card has `free` bytes left. In `float32` and with the vocabulary `V`, for how many labels does it hold the whole logits once? Write an expression of `free` and `V`, a whole number.

# %% tags=["exercise"]
free = 8 * 2**30
most_labels = ...
check("11.1", most_labels, 14134)

# %% [markdown] tags=["zh"]
# **11.2 改一个行为。** 标签平滑（label smoothing）把目标从 one-hot 换成：0.9 给正确 token，余下 0.1 平分给全部 640 个 token，正确的也在内。写出 `all_logits` 的梯度，形状 `(22, 640)`。（当心：第五节以后，变量 `V` 是 151,936。）

# %% [markdown] tags=["en"]
# **11.2 Change a behaviour.** Label smoothing replaces the one-hot target: 0.9 for the right token, and the remaining 0.1 shared equally by all tokens, the right one included. Compute the gradient of `all_logits`, `(22, 640)`. (Beware: `V` has been 151,936 since section 5.)

# %% tags=["exercise"]
smoothed = ...
leaf = all_logits.clone().requires_grad_()
F.cross_entropy(leaf, targets, reduction="sum", label_smoothing=0.1).backward()
check("11.2", smoothed, leaf.grad)

# %% [markdown] tags=["zh"]
# **11.3 找错。** 下面的函数本应返回 logits 的梯度，形状也对，但第四节的对照通不过。改好它。

# %% [markdown] tags=["en"]
# **11.3 Find the bug.** This function is to return the gradient of the logits. The shape is right, yet it fails the comparison of section 4. Mend it.


# %% tags=["exercise"]
def gradient_of_logits(logits, targets):
    gradient = torch.softmax(logits, dim=1)
    gradient[:, targets] -= 1
    return gradient


check("11.3", gradient_of_logits(all_logits, targets), by_autograd.grad, tolerance=1e-6)

# %% [markdown] tags=["zh"]
# ## 别人在这里摔过跤
#
# [modelscope/ms-swift#6966](https://github.com/modelscope/ms-swift/issues/6966)：有人用 32k 的长度训练 Qwen3-30B-A3B，在 `logits.float()` 这一步显存耗尽，报错说要再分配 49 GB。他自己按 32k × 151,936 × 4 字节算出 18.5 GB，问多出来的从何而来；我们读到的回复只建议换一套训练框架。算法与本课相同：一份 `float32` 的完整 logits 就要 18.5 GiB，留几份就乘几。怎么发现？报错的那一行写着 `logits`，就先算 M × V × 4，再用第五节的办法数一数反向留了什么。
#
# [NVIDIA-NeMo/Automodel#2603](https://github.com/NVIDIA-NeMo/Automodel/pull/2603) 是同样的问题，也给出了解法：一个视觉语言模型的微调在损失里多占约 45 GiB；把输出层和交叉熵合在一起分块算以后，完整的 logits 不再出现。
#
# ## 到库里看看
#
# - [`nanovlm/model/loss.py`](../../nanovlm/model/loss.py)，`chunked_cross_entropy`、`chunk_rows` 与 `token_log_probabilities`：本课略去了 16 位计算、fp16 的缩放、反复使用的缓冲区，以及偏好训练需要的「每个 token 一个对数概率」。
# - [`nanovlm/model/vlm.py`](../../nanovlm/model/vlm.py)，`VisionLanguageModel.forward`：只有 `target_positions` 的隐藏状态进入输出层，损失函数可以换。
#
# 论文：Wijmans 等，2024，*Cut Your Losses in Large-Vocabulary Language Models*，[arXiv:2411.09009](https://arxiv.org/abs/2411.09009)；Hsu 等，2024，*Liger Kernel*，[arXiv:2410.10989](https://arxiv.org/abs/2410.10989)。

# %% [markdown] tags=["en"]
# ## In the wild
#
# [modelscope/ms-swift#6966](https://github.com/modelscope/ms-swift/issues/6966): someone trains Qwen3-30B-A3B at a length of 32k and runs out of memory in `logits.float()`, which asks for another 49 GB. Their own count, 32k × 151,936 × 4 bytes, is 18.5 GB, and they ask where the rest comes from. The reply we read only suggests another training framework. The arithmetic is that of this lesson: one whole `float32` copy of the logits takes 18.5 GiB, times the number of copies. How would you notice? When the failing line says `logits`, compute M × V × 4 first, then count what is kept, as in section 5.
#
# [NVIDIA-NeMo/Automodel#2603](https://github.com/NVIDIA-NeMo/Automodel/pull/2603) is the same illness with its cure: fine-tuning a vision-language model spiked by about 45 GiB in the loss. Once head and cross entropy were joined and computed in chunks, the whole logits no longer appeared.
#
# ## Look in the package
#
# - [`nanovlm/model/loss.py`](../../nanovlm/model/loss.py), `chunked_cross_entropy`, `chunk_rows` and `token_log_probabilities`: this lesson left out 16-bit products, the scaling for fp16, buffers that are used again, and the log-probability of each token that preference training needs.
# - [`nanovlm/model/vlm.py`](../../nanovlm/model/vlm.py), `VisionLanguageModel.forward`: only the hidden states at `target_positions` pass the head, and the loss function can be replaced.
#
# The papers: Wijmans et al. 2024, *Cut Your Losses in Large-Vocabulary Language Models*, [arXiv:2411.09009](https://arxiv.org/abs/2411.09009); Hsu et al. 2024, *Liger Kernel*, [arXiv:2410.10989](https://arxiv.org/abs/2410.10989).
