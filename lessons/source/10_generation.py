# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["zh"]
# # 10 · 生成：一个 token 接一个 token
#
# 模型一次前向只给出下一个 token 的 logits。要得到一句话，就得选一个 token、接到末尾、再来一遍，直到它自己说停。这一课把这个循环写出来，再用 KV 缓存（KV cache）省掉其中绝大部分计算。
#
# **进来的**：提示（prompt）的词嵌入 `(1, 68, 192)`，第 09 课的插入结果，`float32`。**出去的**：一串 token id，再变成屏幕上一个字一个字出现的文字。

# %% [markdown] tags=["en"]
# # 10 · Generation: one token after another
#
# One forward pass gives the logits of the next token and no more. To get a sentence, you choose a token, append it, and start over, until the model itself says stop. This lesson writes that loop, and then saves nearly all of its work with a KV cache.
#
# **In**: the embeddings of a prompt, `(1, 68, 192)`, which the splice of lesson 09 gives, in `float32`. **Out**: a list of token ids, and then text that appears on the screen character by character.

# %% tags=["setup"]
import sys
import time

sys.path.insert(0, "../..")  # the repository: nanovlm and the drawing helpers

from random import Random

import torch
from PIL import ImageFilter

from data_tools.scenes_world import draw as draw_scene
from data_tools.scenes_world import random_scene
from lessons import draw
from lessons.check import check
from nanovlm import IMAGE, Message, Sampling, generate, load_model, open_image, prepare
from nanovlm.generate import Prompt, Steps, search
from nanovlm.sampling import sample
from nanovlm.tokenizer.streaming import TextStreamer

ASSETS = "../../nanovlm/assets"
torch.set_grad_enabled(False)
draw.strip("sequence", "hidden states", "logits", "answer")

# %% [markdown] tags=["zh"]
# ## 先猜一猜
#
# 提示有 68 个 token，回答有 200 个。最直接的写法每一步都把到目前为止的全文重读一遍。它一共读了多少个 token，是「每个 token 只读一次」的多少倍？
#
# 再猜一个：把 24 个长短不一的问题放进一个批次，短的要填充（padding）到一样长。如果填在**右边**，24 个答案里还有几个与单独问时相同？

# %% [markdown] tags=["en"]
# ## Predict
#
# A prompt has 68 tokens and the answer 200. The most direct loop reads the whole text so far again at every step. How many times as many tokens does it read as one that reads each token once?
#
# And a second guess: put 24 questions of different lengths into one batch and pad the shorter ones. With the padding on the **right**, how many of the 24 answers are the same as when asked alone?

# %% [markdown] tags=["zh"]
# ## 一、最短的循环
#
# 每一步取最后一个位置的 logits，选最大的那个，这叫贪心（greedy）。选中轮次结束符 `</s>` 就停：什么时候说完，也是模型学出来的。

# %% [markdown] tags=["en"]
# ## 1. The shortest loop
#
# At each step, take the logits of the last place and choose the largest: greedy decoding. When the end-of-turn token `</s>` is chosen, stop. When to end is something the model has learned, too.

# %%
model = load_model(f"{ASSETS}/tiny-vlm").float().eval()  # the file holds bfloat16
language, tokenizer = model.language_model, model.tokenizer
image = open_image(f"{ASSETS}/scene.png")
question = [Message("user", [IMAGE, "描述图片"])]
batch = prepare(model, [question], [[image]], add_generation_prompt=True)
prompt = model.embed(batch)  # (1, T, C), lesson 09
END = model.chat.end_of_turn_id
text, answer, chances = prompt, [], []
while not answer or answer[-1] != END:
    logits = language.logits(language.hidden_states(text))[:, -1]  # (1, V)
    answer.append(int(logits.argmax()))
    chances.append(logits.softmax(-1).max().item())
    text = torch.cat((text, language.embed_tokens(torch.tensor([answer[-1:]]))), dim=1)
print("prompt:", tuple(prompt.shape), " logits:", tuple(logits.shape), " text:", tuple(text.shape))

# %%
made, axis = draw.figure(1, height=2.4)
shown = [tokenizer.decode([token]) or "</s>" for token in answer]
draw.tokens(axis, shown, ["right"] * len(shown), below=[f"{chance:.0%}" for chance in chances])
draw.show(made, "One pass for each token; below, the probability it was chosen with")

# %% [markdown] tags=["zh"]
# 22 个 token 要 22 次前向。第一次读 68 个位置，第二次读 69 个，最后一次读 89 个，每次只用到最后一个位置的结果。
#
# ## 二、哪些是白算的
#
# 语言模型是因果的：后面的 token 影响不了前面的。那么每多一个 token，前面各位置的键（key）和值（value）与上一步**一模一样**，重算只是浪费。新 token 需要的，只是自己的查询，加上所有人的键和值。把键和值存下来，就是 KV 缓存。
#
# 下面是带缓存的注意力。`kept` 是这一层存下的一对张量，形状都是 `(1, 2, S, 48)`：2 个键头，到目前为止的 S 个 token，每个 48 维；第一次调用时是空的。

# %% [markdown] tags=["en"]
# 22 tokens take 22 passes. The first reads 68 places, the second 69, the last 89, and each uses the result of the last place alone.
#
# ## 2. What is computed in vain
#
# The language model is causal: later tokens cannot affect earlier ones. So when a token is added, the keys and values of all earlier places are **the same as before**, and computing them again is waste. What the new token needs is its own query, and everybody's keys and values. Keep those two, and you have a KV cache.
#
# Here is attention with a cache. `kept` is the pair of tensors that this block has kept, both `(1, 2, S, 48)`: 2 key heads, the S tokens so far, 48 numbers each. At the first call it is empty.

# %%
D = language.config.head_dim
HIDDEN = -1e9  # the score of what is hidden; why not −∞, the text below says


def attend(x, part, kept, angles, mask):  # x: the T new tokens; mask (B, S): 0 where padding
    def split(projected):
        return projected.unflatten(-1, (-1, D)).transpose(1, 2)

    q = rotate(part.q_norm(split(part.q_proj(x))), angles)  # (B, H, T, D)
    k, v = rotate(part.k_norm(split(part.k_proj(x))), angles), split(part.v_proj(x))
    if kept:
        k, v = torch.cat((kept[0], k), dim=2), torch.cat((kept[1], v), dim=2)
    kept[:] = k, v  # (B, H_kv, S, D): of all tokens so far
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT / D**0.5  # (B, H, T, S)
    earlier = torch.ones(scores.shape[-2:]).tril(scores.shape[3] - scores.shape[2])
    scores = scores.masked_fill((earlier * mask[:, None, None]) == 0, HIDDEN)
    values = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return part.out_proj((scores.softmax(-1) @ values).transpose(1, 2).flatten(2))


# %% [markdown] tags=["zh"]
# `tril(S − T)` 那一行是因果掩码的一般写法：T 个新 token 是全文 S 个里的最后 T 个，第一个新 token 能看到 S − T + 1 个。T = 1 时整行都是 1，什么也不用遮。遮住的分数写成 −1e9 而不是 −∞：填充在左边时（第四节），最前面几行谁也看不到，整行都是 −∞ 的 softmax 会得到 `nan`。
#
# 旋转位置编码要知道新 token 是**第几个**，而不是这次输入里的第几个，所以位置由外面传进来：

# %% [markdown] tags=["en"]
# The line with `tril(S − T)` is the causal mask in general: the T new tokens are the last T of S, so the first of them sees S − T + 1. With T = 1 its row is all ones, and nothing is hidden. What is hidden gets −1e9 and not −∞: with padding on the left (section 4) the first rows see nothing at all, and a softmax of nothing but −∞ is `nan`.
#
# Rotary positions have to know the place of a new token **in the text**, not in this input, so positions come from outside:


# %%
def rotate(heads, angles):  # lesson 07
    first, second = heads.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()  # (B, 1, T, D / 2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def step(x, cache, positions, mask):  # (B, T, C), (B, T), (B, S) → logits (B, T, V)
    half = torch.arange(0, D, 2) / D
    angles = positions[:, None, :, None] * language.config.rope_theta**-half
    for block, kept in zip(language.blocks, cache):
        x = x + attend(block.attention_norm(x), block.attention, kept, angles, mask)
        x = x + block.mlp(block.mlp_norm(x))
    return language.logits(language.norm(x))


# %% [markdown] tags=["zh"]
# 第一次调用读完整个提示，叫**预填充**（prefill）；以后每次只读一个 token，叫**解码**（decode）。提示里的 token 都已知道，可以一起算；回答里的 token 要等前一个选定了才有，只能逐个算。两种写法的 logits 应当相等，也应当等于库里的 `Steps`。容差 1e-3，理由同第 09 课。

# %% [markdown] tags=["en"]
# The first call reads the whole prompt: **prefill**. Every later call reads one token: **decode**. The prompt's tokens are all known and can be computed together; a token of the answer has to wait until the one before it is chosen. Both ways, with the cache and without, should give the same logits, and those of the package's `Steps`. The tolerance is 1e-3, for the reason of lesson 09.

# %%
cache, steps, length = [[] for _ in language.blocks], Steps(language), prompt.shape[1]
theirs = steps.begin(Prompt(prompt, batch.input_ids), length + 60)
mine = step(prompt, cache, torch.arange(length)[None], torch.ones(1, length))[:, -1]
worst = 0.0
for count, token in enumerate(answer):
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    so_far = language.logits(language.hidden_states(text[:, : length + count]))[:, -1]
    worst = max(worst, (mine - so_far).abs().max().item())
    new = language.embed_tokens(torch.tensor([[token]]))  # (1, 1, C)
    place = length + count
    mine = step(new, cache, torch.tensor([[place]]), torch.ones(1, place + 1))[:, -1]
    theirs = steps.add(torch.tensor([token]))
print(f"{len(answer)} steps equal the package's; with and without the cache: within {worst:.0e}")
print("one block's keys:", tuple(cache[0][0].shape), " values:", tuple(cache[0][1].shape))

# %% [markdown] tags=["zh"]
# ## 三、省了多少
#
# 开头的第一问可以算出来：不用缓存时读 68 + 69 + … + 267 个 token，用缓存时读 68 + 199 个。

# %% [markdown] tags=["en"]
# ## 3. How much it saves
#
# The first question at the top can be computed: without the cache, 68 + 69 + … + 267 tokens are read; with it, 68 + 199.

# %%
without, with_cache = sum(68 + written for written in range(200)), 68 + 199
print(f"{without:,} tokens against {with_cache}: {without / with_cache:.0f} times as many")
config = language.config
numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * D  # keys and values
print(f"the cache keeps {numbers} numbers a token, {numbers * 4 / 1024:.0f} KiB in float32")
large = 2 * 28 * 4 * 128 * 2  # Qwen2.5-7B: 28 blocks, 4 key heads of 128 numbers, 2 bytes each
print(f"Qwen2.5-7B: {large / 1024:.0f} KiB a token, {576 * large / 2**20:.0f} MiB for 576 tokens")

# %% tags=["time"]
lengths = [68, 200, 400, 600, 800, 1000]
again, cached = [torch.inf] * len(lengths), [torch.inf] * len(lengths)  # best of five rounds
for number, length in list(enumerate(lengths)) * 5:
    x = torch.randn(1, length, 192)
    kv = language.new_cache(1, length)
    language.hidden_states(x[:, :-1], cache=kv)  # all but the last token
    started = time.perf_counter()
    language.hidden_states(x[:, -1:], cache=kv)
    middle = time.perf_counter()
    language.hidden_states(x)
    cached[number] = min(cached[number], 1000 * (middle - started))
    again[number] = min(again[number], 1000 * (time.perf_counter() - middle))
print("milliseconds a token, read again:", [f"{value:.0f}" for value in again])
print("milliseconds a token, cache:     ", [f"{value:.0f}" for value in cached])

# %% tags=["time"]
made, axis = draw.figure(1, height=3.0)
lines = {"the whole text again": again, "with the KV cache": cached}
draw.curves(axis, lines, x="tokens so far", y="milliseconds a token", at=lengths,
            parts=["wrong", "right"])  # fmt: skip
axis.set_ylim(0)
draw.show(made, "Without the cache, every token costs more than the one before")

# %% [markdown] tags=["zh"]
# 所以第一问的答案是约 125 倍：33,500 个对 267 个。
#
# 时间因机器而异，要看的是形状：一条随长度上升，另一条几乎是平的。
#
# 生成因此有两个脾气不同的阶段。预填充一次读几十到几千个 token，矩阵乘法又大又满，瓶颈在算力；解码每步只有一个 token，却要把全部权重和整个缓存从内存里过一遍，瓶颈在内存带宽。所以「第一个字出来要多久」和「之后每秒几个字」是两个指标，常常分开报告；一次多答几个问题，解码几乎不变慢，因为权重反正要读一遍。
#
# 缓存不是免费的，它用内存换时间；一张图在缓存里占的地方，正是第 08 课里大家想减少视觉 token 的原因之一。分组查询（第 02、07 课）让键和值的头只有查询的一半，缓存也就小一半。
#
# ## 四、故意弄坏：填充
#
# 一次回答许多问题时，各行长短不一，短的要填充。填在哪边、位置怎么数，这里有五种写法。先看结果。24 个问题：4 张图，各问 6 个；标准是单独问时的答案。

# %% [markdown] tags=["en"]
# So the first answer is about 125 times: 33,500 tokens against 267.
#
# Times differ between machines; look at the shapes: one rises with the length, the other is nearly flat.
#
# So generation has two phases of different character. Prefill reads tens to thousands of tokens at once, in large products of matrices, and is limited by computing. Decoding has one token a step, for which all weights and the whole cache have to come from memory, and is limited by bandwidth. That is why the time to the first token and the tokens a second after it are reported apart, and why answering several questions at once hardly slows decoding down: the weights are read anyway.
#
# The cache is not free, it pays for time with memory, and the room that an image takes in it is one reason why people want fewer visual tokens (lesson 08). Grouped queries (lessons 02 and 07) halve the heads of keys and values here, and so the cache.
#
# ## 4. Broken on purpose: padding
#
# When many questions are answered at once, rows have different lengths, and short ones are padded. On which side, and how are positions counted? Here are five ways. First the results: 24 questions, 6 about each of 4 images, compared with the answers when asked alone. (The four in Chinese: describe the image; which object is leftmost; how many are there; which is topmost.)

# %%
texts = ["描述图片", "最左边的物体是什么？", "图里有几个物体？", "最上面的物体是什么？",
         "What is the leftmost object?", "Is there a red ring, or is there none?"]  # fmt: skip
scenes = [random_scene(Random(seed)) for seed in range(50)]
scenes = [draw_scene(scene) for scene in scenes if len(scene.objects) > 1][:4]
asked = [[Message("user", [IMAGE, text])] for text in texts] * 4
images = [[scene] for scene in scenes for _ in texts]
left = prepare(model, asked, images, add_generation_prompt=True)  # padded on the left
padding = (left.attention_mask == 0).sum(dim=1)  # (24,)
print("ids:", tuple(left.input_ids.shape), " padding:", padding[:6].tolist())
single = [prepare(model, [one], [seen], add_generation_prompt=True)
          for one, seen in zip(asked, images)]  # fmt: skip
alone = [tokenizer.decode(generate(model, one, 40)[0]) for one in single]


# %%
def write(x, mask, positions, next_position, count=40):  # greedy, for a batch
    cache, answers = [[] for _ in language.blocks], []
    for written in range(count):
        logits = step(x, cache, positions, mask)[:, -1]
        answers.append(logits.argmax(dim=-1))
        x = language.embed_tokens(answers[-1][:, None])  # (B, 1, C)
        mask = torch.cat((mask, torch.ones(len(mask), 1)), dim=1)
        positions = next_position[:, None] + written
    rows = torch.stack(answers, dim=1).tolist()
    return [tokenizer.decode(row[: row.index(END)] if END in row else row) for row in rows]


# %%
x, mask = model.embed(left), left.attention_mask.float()  # (B, T, C), (B, T)
B, T = mask.shape
real = mask.sum(dim=1)  # tokens of each row
counted = mask.cumsum(dim=1) - 1  # positions that skip the padding
shift = (torch.arange(T) + padding[:, None]) % T  # moves each row's padding to its right end
turned, turned_mask = x.gather(1, shift[..., None].expand_as(x)), mask.gather(1, shift)
results = {
    "left,\nmasked": write(x, mask, counted, real),
    "left, mask\nforgotten": write(x, mask * 0 + 1, torch.arange(T).expand(B, T), real * 0 + T),
    "left, decoding\ncounts padding": write(x, mask, counted, real * 0 + T),
    "left, decoding\nstarts at 0": write(x, mask, counted, real * 0),
    "right,\nlast place read": write(turned, turned_mask, turned_mask.cumsum(1) - 1, real),
}

# %%
same = {name: sum(map(str.__eq__, said, alone)) for name, said in results.items()}
for name, said in results.items():
    print(f"{same[name]:2} of 24  {name.replace(chr(10), ' '):30} {said[0][:34]}")
print(f"          {'alone':30} {alone[0][:34]}")
official = [tokenizer.decode(one) for one in generate(model, left, 40)]
print("the package, padded on the left:", sum(map(str.__eq__, official, alone)), "of 24")

# %%
made, axis = draw.figure(1, height=3.0)
draw.bars(axis, same, "answers as when asked alone", "of 24", ["right", *["wrong"] * 4])
draw.show(made, "Five ways to pad, none of which raises an error")

# %% [markdown] tags=["zh"]
# 开头的第二问：填在右边，24 个答案里只剩 7 个与单独问时相同。从右往左解释：
#
# - **填在右边，取最后一个位置**（7 个）：短行的最后一个位置是填上去的空位，它的 logits 不是问题的下文。因此生成时习惯填在左边，让各行一起结束。
# - **解码从 0 数起**（10 个）：忘了新 token 接在提示后面，每一步都当自己是开头。没有填充的行也受影响。手写缓存时很容易犯。
# - **解码时把填充也数进去**（12 个）：预填充时跳过了填充，第一个新 token 却从 T 接着数，中间凭空多出一段距离。旋转位置编码看的是距离差，于是错乱。这就是「左填充的陷阱」：填对了边，位置却前后不一致。
# - **忘了掩码**（23 个）：全文都向右平移了同样多，距离差没有变，只是每个 token 还会看见一些没有意义的空位。这个模型受的影响不大，别的模型未必。不报错、影响小，正是它难以发现的原因。
#
# 库里的做法：位置就是「前面能看见的 token 数」，从掩码里数出来，填在哪边都对。
#
# ## 五、不总选最大的
#
# 贪心每次都给同一个答案。要有变化，就按概率抽。为了看清楚，需要一个模型拿不准的地方：给它一张灰图，让它接着「图中有一个物体：大的」往下写。

# %% [markdown] tags=["en"]
# The second answer is the last bar: 7 of 24. From right to left:
#
# - **On the right, reading the last place** (7 of 24): the last place of a short row is padding, and its logits do not continue the question. So for generation one pads on the left, and all rows end together.
# - **Decoding starts at 0** (10): it was forgotten that new tokens follow the prompt. Rows without padding are affected too. It is easily done in a cache written by hand.
# - **Decoding counts the padding** (12): prefill skipped it, yet the first new token goes on from T, with a gap out of nowhere. Rotary positions are about differences, and these are wrong now. This is the left-padding trap: the side is right, but positions before and after do not agree.
# - **The mask forgotten** (23): the whole text has moved to the right by the same amount, so differences have not changed; every token also sees some meaningless places. This model hardly minds. Another may. No error and little effect is what makes it hard to find.
#
# In the package, a token's position is the number of tokens it can see before it, counted from the mask. That is right for padding on either side.
#
# ## 5. Not always the largest
#
# Greedy decoding always gives the same answer. For variety, draw by probability. To see how, we need a place where the model is unsure: give it a grey image, and let it continue 图中有一个物体：大的 (there is one object: a big …).

# %%
batch.pixels = torch.zeros_like(batch.pixels)  # grey
start = torch.tensor([tokenizer.encode("图中有一个物体：大的")])
x = torch.cat((model.embed(batch), language.embed_tokens(start)), dim=1)
logits = language.logits(language.hidden_states(x))[0, -1]  # (V,)


def probabilities(logits, temperature=1.0, top_p=1.0):
    chances = (logits / temperature).softmax(dim=-1)
    sorted_chances, order = chances.sort(descending=True)
    before = sorted_chances.cumsum(0) - sorted_chances  # what the likelier ones have together
    kept = torch.where(before < top_p, sorted_chances, 0.0)
    return torch.zeros_like(chances).scatter(0, order, kept / kept.sum())


settings = {"temperature 0.5": (0.5, 1.0), "temperature 1": (1.0, 1.0),
            "temperature 2": (2.0, 1.0), "temperature 1,\ntop-p 0.8": (1.0, 0.8)}  # fmt: skip
likely = probabilities(logits).topk(8).indices
names = [tokenizer.decode([int(token)]) for token in likely]
print("logits:", tuple(logits.shape), " the 8 likeliest:", names)

# %%
made, axes = draw.figure(4, height=2.9, sharey=True)
for axis, (name, (temperature, top_p)) in zip(axes, settings.items()):
    chances = probabilities(logits, temperature, top_p)
    colours = [draw.LANGUAGE if chance > 0 else draw.WRONG for chance in chances[likely]]
    axis.barh(range(8), chances[likely], color=colours)
    axis.set_yticks(range(8), names)
    rest = 1 - chances[likely].sum()
    axis.set(title=name, xlabel=f"probability (others: {rest:.0%})", xlim=(0, 1))
axes[0].invert_yaxis()
draw.show(made, "Temperature sharpens or flattens; top-p cuts the tail off")

# %% [markdown] tags=["zh"]
# 温度（temperature）除在 softmax 之前：小于 1，强者更强；大于 1，大家拉平，词表里其余 632 个本来几乎不可能的 token 也分走一截（每张图下面的 others：温度为 0.5 时是 0%，为 1 时是 10%，为 2 时是 68%）。top-p 从最大的开始往下留，留够 0.8 为止，剩下的**一律归零**，再重新归一。例如概率依次是 0.5、0.2、0.15、0.1、0.05：前两个合计 0.7，不够 0.8；加上第三个是 0.85，够了，于是留三个。这两样常常一起用：温度给变化，top-p 去掉尾巴上的胡话。
#
# 和库里的 `sample` 核对，没法比单次结果，就比频率：抽 20,000 次。频率的标准误差最多是 √(0.25 / 20000) ≈ 0.004，容差取它的 4 倍。

# %% [markdown] tags=["en"]
# The temperature divides before the softmax. Below 1, the strong get stronger; above 1, all come closer, and the other 632 tokens of the vocabulary, each of them next to impossible, get a large share together: 0% at temperature 0.5, 10% at 1, 68% at 2 ("others" under each picture). Top-p keeps tokens from the largest down until they have 0.8; the others are **set to zero**, and the rest is normalised again. Of 0.5, 0.2, 0.15, 0.1 and 0.05, for example, the first two make 0.7, which is not enough; with the third it is 0.85, so three are kept. The two go together well: temperature for variety, top-p against nonsense from the tail.
#
# A single draw cannot be compared with the package's `sample`, so compare frequencies: 20,000 draws. The standard error of a frequency is at most √(0.25 / 20000) ≈ 0.004, and the tolerance is 4 times that.

# %%
sampling, generator = Sampling(temperature=1.0, top_p=0.8), torch.Generator().manual_seed(0)
many = logits.expand(20_000, -1)
drawn = sample(many, torch.zeros(len(many), 1, dtype=torch.long), sampling, generator)
frequencies = drawn.bincount(minlength=len(logits)) / len(many)
torch.testing.assert_close(frequencies, probabilities(logits, 1.0, 0.8), rtol=0, atol=0.016)
print("draws of the package's sample have these probabilities")

# %% [markdown] tags=["zh"]
# 再看整句话。同一张灰图，三种设置，各抽三个种子：

# %% [markdown] tags=["en"]
# And whole sentences: the same grey image, three settings, three seeds each.

# %%
for temperature, top_p in ((1.0, 1.0), (2.0, 1.0), (2.0, 0.8)):
    print(f"temperature {temperature}, top-p {top_p}")
    for seed in range(3):
        chosen = Sampling(temperature=temperature, top_p=top_p, seed=seed)
        print("   ", tokenizer.decode(generate(model, batch, 30, chosen)[0]))

# %% [markdown] tags=["zh"]
# 温度为 2 时，只要有一步抽到了尾巴上的 token，后面就跟着走样：错误会被当作上文读进去。如果每一步有 5% 的可能抽到尾巴，20 步里至少出一次错的可能就是 1 − 0.95²⁰ ≈ 64%。再看 top-p，它在这里没救回多少：温度已经把尾巴抬到 68%，留够 0.8 时也就留下了不少尾巴，所以温度和 top-p 要一起调。灰图上本来没有物体，模型还是说了一个，这一点和采样无关：它训练时从没见过没有物体的图。
#
# ## 六、几个开头一起写
#
# 采样为了变化，束搜索（beam search）为了更可能：第一步最可能的 token，不一定开出最可能的整句。于是同时留着 K 个最可能的开头，每个都接上词表里的每个 token，从 K × V 个里再留 K 个；接上的是结束符，就收进「写完的」一栏。K = 1 就是贪心。
#
# 写完的几句长短不一，怎么比？每多一个 token，概率就再乘一个小于 1 的数，所以直接比总概率会偏向短句。常用的办法是把对数概率除以长度的 α 次方，α 叫长度惩罚（length penalty）：0 是不除，1 是每个 token 的平均，再大就偏向长句。结束符也算在长度里。

# %% [markdown] tags=["en"]
# At temperature 2, one step that draws a token from the tail is enough, and the rest goes astray: a mistake is read as context. If 5% of the draws at each step come from the tail, the chance of at least one in 20 steps is 1 − 0.95²⁰ ≈ 64%. Top-p at 0.8 repairs little of it here: the temperature has raised the tail to 68%, so whatever reaches 0.8 has much of the tail in it. So the two are tuned together. A grey image has no object, and the model names one all the same. That has nothing to do with sampling: in training it never saw an image without an object.
#
# ## 6. Several beginnings at once
#
# Sampling is for variety; beam search is for likelier answers, because the likeliest first token need not begin the likeliest sentence. So keep the K likeliest beginnings, add every token of the vocabulary to each, and of these K × V keep K again. One that ends in the end-of-turn token is put aside as finished. K = 1 is greedy decoding.
#
# How to compare finished answers of different lengths? Every token multiplies the probability by a number below 1, so the total favours short answers. The usual remedy divides the log probability by the length to the power α, the length penalty: 0 divides by nothing, 1 gives the mean of a token, and more favours long answers. The end token counts.


# %%
def beam_search(x, K, alpha, count=40):  # (1, T, C) → finished: [(score, ids)], best first
    begun, finished = [(0.0, [])], []
    for length in range(1, count + 1):
        ids = torch.tensor([ids for _, ids in begun], dtype=torch.long)
        text = torch.cat((x.expand(len(ids), -1, -1), language.embed_tokens(ids)), dim=1)
        chances = language.logits(language.hidden_states(text))[:, -1].log_softmax(-1)
        totals = torch.tensor([total for total, _ in begun])[:, None] + chances  # (K, V)
        best = totals.flatten().topk(2 * K)  # K that go on, even if K end
        longer = [(total, begun[place // totals.shape[1]][1] + [place % totals.shape[1]])
                  for total, place in zip(best.values.tolist(), best.indices.tolist())]  # fmt: skip
        finished += [(total / length**alpha, ids) for total, ids in longer[:K] if ids[-1] == END]
        finished = sorted(finished, reverse=True)[:K]
        begun = [pair for pair in longer if pair[1][-1] != END][:K]
        if len(finished) == K and begun[0][0] / length**alpha <= finished[-1][0]:
            break  # the likeliest beginning would not get among them any more
    return finished


blurred = draw_scene(random_scene(Random(4))).filter(ImageFilter.GaussianBlur(6))
asked = [Message("user", [IMAGE, "最左边的物体是什么？"])]
batch = prepare(model, [asked], [[blurred]], add_generation_prompt=True)
print("greedy:", tokenizer.decode(generate(model, batch, 40)[0]))
for K, alpha in ((1, 0.0), (2, 0.0), (3, 0.0), (3, 1.0), (3, 2.0)):
    mine = beam_search(model.embed(batch), K, alpha)
    score, ids = mine[0]
    print(f"K = {K}, alpha = {alpha}: log p {score * len(ids) ** alpha:6.2f}  "
          f"score {score:6.3f}  {tokenizer.decode(ids[:-1])}")  # fmt: skip
    if K > 1:
        chosen = Sampling(beams=K, length_penalty=alpha)
        (theirs,) = search(language, Prompt.of(model, batch), 40, {END}, chosen)
        assert [ids[:-1] for _, ids in mine] == [ids for ids, _ in theirs]


# %% [markdown] tags=["zh"]
# 图是模糊的，模型拿不准。贪心先说「橙色」，那一刻它最可能，可接下来没有一个好词，整句的对数概率是 −4.80。留着两个开头，就等到了 −2.83；留三个，−2.60，是贪心的 9 倍（e^2.20）。再看最后一行：α = 2 时，更不可能的长句反而赢了。还要看清楚束搜索没有做什么：它找的是模型眼里最可能的句子，不是正确的句子。最左边其实是黄色圆环。
#
# 代价：每步要算 K 行，缓存也要 K 份；哪个开头接着哪个写，缓存的行就得跟着换。提示只读一次，读完再复制。什么时候停，上面的 `break` 与 `transformers` 默认的规则相同：α 大于 0 时它只是猜测，因为还没写完的开头变长以后，分数可能更高。
#
# ## 七、一个字一个字地出现
#
# 边生成边显示时还有一个坑。「猫」不在这个小词表里，分词器把它的 UTF-8 编码拆成三个字节，一个字节一个 token（第 04 课）。一个一个解码，就会得到：

# %% [markdown] tags=["en"]
# The image is blurred, and the model unsure. Greedy decoding says 橙色 (orange) first, which is the likeliest there, and then finds no good word: log p is −4.80 in all. Two beginnings reach −2.83 (a white heart), three −2.60 (a black heart), which is 9 times as likely (e^2.20). In the last line, α = 2, a longer and less likely answer wins. And note what beam search does not do: it finds the sentence that the model holds for likeliest, not the right one. Leftmost is a yellow ring.
#
# The price: K rows a step, and a cache of K rows, which are reordered as beginnings go on from one another. The prompt is read once and copied afterwards. The `break` above is the default rule of `transformers`. With α above 0 it is a guess: a beginning may score more when it has become longer.
#
# ## 7. One character after another
#
# Showing text while it is generated has a pitfall of its own. 猫 (cat) is not in this small vocabulary, so the tokenizer splits its UTF-8 into three bytes, one a token (lesson 04). Decoded one by one they give:

# %%
ids = tokenizer.encode("红色的猫")
print("one by one:", "".join(tokenizer.decode([token]) for token in ids))


def stream(ids):  # yields text as soon as its characters are complete
    waiting = b""
    for token in ids:
        waiting += tokenizer.decode_bytes([token])
        try:
            yield waiting.decode()
            waiting = b""
        except UnicodeDecodeError:  # in the middle of a character
            yield ""


streamer = TextStreamer(tokenizer)
mine, theirs = list(stream(ids)), [streamer.put(token) for token in ids]
print("whole characters:", mine)
assert "".join(mine) == "".join(theirs).strip() == "红色的猫"

# %% [markdown] tags=["zh"]
# 字节没凑齐就先不显示。看打印的列表：前两个字节各给出空字符串，第三个到了才出现「猫」。库里用的是标准库的增量解码器 `codecs.getincrementaldecoder`，能处理更多情形，比如回答在半个字上被截断。
#
# ## 练习

# %% [markdown] tags=["en"]
# Bytes wait until their character is complete: in the printed list the first two give an empty string each, and with the third 猫 appears. The package uses the standard library's `codecs.getincrementaldecoder`, which handles more, such as an answer cut off within a character.
#
# ## Exercises

# %% [markdown] tags=["zh"]
# **10.1 补一行。** 用 `blocks`、`kv_heads`、`width`（每个头的维数）和 `tokens` 写出 KV 缓存的字节数，每个数占 2 字节。

# %% [markdown] tags=["en"]
# **10.1 Fill in a line.** Write the bytes of a KV cache with `blocks`, `kv_heads`, `width` (numbers of a head) and `tokens`, at 2 bytes a number.

# %% tags=["exercise"]
blocks, kv_heads, width, tokens = 24, 2, 64, 1000  # Qwen2.5-0.5B
size = ...
check("10.1", size, 12_288_000)

# %% [markdown] tags=["zh"]
# **10.2 改变行为。** 写 top-k：只留概率最大的 `k` 个，其余归零，再归一。

# %% [markdown] tags=["en"]
# **10.2 Change a behaviour.** Write top-k: keep the `k` largest probabilities, set the others to zero, normalise.


# %% tags=["exercise"]
def top_k(chances, k):
    return ...


check("10.2", top_k(torch.tensor([0.1, 0.4, 0.2, 0.3]), 2), torch.tensor([0, 4 / 7, 0, 3 / 7]))

# %% [markdown] tags=["zh"]
# **10.3 找错。** 这个 top-p 有时一个 token 都不留：当最大的概率已经超过 `top_p` 时。改好它（留下的这里不必重新归一）。

# %% [markdown] tags=["en"]
# **10.3 Find the bug.** This top-p sometimes keeps no token at all: when the largest probability alone exceeds `top_p`. Mend it (what is kept need not be normalised here).


# %% tags=["exercise"]
def nucleus(sorted_chances, top_p):
    return sorted_chances * (sorted_chances.cumsum(0) <= top_p)


check("10.3", nucleus(torch.tensor([0.7, 0.2, 0.1]), 0.5), torch.tensor([0.7, 0.0, 0.0]))

# %% [markdown] tags=["zh"]
# ## 别人在这里摔过跤
#
# [unslothai/unsloth#3699](https://github.com/unslothai/unsloth/issues/3699)：左填充的批次里，短的提示得到乱码，最长的那条没有填充，结果正常。[修复它的一个提案](https://github.com/unslothai/unsloth/pull/3795)指出原因：所有行共用了一份 `cache_position` 作位置，而左填充时每行应当从自己的注意力掩码里数。怎么发现？像第四节那样：同一个问题，单独问一次，放进批次再问一次，比较答案，最好比较 logits。
#
# ## 到库里看看
#
# - [`nanovlm/generate.py`](../../nanovlm/generate.py)，`decode`、`search`、`Steps` 与 `CompiledSteps`：本课略去了最大长度的检查，和编译好的步骤。
# - [`nanovlm/sampling.py`](../../nanovlm/sampling.py)，`sample`：本课略去了重复惩罚。
# - [`nanovlm/beams.py`](../../nanovlm/beams.py)，`Beams`：一批提示的束搜索，全部用张量写成。
# - [`nanovlm/tokenizer/streaming.py`](../../nanovlm/tokenizer/streaming.py)，`TextStreamer`：第七节的正式版本。
# - [`nanovlm/model/attention.py`](../../nanovlm/model/attention.py)，`KVCache` 与 `StaticCache`：前者一次分配好，逐步填写，不像本课每步都 `cat`；后者大小固定，未写的位置用掩码遮住，CUDA 图（CUDA graph）才能录下一步、反复重放。
#
# 论文：Holtzman 等，2019，*The Curious Case of Neural Text Degeneration*（top-p），[arXiv:1904.09751](https://arxiv.org/abs/1904.09751)；Graves，2012，*Sequence Transduction with Recurrent Neural Networks*（束搜索，分数除以长度），[arXiv:1211.3711](https://arxiv.org/abs/1211.3711)。

# %% [markdown] tags=["en"]
# ## In the wild
#
# [unslothai/unsloth#3699](https://github.com/unslothai/unsloth/issues/3699): in batches padded on the left, shorter prompts got garbage, while the longest, which needs no padding, was right. [A proposed fix](https://github.com/unslothai/unsloth/pull/3795) names the cause: all rows shared one `cache_position` as their positions, where with left padding each row has to count from its own attention mask. How would you notice? As in section 4: ask a question alone and in a batch, and compare the answers, or better, the logits.
#
# ## Look in the package
#
# - [`nanovlm/generate.py`](../../nanovlm/generate.py), `decode`, `search`, `Steps` and `CompiledSteps`: this lesson left out the check of the longest text, and compiled steps.
# - [`nanovlm/sampling.py`](../../nanovlm/sampling.py), `sample`: this lesson left out the repetition penalty.
# - [`nanovlm/beams.py`](../../nanovlm/beams.py), `Beams`: beam search for a batch of prompts, on tensors alone.
# - [`nanovlm/tokenizer/streaming.py`](../../nanovlm/tokenizer/streaming.py), `TextStreamer`: section 7 in earnest.
# - [`nanovlm/model/attention.py`](../../nanovlm/model/attention.py), `KVCache` and `StaticCache`: the first is allocated once and filled step by step, where this lesson calls `cat` each time; the second has a fixed size and masks what is not written yet, so that a CUDA graph can record one step and replay it.
#
# The papers: Holtzman et al. 2019, *The Curious Case of Neural Text Degeneration* (top-p), [arXiv:1904.09751](https://arxiv.org/abs/1904.09751); Graves 2012, *Sequence Transduction with Recurrent Neural Networks* (beam search, with scores over the length), [arXiv:1211.3711](https://arxiv.org/abs/1211.3711).
