# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["zh"]
# # 06 · 语言模型（一）：残差流
#
# 前五课备好了一行向量：文字的词嵌入，中间夹着图片的视觉 token。语言模型（language model）读这一行，在每个位置上给词表里的每个 token 打一个分。这一课从词嵌入走到 logits，只有一件事留给第 07 课：位置。
#
# **进来的**：形状为 `(1, T, 192)` 的 `float32` 向量。**出去的**：形状为 `(1, T, 640)` 的 logits，每个位置对下一个 token 的打分。

# %% [markdown] tags=["en"]
# # 06 · The language model I: the residual stream
#
# Five lessons have prepared a row of vectors: embeddings of words, with the visual tokens of an image among them. The language model reads this row and, at each position, gives every token of the vocabulary a score. This lesson goes from embeddings to logits and leaves one thing to lesson 07, positions.
#
# **In**: `float32` vectors of shape `(1, T, 192)`. **Out**: logits of shape `(1, T, 640)`, at each position the scores of the next token.

# %% tags=["setup"]
import math
import sys

sys.path.insert(0, "../..")  # the repository: nanovlm and the drawing helpers

from random import Random

import torch
import torch.nn.functional as F
from matplotlib.colors import ListedColormap
from torch import nn

from data_tools import scenes_world as world
from data_tools.scenes_text import describe
from lessons import draw
from lessons.check import check
from nanovlm import IMAGE, LanguageModelConfig, Message, load_model, open_image, prepare

ASSETS = "../../nanovlm/assets"
draw.strip("sequence", "hidden states", "logits")

# %% [markdown] tags=["zh"]
# ## 先猜一猜
#
# 我们会从零训练两种很小的语言模型，数据、步数、随机种子都一样。一种只许看**前面**的 token，另一种没有这个限制，前后都看得见。开始时两者的损失都是 ln 640 ≈ 6.46。
#
# 200 步以后，各是多少？再猜一个：让**损失低的那个**从头写一句话，写得怎么样？

# %% [markdown] tags=["en"]
# ## Predict
#
# We will train two kinds of very small language models from zero, with the same data, steps and seeds. One may look at **earlier** tokens only, the other at all of them, before and after. The loss of both starts at ln 640 ≈ 6.46.
#
# Where is each after 200 steps? And when **the one with the lower loss** writes a sentence from the start, what is it like?

# %% [markdown] tags=["zh"]
# ## 一、词嵌入：查表
#
# 词嵌入（embedding）是一张表，一个 token 一行。「查第 i 行」等于「用第 i 位是 1 的向量乘这张表」，所以它也是一个可以求导的矩阵乘法。下面的对话还是那张图、那个问题，外加标准答案；占位 token 的位置上已经换成了视觉 token（第 09 课）。

# %% [markdown] tags=["en"]
# ## 1. Embeddings: looking up rows
#
# The embedding is a table with a row for each token. Looking up row i equals multiplying the table by a vector whose i-th number is 1, so it is a product of matrices that can be differentiated. The conversation below is the same image and question as ever, with the right answer; visual tokens already stand where the placeholders were (lesson 09).

# %%
model = load_model(f"{ASSETS}/tiny-vlm").float().eval()  # the file holds bfloat16
tokenizer, theirs = model.tokenizer, model.language_model
config = model.config.language_model
image = open_image(f"{ASSETS}/scene.png")
answer = "图中有三个物体，从左到右是：大的红色圆环、大的蓝色五角星、小的橙色三角形。"
conversation = [Message("user", (IMAGE, "描述图片")), Message("assistant", (answer,))]
batch = prepare(model, [conversation], [[image]])
with torch.no_grad():
    embeddings = model.embed(batch)  # (1, T, C)
table = theirs.embed_tokens.weight.detach()  # (V, C)
words = batch.input_ids[0] != model.chat.image_token_id  # the positions of words
ids = batch.input_ids[0, words]
one_hot = F.one_hot(ids, len(table)).float()  # (words, V)
torch.testing.assert_close(one_hot @ table, embeddings[0, words], rtol=0, atol=0)
print("table", tuple(table.shape), " row of vectors", tuple(embeddings.shape))

# %% [markdown] tags=["zh"]
# ## 二、RMSNorm：只管大小
#
# 向量有长有短，层希望读到的总是差不多大的数。RMSNorm 把每个向量除以它自己的均方根（root mean square），再逐维乘一个学到的权重。和第 03 课的 LayerNorm 比，它不减均值，也没有偏置。

# %% [markdown] tags=["en"]
# ## 2. RMSNorm: size alone
#
# Vectors come long and short, and a layer wants numbers of about one size. RMSNorm divides each vector by its own root mean square and multiplies each dimension by a learned weight. Unlike the LayerNorm of lesson 03 it subtracts no mean and has no bias.


# %%
class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, hidden_states):  # (…, C) → (…, C)
        size = (hidden_states.square().mean(dim=-1, keepdim=True) + self.eps).sqrt()
        return hidden_states / size * self.weight


def rms(vectors):
    return vectors.square().mean(dim=-1).sqrt()


# %%
normalised = RMSNorm(config.hidden_size, config.rms_norm_eps)(embeddings).detach()
made, axes = draw.figure(1, height=2.5)
axes.semilogy(rms(embeddings)[0], color=draw.PROJECTOR, label="as they come")
axes.semilogy(rms(normalised)[0], "--", color=draw.LANGUAGE, label="after RMSNorm (weight 1)")
axes.set(xlabel="position", ylabel="root mean square")
axes.legend(frameon=False)
draw.show(made, "Words and visual tokens differ in size; RMSNorm makes them equal")
for name, chosen in (("words", words), ("visual tokens", ~words)):
    print(f"{name}: median size {rms(embeddings)[0, chosen].median():.2f}")

# %% [markdown] tags=["zh"]
# 图里中间一段是视觉 token，两头是文字。打印的是两者的典型大小，相差二十多倍。投影层没有义务让它们一样大，因为每一层一上来就会归一化。
#
# 写成式子：`y = x / sqrt(mean(x²) + eps) · weight`。
#
# ## 三、门控 MLP
#
# MLP 分别处理每个位置。第 03 课的 MLP 是「升维、GELU、降维」；这里升维升两次，一路经过 SiLU 当作**门**，和另一路逐个相乘，再降维（SwiGLU）。SiLU 是 x · sigmoid(x)，形状和 GELU 差不多。门接近零的维，另一路有什么都过不去；而门是由输入自己算出来的，所以每个 token 打开的维不同。

# %% [markdown] tags=["en"]
# The middle stretch is visual tokens; words are at both ends. Their typical sizes are printed: they differ more than 20-fold. Nothing obliges the projector to match them, since every layer begins by normalising.
#
# As a formula: `y = x / sqrt(mean(x²) + eps) · weight`.
#
# ## 3. The gated MLP
#
# An MLP works on each position by itself. That of lesson 03 went up, through a GELU, and down. Here it goes up twice. One way passes a SiLU, x times the sigmoid of x, and becomes a **gate**, by which the other is multiplied, number by number; then down (SwiGLU). Where a gate is near zero, nothing of the other way gets through; and as the gate comes from the input itself, each token opens other dimensions.


# %%
class GatedMLP(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, hidden_states):  # (…, C) → (…, C)
        gate = self.gate_proj(hidden_states)  # (…, inner)
        return self.down_proj(gate * torch.sigmoid(gate) * self.up_proj(hidden_states))


# %% [markdown] tags=["zh"]
# ## 四、因果掩码，和它的坏法
#
# 第 05 课说过，位置 t 的输出要预测 t + 1。训练时整句话一次送进去，注意力若不加限制，位置 t 就能直接看到 t + 1，也就是答案。因果掩码（causal mask）规定：只看自己和前面。这样一次前向就有 T 道预测题，每道题都只看得到该看的部分。做法是在 softmax **之前**给不许看的分数**加** −∞，`exp(−∞) = 0`，权重就是零。
#
# 下面先做对，再做一个看上去差不多的：把不许看的分数**乘**以 0。

# %% [markdown] tags=["en"]
# ## 4. The causal mask, and how it breaks
#
# Lesson 05 said that the output at position t has to predict token t + 1. In training the whole text goes in at once, and without a limit attention lets position t look at t + 1, the answer. The causal mask says: yourself and what is earlier. So one forward pass poses T questions, and each sees no more than it may. The mask **adds** −∞ to the forbidden scores **before** the softmax; `exp(−∞) = 0`, so their weight is zero.
#
# Here it is done right, and then in a way that looks much the same: forbidden scores are **multiplied** by 0.

# %%
torch.manual_seed(0)
scores = torch.randn(6, 6)  # (T, S): query, key
allowed = torch.ones(6, 6).tril().bool()  # query t may see keys 0 … t
added = scores.masked_fill(~allowed, -math.inf).softmax(dim=-1)
multiplied = (scores * allowed).softmax(dim=-1)
made, axes = draw.figure(3, height=2.7)
grids = {"allowed": allowed.float(), "weights, −∞ added": added, "weights, times 0": multiplied}
for axis, (name, grid) in zip(axes, grids.items()):
    draw.heat(axis, grid, name, ".2f", "Blues", limits=(0, 1))
    axis.set(xlabel="key (position seen)", ylabel="query")
draw.show(made, "What each position may see, and what it does see")

# %% [markdown] tags=["zh"]
# 右边上三角里还有权重：分数乘 0 得 0，而 `exp(0) = 1`，一点也没挡住。形状对，每行的和也是 1，训练照样进行。**检查的办法不是看数，而是动手**：改掉最后一个 token，前面各处的输出必须一个数也不变。

# %% [markdown] tags=["en"]
# On the right there is weight above the diagonal: a score times 0 is 0, and `exp(0) = 1` hides nothing. The shape is right, each row sums to 1, and training goes on. **The test is not to look at numbers but to act**: change the last token, and no output before it may move.

# %%
values = torch.randn(6, 4)  # (S, D)
changed = values.clone()
changed[-1] = 100.0
for name, weights in (("−∞ added", added), ("times 0", multiplied)):
    moved = (weights @ values - weights @ changed)[:-1].abs().max()
    print(f"{name:9} an earlier output moved by up to {moved:.3f}")

# %% [markdown] tags=["zh"]
# ## 五、层与残差流
#
# 一层（block）有两步，每一步都是「归一化、计算、**加回去**」。输入本身不被替换，只被加上一点东西；它从第一层一路流到最后，叫做残差流（residual stream）。反向传播时，梯度也沿着这条「加」的路原样传回最早的层，不会一层一层地变小。各层不过是从流里读，再往流里写。
#
# 注意力是第 02 课的，拿来就用；`rotary` 是第 07 课的内容，这里先当作「告诉注意力各个位置在哪里」。`AttentionInputs` 把注意力除了隐藏状态以外还要的东西包在一起，这里是「要不要因果掩码」和 `rotary`。

# %% [markdown] tags=["en"]
# ## 5. Blocks and the residual stream
#
# A block takes two steps, and each is "normalise, compute, **add**". Its input is not replaced; something is added to it. It flows from the first block to the last and is called the residual stream. Blocks read from the stream and write into it, no more. In the backward pass, gradients return along the additions to the earliest blocks without shrinking at each.
#
# Attention is that of lesson 02, ready for use. `rotary` belongs to lesson 07; for now it tells attention where each position is. `AttentionInputs` is a bundle of what attention needs besides the hidden states: here, whether it is causal, and `rotary`.

# %%
from nanovlm.model.attention import Attention, AttentionInputs
from nanovlm.model.rotary import rotary_embedding, rotary_frequencies


def attention_inputs(config, length, causal):
    frequencies = rotary_frequencies(config.head_dim, config.rope_theta)
    rotary = rotary_embedding(torch.arange(length)[None], frequencies)
    return AttentionInputs(is_causal=causal, rotary=rotary)


# %%
class DecoderBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config.attention)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)

    def forward(self, hidden_states, inputs):  # (B, T, C) → (B, T, C)
        hidden_states = hidden_states + self.attention(self.attention_norm(hidden_states), inputs)
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


# %% [markdown] tags=["zh"]
# 最后，流再归一化一次，乘上输出层（output head）就是 logits。自带模型的输出层没有自己的参数：它就是词嵌入表的转置，叫做共享（tied）。于是「给 token 打分」就是「看最后的向量和哪个词嵌入的内积最大」。

# %% [markdown] tags=["en"]
# At the end the stream is normalised once more. Multiplied by the output head it gives logits. The shipped model's head has no parameters of its own. It is the embedding table, transposed; the two are said to be tied. So to score a token is to ask how large the inner product of the last vector with its embedding is.


# %%
class LanguageModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def stream(self, embeddings, causal=True):  # (B, T, C) → before and after each block
        inputs = attention_inputs(self.config, embeddings.shape[1], causal)
        states = [embeddings]
        for block in self.blocks:
            states.append(block(states[-1], inputs))
        return states

    def logits(self, state):  # (…, C) → (…, V): normalised, then the tied head
        return self.norm(state) @ self.embed_tokens.weight.T

    def forward(self, input_ids, causal=True):  # (B, T) → (B, T, V)
        return self.logits(self.stream(self.embed_tokens(input_ids), causal)[-1])


# %% [markdown] tags=["zh"]
# ## 六、与库代码核对
#
# 名字都取自库代码，所以权重可以直接装进来；`load_state_dict` 默认要求一个不多、一个不少。容差取 1e-3：logits 有几十那么大，`float32` 里求和的次序不同，差别大约在第六位有效数字上。

# %% [markdown] tags=["en"]
# ## 6. Proven equal
#
# All names are the package's, so its weights can be loaded; `load_state_dict` insists that none is missing and none left over. The tolerance is 1e-3: logits reach some tens, and in `float32` another order of summation changes about the sixth digit.

# %%
mine = LanguageModel(config).eval()
print(mine.load_state_dict(theirs.state_dict()))
with torch.no_grad():
    states = mine.stream(embeddings)
    logits = mine.logits(states[-1])
    expected = theirs.logits(theirs.hidden_states(embeddings))
torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-3)
for block, other in zip(mine.blocks, theirs.blocks):  # and the parts by themselves
    normed = block.mlp_norm(embeddings)
    torch.testing.assert_close(normed, other.mlp_norm(embeddings), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(block.mlp(normed), other.mlp(normed), rtol=1e-4, atol=1e-4)
print(tuple(embeddings.shape), "→", tuple(logits.shape), "equal to the package's")

# %%
names = ["embeddings", *(f"block {number}" for number in range(1, len(states)))]
sizes = {name: float(rms(state)[0, words].mean()) for name, state in zip(names, states)}
made, axes = draw.figure(1, height=2.6)
draw.bars(axes, sizes, "", "root mean square", number=".1f")
draw.show(made, "The residual stream grows as blocks write into it (positions of words)")

# %% [markdown] tags=["zh"]
# 流越来越大：从 0.2 到 38.7，各层写进去的东西很少互相抵消。词嵌入到最后只占很小的一份，却从头到尾都在里面。
#
# ## 七、没有掩码的损失
#
# 现在训练。数据是第 05 课的描述句；小模型一层，宽 64。`causal=False` 时注意力不加掩码，别的一概不变。

# %% [markdown] tags=["en"]
# The stream grows, from 0.2 to 38.7: what the blocks write rarely cancels out. In the end the embedding is a small part of it, but it is there all the way.
#
# ## 7. A loss without the mask
#
# Now to training. The data are the descriptions of lesson 05; the small model has one block and 64 hidden numbers. With `causal=False` attention has no mask, and nothing else changes.

# %%
random = Random(0)
special = tokenizer.special_tokens
prompt = [special["<user>"], *tokenizer.encode("描述图片"), special["</s>"], special["<assistant>"]]
texts = [describe(world.random_scene(random), "zh") for _ in range(544)]
rows = [[*prompt, *tokenizer.encode(text), special["</s>"]] for text in texts]
longest = max(map(len, rows))
all_ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
all_labels = all_ids.masked_fill(all_ids == 0, -100)
all_labels[:, : len(prompt)] = -100
small = LanguageModelConfig(
    config.vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=1, head_dim=32,
    num_attention_heads=4, num_key_value_heads=2, qkv_bias=False, qk_norm=True, rope_theta=100.0,
)  # fmt: skip
print("ids:", tuple(all_ids.shape), " the last 32 rows are kept for validation")


# %%
def train(causal, seed, steps=200):
    torch.manual_seed(seed)
    small_model, losses = LanguageModel(small), []
    for parameter in filter(lambda each: each.dim() == 2, small_model.parameters()):
        nn.init.normal_(parameter, std=0.02)  # so that all tokens are about as likely at first
    optimizer = torch.optim.AdamW(small_model.parameters(), lr=5e-3)
    for _ in range(steps):
        chosen = torch.randint(512, (16,))
        logits = small_model(all_ids[chosen], causal)[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), all_labels[chosen, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return small_model, losses


# %%
pairs = [(causal, seed) for causal in (True, False) for seed in (0, 1, 2)]
trained = {pair: train(*pair) for pair in pairs}
made, axes = draw.figure(1, height=3.0)
for (causal, seed), (_, losses) in trained.items():
    style, colour = ("-", draw.RIGHT) if causal else ("--", draw.WRONG)
    name = ("causal mask" if causal else "no mask") if seed == 0 else None
    axes.plot(losses, style, color=colour, label=name)
axes.axhline(math.log(config.vocab_size), color=draw.FAINT, linewidth=0.8)
axes.text(199, math.log(config.vocab_size) + 0.1, "ln 640", ha="right", color=draw.FAINT)
axes.set(xlabel="step", ylabel="training loss per token (nats)", ylim=(-0.2, 7.2))
axes.legend(frameon=False, loc="center right")
draw.show(made, "Without the mask the loss goes to zero, on three seeds of three")

# %% [markdown] tags=["zh"]
# 没有掩码的模型，损失降到几乎为零；有掩码的停在 0.7 附近，那是「猜下一个物体」无论如何都要付的代价。
#
# 再量一次，这次像推理时那样量：预测第 t 个 token 时，**只把前 t 个送进去**，后面的还不存在。用留出的 32 句。

# %% [markdown] tags=["en"]
# Without the mask the loss falls to almost nothing. With it, it stays near 0.7, which is the price of guessing the next object and has to be paid by anyone.
#
# Now measure again, this time as at inference: to predict token t, **only the t tokens before it go in**; the rest does not exist yet. On the 32 sentences that were kept back.


# %%
@torch.no_grad()
def honest_loss(small_model, causal):
    held_out, total, count = all_ids[512:], 0.0, 0
    for t in range(len(prompt), longest):
        target = all_labels[512:, t]
        logits = small_model(held_out[:, :t], causal)[:, -1]
        total += F.cross_entropy(logits, target, reduction="sum").item()  # −100 adds nothing
        count += (target != -100).sum().item()
    return total / count


@torch.no_grad()
def write(small_model, causal, length=20):
    ids = list(prompt)
    while len(ids) < len(prompt) + length and ids[-1] != special["</s>"]:
        ids.append(small_model(torch.tensor([ids]), causal)[0, -1].argmax().item())
    return tokenizer.decode(ids[len(prompt) :])


# %%
for (causal, seed), (small_model, losses) in trained.items():
    name, end = "causal mask" if causal else "no mask", sum(losses[-10:]) / 10
    honest = honest_loss(small_model, causal)
    print(f"{name:11} seed {seed}: in training {end:.3f}, honest {honest:5.2f}  ", end="")
    print(write(small_model, causal))

# %% [markdown] tags=["zh"]
# 有掩码的模型，两个数几乎相等（平均 0.72 和 0.74）：训练时它看到的和推理时一样多。没有掩码的，训练时是 0.003，照推理的样子一量却有 2.5 到 4.0，写出来的句子颠三倒四。它把唯一的一层用来抄下一个 token，而推理时那个 token 还不存在。
#
# 这就是开头问题的答案，也是读损失曲线的一条经验：**好得不真实的损失，先查漏**，办法在第四节。
#
# ## 八、logit lens：每一层「想说」什么
#
# 输出层可以接在流的任何一处，不必等到最后。把每一层之后的流都归一化、乘输出层，看看最可能的 token 是什么，这叫做 logit lens。

# %% [markdown] tags=["en"]
# With the mask both numbers are nearly equal, 0.72 and 0.74 on average: in training the model sees as much as at inference. Without it, the loss in training is 0.003 and the honest one 2.5 to 4.0, and the sentences are confused. The one block was spent on copying the next token, which at inference does not exist yet.
#
# That answers the question at the top, and makes a rule for reading curves: **if a loss is too good to be true, look for the leak first**, as in section 4.
#
# ## 8. The logit lens: what each block would say
#
# The output head can be put to the stream anywhere, not only at its end. Normalise the stream after each block, multiply by the head, and look at the likeliest token. This is called the logit lens.

# %%
with torch.no_grad():
    lens = torch.stack([mine.logits(state[0, batch.target_positions]) for state in states])
guesses = lens.argmax(dim=-1)  # (blocks + 1, M)
made, axes = draw.figure(1, height=2.9)
right = (guesses == batch.targets).float()[:, :14]
two = ListedColormap([draw.PALE["wrong"], draw.PALE["right"]])
draw.heat(axes, right, "", colours=two, rows=names, limits=(0, 1))
for row, column in torch.cartesian_prod(*map(torch.arange, right.shape)).tolist():
    text = tokenizer.decode([guesses[row, column].item()])
    axes.text(column, row, text, ha="center", va="center", fontsize=8 if len(text) < 6 else 6)
axes.set_xticks(range(14), [tokenizer.decode([id]) for id in batch.targets[:14]], fontsize=7)
axes.set_xlabel(f"the right token (the first 14 of {guesses.shape[1]})")
draw.show(made, "The likeliest token after each block (green: right)")

# %% [markdown] tags=["zh"]
# 先看第一行：输出层直接接在词嵌入上，每个位置最像的 token 正是**它自己**，因为两张表是同一张。模型要做的，就是沿着流把「我是谁」改写成「下一个是谁」。
#
# 往下看，句子的骨架（「图中有」「个物体」「从左到右是」）和图里才有的内容（颜色、形状）不是同时出现的。一句话不足为凭，换 24 个随机场景，各画一张图，分三类统计猜对的比例：颜色和形状（各有 8 种），大小（2 种）和个数，其余是骨架。

# %% [markdown] tags=["en"]
# The first row first. With the head put to the embeddings, the token that each position is most like is **itself**, since the two tables are one. What the model has to do along the stream is to rewrite "who I am" into "who comes next".
#
# Further down, the frame of the sentence (图中有, 个物体, 从左到右是) and what the image alone tells (colours, shapes) do not come at once. One sentence proves little, so draw 24 random scenes and count right guesses of three kinds: colours and shapes, of which there are 8 each; sizes, of which there are 2, and the number; and the frame.

# %%
KINDS = {name: 0 for name in (*world.COLOURS.values(), *world.SHAPES.values())}
KINDS |= {name: 1 for name in (*world.SIZES.values(), "一", "两", "三", "四")}
hits = {"colours, shapes": [], "sizes, number": [], "frame": []}
random = Random(1)
for _ in range(24):
    scene = world.random_scene(random)
    turns = [conversation[0], Message("assistant", (describe(scene, "zh"),))]
    sample = prepare(model, [turns], [[world.draw(scene)]])
    with torch.no_grad():
        states_of = torch.cat(mine.stream(model.embed(sample)))[:, sample.target_positions]
        guess = mine.logits(states_of).argmax(dim=-1)  # (blocks + 1, M)
    kinds = torch.tensor([KINDS.get(tokenizer.decode([id]), 2) for id in sample.targets])
    for kind, found in enumerate(hits.values()):
        found.append((guess == sample.targets)[:, kinds == kind])

# %%
shares = {name: 100 * torch.cat(found, dim=1).float().mean(dim=1) for name, found in hits.items()}
made, axes = draw.figure(1, height=2.7)
draw.curves(axes, shares, "", "", "right guesses, %", parts=("vision", "projector", "word"))
for name, share in shares.items():
    step = int(share.diff().argmax()) + 1
    print(f"{name:15}", *(f"{value:5.1f}" for value in share), f"  largest step: block {step}")
axes.set_xticks(range(len(names)), names)
draw.show(made, "24 scenes: how many guesses are right after each block")

# %% [markdown] tags=["zh"]
# 先看紫线：第 1 层之后，颜色和形状还和瞎猜差不多（14.4%，8 选 1 是 12.5%）；到第 2 层突然会了（96.6%），多半是注意力在那里从视觉 token 取来了需要的东西。灰线从第 1 层起就有 63%，因为骨架多半只要前面几个字就能接下去。我们原以为骨架处处领先，最后一层之前就该齐了，结果不是：第 1 层之后它落在大小和个数后面，第 2 层起又落在颜色和形状后面（74.2% 对 96.6%），到最后一层才从 77% 一下子升到 100%。
#
# 读这种图要留个心眼：中间层是透过最后的输出层去看的，那一层不是为它们训练的。「猜错」不等于「还不知道」，也可能是知道了，但写在别的方向上。
#
# ## 练习

# %% [markdown] tags=["en"]
# The purple line jumps in block 2. Before it, colours and shapes are about as good as chance (14.4%; 1 in 8 is 12.5%); after it, 96.6% are known, most likely because its attention fetches from the visual tokens what is needed. The grey line is at 63% from block 1 on, since much of the frame follows from the last few tokens. We had expected the frame to be ahead everywhere, and complete before the last block. It is not: sizes and number are ahead of it after block 1, colours and shapes after block 2, and it rises from 77% to 100% only in the last block.
#
# Read such pictures with care. The middle is seen through a head that was not trained for it. A wrong guess need not mean "does not know yet": it may be known, and written in another direction.
#
# ## Exercises

# %% [markdown] tags=["zh"]
# **06.1 补一行。** 一个门控 MLP 有多少个参数？用宽度 `C` 和中间宽度 `inner` 写成一个式子。

# %% [markdown] tags=["en"]
# **06.1 Fill in a line.** How many parameters does a gated MLP have? Write it as an expression of the width `C` and the inner width `inner`.

# %% tags=["exercise"]
C, inner = config.hidden_size, config.intermediate_size
count = ...
check("06.1", count, sum(parameter.numel() for parameter in mine.blocks[0].mlp.parameters()))

# %% [markdown] tags=["zh"]
# **06.2 改一个行为。** 图片一开始就是完整的，没有先后。有的模型允许同一张图的视觉 token 互相看见，文字仍然只看前面。6 个 token 里前 3 个是图片，写出 `(6, 6)` 的布尔掩码。

# %% [markdown] tags=["en"]
# **06.2 Change a behaviour.** An image is there as a whole, without before and after. Some models let the visual tokens of an image see each other both ways, while words still look back only. Of 6 tokens the first 3 are an image: write the `(6, 6)` bool mask.

# %% tags=["exercise"]
both_ways = ...
wanted = [[1, 1, 1, 0, 0, 0]] * 3 + [[1] * (t + 1) + [0] * (5 - t) for t in (3, 4, 5)]
check("06.2", both_ways, torch.tensor(wanted).bool())

# %% [markdown] tags=["zh"]
# **06.3 找错。** 这个层能训练，却和库代码不一样：残差流被换掉了。找出是哪一行，改好。

# %% [markdown] tags=["en"]
# **06.3 Find the bug.** This block can be trained, but is not the package's: the residual stream gets replaced. Find the line and mend it.


# %% tags=["exercise"]
def run_block(block, hidden_states, inputs):
    hidden_states = block.attention_norm(hidden_states)
    hidden_states = hidden_states + block.attention(hidden_states, inputs)
    return hidden_states + block.mlp(block.mlp_norm(hidden_states))


with torch.no_grad():
    inputs = AttentionInputs(is_causal=True)
    right_answer = theirs.blocks[1](states[1], inputs)
    check("06.3", run_block(mine.blocks[1], states[1], inputs), right_answer)

# %% [markdown] tags=["zh"]
# ## 别人在这里摔过跤
#
# [karpathy/minGPT#75](https://github.com/karpathy/minGPT/issues/75)：训练损失和验证损失都接近零，一到生成就很差。原因是掩码用了一个**有限**的大负数：学习率够大时，网络把允许看的分数压得比这个数还低，掩码就等于没有，于是它看见了整个输入，照抄即可。报告里打印出的分数正是这样，掩码处是 −10000，允许处反而更小。怎么发现？第四节的办法：改最后一个 token，看前面动不动。
#
# [harvardnlp/annotated-transformer#92](https://github.com/harvardnlp/annotated-transformer/issues/92)：有人问代码为什么先归一化再计算，和原论文相反。回答是：先归一化（pre-norm）如今被认为更好，这份代码跟的是今天的做法，不是论文里的写法。
#
# ## 到库里看看
#
# - [`nanovlm/model/language_model.py`](../../nanovlm/model/language_model.py)，`LanguageModel` 与 `DecoderBlock`：最后一层的 MLP 和输出层只算有标签的位置；还有 GPT-2 的部件，供从零搭的模型用。
# - [`nanovlm/model/layers.py`](../../nanovlm/model/layers.py)，`RMSNorm` 与 `GatedMLP`：同样的式子，反向传播手写，少存几个激活。
# - [`nanovlm/model/attention.py`](../../nanovlm/model/attention.py)，`causal_mask` 与 `bidirectional_mask`：填充、打包和互相看见的图片（第 16 课）。
#
# 论文：Zhang 与 Sennrich，2019，*Root Mean Square Layer Normalization*，[arXiv:1910.07467](https://arxiv.org/abs/1910.07467)；Shazeer，2020，*GLU Variants Improve Transformer*，[arXiv:2002.05202](https://arxiv.org/abs/2002.05202)。

# %% [markdown] tags=["en"]
# ## In the wild
#
# [karpathy/minGPT#75](https://github.com/karpathy/minGPT/issues/75): training and validation loss near zero, and generation very bad. The mask was a large but **finite** negative number. With a high enough learning rate the network pushes the allowed scores below that number, the mask does nothing any more, and the whole input can be seen and copied. The scores printed in the report show it: −10000 where masked, and lower still where allowed. How would you notice? As in section 4: change the last token and see whether anything before it moves.
#
# [harvardnlp/annotated-transformer#92](https://github.com/harvardnlp/annotated-transformer/issues/92): someone asks why the code normalises before computing, unlike the original paper. The answer: pre-norm is widely accepted as better today, and the code follows today's practice instead of the paper's text.
#
# ## Look in the package
#
# - [`nanovlm/model/language_model.py`](../../nanovlm/model/language_model.py), `LanguageModel` and `DecoderBlock`: the last block's MLP and the head run at labelled positions only; there are also GPT-2's parts, for models made from scratch.
# - [`nanovlm/model/layers.py`](../../nanovlm/model/layers.py), `RMSNorm` and `GatedMLP`: the same formulas with the backward pass by hand, which keeps fewer activations.
# - [`nanovlm/model/attention.py`](../../nanovlm/model/attention.py), `causal_mask` and `bidirectional_mask`: padding, packing, and images that are seen both ways (lesson 16).
#
# The papers: Zhang and Sennrich 2019, *Root Mean Square Layer Normalization*, [arXiv:1910.07467](https://arxiv.org/abs/1910.07467); Shazeer 2020, *GLU Variants Improve Transformer*, [arXiv:2002.05202](https://arxiv.org/abs/2002.05202).
