# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["zh"]
# # 12 · 加载预训练权重
#
# 模型的代码写对了，里面还是随机数。预训练的权重以文件的形式发布，要把其中每个张量放到模型里正确的位置上。这一课手写全过程：逐字节读 safetensors 文件，写一张名字对照表，再做一件很多项目省掉的事：严格检查。
#
# **进来的**：一个 2.9 MB 的文件 `model.safetensors`，数值是 `bfloat16`。**出去的**：一个语言模型，46 个张量一个不差地装满。

# %% [markdown] tags=["en"]
# # 12 · Loading pretrained weights
#
# The code of a model may be right, and it still holds random numbers. Pretrained weights are published as files, and each tensor has to reach its place in the model. This lesson does all of it by hand: read a safetensors file byte by byte, write a table of names, and then do what many projects leave out, a strict check.
#
# **In**: a file of 2.9 MB, `model.safetensors`, with values in `bfloat16`. **Out**: a language model with all 46 tensors filled.

# %% tags=["setup"]
import json
import math
import re
import sys
from pathlib import Path
from random import Random

sys.path.insert(0, "../..")  # the repository: nanovlm and the drawing helpers

import torch
import torch.nn.functional as F

from lessons import draw
from lessons.check import check
from nanovlm import IMAGE, LanguageModel, Message, VisionLanguageModel, load_language_model
from nanovlm import load_model, load_tokenizer, load_vision_encoder, open_image, prepare

ASSETS = Path("../../nanovlm/assets")
draw.strip("hidden states", "logits")

# %% [markdown] tags=["zh"]
# ## 先猜一猜
#
# 自带的小语言模型按 Qwen3 的格式发布。我们用 `nanovlm` 的 `LanguageModel` 建一个同样大小的模型，读出文件，调用
#
# `model.load_state_dict(tensors, strict=False)`
#
# 它不报错。**46 个张量里装进去了几个？** 写下数字。

# %% [markdown] tags=["en"]
# ## Predict
#
# The small language model that ships with the package is published in Qwen3's format. We build a `LanguageModel` of the same size, read the file, and call
#
# `model.load_state_dict(tensors, strict=False)`
#
# There is no error. **How many of the 46 tensors have been loaded?** Write the number down.

# %% [markdown] tags=["zh"]
# ## 一、文件里有什么
#
# safetensors 的格式短得可以背下来：8 个字节是一个整数 N；接着 N 个字节是 JSON 表头，写明每个张量的类型、形状、起止位置；剩下的全是数。为什么不用 `torch.save`？那种文件是 Python 的 pickle，读它可能运行文件里藏着的代码；safetensors 里只有数，而且可以只读其中一个张量。
#
# 整数的低位字节在前：打印出来的 `38 13` 要倒过来读，是十六进制的 1338，即 4920。

# %% [markdown] tags=["en"]
# ## 1. What is in the file
#
# The safetensors format is short enough to learn by heart. 8 bytes are a whole number N. The next N bytes are a header in JSON: type, shape, begin and end of each tensor. All the rest is numbers. Why not `torch.save`? Its file is a Python pickle, and reading one may run code that is hidden in it. A safetensors file holds nothing but numbers, and a single tensor can be read from it.
#
# The low bytes of a whole number come first: the `38 13` printed below is read backward, hexadecimal 1338, which is 4920.

# %%
folder = ASSETS / "tiny-language-model"
data = (folder / "model.safetensors").read_bytes()
length = int.from_bytes(data[:8], "little")  # N: the lowest byte comes first
header = json.loads(data[8 : 8 + length])
print("first 8 bytes:", data[:8].hex(" "), "→ the header has", length, "bytes")
print("metadata:", header.pop("__metadata__"))
print(len(header), "tensors, for example:")
for name in ("model.embed_tokens.weight", "model.norm.weight"):
    print(" ", name, header[name])

# %%
kinds = {"embed": "word", "norm": "right", "self_attn": "language", "mlp": "projector"}
made, axis = draw.figure(height=1.7)
for name, entry in header.items():
    kind = next(kind for kind in kinds if kind in name)
    begin, end = (offset / 1000 for offset in entry["data_offsets"])
    axis.barh(0, end - begin, left=begin, color=draw.STRONG[kinds[kind]], edgecolor="white", lw=0.4)
for kind, part in kinds.items():
    axis.barh(0, 0, color=draw.STRONG[part], label=kind)
axis.set(yticks=[], xlabel="position in the data, KB")
axis.legend(ncols=4, frameon=False, loc="lower left", bbox_to_anchor=(0, 1))
draw.show(made, "46 tensors side by side, without gaps")

# %% [markdown] tags=["zh"]
# 四层的注意力（蓝）和 MLP（橙）交替出现，归一化的权重只有一丝宽。偏移量从**表头之后**算起，张量首尾相接；一个字节都不多，所以文件被截断时一查便知。
#
# ## 二、两个字节是一个数
#
# `BF16` 即 `bfloat16`：1 位符号、8 位指数、7 位尾数。它就是 `float32` 砍掉低位的两个字节（低位在前，所以是存在前面的两个），范围不变，精度约剩两到三位十进制数字。看下面打印的例子：指数 01111110 是 126，减去 127 得 −1；尾数 0111010 是 58；于是数值是 2⁻¹ × (1 + 58/128) = 0.7266。

# %% [markdown] tags=["en"]
# Attention (blue) and MLP (orange) of the four blocks take turns; the weights of the norms are slivers. Offsets count **from the end of the header**, and the tensors leave no gap. No byte is left over, so a truncated file is easy to notice.
#
# ## 2. Two bytes are a number
#
# `BF16` is `bfloat16`: 1 bit for the sign, 8 for the exponent, 7 for the fraction. It is a `float32` without its two low bytes, those that are stored first: the same range, and a precision of two to three decimal digits. In the example printed below, the exponent 01111110 is 126, less 127 makes −1; the fraction 0111010 is 58; so the value is 2⁻¹ × (1 + 58/128) = 0.7266.

# %%
begin, _ = header["model.norm.weight"]["data_offsets"]
pair = data[8 + length + begin :][:2]
bits = f"{int.from_bytes(pair, 'little'):016b}"
sign, exponent, fraction = int(bits[0]), int(bits[1:9], 2), int(bits[9:], 2)
value = (-1) ** sign * 2.0 ** (exponent - 127) * (1 + fraction / 128)
print(f"bytes {pair.hex(' ')} → bits {bits[0]} {bits[1:9]} {bits[9:]} → {value}")
print("PyTorch reads:", torch.frombuffer(bytearray(pair), dtype=torch.bfloat16).item())

# %% [markdown] tags=["zh"]
# 有了这些，整个读取器只要十行。位置都是现成的：第 start + begin 个字节到第 start + end 个字节，按类型解释，再按形状排好：

# %% [markdown] tags=["en"]
# With that, the whole reader is one short function. The places are given: the bytes from start + begin to start + end, read as their type and laid out in their shape:

# %%
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "I64": torch.int64}


def read_safetensors(path):
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            piece = bytearray(data[start + begin : start + end])
            flat = torch.frombuffer(piece, dtype=DTYPES[entry["dtype"]])
            tensors[name] = flat.view(entry["shape"])
    return tensors


tensors = read_safetensors(folder / "model.safetensors")
print(len(tensors), "tensors,", sum(tensor.numel() for tensor in tensors.values()), "numbers")

# %% [markdown] tags=["zh"]
# ## 三、故意弄坏：`strict=False`
#
# 现在照开头说的做。先准备一把尺子：五句描述，只有文字，模型预测每个下一个 token 的平均损失。什么都不知道时，它约为 ln V（第 11 课）。

# %% [markdown] tags=["en"]
# ## 3. Broken on purpose: `strict=False`
#
# Now do what the question described. First a yardstick: the mean loss of predicting each next token in five descriptions, text without images. A model that knows nothing has about ln V (lesson 11).

# %%
from data_tools.scenes_text import describe  # the toy world, on which the model was trained
from data_tools.scenes_world import draw as draw_scene
from data_tools.scenes_world import random_scene

tokenizer = load_tokenizer(folder)
scenes = [random_scene(Random(seed)) for seed in range(48)]
print(describe(scenes[1], "zh"))


@torch.no_grad()
def text_loss(model):
    losses = []
    for scene in scenes[:5]:
        ids = torch.tensor([tokenizer.encode(describe(scene, "zh"))])
        losses.append(F.cross_entropy(model(ids)[0, :-1], ids[0, 1:], reduction="none"))
    return torch.cat(losses).mean().item()


# %%
config = load_language_model(folder).config  # of config.json: widths, heads, layers
torch.manual_seed(0)
model = LanguageModel(config)
print(f"random:       loss {text_loss(model):.2f}, ln V = {math.log(config.vocab_size):.2f}")
result = model.load_state_dict(tensors, strict=False)
print(f"strict=False: loss {text_loss(model):.2f}")

# %% [markdown] tags=["zh"]
# 两次打印对照着看：没有报错，没有警告，损失**一位小数也没有变**，仍是 6.37。并不是变化太小、打印时舍掉了，而是确实什么都没有发生。PyTorch 其实说了，只是说在一个没有人看的返回值里：

# %% [markdown] tags=["en"]
# No error, no warning, and the loss **has not moved in any digit**. Nothing happened at all. PyTorch did say so, in a return value that nobody reads:

# %%
places = model.state_dict()
print(f"missing {len(result.missing_keys)}, unexpected {len(result.unexpected_keys)}")
print(f"loaded {len(places.keys() & tensors.keys())} of {len(places)}")
for theirs, ours in zip(list(tensors)[:2], list(places)[:2]):
    print(f"  in the file: {theirs:42} in the model: {ours}")

# %% [markdown] tags=["zh"]
# 答案是 0，一个也没有。文件里叫 `model.layers.0.mlp.up_proj.weight`，模型里叫 `blocks.0.mlp.up_proj.weight`：名字对不上的，`strict=False` 就跳过，而这里没有一个对得上：少了开头的 `model.`，`layers` 也换成了 `blocks`。
#
# 还要留意：`load_state_dict` 的返回值里，`missing` 和 `unexpected` 都是 46。两个数同时很大，几乎总是名字的问题，加一张对照表就好；只有一个很大，才是文件真的缺了或多了东西。
#
# 为什么有人要写 `strict=False`？往往出于好意：视觉语言模型比语言模型多出视觉编码器和投影层，从纯语言的文件里加载，本来就会「缺」。于是为了放过这几个，把所有的都放过了。**更好的办法是分部件加载，每个部件都严格。**
#
# ## 四、名字对照表
#
# 每个系列的模型有自己的命名习惯。对照表从左（发布的名字）到右（我们的名字），层号用正则表达式取出。有一处容易看错：`post_attention_layernorm` 字面上是「注意力之后」，其实是 MLP 之前的那个归一化：

# %% [markdown] tags=["en"]
# The answer is 0. The file says `model.layers.0.mlp.up_proj.weight`, the model `blocks.0.mlp.up_proj.weight`. The leading `model.` is missing, and `layers` has become `blocks`. `strict=False` passes over every name without a partner, and here no name has one.
#
# Note the two counts in the return value: `missing` and `unexpected` are both 46. When both are large, the names are nearly always to blame. When only one is, the file really lacks something, or has more than it should.
#
# Why would anyone write `strict=False`? Often with good intentions: a vision-language model has a vision encoder and a projector that a language model's file cannot hold, so something is always "missing". To let those pass, everything is let pass. **Better load each part by itself, and each strictly.**
#
# ## 4. A table of names
#
# Each family of models has its own names. The table leads from left (published) to right (ours), and a regular expression takes the block's number out. One name is easily misread: `post_attention_layernorm`, "after attention", is the norm before the MLP:

# %%
BLOCK = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "mlp_norm",
    "self_attn.o_proj": "attention.out_proj",
    **{f"self_attn.{x}_proj": f"attention.{x}_proj" for x in "qkv"},
    **{f"self_attn.{x}_norm": f"attention.{x}_norm" for x in "qk"},
}  # the names of the MLP agree


def our_name(name):
    block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    if block is None:
        return name.removeprefix("model.")
    number, part = block.groups()
    return f"blocks.{number}.{BLOCK.get(part, part)}.weight"


for name in ("model.embed_tokens.weight", "model.layers.3.self_attn.o_proj.weight"):
    print(f"{name:40} → {our_name(name)}")

# %% [markdown] tags=["zh"]
# 没有 `lm_head.weight`：这个模型的输出层就是词嵌入（embedding）表，两个名字指同一个张量，叫做共享（tied），文件里只存一份。换一个不共享的模型，文件里就必须有它。
#
# ## 五、严格
#
# 严格就是三个问题，答案都必须是「没有」：模型需要而文件没有的？文件有而模型没处放的？名字对上而形状不同的？

# %% [markdown] tags=["en"]
# There is no `lm_head.weight`: the output head of this model is its embedding table. Two names mean one tensor (they are tied), and the file holds it once. For a model whose two are not tied, the file must have it.
#
# ## 5. Strict
#
# Strict means three questions, each to be answered with "none". What does the model need that the file lacks? What has the file that the model has no place for? Which names agree while the shapes differ?


# %%
def problems(model, tensors):
    places = model.state_dict()
    both = places.keys() & tensors.keys()
    return {
        "missing": sorted(places.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - places.keys()),
        "mis-shaped": sorted(name for name in both if places[name].shape != tensors[name].shape),
    }


renamed = {our_name(name): tensor for name, tensor in tensors.items()}
for what, found in (("as published", tensors), ("renamed", renamed)):
    print(f"{what:13}", {kind: len(names) for kind, names in problems(model, found).items()})
model.load_state_dict(renamed)  # strict is PyTorch's default
print(f"loss {text_loss(model):.2f}")

# %% [markdown] tags=["zh"]
# PyTorch 的 `strict=False` 只放过前两个问题；形状不符，它仍然报错。所以宽度不同的权重立刻报错，只有名字不同的权重，却始终一声不响。
#
# 这次损失从 6.37 降到了 3.07，比 ln V 低了一大截，说明语言已经在里面。可它离第 05 课那些小模型的 0.7 还远：它们只学描述，别的不学；这个模型学的是照着写在前面的便签来描述，而这里前面什么也没有，开头的话和物体都出乎它的意料。
#
# 库里的加载函数 `load_into` 做同样的检查，把所有问题**一次列全**，而且在动模型之前。给它原来的名字，看看它怎么说：

# %% [markdown] tags=["en"]
# PyTorch's `strict=False` lets only the first two questions pass; a wrong shape is an error even then. So weights of another width fail loudly, and weights under other names fail without a sound.
#
# Now the loss has fallen from 6.37 to 3.07, well below ln V: the language is in there. It stays far above the 0.7 of the small models of lesson 05, which were trained on descriptions and nothing else. This model learned to describe a scene from a note that stood before the answer; here nothing stands before it, so it is surprised by the opening words and by the objects.
#
# The package's `load_into` makes the same check. It lists **all problems at once**, before it touches the model. Give it the published names, and see what it says:

# %%
from nanovlm import NanoVLMError
from nanovlm.hub.loading import load_into, open_checkpoint

try:
    load_into(LanguageModel(config), open_checkpoint(folder), lambda name: name)
except NanoVLMError as error:
    for line in str(error).splitlines()[:6]:
        print(line.replace(str(folder), folder.name))
    print("    …")

# %% [markdown] tags=["zh"]
# ## 六、与库代码核对
#
# `load_language_model` 走的是同一条路：读表头、查对照表、严格检查。这里没有任何浮点运算，只有搬运字节，所以容差是 0，一位都不许差。

# %% [markdown] tags=["en"]
# ## 6. Proven equal
#
# `load_language_model` goes the same way: header, table of names, strict check. Nothing is computed here, bytes are only moved. So the tolerance is 0, to the last bit.

# %%
theirs = load_language_model(folder)  # in the file's bfloat16
assert theirs.state_dict().keys() == renamed.keys()
for name, tensor in theirs.state_dict().items():
    torch.testing.assert_close(renamed[name], tensor, rtol=0, atol=0)
ids = torch.tensor([tokenizer.encode(describe(scenes[0], "zh"))])
with torch.no_grad():
    torch.testing.assert_close(model(ids), theirs.float()(ids), rtol=0, atol=0)
print("46 tensors and the logits equal to the last bit")

# %% [markdown] tags=["zh"]
# ## 七、没装进去的模型，训练起来什么样
#
# 现实里没有人会先量一句话的损失。大家直接开训，看曲线。那么就训：视觉编码器和语言模型冻结，只训练投影层（第 1 阶段，第 18 课），24 步，每步 8 张图。冻结的语言模型正是最容易漏查的：它没有装好，也不会在训练中自己变好。一次正确装载，三次 `strict=False`（三个随机种子）：

# %% [markdown] tags=["en"]
# ## 7. Training a model that was never loaded
#
# Nobody measures the loss of a sentence first. One starts training and watches the curve. So train: vision encoder and language model frozen, the projector trainable (stage 1, lesson 18), 24 steps of 8 images. A frozen language model is the one that is least often checked, and training will not mend it. Once loaded properly, three times with `strict=False` (three seeds):

# %%
vlm = load_model(ASSETS / "tiny-vlm").float().eval()
encoder = load_vision_encoder(ASSETS / "tiny-vision-encoder").float()
asked = Message("user", [IMAGE, "描述图片"])
which = vlm.config.vision_layer, vlm.config.vision_norm
batches = []
for first in range(0, 48, 8):
    some = scenes[first : first + 8]
    talks = [[asked, Message("assistant", describe(scene, "zh"))] for scene in some]
    batch = prepare(vlm, talks, [[draw_scene(scene)] for scene in some])
    with torch.no_grad():  # the encoder is frozen: its patch vectors stay the same
        batch.patches = encoder.patches(batch.pixels, *which)
    batches.append(batch)
print("patch vectors of a batch:", tuple(batches[0].patches.shape))


# %%
def train_projector(language_model, seed):
    torch.manual_seed(seed)
    model = VisionLanguageModel(vlm.config, vlm.tokenizer)  # with a new projector
    model.language_model = language_model.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.projector.parameters(), lr=1e-3)
    history = []
    for step in range(24):
        batch = batches[step % len(batches)]
        loss = model(batch) / len(batch.targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    return history


# %%
histories = {"loaded": train_projector(model, seed=0)}
for seed in range(3):
    torch.manual_seed(seed)
    empty = LanguageModel(config)
    empty.load_state_dict(tensors, strict=False)
    histories[f"strict=False, seed {seed}"] = train_projector(empty, seed)

# %%
made, axis = draw.figure(height=3.2)
draw.curves(axis, histories, x="step", y="loss per label", parts=["right", *["wrong"] * 3])
axis.axhline(math.log(config.vocab_size), color=draw.FAINT, lw=0.8)
axis.text(23, math.log(config.vocab_size) + 0.1, "ln V", ha="right", color=draw.FAINT)
axis.set_ylim(0, 7.3)
axis.legend(frameon=False, loc="center left")
draw.show(made, "Not loaded: the loss falls a little, then stays near ln V")
for name, history in histories.items():
    print(f"{name:21} first {history[0]:.2f}, last {history[-1]:.2f}")

# %% [markdown] tags=["zh"]
# 三条红线并不是一动不动，它们**降了一点**，从 6.5 到 5.75 左右：冻结的随机网络后面，投影层仍能让常见的 token 稍微多一些。正是这一点下降最能骗人，让人去调学习率、加数据、再等一天。怎样区分「学得慢」和「没装进去」？看第一步：装好的是 2.01，没装的约为 6.5。第一步的损失在训练之前就能量。看到损失停在 ln V 附近（这里 6.46，词表 6,400 时是 8.76，Qwen 是 11.93），先查权重。
#
# ## 八、只少一个张量呢
#
# 全都没装进去，起码曲线很难看。更难发现的是少一个。把训练好的视觉语言模型里语言部分的张量，逐个换成随机初始化（三个种子取平均），看描述那张图的损失：

# %% [markdown] tags=["en"]
# The red lines do not stand still, they **fall a little**, from 6.5 to about 5.75: through a frozen random network, the projector can still make frequent tokens somewhat likelier. This small fall is what misleads: one tunes the learning rate, adds data, waits another day. How to tell "learns slowly" from "was never loaded"? By the first step, 2.01 against 6.5, and its loss can be measured before any training. When a loss stays near ln V (6.46 here; 8.76 for a vocabulary of 6,400; 11.93 for Qwen), check the weights first.
#
# ## 8. One tensor missing
#
# When nothing is loaded, at least the curve is ugly. One missing tensor is harder to see. Replace the tensors in the language model of the trained vision-language model one at a time by their random initialisation (mean of three seeds), and look at the loss of describing the scene:

# %%
truth = "图中有三个物体，从左到右是：大的红色圆环、大的蓝色五角星、小的橙色三角形。"
talk = [asked, Message("assistant", truth)]
batch = prepare(vlm, [talk], [[open_image(ASSETS / "scene.png")]])
language = vlm.language_model.requires_grad_(False)

# %%
fresh = []
for seed in range(3):
    torch.manual_seed(seed)
    fresh.append(LanguageModel(language.config).state_dict())


@torch.no_grad()
def loss_without(name):
    place, total = language.get_parameter(name), 0.0
    kept = place.clone()
    for other in fresh:
        place.copy_(other[name])
        total += vlm(batch).item() / len(batch.targets) / len(fresh)
    place.copy_(kept)
    return total


# %%
parts = [name.removeprefix("blocks.0.") for name in renamed if name.startswith("blocks.0.")]
grid = torch.tensor([[loss_without(f"blocks.{n}.{part}") for n in range(4)] for part in parts])
with torch.no_grad():
    whole = vlm(batch).item() / len(batch.targets)
made, axis = draw.figure(height=4.0)
draw.heat(
    axis, grid, numbers=".3f", colours="Reds", limits=(0, 3),
    rows=[part.removesuffix(".weight") for part in parts], columns=[f"block {n}" for n in range(4)],
)  # fmt: skip
draw.show(made, f"Loss with one tensor missing (nothing missing: {whole:.4f})")
print(f"embed_tokens: {loss_without('embed_tokens.weight'):.2f}, ",
      f"final norm: {loss_without('norm.weight'):.2f}")  # fmt: skip

# %% [markdown] tags=["zh"]
# 深色的格子（最高 9.6）一训练就看得出来，第 0 层尤其如此；缺了词嵌入，损失也到 6.48。浅色的看不出来：归一化的权重缺了就是 1，在这句描述上几乎没有差别；第 1、2 层的 MLP 里，一整个矩阵换成了随机数，损失也只有 0.001 或 0.002。一句容易的描述考不出它们学到的东西，换成难的问题也许就会错。这样的模型能用，只是差一点，没有人知道为什么。严格检查对 46 个张量一视同仁，不管它重不重要，缺了就说出名字。
#
# 严格也有它**查不出**的：名字和形状都对、内容放错。把每层的 `gate_proj` 和 `up_proj` 互换，两者形状相同：

# %% [markdown] tags=["en"]
# The dark cells, up to 9.6, show up as soon as one trains, those of block 0 above all; without the embeddings it is 6.48. The pale ones do not. A missing norm is a row of ones, which on this sentence makes almost no difference. In the MLPs of blocks 1 and 2 a whole matrix has become random numbers, and the loss moved by 0.001 or 0.002. One easy description does not test what they had learned; a harder question may. Such a model works, a little worse, and nobody knows why. The strict check treats all 46 tensors alike and names whatever is missing, important or not.
#
# There is something that strict **cannot** find: right names, right shapes, wrong contents. Swap `gate_proj` and `up_proj` of each block, which have the same shape:

# %%
state = language.state_dict()
swapped = {
    name.replace("gate", "*").replace("up_proj", "gate_proj").replace("*_proj", "up_proj"): tensor
    for name, tensor in state.items()
}
print("problems:", problems(language, swapped))
mixed = LanguageModel(language.config).requires_grad_(False)
mixed.load_state_dict(swapped)
vlm.language_model = mixed
print(f"loss {vlm(batch).item() / len(batch.targets):.2f}, before {whole:.4f}")
vlm.language_model = language

# %% [markdown] tags=["zh"]
# 三项全空，损失却从 0.0001 升到 1.29。对付这一类，只有拿同样的输入和一个可信的实现比较输出；`tests/` 里对每个系列的模型都这样做。
#
# ## 练习

# %% [markdown] tags=["en"]
# No problem found, and the loss is 1.29 instead of 0.0001. Against this kind only one thing helps: compare outputs with a trusted implementation on the same input. The tests do so for each family of models.
#
# ## Exercises

# %% [markdown] tags=["zh"]
# **12.1 补一行。** 不读任何权重，只用 `header`，算出模型有多少参数。（`math.prod` 求积。）

# %% [markdown] tags=["en"]
# **12.1 Fill in a line.** Without reading any weights, compute from `header` alone how many parameters the model has. (`math.prod` multiplies.)

# %% tags=["exercise"]
parameters = ...
check("12.1", parameters, sum(tensor.numel() for tensor in tensors.values()))

# %% [markdown] tags=["zh"]
# **12.2 改一个行为。** 有的系列（如第一代 Qwen）把 q、k、v 三个矩阵沿第一维叠成一个 `c_attn`。下面是视觉编码器第 0 层这样叠起来的张量。从中取出 `k_proj.weight`。

# %% [markdown] tags=["en"]
# **12.2 Change a behaviour.** Some families, such as the first Qwen, stack the matrices of q, k and v along the first dimension in one `c_attn`. Here is such a stack of the vision encoder's block 0. Take `k_proj.weight` out of it.

# %% tags=["exercise"]
attention = encoder.blocks[0].attention
c_attn = torch.cat([getattr(attention, f"{x}_proj").weight.detach() for x in "qkv"])
k_proj = ...
check("12.2", k_proj, attention.k_proj.weight.detach())

# %% [markdown] tags=["zh"]
# **12.3 找错。** 这个函数只读一个张量。形状对，类型对，数值全错。改好它。

# %% [markdown] tags=["en"]
# **12.3 Find the bug.** This function reads one tensor. Shape and type are right, the values are all wrong. Mend it.


# %% tags=["exercise"]
def read_one(data, name):
    start = int.from_bytes(data[:8], "little")
    entry = json.loads(data[8 : 8 + start])[name]
    begin, end = entry["data_offsets"]
    piece = bytearray(data[start + begin : start + end])
    return torch.frombuffer(piece, dtype=torch.bfloat16).view(entry["shape"])


check("12.3", read_one(data, "model.norm.weight"), tensors["model.norm.weight"])

# %% [markdown] tags=["zh"]
# ## 别人在这里摔过跤
#
# [jingyaogong/minimind-v#75](https://github.com/jingyaogong/minimind-v/issues/75)：好几个人报告预训练的损失停在 7.3 到 7.5，输出「完全不说人话」，直接装作者训好的权重也一样。最后有人指出 `model.load_state_dict(state_dict, strict=False)` 这一行「根本没有 load 进去任何东西」：检查点里的名字和模型参数的名字不对应，整个模型都是随机初始化。怎么一分钟内发现？数一数装进去几个张量；或者像第三节那样，训练之前先量一句话的损失，和 ln V 比。
#
# ## 到库里看看
#
# - [`nanovlm/hub/safetensors.py`](../../nanovlm/hub/safetensors.py)，`SafetensorsFile` 与 `save_file`：内存映射，不读就不占内存；打开时检查每一个字节的去处。
# - [`nanovlm/hub/names.py`](../../nanovlm/hub/names.py)，`QWEN`、`DINOV2` 与 `translate`：各个系列的对照表；`Split` 处理叠在一起的 q、k、v。
# - [`nanovlm/hub/loading.py`](../../nanovlm/hub/loading.py)，`load_into`：严格检查，每个张量只在内存里放一份；还有分成多个文件的权重。
#
# 论文：Kalamkar 等，2019，*A Study of BFLOAT16 for Deep Learning Training*，[arXiv:1905.12322](https://arxiv.org/abs/1905.12322)。

# %% [markdown] tags=["en"]
# ## In the wild
#
# [jingyaogong/minimind-v#75](https://github.com/jingyaogong/minimind-v/issues/75): several people report a pretraining loss that stays at 7.3 to 7.5 and answers that are not human language, even from the author's own trained weights. Then someone finds that the line `model.load_state_dict(state_dict, strict=False)` loads nothing at all: the names in the checkpoint are not those of the model, which is randomly initialised throughout. How to notice within a minute? Count the tensors that were loaded, or measure the loss of a sentence before training, as in section 3, and compare it with ln V.
#
# ## Look in the package
#
# - [`nanovlm/hub/safetensors.py`](../../nanovlm/hub/safetensors.py), `SafetensorsFile` and `save_file`: memory-mapped, so that what is not read takes no memory; on opening, every byte is accounted for.
# - [`nanovlm/hub/names.py`](../../nanovlm/hub/names.py), `QWEN`, `DINOV2` and `translate`: the tables of each family; `Split` is for q, k and v that are stacked.
# - [`nanovlm/hub/loading.py`](../../nanovlm/hub/loading.py), `load_into`: the strict check, each tensor in memory once, and weights in several files.
#
# The paper: Kalamkar et al. 2019, *A Study of BFLOAT16 for Deep Learning Training*, [arXiv:1905.12322](https://arxiv.org/abs/1905.12322).
