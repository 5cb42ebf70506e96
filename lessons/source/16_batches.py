# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["zh"]
# # 16 · 批次
#
# 显卡喜欢整齐的矩形，对话却有长有短，而且常常有好几个问题问的是同一张图。这一课用三种办法把它们装进 `(B, T)` 的矩形：填充（padding）、一张图片多个问题共用前缀、打包（packing）。每一种都要证明：模型算出来的，和一个一个单独算时完全一样。
#
# **进来的**：几十个长短不一的序列。**出去的**：一个批次 `(B, T)`、它的注意力掩码和每个 token 的位置。
#
# 这一课要用到第 05 课的标签和第 06 课的因果掩码。

# %% [markdown] tags=["en"]
# # 16 · Batches
#
# A GPU likes full rectangles. Conversations are long and short, and often several questions ask about one image. This lesson puts them into a rectangle `(B, T)` in three ways: padding, several questions that share one image as a prefix, and packing. Each of them has to be proven: what the model computes is what it computes for every sequence by itself.
#
# **In**: some dozens of sequences of unequal length. **Out**: one batch `(B, T)`, its attention mask, and a position for each token.
#
# It builds on the labels of lesson 05 and the causal mask of lesson 06.

# %% tags=["setup"]
import sys
from pathlib import Path
from random import Random

sys.path.insert(0, "../..")  # the repository: nanovlm and the drawing helpers

import torch
import torch.nn.functional as F
from matplotlib.colors import ListedColormap

from data_tools.scenes_text import questions
from data_tools.scenes_world import draw as draw_scene
from data_tools.scenes_world import random_scene
from lessons import draw
from lessons.check import check
from nanovlm import IMAGE, Message, load_model, preprocess

ASSETS = "../../nanovlm/assets"
torch.manual_seed(0)
draw.strip("sequence", "hidden states")

# %% [markdown] tags=["zh"]
# ## 先猜一猜
#
# 自带的模型答这些题几乎全对：在正确的前文之后，答案里约 99% 的 token 它都预测得对。现在把几个场景的样本首尾相接放进同一行，掩码用最普通的因果掩码，后面的样本于是能看到前面的图和问答。
#
# 答案 token 的正确率会变成百分之多少？先写下一个数，第六节来量。

# %% [markdown] tags=["en"]
# ## Predict
#
# The shipped model is good at these questions: after the right words before it, about 99% of the answers' tokens are predicted right. Now put samples of several scenes one after another into one row, with the plain causal mask. The later ones can see the images, questions and answers of the earlier ones.
#
# What percentage of the answers' tokens is still right? Write a number down. Section 6 measures it.

# %% [markdown] tags=["zh"]
# ## 一、长短不一的序列
#
# 12 个随机场景，每个场景有 1 到 8 个问题。先让每个问题自成一个序列：图片的 64 个占位 token、问题、答案。库里的 `TokenSequence` 装着一个序列的 id、标签、每个 token 在注意力掩码里的编号，以及它用到的图片和名字。

# %% [markdown] tags=["en"]
# ## 1. Sequences of unequal length
#
# Take 12 random scenes with 1 to 8 questions each. At first every question is a sequence by itself: 64 placeholders of the image, the question, the answer. A `TokenSequence` is the package's record of one: its ids, its labels, a number for each token in `attention_mask` (1 for now; section 3 uses others), its images, and its name in `records`.

# %%
from nanovlm.data.sequences import TokenSequence

model = load_model(f"{ASSETS}/tiny-vlm").float().eval()  # the file holds bfloat16
random, groups, pixels = Random(0), [], []
for number in range(12):
    scene = random_scene(random)
    image = draw_scene(scene)
    pixels.append(preprocess(image, model.config.image))
    groups.append([])  # the sequences of this scene
    for one in questions(scene, random)[: 1 + number * 5 % 8]:
        messages = [Message("user", [IMAGE, one.text]), Message("assistant", [one.answer])]
        sample = model.chat.encode(messages, [model.image_tokens(*image.size)])
        name = f"{number}/{one.kind}/{len(groups[-1])}"
        groups[-1].append(TokenSequence.of(sample, (Path(str(number)),), name))

# %%
with torch.no_grad():
    patches = model.vision_features(torch.stack(pixels))[:, None]  # (12, 1, P, C): once an image
sequences = [sequence for group in groups for sequence in group]
lengths = [len(sequence) for sequence in sequences]
print("patches of 12 images:", tuple(patches.shape))
print(len(sequences), "sequences, from", min(lengths), "to", max(lengths), "tokens")
print("questions of each scene:", [len(group) for group in groups])

# %% [markdown] tags=["zh"]
# ## 二、填充
#
# 最直接的办法：短的在右边填到最长，另记一张表，1 是 token，0 是填充。填充处没有标签（−100），因果掩码又不许任何 token 往后看，所以右边的填充谁也看不到，不需要额外的掩码。

# %% [markdown] tags=["en"]
# ## 2. Padding
#
# The plainest way: fill short rows up on the right, and note in a table what is a token (1) and what is padding (0). Padding has no label (−100), and under the causal mask no token looks to its right. So nobody sees the padding, and no other mask is needed.


# %%
def pad(rows, padding):
    longest = max(map(len, rows))
    return torch.tensor([list(row) + [padding] * (longest - len(row)) for row in rows])


def rectangle(rows):
    """Ids, labels and numbers of the attention mask, (B, T) each."""
    ids = pad([row.input_ids for row in rows], 0)
    labels = pad([row.labels for row in rows], -100)
    return ids, labels, pad([row.attention_mask for row in rows], 0)


def kinds(rows):
    """What is where: 0 padding, 1 visual token, 2 word, 3 labelled word."""
    ids, labels, numbers = rectangle(rows)
    is_image = ids == model.chat.image_token_id
    return (numbers > 0) * torch.where(is_image, 1, torch.where(labels == -100, 2, 3))


ids, labels, numbers = rectangle(sequences)
print("ids, labels, numbers:", tuple(ids.shape), f"— {(numbers > 0).float().mean():.0%} are tokens")

# %%
COLOURS = ListedColormap(["white", draw.PROJECTOR, draw.WORD, draw.LANGUAGE])
made, axis = draw.figure(height=3.4)
drawn = draw.heat(axis, kinds(sequences), colours=COLOURS, limits=(0, 3))
drawn.set_interpolation("nearest")
axis.set(xlabel="position: orange image, grey question, blue answer, white padding", ylabel="row")
draw.show(made, "Every question by itself: the same image is read again and again")

# %% [markdown] tags=["zh"]
# 右边的白边看得见，更大的浪费却是左边的橙色：64 个视觉 token 每行都重来一遍，而带标签的蓝色只有窄窄一条。训练只从蓝色的格子里学东西，其余的格子都是为它付的代价：4,800 个位置里，带标签的只有 346 个，约 7%。
#
# ## 三、一张图片，多个问题
#
# 同一场景的序列，开头完全相同，至少有 65 个 token：`<user>` 和 64 个占位 token。只写一遍前缀，后面接上各个问题，每个问题是一条**分支**：它看得到前缀，看不到别的分支。给每个 token 一个编号来表示：前缀是 1，分支依次是 2、3、4……
#
# 分支要从第一个标签**之前**分开：预测某个标签的，是它左边紧挨着的那个 token，所以这个 token 必须在分支里。几个问题本来就不同，这里自然成立；库里的 `share_prefix` 还会专门检查。

# %% [markdown] tags=["en"]
# White is padding, but the larger waste is orange: the 64 visual tokens come again in every row, and the labels, blue, are a narrow strip. Training learns from blue cells only; all others are what they cost. Of 4,800 positions 346 have a label, about 7%.
#
# ## 3. One image, many questions
#
# The sequences of one scene begin alike, with 65 tokens at least: `<user>` and 64 placeholders. Write the common prefix once and let the questions follow. Each is a **branch**: it sees the prefix and no other branch. A number for each token says so: 1 for the prefix, then 2, 3, 4, … for the branches.
#
# A branch has to begin **before** its first label: a label is predicted by the token right before it, so that token must belong to the branch. Our questions differ anyway, and so they do; `share_prefix` of the package makes sure of it.


# %%
def share(group):
    if len(group) == 1:
        return group[0]
    rows = [sequence.input_ids for sequence in group]
    common = 0
    while len({tuple(row[: common + 1]) for row in rows}) == 1:
        common += 1
    first = group[0]
    joined = TokenSequence(rows[0][:common], [-100] * common, [1] * common, first.images)
    for branch, sequence in enumerate(group, start=2):
        joined.input_ids += sequence.input_ids[common:]
        joined.labels += sequence.labels[common:]
        joined.attention_mask += [branch] * (len(sequence) - common)
        joined.records += sequence.records
    return joined


# %%
shared = [share(group) for group in groups]
print("from", sum(lengths), "tokens to", sum(map(len, shared)), "in", len(shared), "sequences:")
print(sorted(map(len, shared)))

# %% [markdown] tags=["zh"]
# token 少了一大半，从 3,842 个到 1,502 个；可是现在长短差得更远，从 99 到 180，填充的白边会更宽。
#
# ## 四、打包
#
# 于是把几个序列放进同一行。哪些放一起？这是装箱问题；一个够好的办法：从最长的开始，每个放进第一个还装得下的行（first-fit decreasing）。为什么先放长的？长的最难安置；短的留到最后，正好填缝。

# %% [markdown] tags=["en"]
# 61% of the tokens are gone, from 3,842 to 1,502. But lengths now differ more, from 99 to 180, and padding would take more.
#
# ## 4. Packing
#
# So put several sequences into one row. Which ones together? This is the bin-packing problem, and a good enough answer is: begin with the longest, and put each into the first row that has room for it (first-fit decreasing). The longest are the hardest to place; the short ones come last and fill the gaps.


# %%
def first_fit(sequences, length):
    rows = []
    for sequence in sorted(sequences, key=len, reverse=True):
        for row in rows:
            if sum(map(len, row)) + len(sequence) <= length:
                row.append(sequence)
                break
        else:
            rows.append([sequence])
    return rows


# %%
SEGMENT = 2**16  # sample k of a row: its numbers are raised by k · SEGMENT


def join(row):
    joined = TokenSequence([], [], [], ())
    for segment, sequence in enumerate(row):
        joined.input_ids += sequence.input_ids
        joined.labels += sequence.labels
        joined.attention_mask += [segment * SEGMENT + each for each in sequence.attention_mask]
        joined.images += sequence.images
        joined.records += sequence.records
    return joined


# %%
rows = first_fit(shared, 600)
packed = [join(row) for row in rows]
made, axes = draw.figure(1, rows=2, height=3.6)
for axis, shown, name in ((axes[0], shared, "shared, padded"), (axes[1], packed, "shared, packed")):
    drawn = draw.heat(axis, kinds(shown), f"{name}: {tuple(kinds(shown).shape)}", "", COLOURS)
    drawn.set_interpolation("nearest")
draw.show(made, "Packing fills the rectangle")

# %%
used = {"one question a row": sequences, "shared prefix": shared, "shared and packed": packed}
places = {name: kinds(shown).numel() for name, shown in used.items()}
made, axis = draw.figure(height=2.6)
draw.bars(axis, places, "", "positions, B · T", ["wrong", "projector", "right"])
draw.show(made, "The same answers to learn from, in fewer and fewer positions")

# %% [markdown] tags=["zh"]
# 三种装法要学的答案一样多，位置却从 4,800 个减到 2,160 个，再减到 1,800 个。
#
# ## 五、掩码与位置
#
# 现在一行里有好几个样本，样本里还有分支。谁能看谁？三条规则：不看后面的；不看别的样本；同一样本里，只看自己的分支和前缀。先用两重循环写在一个小例子 `small` 上。样本 0 的前缀编号是 1，两条分支是 2 和 3；样本 1 没有分支，编号是 SEGMENT + 1，除以 SEGMENT 的商说明是哪个样本，余数说明是前缀还是分支；最后一格 0 是填充。

# %% [markdown] tags=["en"]
# The three ways hold the same answers to learn from, in 4,800 positions, in 2,160, and in 1,800.
#
# ## 5. Mask and positions
#
# A row now holds several samples, and samples have branches. Who sees whom? Three rules: nobody looks to the right; nobody looks into another sample; within a sample a token sees its own branch and the prefix. First with two loops on an example, `small`. Sample 0 has 1 for its prefix and 2 and 3 for its two branches. Sample 1 has no branches, and all its numbers are SEGMENT + 1: divided by SEGMENT, the quotient says which sample it is, the remainder whether prefix or branch. The 0 at the end is padding.


# %%
def mask_of(numbers):
    """(T,) numbers → (T, T): True where the query (row) sees the key (column)."""
    mask = torch.eye(len(numbers), dtype=torch.bool)  # even padding sees itself
    for query, own in enumerate(numbers.tolist()):
        for key, other in enumerate(numbers.tolist()[:query]):
            same_sample = own // SEGMENT == other // SEGMENT
            prefix = other % SEGMENT == 1
            mask[query, key] = own > 0 and other > 0 and same_sample and (own == other or prefix)
    return mask


small = torch.tensor([1, 1, 1, 2, 2, 3, 3, *[SEGMENT + 1] * 3, 0])
mask = mask_of(small)  # (T, T)
positions = mask.sum(dim=1) - 1  # (T,): how many tokens before it a token sees
print("mask:", tuple(mask.shape), " positions:", positions.tolist())

# %%
names = ["P", "P", "P", "a", "a", "b", "b", "Q", "Q", "Q", "·"]
made, axes = draw.figure(2, height=3.4)
plain = torch.ones(11, 11).tril()
for axis, grid, title in (
    (axes[0], mask, "block-diagonal, with branches"),
    (axes[1], plain, "causal"),
):
    draw.heat(axis, grid.float(), title, ".0f", "Blues", names, names, (0, 1.4))
    axis.set_xticks(range(11), names, rotation=0)
    axis.set(xlabel="seen (key)", ylabel="looking (query)")
draw.show(made, "Prefix P, branches a and b, another sample Q, padding ·")

# %% [markdown] tags=["zh"]
# 读图时，一行是一个 token 能看到谁，一列是谁能看到它。左图沿对角线是一块一块的，所以叫块对角掩码（block-diagonal mask）；分支 b 那两行跳过了 a，就像 a 那个问题从来没有问过。右图里，后面的样本把前面的全都看在眼里。
#
# 位置也从掩码来：**一个 token 的位置，等于它能看到的之前的 token 数**。于是每条分支都从前缀之后接着数，每个样本都从 0 数起，就像它独占一行。对照打印的 0 1 2 3 4 3 4 0 1 2 0：分支 b 又从 3 数起，样本 1 又从 0 数起。填充的位置看得到自己，是为了 softmax 不出 `nan`：一整行都是 −∞ 时，0 除以 0。
#
# ## 六、与单独计算核对
#
# 库里的函数是 `share_prefix`、`first_fit_decreasing`、`join` 和 `causal_mask`。先逐一比较，再用自带的权重做最要紧的一次：打包之后每个标签的损失，和那个问题自成一批时相比。要逐个标签比，不能只比总和：有的高了、有的低了，总和也可能碰巧相等。容差 1e-4：两次求和的次序不同，`float32` 末几位会有差别。

# %% [markdown] tags=["en"]
# A row shows whom a token sees, a column who sees it. On the left there are blocks along the diagonal, hence block-diagonal mask; the rows of branch b skip a, as if a had never been asked. On the right, later samples see all that came before.
#
# Positions come from the mask, too: **a token's position is the number of earlier tokens it sees**. So each branch goes on counting after the prefix, and each sample starts at 0, as if it had the row to itself: in the line printed, 0 1 2 3 4 3 4 0 1 2 0, branch b goes on from 3 again, and sample 1 from 0. Padding sees itself so that the softmax gives no `nan`: for a row of nothing but −∞ it would divide 0 by 0.
#
# ## 6. Proven equal to one at a time
#
# The package's functions are `share_prefix`, `first_fit_decreasing`, `join` and `causal_mask`. Compare them one by one, and then, with the shipped weights, what matters most: the loss of every label in the packed batch against the same question in a batch by itself. Label by label, that is, since sums may be equal by accident, some losses higher and others lower. The tolerance is 1e-4, because sums are taken in another order.

# %%
from nanovlm.data import packing, sequences as package
from nanovlm.data.collate import collate
from nanovlm.model.attention import AttentionInputs, additive_mask, causal_mask
from nanovlm.model.rotary import rotary_embedding, rotary_frequencies

placeholder = model.chat.image_token_id
for group, mine in zip(groups, shared):
    theirs = package.share_prefix(group, placeholder)[0]
    assert theirs.input_ids == mine.input_ids and theirs.attention_mask == mine.attention_mask
their_rows = packing.first_fit_decreasing(shared, 600)
assert [packing.join(row) for row in their_rows] == packed

# %%
features = [patches[int(str(path))] for row in packed for path in row.images]
batch = collate(packed, placeholder, patches=features)
masks = torch.stack([mask_of(row) for row in batch.attention_mask])  # (B, T, T)
assert torch.equal(masks, causal_mask(batch.attention_mask, masks.shape[1]))
print("sequences, rows and masks", tuple(masks.shape), "equal the package's")

# %%
language_model, config = model.language_model, model.config.language_model


@torch.no_grad()
def losses(batch, masks, position_ids):
    """The loss of each label (M,), and whether the likeliest token is the right one (M,)."""
    hidden_states = model.embed(batch)  # (B, T, C)
    frequencies = rotary_frequencies(config.head_dim, config.rope_theta)
    rotary = rotary_embedding(position_ids, frequencies)
    inputs = AttentionInputs(additive_mask(masks[:, None], torch.float32), rotary=rotary)
    for block in language_model.blocks:
        hidden_states = block(hidden_states, inputs)
    chosen = language_model.norm(hidden_states).flatten(0, 1)[batch.target_positions]
    logits = language_model.logits(chosen)  # (M, V)
    right = logits.argmax(dim=1) == batch.targets
    return F.cross_entropy(logits, batch.targets, reduction="none"), right


# %%
alone = {}
for sequence in sequences:  # one at a time, by the package alone
    number = int(str(sequence.images[0]))
    single = collate([sequence], placeholder, patches=[patches[number]])
    with torch.no_grad():
        hidden_states, head, targets = model(single, lambda *inputs: inputs)
        loss = F.cross_entropy(hidden_states @ head.T, targets, reduction="none")
    alone[sequence.records[0]] = loss
expected = torch.cat([alone[name] for row in packed for name in row.records])
position_ids = masks.sum(dim=-1) - 1
mine, right = losses(batch, masks, position_ids)
torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)
with torch.no_grad():
    torch.testing.assert_close(model(batch), expected.sum(), rtol=1e-4, atol=1e-3)
print(tuple(mine.shape), f"losses equal, largest difference {(mine - expected).abs().max():.1e}")

# %% [markdown] tags=["zh"]
# 填充、分支、打包都没有改变任何一个标签的损失，也就不会改变梯度。只有一样变了：各行的标签数不再相同。所以损失要先求和，最后除以整批的标签总数；若按行取平均，短答案就会占便宜（第 13 课）。
#
# **故意弄坏。** 掩码或位置，两样都可能忘。四种组合都试一遍：

# %% [markdown] tags=["en"]
# Padding, branches and packing changed the loss of no label, and so will not change the gradient. One thing did change: rows hold different numbers of labels. So losses are summed and then divided by the number of labels of the whole batch; a mean for each row would favour short answers (lesson 13).
#
# **Broken on purpose.** One can forget the mask, the positions, or both. All four combinations:

# %%
causal = torch.ones_like(masks[0]).tril().expand_as(masks)  # (B, T, T)
running = torch.arange(masks.shape[1]).expand(len(masks), -1)  # (B, T): 0, 1, 2, … all along
cases = {
    "mask and\npositions": (masks, position_ids),
    "mask only": (masks, running),
    "positions\nonly": (causal, position_ids),
    "neither": (causal, running),
}
results = {name: losses(batch, *case) for name, case in cases.items()}
for name, (loss, good) in results.items():
    print(
        f"{name.replace(chr(10), ' '):19} loss {loss.mean():.3f}, right {good.float().mean():.1%}"
    )

# %%
places = torch.cat(
    [
        torch.full((len(alone[name]),), place)
        for row in rows for place, sequence in enumerate(row) for name in sequence.records
    ]
)  # fmt: skip
by_place = {}
for name, (_, good) in results.items():
    found = [good[places == place].float().mean() * 100 for place in range(places.max() + 1)]
    by_place[name.replace("\n", " ")] = found

# %%
made, axes = draw.figure(2, height=3.2)
parts = ["right", "projector", "wrong", "word"]
share_right = {name: good.float().mean() * 100 for name, (_, good) in results.items()}
draw.bars(axes[0], share_right, "all labels", "% right", parts, ".1f")
draw.curves(axes[1], by_place, "by place in the row", "samples before it", "% right", parts=parts)
axes[1].set_ylim(0, 104)
axes[1].legend(frameon=False, loc="lower left")
axes[0].tick_params(axis="x", labelsize=8)
draw.show(made, "What leaks from one sample into the next")

# %% [markdown] tags=["zh"]
# 这就是开头的答案：最右边的柱子，掩码和位置都忘了，正确率从 99.7% 掉到 91.3%。右图说明掉在哪里：行首的样本前面没有别人，安然无恙，还是 100%；越靠后，前面的图和问答越多，错得越多，前面有四个样本时只剩 75%。形状没有错，没有任何警告。
#
# 没想到的是第三根柱子。**只把位置归零、不改掩码，比什么都不做更糟**（77.7% 对 91.3%）；换几组随机场景，次序也是这样（在第一节写上 `Random(1)`、`Random(2)` 或 `Random(3)` 就能看到）。一个可能的解释：位置一路数下去时，自己的图至少是离自己最近的一张；位置归零以后，几张图的位置完全重合，模型靠位置再也分不清哪一张是自己的。右图的红线在行首就不到 100%，也说得通：行首的样本前面没有别人，可它自己的几条分支位置也重合了，后面的又看得见前面的。
#
# 反过来，只有掩码、位置一路数，几乎没有影响。旋转位置编码只看位置之**差**（第 07 课），前缀内部和每条分支内部的差没有变；变了的只是后面的分支与前缀的距离，所以损失略有不同，是 0.009 而不是 0.007。结论：先有掩码，再谈位置。
#
# 如果是在训练中漏呢？损失照样会下降，因为模型可以慢慢适应一行里有许多张图。可是推理时一行只有一个样本，这番适应就用错了地方。
#
# 还有一笔账：掩码是 `(T, T)` 的，行越长，其中不许看的格子越多，算了也白算：

# %% [markdown] tags=["en"]
# That is the answer: the bar on the right, with mask and positions both forgotten, is at 91.3% instead of 99.7%. The right picture says where. The first sample of a row has nobody before it and is unharmed at 100%. The later a sample comes, the more images and answers lie before it, and the more goes wrong: 75% with four before it. No shape is wrong, and nothing warns.
#
# The third bar was a surprise. **Resetting the positions without the mask is worse than doing nothing**, 77.7% against 91.3%. Other sets of scenes give the same order; put `Random(1)`, `Random(2)` or `Random(3)` into section 1 to see it. A possible reason: while positions are counted on, a sample's own image is at least the nearest one. Reset, the images of a row lie at the same positions, and positions no longer tell which of them is one's own. That would also explain why the red line is below 100% at place 0 already. The first sample of a row has no other before it, but its own branches lie at the same positions now, and each sees those before it.
#
# The other way round, the mask alone, with positions counted on, costs almost nothing. Rotary positions look at **differences** only (lesson 07), and within the prefix and within a branch they stay the same. What changed is how far a later branch is from its prefix, so the loss is 0.009 instead of 0.007. The mask comes first, then the positions.
#
# And a leak in training? The loss would fall all the same, since the model can get used to many images in a row. At inference a row holds one sample, and what it got used to is out of place.
#
# One more cost: the mask is `(T, T)`, and the longer a row, the more of it is forbidden, and computed for nothing:

# %%
single = [mask_of(torch.tensor(sequence.attention_mask)) for sequence in sequences]
pairs = sum(mask.sum().item() for mask in single)
print(f"one question a row: {pairs:,} pairs of tokens that attend")
print(f"packed: {masks.sum().item():,} attend, of {masks.numel():,} in the mask ", end="")
print(f"({masks.sum() / masks.numel():.0%})")

# %% [markdown] tags=["zh"]
# 打包以后，掩码里只有 7% 的格子真正有用。对小模型和几百个 token 的行，矩阵乘法占大头，打包合算；行到几千个 token，就要用能跳过整块的注意力内核。
#
# ## 练习

# %% [markdown] tags=["en"]
# After packing, 7% of the mask's cells are of use. With a small model and rows of some hundreds of tokens the matrix products cost most, and packing pays. Rows of thousands need attention kernels that skip whole blocks.
#
# ## Exercises

# %% [markdown] tags=["zh"]
# **16.1 补一行。** 把 `lengths` 里的序列填充成一个批次，其中真正是 token 的占多少？写成 `lengths` 的式子。

# %% [markdown] tags=["en"]
# **16.1 Fill in a line.** When the sequences of `lengths` are padded into one batch, what share of it is tokens? Write an expression of `lengths`.

# %% tags=["exercise"]
filled = ...
check("16.1", filled, (numbers > 0).double().mean().item())

# %% [markdown] tags=["zh"]
# **16.2 改一个行为。** 不打包也能少填充：先按长度排序，再每 4 个一批。算出 `shared` 这样分批时，三个批次的位置总数（B·T 之和）。

# %% [markdown] tags=["en"]
# **16.2 Change a behaviour.** Less padding without packing: sort by length, then take 4 at a time. For `shared`, compute the positions of the three batches together, the sum of their B · T.

# %% tags=["exercise"]
ordered = sorted(map(len, shared))
sorted_places = ...
check("16.2", sorted_places, 1644)

# %% [markdown] tags=["zh"]
# **16.3 找错。** 这个不用循环的掩码在小例子上有两处与 `mask_of` 不同：分支看不到前缀，填充的位置也看不到自己。改好它。

# %% [markdown] tags=["en"]
# **16.3 Find the bug.** This mask without loops differs from `mask_of` in two ways: branches do not see the prefix, and padding does not see itself. Mend it.


# %% tags=["exercise"]
def fast_mask(numbers):
    query, key = numbers[:, None], numbers[None, :]
    earlier = torch.ones(len(numbers), len(numbers), dtype=torch.bool).tril()
    return earlier & (query > 0) & (query == key)


check("16.3", fast_mask(small).int(), mask_of(small).int())

# %% [markdown] tags=["zh"]
# ## 别人在这里摔过跤
#
# [huggingface/nanoVLM#201](https://github.com/huggingface/nanoVLM/issues/201)：有人读代码时发现，打包的序列从头到尾一路数位置，第二个样本的第一个 token 拿到的是 101 而不是 0。[#204](https://github.com/huggingface/nanoVLM/pull/204) 在复现时发现事情不止于此：只把位置归零并不够，样本 B 仍然能看到样本 A，必须连掩码一起改。怎么发现？就像第六节：改动或去掉前一个样本，后一个样本的输出必须一个数也不变。
#
# ## 到库里看看
#
# - [`nanovlm/data/sequences.py`](../../nanovlm/data/sequences.py)，`TokenSequence`、`share_prefix` 与 `share_prefixes`：图片不在前缀里的、太长的，怎么处理。
# - [`nanovlm/data/packing.py`](../../nanovlm/data/packing.py)，`first_fit_decreasing`、`join`、`cut_by_length` 与 `deal`：还要把行分给批次和多个进程，各得差不多的活。
# - [`nanovlm/data/collate.py`](../../nanovlm/data/collate.py)，`collate` 与 `prepare`：从序列到 `Batch`；生成时填充在左边。
# - [`nanovlm/model/attention.py`](../../nanovlm/model/attention.py)，`causal_mask` 与 `additive_mask`：同一张掩码，没有循环，也用于带缓存的解码。
#
# 论文：Krell 等，2021，*Efficient Sequence Packing without Cross-contamination*，[arXiv:2107.02027](https://arxiv.org/abs/2107.02027)。

# %% [markdown] tags=["en"]
# ## In the wild
#
# [huggingface/nanoVLM#201](https://github.com/huggingface/nanoVLM/issues/201): reading the code, someone notices that positions are counted on through a packed row, so that the second sample's first token gets position 101 instead of 0. While reproducing it, [#204](https://github.com/huggingface/nanoVLM/pull/204) found more: resetting positions is not enough, because sample B can still attend to sample A, and the mask has to change as well. How would you notice? As in section 6: change or remove the sample before, and no output of the one after it may move.
#
# ## Look in the package
#
# - [`nanovlm/data/sequences.py`](../../nanovlm/data/sequences.py), `TokenSequence`, `share_prefix` and `share_prefixes`: what happens where an image is not in the prefix, or a sequence would get too long.
# - [`nanovlm/data/packing.py`](../../nanovlm/data/packing.py), `first_fit_decreasing`, `join`, `cut_by_length` and `deal`: rows also have to be divided among batches and processes, with about equal work.
# - [`nanovlm/data/collate.py`](../../nanovlm/data/collate.py), `collate` and `prepare`: from sequences to a `Batch`; for generation the padding is on the left.
# - [`nanovlm/model/attention.py`](../../nanovlm/model/attention.py), `causal_mask` and `additive_mask`: the same mask without loops, also for decoding with a cache.
#
# The paper: Krell et al. 2021, *Efficient Sequence Packing without Cross-contamination*, [arXiv:2107.02027](https://arxiv.org/abs/2107.02027).
