# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["zh"]
# # 09 · 插入：图片进入句子
#
# 投影层给了我们 64 个视觉 token，分词器给了我们一串 id。这一课把它们放进同一个序列，然后把整个模型从像素到 logits 走一遍，全部手写。
#
# **进来的**：`(1, 64, 192)` 的视觉 token，和 `(1, 68)` 的 token id，类型 `int64`。**出去的**：`(1, 68, 640)` 的 logits，每个位置对词表里 640 个 token 各有一个分数。

# %% [markdown] tags=["en"]
# # 09 · The splice: an image enters the sentence
#
# The projector gave us 64 visual tokens, and the tokenizer a list of ids. This lesson puts both into one sequence and then walks the whole model by hand, from pixels to logits.
#
# **In**: visual tokens `(1, 64, 192)`, and token ids `(1, 68)` of type `int64`. **Out**: logits `(1, 68, 640)`, at each position a score for each of the 640 tokens of the vocabulary.

# %% tags=["setup"]
import sys

sys.path.insert(0, "../..")  # the repository: nanovlm and the drawing helpers

from random import Random

import torch
import torch.nn.functional as F

from data_tools.scenes_world import draw as draw_scene
from data_tools.scenes_world import random_scene
from lessons import draw
from lessons.check import check
from nanovlm import IMAGE, Message, NanoVLMError, generate, load_model, open_image, prepare
from nanovlm.explain.attribution import explain

ASSETS = "../../nanovlm/assets"
torch.set_grad_enabled(False)
draw.strip("visual tokens", "sequence", "hidden states", "logits")

# %% [markdown] tags=["zh"]
# ## 先猜一猜
#
# 取 24 张图，把上半部和下半部对调，再问「最上面的物体是什么？」。对调有两种做法：
#
# - 在**像素**上对调，再送进视觉编码器；
# - 像素不动，把投影层给出的 64 个**视觉 token** 的前 32 个和后 32 个对调。
#
# 两种做法各会改变 24 个答案中的几个？写下两个数。

# %% [markdown] tags=["en"]
# ## Predict
#
# Take 24 images, exchange the upper half and the lower half, and ask "最上面的物体是什么？" (which object is topmost?). There are two ways to exchange them:
#
# - exchange the **pixels**, then let the vision encoder see the image;
# - leave the pixels alone, and exchange the first 32 with the last 32 of the 64 **visual tokens** that the projector gives.
#
# How many of the 24 answers does each way change? Write down two numbers.

# %% [markdown] tags=["zh"]
# ## 一、给图片留座位
#
# 文字变成 id 时，图片的位置上写着 64 个一模一样的占位 token（placeholder），id 都相同（代码里的 `placeholder`，这里是 2）。它们只占座位。68 = 1 + 64 + 1 + 2：`<user>`、图片、问题，最后是 `</s>` 和 `<assistant>`。

# %% [markdown] tags=["en"]
# ## 1. Keeping seats for the image
#
# When the text becomes ids, 64 placeholders stand where the image goes, all with the same id (`placeholder`, here 2). They only keep the seats. 68 = 1 + 64 + 1 + 2: `<user>`, the image, the question, and at the end `</s>` and `<assistant>`.

# %%
model = load_model(f"{ASSETS}/tiny-vlm").float().eval()  # the file holds bfloat16
image = open_image(f"{ASSETS}/scene.png")
question = [Message("user", [IMAGE, "描述图片"])]
batch = prepare(model, [question], [[image]], add_generation_prompt=True)  # lesson 05
ids = batch.input_ids  # (1, T)
print("ids:", tuple(ids.shape), ids.dtype, ids[0, :3].tolist(), "…", ids[0, -5:].tolist())
placeholder = model.chat.image_token_id  # 2
places = [place for place, token in enumerate(ids[0].tolist()) if token == placeholder]
print("seats:", len(places), "from", places[0], "to", places[-1])
torch.testing.assert_close(torch.tensor(places), batch.image_positions)

# %%
texts = [model.tokenizer.decode([token]) for token in ids[0].tolist()]
chosen = [0, 1, 2, 3, 4, 62, 63, 64, 65, 66, 67]  # the 57 in the middle look alike
shown = [texts[place] for place in chosen]
shown.insert(5, "…")
below = [str(place) for place in chosen]
below.insert(5, "57 more")
parts = ["projector" if text in ("<image>", "…") else "word" for text in shown]
made, axis = draw.figure(1, height=1.7)
draw.tokens(axis, shown, parts, below=below)
draw.show(made, "68 places: 64 of them for the image")

# %% [markdown] tags=["zh"]
# 一张图占了 68 个位置中的 64 个，问题本身只有 1 个 token（「描述图片」在词表里恰好是一整个 token）。
#
# 为什么要先占座，而不是等向量来了再塞进去？因为座位一定，序列的长度 T 就定了：注意力掩码、位置编号、标签都可以在造批次时按 id 算好，模型里不必再移动任何东西。早期的 LLaVA 走的是另一条路：文本里只放一个 `<image>`，到了模型里再展开成 576 个向量，长度随之改变，标签和掩码都得跟着重排。占座的代价是：**座位数必须事先算对**。它等于投影层的 K 乘以子图（tile）的个数（大图可以切成几块子图，每块当作一张图来编码；这里只有一块），与图片内容无关，只与尺寸有关，所以在分词时就能知道。
#
# ## 二、换上视觉 token
#
# 词嵌入就是查表：第 i 个 id 取嵌入表的第 i 行。插入（splice）就是把占位 token 的那些行换掉。先写循环：

# %% [markdown] tags=["en"]
# The image takes 64 of 68 places. The question itself is one token, since 描述图片 happens to be a whole token of this vocabulary.
#
# Why keep seats, when the vectors could be pushed in once they are there? With the seats, the length T is known: the attention mask, the positions and the labels can be computed from the ids where the batch is made, and nothing has to be moved inside the model. Early LLaVA did it the other way: one `<image>` in the text, unfolded into 576 vectors inside the model, so that the length changed and labels and mask had to be laid out again. The price of seats is that **their number has to be right beforehand**. It is the projector's K times the number of tiles (a large image may be cut into tiles, each encoded like an image of its own; here there is one). It depends on the size of the image, not on its contents, so the tokenizer's side can know it.
#
# ## 2. The visual tokens take their seats
#
# Embedding is looking up: id i gets row i of the table. The splice replaces the rows of the placeholders. First as a loop:


# %%
def splice_loop(ids, visual_tokens):  # (T,), (K, C) → (T, C)
    table, rows, used = model.language_model.embed_tokens.weight, [], 0
    for token in ids.tolist():
        if token == placeholder:
            rows.append(visual_tokens[used])
            used += 1
        else:
            rows.append(table[token])
    return torch.stack(rows)


visual_tokens = model.encode_images(batch)  # (1, K, C), lessons 03 and 08
embeddings = splice_loop(ids[0], visual_tokens[0])[None]  # (1, T, C)
words = model.language_model.embed_tokens(ids)  # (1, T, C), the placeholders' own rows included
print("visual tokens:", tuple(visual_tokens.shape), " embeddings:", tuple(embeddings.shape))
torch.testing.assert_close(embeddings, model.splice(batch, visual_tokens), rtol=0, atol=0)

# %%
made, axes = draw.figure(2, height=2.6, sharey=True)
for axis, rows, title in ((axes[0], words, "looked up"), (axes[1], embeddings, "spliced")):
    is_image = ids[0] == placeholder
    colours = [draw.PROJECTOR if orange else draw.WORD for orange in is_image.tolist()]
    axis.bar(range(68), rows[0].norm(dim=-1), color=colours, width=1.0)
    axis.set(title=title, xlabel="place in the sequence", ylabel="length of the vector")
draw.show(made, "Before, 64 equal rows; after, the image")

# %% [markdown] tags=["zh"]
# 左图里橙色的 64 根一样高：它们是嵌入表里同一行的 64 份拷贝，不含任何图片信息，马上就要被扔掉。右图里它们换成了视觉 token，每根都不同。
#
# 一个批次有许多行、许多图，循环太慢。库里的办法是把 `(B, T)` 拉平成一维，事先记下所有占位 token 在这一维里的下标 `image_positions`，叫**展平下标**（flat index），一次 `index_copy` 全部写好。例如 T = 68 时，第 2 行第 5 列（都从 0 数起）的展平下标是 2 × 68 + 5 = 141。

# %% [markdown] tags=["en"]
# On the left, the 64 orange bars are equally high: 64 copies of one row of the table, which know nothing of the image and are about to be thrown away. On the right they are visual tokens, each one different.
#
# A batch has many rows and many images, and a loop is slow. The package flattens `(B, T)` into one dimension, keeps the **flat indices** of all placeholders in `image_positions`, and writes everything with one `index_copy`. With T = 68, for example, row 2, column 5 (both counted from 0) has the flat index 2 × 68 + 5 = 141.


# %%
def splice(ids, positions, visual_tokens):  # (B, T), (N · K,), (N, K, C) → (B, T, C)
    embeddings = model.language_model.embed_tokens(ids).flatten(0, 1)  # (B · T, C)
    embeddings = embeddings.index_copy(0, positions, visual_tokens.flatten(0, 1))
    return embeddings.unflatten(0, ids.shape)


torch.testing.assert_close(
    splice(ids, batch.image_positions, visual_tokens), embeddings, rtol=0, atol=0
)
print("loop = index_copy, to the last bit")

# %% [markdown] tags=["zh"]
# ## 三、整个模型，40 行
#
# 前面各课的零件现在都齐了。下面三格就是整个模型，除了线性层和 LayerNorm 借用已经装好权重的 `nn.Linear` 等，没有别的帮手。先是两个 Transformer 共用的注意力（第 02 课）。看图时不给 `rotary`，也就没有因果掩码，图块互相都看得见；读句子时给了 `rotary`，每个位置只看自己和前面：

# %% [markdown] tags=["en"]
# ## 3. The whole model in 40 lines
#
# The pieces of the lessons so far are complete now. The next three cells are the whole model. Its linear layers and LayerNorms are the loaded ones; there is no other help. First the attention that both transformers share (lesson 02). For the image it gets no `rotary`, and then it has no causal mask: all patches see each other. For the sentence it gets `rotary`, and each place sees itself and what is earlier:


# %%
def attend(x, part, rotary=None):  # (B, T, C) → (B, T, C); with `rotary` it is causal
    def split(projected):
        return projected.unflatten(-1, (-1, part.head_dim)).transpose(1, 2)

    q, k, v = split(part.q_proj(x)), split(part.k_proj(x)), split(part.v_proj(x))
    if rotary is not None:
        q, k = rotate(rms(q, part.q_norm), rotary), rotate(rms(k, part.k_norm), rotary)
    k, v = (heads.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for heads in (k, v))
    scores = q @ k.mT / part.head_dim**0.5
    if rotary is not None:
        scores += torch.full(scores.shape[-2:], -torch.inf).triu(1)
    return part.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


# %% [markdown] tags=["zh"]
# 视觉编码器（第 03 课）和投影层（第 08 课）：

# %% [markdown] tags=["en"]
# The vision encoder (lesson 03) and the projector (lesson 08):


# %%
def enter(pixels, encoder):  # (N, 3, H, W) → (N, 1 + P, C_v): the class token, then patches
    patches = encoder.patch_embedding(pixels).flatten(2).mT
    x = torch.cat((encoder.cls_token.expand(len(pixels), -1, -1), patches), dim=1)
    return x + encoder.position_embedding


def see(pixels, encoder, first=1):  # (N, 3, H, W) → (N, P, C_v)
    return climb(enter(pixels, encoder), encoder)[:, first:]  # without the class token


def climb(x, encoder):  # (N, 1 + P, C_v) → the same shape
    for block in encoder.blocks:
        x = x + block.attention_scale * attend(block.attention_norm(x), block.attention)
        inner = F.gelu(block.mlp.up_proj(block.mlp_norm(x)))
        x = x + block.mlp_scale * block.mlp.down_proj(inner)
    return encoder.norm(x) if model.config.vision_norm else x  # the shipped config decides


def project(patches, projector):  # (N, P, C_v) → (N, K, C_t)
    return projector.down(F.gelu(projector.up(patches)))


# %% [markdown] tags=["zh"]
# 语言模型（第 06、07 课）。RMSNorm 和旋转位置编码各两三行：

# %% [markdown] tags=["en"]
# The language model (lessons 06 and 07). RMSNorm and the rotary positions take a few lines each:


# %%
def rms(x, norm):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight


def rotate(heads, angles):  # the first half of a head turns with the second
    first, second = heads.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()  # (T, D / 2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def read(x, language):  # (B, T, C_t) → (B, T, V)
    half = torch.arange(0, language.config.head_dim, 2) / language.config.head_dim
    angles = torch.arange(x.shape[1])[:, None] * language.config.rope_theta**-half
    for block in language.blocks:
        x = x + attend(rms(x, block.attention_norm), block.attention, angles)
        inner, mlp = rms(x, block.mlp_norm), block.mlp
        x = x + mlp.down_proj(F.silu(mlp.gate_proj(inner)) * mlp.up_proj(inner))
    return rms(x, language.norm) @ language.embed_tokens.weight.T


# %% [markdown] tags=["zh"]
# 四步连起来：看、投影、插入、读，一步一行，再与库代码核对。容差取 1e-3：经过 8 层，求和次序不同带来的误差会累积，实际大约是 1e-5。真正写错的差别大得多。一种容易犯的错是总做编码器最后的 LayerNorm，而做不做由设置 `vision_norm` 决定。第 03 课故意犯过一次：编码器的输出差了 10 左右，物体却几乎全都说对。看答案发现不了这种错，比数字才行。

# %% [markdown] tags=["en"]
# The four steps in a row, see, project, splice, read, a line each, compared with the package. The tolerance is 1e-3: over 8 blocks the differences of another summing order add up, in fact to about 1e-5. A real mistake is far larger. An easy one is to apply the encoder's last LayerNorm always, while the setting `vision_norm` decides. Lesson 03 made it on purpose: the encoder's output was off by about 10, and nearly all objects were still named correctly. Reading answers does not find such a mistake; comparing numbers does.

# %%
patches = see(batch.pixels, model.vision_encoder)
visual_tokens = project(patches, model.projector)
embeddings = splice(ids, batch.image_positions, visual_tokens)
logits = read(embeddings, model.language_model)
theirs = model.language_model.logits(model.language_model.hidden_states(model.embed(batch)))
torch.testing.assert_close(logits, theirs, rtol=1e-3, atol=1e-3)
print("logits:", tuple(logits.shape), f" largest difference {(logits - theirs).abs().max():.1e}")
best = logits[0, -1].softmax(-1).topk(3)
for chance, token in zip(*best):
    print(f"{chance:6.1%}  {model.tokenizer.decode([int(token)])}")

# %% [markdown] tags=["zh"]
# 从像素到下一个词，就这么多。最后一个位置（`<assistant>`）的 logits 给出回答的第一个 token。把它接到末尾再来一遍，就是生成（第 10 课）。
#
# 请注意代码里**没有**的东西：`read` 不知道哪些位置是图、哪些是字。插入之后，68 个向量一视同仁，走同样的层，乘同样的矩阵。「多模态」全部发生在那一次 `index_copy` 里。
#
# 那么图片能影响谁？语言模型是因果的，每个位置只看自己和前面。换一张空白图，量一量各个位置的 logits 变了多少：

# %% [markdown] tags=["en"]
# From pixels to the next word, that is all. The logits of the last place (`<assistant>`) give the first token of the answer. Append it and start over, and you are generating (lesson 10).
#
# Notice what is **not** in the code: `read` does not know which places are image and which are words. After the splice, 68 vectors are treated alike, by the same blocks and the same matrices. All that is "multimodal" happens in that one `index_copy`.
#
# Whom can the image affect, then? The language model is causal: each place looks at itself and at earlier ones. Put in a blank image and measure how the logits change, place by place:

# %%
blank = project(see(torch.zeros_like(batch.pixels), model.vision_encoder), model.projector)
change = logits - read(splice(ids, batch.image_positions, blank), model.language_model)
for place in (0, 1, 64, 65, 67):
    print(f"place {place:2} {texts[place]:12} {change[0, place].abs().max():8.4f}")

# %% [markdown] tags=["zh"]
# 第 0 个位置 `<user>` 在图片之前，变化正好是 0；第 1 个位置只看得到一个视觉 token，变得较少；问题和 `<assistant>` 在图片之后，都变了。反过来，**图片看不到问题**：问题排在后面，64 个视觉 token 经过语言模型各层时，并不知道你要问什么。所以同一张图问许多问题时，图片的那一段可以只算一次（第 10 课的缓存、第 16 课的打包都用到这一点）。
#
# ## 四、故意弄坏：多出来的一个向量
#
# 编码器输出的是 65 个向量：class token 加 64 个图块。假设有人忘了去掉 class token。`index_copy` 会立刻报错，因为 65 对不上 64。可是不少代码用的是 `masked_scatter`，它只管从头取，**多出来的不声不响地留下**。取 24 张至少有两个物体的图来试：

# %% [markdown] tags=["en"]
# Place 0, `<user>`, comes before the image, and its change is exactly 0; place 1 sees a single visual token and changes less; the question and `<assistant>` come after it, and both change. The other way round, **the image cannot see the question**: the question comes later, so the 64 visual tokens pass the language model without knowing what will be asked. That is why, for many questions about one image, the image's part can be computed once (the cache of lesson 10 and the packing of lesson 16 use it).
#
# ## 4. Broken on purpose: one vector too many
#
# The encoder gives 65 vectors: the class token and 64 patches. Suppose someone forgets to drop the class token. `index_copy` complains at once, as 65 do not fit 64. But much code uses `masked_scatter`, which takes what it needs from the front and **leaves the rest without a word**. On 24 images with at least two objects each:

# %%
scenes = [random_scene(Random(seed)) for seed in range(200)]
scenes = [scene for scene in scenes if len(scene.objects) > 1][:24]
drawn = [draw_scene(scene) for scene in scenes]


def ask(text):  # one batch: 24 rows, 24 images
    questions = [[Message("user", [IMAGE, text])]] * len(drawn)
    return prepare(model, questions, [[one] for one in drawn], add_generation_prompt=True)


many = ask("描述图片")
features = see(many.pixels, model.vision_encoder, first=0)  # (24, 65, C_v)
too_many = project(features, model.projector)
mask = (many.input_ids == placeholder)[..., None]  # (24, T, 1)
wrong = model.language_model.embed_tokens(many.input_ids).masked_scatter(mask, too_many)
print(tuple(too_many.shape), "into", int(mask.sum()), "seats → ", tuple(wrong.shape), "no error")

# %%
owner = torch.arange(24)[:, None].expand(24, 65)  # of each vector: its image
seats = torch.zeros(24, 64, dtype=torch.long)
seated = seats.masked_scatter(torch.ones(24, 64, dtype=torch.bool), owner)
made, axis = draw.figure(1, height=3.0)
foreign = (seated != torch.arange(24)[:, None]).float()
draw.heat(axis, foreign, colours="Reds", limits=(0, 1.3))
axis.set(xlabel="seat of the image, 0 to 63", ylabel="row of the batch, 0 to 23")
draw.show(made, "Red: a vector of the image in the row above")

# %% [markdown] tags=["zh"]
# `masked_scatter` 把 24 × 65 个向量排成一队，依次填进 24 × 64 个座位。第 0 行多出一个，挤进了第 1 行；第 1 行又多出一个，两个一起挤进第 2 行。所以第 0 行只错开一位，第 23 行已经有 23 个座位坐着**上一张图**的向量。它们对答案有多大影响？写一个函数，把任意的视觉 token 插进去再生成。

# %% [markdown] tags=["en"]
# `masked_scatter` lines up 24 × 65 vectors and fills 24 × 64 seats in that order. Row 0 has one left over, which gets into row 1; row 1 leaves another, and two get into row 2. So row 0 is off by one seat, and in row 23, 23 seats hold vectors of **the image before**. What does that do to the answers? Write a function that splices in any visual tokens and generates.


# %%
def answers(batch, visual_tokens):  # the model's answers when these are spliced in
    kept, model.projector = model.projector, torch.nn.Identity()
    batch.pixels, batch.patches = None, visual_tokens
    said = [model.tokenizer.decode(answer) for answer in generate(model, batch, 60)]
    model.projector = kept
    return said


pixels = many.pixels
right = project(see(pixels, model.vision_encoder), model.projector)  # (24, 64, C_t)
shifted = too_many.flatten(0, 1)[: 24 * 64].unflatten(0, (24, 64))  # as masked_scatter takes them
pairs = zip(answers(many, right), answers(many, shifted))
changed = [row for row, (one, other) in enumerate(pairs) if one != other]
print(f"{len(changed)} of 24 answers change, in rows {changed}")

# %% [markdown] tags=["zh"]
# 第 0 到 7 行一个也没变：至多 7 个座位坐错，在这里看不出害处。从第 8 行起，16 个答案变了 10 个，正是上面那张图里红色较多的行。批次越大，混进来的别人的向量越多；用一张图试的时候（第 0 行），几乎看不出来。训练时也没有任何提示。可怕之处就在这里。
#
# 所以 nanovlm 在做任何计算之前先数一数，不相等就报错，并说出两个数。下面故意少给一个座位，看它怎么说：

# %% [markdown] tags=["en"]
# None of the rows 0 to 7 is among them: up to 7 foreign seats do no visible harm here. From row 8 on, 10 of 16 answers change. The larger the batch, the more of another image's vectors get in; and whoever tries it with one image, row 0, hardly notices. In training nothing would complain either. That is what makes this mistake so nasty.
#
# So nanovlm counts before it computes anything, and a mismatch is an error that names both numbers. Here one seat is taken away on purpose:

# %%
short = prepare(model, [question], [[image]], add_generation_prompt=True)
short.image_positions = short.image_positions[:-1]
try:
    model.embed(short)
except NanoVLMError as error:
    print("error:", error)

# %% [markdown] tags=["zh"]
# ## 五、对调
#
# 先做最直接的检查：两张图的视觉 token 互换座位，答案应当跟着换。如果没有换，就说明模型根本没用到它们，后面的实验也不必做了。

# %% [markdown] tags=["en"]
# ## 5. Exchanges
#
# The most direct check first: let the visual tokens of two images change seats, and the answers should follow. If they did not, the model would not use the visual tokens at all, and there would be no point in the experiments below.

# %%
pair = prepare(model, [question] * 2, [[drawn[0]], [drawn[1]]], add_generation_prompt=True)
before = answers(pair, right[:2])
after = answers(pair, right[[1, 0]])
for row in range(2):
    print(f"image {row}, its own tokens:  {before[row]}\n         the other's:     {after[row]}")

# %% [markdown] tags=["zh"]
# 现在做开头的实验。「对调上下」在像素上是交换前 32 行与后 32 行像素；在视觉 token 上，第 0 到 31 个来自上半部，第 32 到 63 个来自下半部，交换即可。对调之后，每一半内部的次序还在，所以再加一种更狠的：把 64 个视觉 token **彻底打乱**，三个种子。

# %% [markdown] tags=["en"]
# Now the experiment of the beginning. In pixels, exchanging the halves means rows 0 to 31 against rows 32 to 63. In visual tokens, 0 to 31 come from the upper half and 32 to 63 from the lower one. Within each half the order remains, hence something harsher: **shuffle** all 64 visual tokens, with three seeds.

# %%
swapped = torch.cat((pixels[:, :, 32:], pixels[:, :, :32]), dim=2)  # (24, 3, 64, 64)
changes = {
    "pixels:\nhalves exchanged": project(see(swapped, model.vision_encoder), model.projector),
    "tokens:\nhalves exchanged": torch.cat((right[:, 32:], right[:, :32]), dim=1),
}
for seed in range(3):
    order = torch.randperm(64, generator=torch.Generator().manual_seed(seed))
    changes[f"tokens:\nshuffled, seed {seed}"] = right[:, order]

# %%
topmost = ask("最上面的物体是什么？")
usual = answers(topmost, right)
counts = {}
for name, visual_tokens in changes.items():
    said = answers(topmost, visual_tokens)
    counts[name] = sum(one != other for one, other in zip(said, usual))
print("with the image as it is:", usual[:4])
print(counts)

# %%
made, axes = draw.figure(2, height=1.9)
draw.picture(axes[0], pixels[0] * 0.5 + 0.5, "as it is")
draw.picture(axes[1], swapped[0] * 0.5 + 0.5, "halves exchanged in pixels")
draw.show(made, "Another image: another object is topmost")
made, axis = draw.figure(1, height=3.0)
parts = ["vision", *["projector"] * 4]
draw.bars(axis, counts, "answers to 最上面的物体是什么？ that change", "of 24", parts)
draw.show(made, "Where a patch was is written in its vector, not in its seat")

# %% [markdown] tags=["zh"]
# 像素对调，24 个答案变了 22 个，这很自然：那是另一张图。视觉 token 对调，只变了 1 个；彻底打乱，三个种子都一个没变。
#
# 原因在第 01 课：编码器在最开头就把位置表加进了每个图块。走完 4 层之后，「我在左上角」已经写进向量本身；视觉 token 带着这个信息，坐在哪个座位上都读得出来。语言模型的旋转位置编码当然也给 64 个座位编了号，但这个模型学会了主要看内容。
#
# 这不是说次序永远无所谓。别的模型可能用到座位，训练时从没打乱过，谁也没有保证；几张图、几个子图（tile）之间的先后，也只有座位能说明。
#
# ## 六、它看了哪里？
#
# 答案里的「红色」来自哪些图块？整个模型是一个函数，所以可以求导。设图块的向量为 h（进入第一层之前，只含它自己的像素），空白图在同一处的向量为 h₀。一阶近似下，这个图块让「红色」的对数概率改变了「梯度乘以 (h − h₀)」，每个通道一项。把各项的**绝对值**加起来，就是这个图块的份额；带着符号相加，正负会互相抵消。只需一次前向，每个词一次反向：

# %% [markdown] tags=["en"]
# With exchanged pixels 22 of 24 answers change, as they should: it is another image. With exchanged visual tokens 1 changes, and with shuffled ones none.
#
# The reason is in lesson 01: at the very start, the encoder adds its position table to every patch. Four blocks later, "I am at the top left" is written in the vector itself, and it can be read from any seat. The language model's rotary positions number the 64 seats as well, but this model has learned to go by the contents.
#
# That does not mean that order never matters. Another model may use the seats: in training they were never shuffled, so nothing is promised. And which of two images, or of several tiles, came first, only the seats can say.
#
# ## 6. Where did it look?
#
# Which patches does the word 红色 (red) of the answer come from? The whole model is a function, so it can be differentiated. Let h be a patch's vector before the first block, where it holds nothing but its own pixels, and h₀ that of a blank image in the same place. To the first order the patch has changed the log-probability of 红色 by the gradient times (h − h₀), one term for each channel. Its part is the sum of the terms' **absolute values**; with their signs they would cancel each other. It takes one forward pass, and one backward pass for each word:

# %%
said = generate(model, batch, 60)[0]
with_answer = torch.cat((ids, torch.tensor([said])), dim=1)  # (1, T + A)
blank = enter(torch.zeros_like(batch.pixels), model.vision_encoder)
with torch.enable_grad():
    own = enter(batch.pixels, model.vision_encoder).requires_grad_()  # (1, 65, C_v)
    visual_tokens = project(climb(own, model.vision_encoder)[:, 1:], model.projector)
    embeddings = splice(with_answer, batch.image_positions, visual_tokens)
    rows = read(embeddings, model.language_model)[0, 67:-1].log_softmax(-1)  # (A, V)
    log_probs = [row[token] for row, token in zip(rows, said)]  # predicted one place before
parts = {}
for place, log_prob in enumerate(log_probs):
    (slope,) = torch.autograd.grad(log_prob, own, retain_graph=True)
    parts[place] = (slope * (own - blank)).abs().sum(-1)[0, 1:].detach()  # (64,)
for word in explain(model, batch, [image], said):
    ours = parts[word.tokens[0]]  # here each word is one token
    torch.testing.assert_close((ours / ours.sum()).view(8, 8), word.maps[0], rtol=1e-3, atol=1e-4)

# %%
made, axes = draw.figure(6, height=1.7)
colourful = {"红色", "圆环", "蓝色", "五角星", "橙色", "三角形"}
names = {place: model.tokenizer.decode([token]) for place, token in enumerate(said)}
named = [place for place in names if names[place] in colourful]
for axis, place in zip(axes, named):
    light = (parts[place] / parts[place].max()).view(8, 8).kron(torch.ones(8, 8))
    draw.picture(axis, 1 - (0.5 - batch.pixels[0] * 0.5) * (0.2 + 0.8 * light), names[place])
draw.show(made, "Where six words came from")


# %%
def chance(place, hidden):  # of a word, with some patches of the image blank
    kept = 1 - torch.zeros(64).index_fill(0, hidden, 1.0).view(8, 8).kron(torch.ones(8, 8))
    seen = project(see(batch.pixels * kept, model.vision_encoder), model.projector)
    logits = read(splice(with_answer, batch.image_positions, seen), model.language_model)
    return f"{logits[0, 67 + place].softmax(-1)[said[place]]:7.1%}"


random = torch.randperm(64, generator=torch.Generator().manual_seed(2))[:6]
for place in named:
    six = parts[place].topk(6).indices
    print(f"six of its own blank: {chance(place, six)}, six random ones: ", end="")
    print(chance(place, random), names[place])

# %% [markdown] tags=["zh"]
# 手写的结果与库里的 `explain` 一致。六张小图里，亮处大多在所说的物体上：「五角星」来自五角星，「橙色」来自三角形。
#
# 好看不等于对，所以最后一格来验证：把份额最大的六个图块（约十分之一）涂成空白，再读一遍同样的答案。形状的三个词全都保不住，随便涂六个却几乎没有影响。「橙色」也保不住；「红色」和「蓝色」还在，因为圆环和五角星都大，六个图块盖不住，剩下的部分颜色照样看得见。
#
# `python infer.py nanovlm/assets/scene.png "描述图片" --explain out.png` 给每个词都画一张，`python -m nanovlm.explain` 在许多图片上做同样的验证（[评测](../../docs/zh/evaluation.md)一页有数字）。
#
# ## 练习

# %% [markdown] tags=["en"]
# The parts computed by hand equal those of the package's `explain`. In the six small pictures the bright places lie mostly on the object that the word is about: 五角星 (star) comes from the star, 橙色 (orange) from the triangle.
#
# A picture that looks right need not be right, so the last cell puts it to the test: blank the six patches with the largest parts, about a tenth, and read the same answer again. None of the three shapes survives that, while six random patches hardly matter. 橙色 does not survive either. 红色 and 蓝色 do: the ring and the star are large, six patches do not cover them, and what is left still shows the colour.
#
# `python infer.py nanovlm/assets/scene.png "描述图片" --explain out.png` draws every word, and `python -m nanovlm.explain` makes the same test on many images ([evaluation](../../docs/en/evaluation.md) has the figures).
#
# ## Exercises

# %% [markdown] tags=["zh"]
# **09.1 补一行。** 从 `many.input_ids`（24 行）求出所有占位 token 的展平下标。占位 token 的 id 就是 `placeholder`。

# %% [markdown] tags=["en"]
# **09.1 Fill in a line.** From `many.input_ids` (24 rows) compute the flat indices of all placeholders, whose id is `placeholder`.

# %% tags=["exercise"]
positions = ...
check("09.1", positions, many.image_positions)

# %% [markdown] tags=["zh"]
# **09.2 改变行为。** 把 24 张图的视觉 token 各减去 24 张图的平均，只留下「与众不同」的部分，再插入。得到 `(24, T, C)` 的词嵌入，用 `splice` 完成。

# %% [markdown] tags=["en"]
# **09.2 Change a behaviour.** Subtract the mean over the 24 images from each image's visual tokens, so that only what sets it apart is left, then splice. Use `splice`; the result is `(24, T, C)`.

# %% tags=["exercise"]
apart = ...
expected = splice(many.input_ids, many.image_positions, right - right.mean(dim=0))
check("09.2", apart, expected)

# %% [markdown] tags=["zh"]
# **09.3 找错。** 这个插入函数对一行是对的，对一个批次却让每一行都看到了同一张图。改好它。

# %% [markdown] tags=["en"]
# **09.3 Find the bug.** This splice is right for one row. In a batch, every row sees the same image. Mend it.


# %% tags=["exercise"]
def splice_rows(ids, visual_tokens):
    embeddings = model.language_model.embed_tokens(ids)
    for row in range(len(ids)):
        embeddings[row, ids[row] == placeholder] = visual_tokens[0]
    return embeddings


check("09.3", splice_rows(many.input_ids, right), model.splice(many, right))

# %% [markdown] tags=["zh"]
# ## 别人在这里摔过跤
#
# [vllm-project/vllm#7153](https://github.com/vllm-project/vllm/pull/7153)：给 LLaVA 加上 SigLIP 编码器时，占位 token 的数目对不上了。原来代码里有两处算错：CLIP 的输出带 class token，应当加 1 而没有加；LLaVA 默认要去掉它，应当减 1 而没有减。两个错误一直互相抵消，直到来了一个没有 class token 的编码器才暴露。怎么发现？数数：占位 token 的个数，与将要插入的向量个数，在计算之前比较，不相等就停下。
#
# ## 到库里看看
#
# - [`nanovlm/model/vlm.py`](../../nanovlm/model/vlm.py)，`VisionLanguageModel.splice` 与 `VisionLanguageModel.forward`：本课略去了不在嵌入表里的占位 token、自动混合精度，和只让有标签的位置经过输出层。
# - [`nanovlm/inputs/batch.py`](../../nanovlm/inputs/batch.py)，`Batch`：一次前向需要的全部张量，展平下标在造批次时就算好。
# - [`nanovlm/explain/attribution.py`](../../nanovlm/explain/attribution.py)，`explain`：同样的份额，适用于任何投影层，也适用于切成子图的图片。
#
# 论文：Liu 等，2023，*Visual Instruction Tuning*（LLaVA），[arXiv:2304.08485](https://arxiv.org/abs/2304.08485)。

# %% [markdown] tags=["en"]
# ## In the wild
#
# [vllm-project/vllm#7153](https://github.com/vllm-project/vllm/pull/7153): with a SigLIP encoder added to LLaVA, the number of placeholders no longer fitted. Two calculations had been wrong: CLIP's output has a class token, for which 1 should have been added; LLaVA drops it by default, for which 1 should have been subtracted. The two mistakes had cancelled each other, until an encoder without a class token came. How would you notice? Count: the placeholders and the vectors that are to take their seats, compared before anything is computed.
#
# ## Look in the package
#
# - [`nanovlm/model/vlm.py`](../../nanovlm/model/vlm.py), `VisionLanguageModel.splice` and `VisionLanguageModel.forward`: this lesson left out placeholders that have no row in the table, autocast, and that only labelled positions pass the output head.
# - [`nanovlm/inputs/batch.py`](../../nanovlm/inputs/batch.py), `Batch`: all tensors of a forward pass, with flat indices computed where the batch is made.
# - [`nanovlm/explain/attribution.py`](../../nanovlm/explain/attribution.py), `explain`: the same parts with any projector, also of images in tiles.
#
# The paper: Liu et al. 2023, *Visual Instruction Tuning* (LLaVA), [arXiv:2304.08485](https://arxiv.org/abs/2304.08485).
