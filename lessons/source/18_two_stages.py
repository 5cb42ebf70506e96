# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["zh"]
# # 18 · 为什么分两个阶段
#
# 几乎每个视觉语言模型的训练都分两个阶段：第 1 阶段只训练投影层，第 2 阶段连语言模型一起训练。这一课亲手写出两个阶段，再用实验问一句：非分不可吗？
#
# **进来的**：一个预训练的视觉编码器，一个预训练的语言模型，中间一个随机的投影层，`(192, 192)` 的矩阵两个。**出去的**：会看图回答的模型，以及四种训练方法的对照。

# %% [markdown] tags=["en"]
# # 18 · Why two stages
#
# Almost every vision-language model is trained in two stages: stage 1 trains the projector alone, stage 2 the language model as well. This lesson writes both by hand and then asks by experiment: does it have to be two?
#
# **In**: a pretrained vision encoder, a pretrained language model, and a random projector between them, two matrices of `(192, 192)`. **Out**: a model that answers about images, and a comparison of four ways to train it.

# %% tags=["setup"]
import sys

sys.path.insert(0, "../..")  # the repository: nanovlm and the drawing helpers

import copy
import json
from random import Random

import torch

from data_tools.scenes_text import questions
from data_tools.scenes_world import draw as draw_scene
from data_tools.scenes_world import random_scene
from lessons import draw
from lessons.check import check
from nanovlm import IMAGE, LanguageModel, Message, ProjectorConfig, load_model, prepare
from nanovlm.hub.models import join_parts
from nanovlm.training.freezing import freeze
from nanovlm.training.optim.optimizer import build_optimizer, set_learning_rates
from nanovlm.training.presets import load_settings

ASSETS = "../../nanovlm/assets"
draw.strip("visual tokens", "hidden states", "logits")

# %% [markdown] tags=["zh"]
# ## 先猜一猜
#
# 一共 300 个优化步，每步 64 道题，四种用法：
#
# 1. **两个阶段**：80 步只训练投影层，220 步训练投影层和语言模型。
# 2. **只有第 1 阶段**：300 步都只训练投影层，语言模型一直冻结。
# 3. **一个阶段**：300 步都一起训练。
# 4. **随机的语言模型**：也分两个阶段，但语言模型从随机权重开始。
#
# 训练之后各考 192 道题。给四种方法排个名次，再写下第 2 种能答对百分之几。

# %% [markdown] tags=["en"]
# ## Predict
#
# There are 300 optimizer steps of 64 questions. Four ways to spend them:
#
# 1. **Two stages**: 80 steps for the projector alone, 220 for projector and language model.
# 2. **Stage 1 only**: 300 steps for the projector alone; the language model stays frozen.
# 3. **One stage**: 300 steps for both together.
# 4. **A random language model**: two stages again, but its weights start at random.
#
# Afterwards each sits an exam of 192 questions. Rank the four, and write down what share the second will get right.

# %% [markdown] tags=["zh"]
# ## 一、三个部分，谁在训练
#
# 把两个预训练的部分接起来，中间放一个新的投影层（第 08 课）。先数一数各有多少参数。

# %% [markdown] tags=["en"]
# ## 1. Three parts, and which of them is trained
#
# Join the two pretrained parts with a new projector (lesson 08), and count the parameters of each.

# %%
shipped = load_model(f"{ASSETS}/tiny-vlm").float()  # for its image settings, and section 5
PARTS = ("vision_encoder", "projector", "language_model")


def fresh(random_language_model=False):
    torch.manual_seed(0)
    folders = f"{ASSETS}/tiny-vision-encoder", f"{ASSETS}/tiny-language-model"
    image = shipped.config.image
    model = join_parts(*folders, ProjectorConfig("mlp"), image, vision_norm=False).float()
    if random_language_model:
        model.language_model = LanguageModel(model.language_model.config)
    return model


model = fresh()
sizes = {part: sum(p.numel() for p in model.get_submodule(part).parameters()) for part in PARTS}
for part, size in sizes.items():
    print(f"{part:15} {size:>9,} parameters")

# %% [markdown] tags=["zh"]
# 冻结（frozen）就是不求梯度。`requires_grad` 是**参数**的属性，所以要对每个参数设置：

# %% [markdown] tags=["en"]
# A frozen part gets no gradients. `requires_grad` belongs to each **parameter**, so it is set on each:

# %%
STAGE_1, STAGE_2 = ("projector",), ("projector", "language_model")
RATES = {"projector": 2e-3, "language_model": 1e-3}  # learning rates


def train_only(model, parts):
    for part in PARTS:
        for parameter in model.get_submodule(part).parameters():
            parameter.requires_grad = part in parts


# %%
made, axes = draw.figure(rows=2, height=2.5, sharex=True)
colours = dict(zip(PARTS, ("vision", "projector", "language")))
for axis, (name, parts) in zip(axes, (("stage 1", STAGE_1), ("stage 2", STAGE_2))):
    train_only(model, parts)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for place, part in enumerate(PARTS):
        pale, strong = draw.PALE[colours[part]], draw.STRONG[colours[part]]
        axis.barh(place, sizes[part] / 1e6, color=strong if part in parts else pale, ec=strong)
    axis.set_yticks(range(3), PARTS)
    axis.set_title(f"{name}: {trained:,} parameters are trained (dark)", fontsize=10)
axes[1].set_xlabel("million parameters")
draw.show(made, "Stage 1 trains the smallest part")

# %% [markdown] tags=["zh"]
# 第 1 阶段训练的参数不到全部的 3%。只有这些参数要存梯度和动量，所以它省内存。换成真正的大模型来算账，每个可训练参数按 16 字节（第 15 课）：70 亿参数的语言模型全部训练，要 112 GB；LLaVA-1.5 的投影层约 2,100 万参数，只要 0.34 GB。
#
# ## 二、手写训练
#
# 数据：每步 8 道题，关于 4 个新场景。视觉编码器一直冻结，每张图的图块向量算一次就够了。

# %% [markdown] tags=["en"]
# Stage 1 trains less than 3% of the parameters. Gradients and moments are kept for these alone, which makes the stage small. To count for a large model, at 16 bytes a trainable parameter (lesson 15): all of a language model of 7 billion takes 112 GB, the projector of LLaVA-1.5 with its 21 million 0.34 GB.
#
# ## 2. Training by hand
#
# The data: 8 questions a step, about 4 new scenes. The vision encoder stays frozen throughout, so the patch vectors of an image are computed once.


# %%
@torch.no_grad()
def draw_batch(scenes, random):
    conversations, images = [], []
    for _ in range(scenes):
        scene = random_scene(random)
        for asked in questions(scene, random)[1:3]:  # the first is the long description
            turn = Message("user", [IMAGE, asked.text]), Message("assistant", [asked.answer])
            conversations.append(turn)
            images.append([draw_scene(scene)])
    batch = prepare(model, conversations, images)
    batch.patches, batch.pixels = model.vision_features(batch.pixels), None
    return batch


# %%
random = Random(0)
batches = [draw_batch(4, random) for _ in range(60)]
held_out = draw_batch(32, random)
print("ids:", tuple(batches[0].input_ids.shape), " patches:", tuple(batches[0].patches.shape))
print("labelled tokens in a step:", len(batches[0].targets))

# %% [markdown] tags=["zh"]
# 训练循环是第 14 课的缩写：前向、反向、裁剪、走一步。在这里，两个阶段只差一个 `parts`；预设在第 2 阶段还把投影层的学习率调低了（第五节）。

# %% [markdown] tags=["en"]
# The loop is lesson 14's in short: forward, backward, clip, step. Here the two stages differ in `parts` alone; in stage 2 the preset also lowers the projector's learning rate (section 5).


# %%
def train(model, parts, batches):
    train_only(model, parts)
    groups = [
        {"params": list(model.get_submodule(part).parameters()), "lr": RATES[part]}
        for part in parts
    ]
    optimizer, losses = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0), []
    for batch in batches:
        loss = model(batch) / len(batch.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# %%
@torch.no_grad()
def loss_of(model, batch):
    return model(batch).item() / len(batch.targets)


# %% [markdown] tags=["zh"]
# 训练之前，随机的投影层给了语言模型什么？把它的视觉 token 全部换成零，比较损失；再看一次反向传播给两个部分的梯度有多大。

# %% [markdown] tags=["en"]
# Before any training, what does the language model get from a random projector? Replace all its visual tokens by zeros and compare the losses; then see how large a gradient one backward pass gives to each part.

# %%
silent = copy.deepcopy(model)
with torch.no_grad():
    for parameter in silent.projector.parameters():
        parameter.zero_()
print(f"random projector {loss_of(model, held_out):.3f}, zeros {loss_of(silent, held_out):.3f}")
train_only(model, STAGE_2)
(model(batches[0]) / len(batches[0].targets)).backward()
for part in STAGE_2:
    squares = [p.grad.square().sum() for p in model.get_submodule(part).parameters()]
    print(f"gradient norm of {part:15} {torch.stack(squares).sum().sqrt():.2f}")
model.zero_grad()

# %% [markdown] tags=["zh"]
# 两个损失差不多：随机投影的视觉 token 和没有一样，语言模型只能凭问题猜。可是语言模型的梯度不是零。如果一开始就让它训练，它会为这些还毫无意义的输入改动自己的权重。分两个阶段的理由通常就是这一条：**先训练投影层，等视觉 token 有了意义，再训练语言模型。** 听上去有道理，对不对要看第六节。

# %% [markdown] tags=["en"]
# The two losses are about equal: visual tokens of a random projector are worth as much as none, and the language model guesses from the question. Yet its gradient is not zero. Trained from the first step, it changes its weights for inputs that mean nothing yet. That is the usual reason for two stages: **first train the projector until its visual tokens mean something, and only then the language model.** It sounds right. Section 6 tells whether it is.

# %% [markdown] tags=["zh"]
# ## 三、故意弄坏：语言模型什么都不懂
#
# 第 1 阶段要让投影层学会写出语言模型看得懂的视觉 token。那么语言模型自己得先懂点什么。跑 60 步：一次用预训练的语言模型，一次把它换成随机权重，其余不变。

# %% [markdown] tags=["en"]
# ## 3. Broken on purpose: a language model that knows nothing
#
# In stage 1 the projector learns to write visual tokens that the language model understands. For that, the language model must understand something to begin with. Here are sixty steps, once with the pretrained language model and once with random weights in its place; nothing else changes.

# %%
pretrained, random_one = fresh(), fresh(random_language_model=True)
before = loss_of(pretrained, held_out)
losses = {
    "pretrained language model": train(pretrained, STAGE_1, batches),
    "random language model": train(random_one, STAGE_1, batches),
}
made, axes = draw.figure(height=2.8)
draw.curves(axes, losses, "", "step", "loss per token", parts=["language", "wrong"])
guess = torch.tensor(float(model.config.language_model.vocab_size)).log().item()
axes.axhline(guess, color=draw.FAINT, lw=0.8, ls=":")
axes.text(60, guess, "ln V", va="bottom", ha="right", color=draw.FAINT)
axes.set_ylim(bottom=0)
draw.show(made, "Sixty steps of stage 1: the projector cannot teach a language")

# %% [markdown] tags=["zh"]
# 下面那条从很低的地方开始，因为语言模型本来就知道回答是什么样子。上面那条从 ln V（随便猜一个 token 的损失，第 11 课）开始，走了 60 步，还在 5 上下：投影层只能改变输入，教不会语言模型写句子。
#
# 下面那条降下来了吗？每步只有 8 道题，起伏太大，看不清，所以换留出的 64 道题来量。如果降了，是因为它在看图吗？把这些题的图互相调换，再算一次损失：

# %% [markdown] tags=["en"]
# The lower curve starts low, because the language model knows what an answer looks like. The upper one starts at ln V, the loss of guessing any token (lesson 11), and sixty steps later is still at about 5: a projector can change what goes in, but it cannot teach a language model to write.
#
# Does the lower one come down? With 8 questions a step it is hard to see, so take 64 held-out questions. And if it does, is that because the model looks at the image? Give the questions each other's images and compute the loss again:

# %%
shuffled = copy.copy(held_out)
shuffled.patches = held_out.patches.roll(2, dims=0)  # two questions a scene: another scene's
print(f"held out, before training   {before:.3f}")
print(f"after 60 steps, own image   {loss_of(pretrained, held_out):.3f}")
print(f"after 60 steps, another's   {loss_of(pretrained, shuffled):.3f}")

# %% [markdown] tags=["zh"]
# 第三个数比第一个低的那一段，是配上别人的图也能得到的：模型学到的是「这类问题一般怎么答」。第三个数与第二个数之差才来自图片。比一比哪一段长：前一段是 0.6，后一段还不到 0.2。**损失下降不等于看见**，第 00 课的对照在训练途中同样有用；第六节会看到，80 步之后模型答题，比置空高不了几个百分点。
#
# ## 四、另一种坏法：没有冻结
#
# 还有一个 PyTorch 的陷阱。下面的第二行想冻结语言模型，**不报错，也不起作用**：

# %% [markdown] tags=["en"]
# The fall from the first number to the third needs no image, or not the right one: there the model learned how such questions are usually answered. Only the fall from the third to the second comes from the image. The one is 0.6, the other less than 0.2. **A falling loss is not seeing**, and the controls of lesson 00 are as useful during training; section 6 will show that after 80 steps the score is only a few points above the blind one.
#
# ## 4. Another way to break it: not frozen
#
# PyTorch has a trap here. The second line below is meant to freeze the language model. **It raises no error and does nothing**:

# %%
model.requires_grad_(True)
model.language_model.requires_grad = False  # an attribute of the module, which nobody reads
print(
    "still trainable:", sum(p.numel() for p in model.language_model.parameters() if p.requires_grad)
)
model.language_model.requires_grad_(False)  # the method, with an underscore: all its parameters
print(
    "and now:        ", sum(p.numel() for p in model.language_model.parameters() if p.requires_grad)
)
del model.language_model.requires_grad

# %% [markdown] tags=["zh"]
# 给属性赋值，而不是调用方法 `requires_grad_`，「第 1 阶段」就成了全部一起训练。怎么发现？训练前数一数可训练的参数，nanovlm 开始训练时会打印这张表。
#
# ## 五、与库代码核对
#
# 库里是 `freeze` 和 `build_optimizer`，预设 `tiny` 给出每个阶段训练什么、学习率多少。先核对两个阶段可训练的参数是否相同，再用自带的权重各走一步第 2 阶段，比较更新之后的权重。容差是 1e-6 再加上权重大小的 1e-5：库里用的是融合的 AdamW，运算次序不同。

# %% [markdown] tags=["en"]
# Set the attribute instead of calling the method, and "stage 1" trains everything. How would you notice? Count the trainable parameters before training; nanovlm prints that table when a run begins.
#
# ## 5. Proven equal
#
# In the package these are `freeze` and `build_optimizer`, and the preset `tiny` says what each stage trains, and at which rates. First compare which parameters are trainable in both stages, then take one step of stage 2 from the shipped weights on either side and compare the weights after it. The tolerance is 1e-6 plus 1e-5 of a weight's size, because the package uses a fused AdamW, which computes in another order.

# %%
for stage, parts in (("stage1", STAGE_1), ("stage2", STAGE_2)):
    settings = load_settings(stage, [])
    train_only(model, parts)
    mine = [name for name, p in model.named_parameters() if p.requires_grad]
    freeze(model, settings)
    assert mine == [name for name, p in model.named_parameters() if p.requires_grad]
    print(stage, "trains", settings.train, "at", {p: settings.peak_lr(p) for p in parts})

# %%
mine, theirs = copy.deepcopy(shipped), copy.deepcopy(shipped)
train_only(mine, STAGE_2)
groups = []
for part in STAGE_2:  # matrices decay, vectors do not
    for wanted, decay in ((True, settings.weight_decay), (False, 0.0)):
        chosen = [p for p in mine.get_submodule(part).parameters() if (p.dim() >= 2) == wanted]
        groups.append({"params": chosen, "lr": settings.peak_lr(part), "weight_decay": decay})

# %%
by_hand = torch.optim.AdamW(groups, betas=(0.9, settings.beta2))
freeze(theirs, settings)
packaged = build_optimizer(theirs, settings)
set_learning_rates(packaged, 1.0)  # the top of the schedule
for network, optimizer in ((mine, by_hand), (theirs, packaged)):
    (network(batches[0]) / len(batches[0].targets)).backward()
    optimizer.step()
for one, other in zip(mine.parameters(), theirs.parameters()):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
print("the same weights after a step of stage 2, all", len(list(mine.parameters())), "tensors")

# %% [markdown] tags=["zh"]
# ## 六、四种训练法（录制）
#
# 现在回答开头的问题。下面的结果是**录制**的：四种方法各训练 300 步，各用两个种子。步数比预设少（预设是 335 + 1,339 步），其余设置相同；「一个阶段」给投影层第 1 阶段的学习率，给语言模型第 2 阶段的学习率。

# %% [markdown] tags=["en"]
# ## 6. Four ways to train (recorded)
#
# Now for the question at the top. What follows is **recorded**: 300 steps for each of the four ways, with two seeds each. That is fewer steps than the preset takes (335 + 1,339); the other settings are the preset's. "One stage" gives the projector stage 1's learning rate and the language model stage 2's.

# %%
recorded = json.load(open("../recorded/18.json", encoding="utf-8"))
print("recorded with:", recorded["command"], "|", recorded["machine"])
arms = recorded["results"]["arms"]
STYLES = dict(zip(arms, (draw.LANGUAGE, draw.PROJECTOR, draw.VISION, draw.WRONG)))
made, axes = draw.figure(height=3.2)
for (name, runs), marker in zip(arms.items(), "os^x"):
    for run in runs:
        steps, values = zip(*run["val_loss"])
        label = name if run is runs[0] else None
        axes.plot(steps, values, marker=marker, ms=4, lw=1.2, color=STYLES[name], label=label)
axes.axvline(recorded["results"]["steps"][0], color=draw.FAINT, lw=0.8, ls=":")
axes.set(yscale="log", xlabel="step (dotted: the language model joins in)", ylabel="val loss")
axes.legend(frameon=False, fontsize=9)
draw.show(made, "Validation loss, two seeds each (recorded)")

# %%
made, axes = draw.figure(2, height=3.2, sharey=True)
names = [name.replace(" ", "\n", 1) for name in arms]
for axis, key, title in zip(axes, ("exact", "blind"), ("with the image", "blind")):
    means = {n: 100 * sum(r[key] for r in runs) / 2 for n, runs in zip(names, arms.values())}
    draw.bars(axis, means, title, "exact match, %", ["language", "projector", "vision", "wrong"])
    for place, runs in enumerate(arms.values()):
        axis.plot([place] * 2, [100 * run[key] for run in runs], "k_", ms=14)
    axis.tick_params(axis="x", labelsize=8)
draw.show(made, "After 300 steps: mean, and each seed as a line (recorded)")
for name, runs in arms.items():
    if "random" not in name:
        moved = [f"{100 * run['language_model_moved']:.1f}%" for run in runs]
        print(f"{name:15} language model's weights moved by", *moved)
middle = [f"{100 * run['after_stage_1']:.0f}%" for run in arms["two stages"]]
print("two stages, exact match between them:", *middle)

# %% [markdown] tags=["zh"]
# 先看最明显的：**语言模型懂不懂，差别最大。** 语言模型从随机权重开始，同样的 300 步只答对 32%，置空也有 21%。这正是第三节那条红线的结局：第 1 阶段的 80 步里投影层几乎无能为力，第 2 阶段语言模型又得从头学语言。
#
# 其余三种都在 92% 到 97% 之间，开头问的第 2 种（只有第 1 阶段）平均约 96%。「一个阶段」和「只有第 1 阶段」在两个种子里各赢一次；「两个阶段」两次都排第三，差 2 到 5 个百分点。可是 192 道题，每个成绩都有上下 3 个百分点左右的误差（第 17 课），种子也只有两个。所以**三者谁更好，这里分不清；但「两个阶段」没有赢**，与我们原来想的不同。在这个玩具世界里，一开始就一起训练没有坏处，只训练投影层也几乎够了。若看上面的验证损失，「一个阶段」在两个种子里都最低，但那也只是两个种子。
#
# 为什么？自带的语言模型在预训练时读的是场景的「便签」：一个物体一张，写着大小、颜色、形状和位置；便签后面问的正是这些问题，所以只要视觉 token 像它认得的便签，它就会答。真正的语言模型没见过这样的题，只训练投影层就不够。两个阶段中间那次考试（最后一行）也说明 80 步太短：学习率已经降到 0，投影层还没学会，那时只答对 28% 和 30%，而置空（300 步之后测的）平均是 25%。
#
# 那么为什么大家还分两个阶段？实验支持的理由有两条。其一是**便宜**：第 1 阶段只训练 74,112 个参数，可以用许多只有一句描述的图片，先让投影层学个大概。其二是**少动语言模型**：两个阶段里，它的权重移动得比一个阶段少一些（看打印的百分数），只训练投影层则完全不动。移动得少，原有的本领多半也丢得少，不过这里没有量。至于「不分就学坏」，这里没有看到；Prismatic 的作者在大模型上比较过，结论也是可以省去第 1 阶段。
#
# ## 练习
#
# 每格最后一行的 `check` 会告诉你差多少。

# %% [markdown] tags=["en"]
# The plainest first: **what matters most is whether the language model knows anything.** Started from random weights, it gets 32% of the questions right in the same 300 steps, against 21% blind. This is where the red line of section 3 leads: in the 80 steps of stage 1 the projector can do next to nothing, and in stage 2 the language model has to learn the language from the beginning.
#
# The other three lie between 92% and 97%. "One stage" and "stage 1 only" win one seed each; two stages come third in both, 2 to 5 points behind the other two. With 192 questions each of these scores may be off by about 3 points either way (lesson 17), and there are only two seeds. So **which of the three is best cannot be told here, but two stages did not win**, and we had expected them to. In this toy world training both from the first step does no harm, and the projector alone, the second way, is almost enough: 96% on average. By the validation loss above, one stage is the lowest in both seeds, but those are two seeds, too.
#
# Why? The language model that ships was pretrained on notes about scenes, one for each object, with its size, colour, shape and place. These very questions followed the notes, so it can answer as soon as the visual tokens resemble what it knows. A real language model has not met such questions, and there the projector alone does not suffice. The exam between the two stages (the last line) also shows that 80 steps are too few: the learning rate has come down to 0, the projector is not done, and the scores are 28% and 30%, where blind answers (after all 300 steps) get 25% on average.
#
# So why do people use two stages? The experiment supports two reasons. First, stage 1 is **cheap**: it trains 74,112 parameters and can take many images with no more than a caption each, to bring the projector half the way. Second, it **moves the language model less**: with two stages its weights move somewhat less than with one (see the percentages), and with the projector alone not at all. What moves less should forget less, though that was not measured here. That training goes wrong without it was not seen here; the authors of Prismatic compared the two on large models and also found that stage 1 can be left out.
#
# ## Exercises
#
# The `check` at the end of each cell says how far off an answer is.

# %% [markdown] tags=["zh"]
# **18.1 补一行。** MLP 投影层有两个矩阵和两个偏置，宽度都是 `width`。一共多少参数？写成 `width` 的式子。

# %% [markdown] tags=["en"]
# **18.1 Fill in a line.** The MLP projector has two matrices and two biases, all of width `width`. How many parameters is that? Write it as an expression of `width`.

# %% tags=["exercise"]
width = 192
count = ...
check("18.1", count, sizes["projector"])

# %% [markdown] tags=["zh"]
# **18.2 换一种做法。** 有的项目在第 1 阶段也训练语言模型的最后一层（block）。把 `partly` 里的投影层和 `language_model.blocks` 的最后一个设为可训练，其余冻结，数出可训练的参数。

# %% [markdown] tags=["en"]
# **18.2 Another way.** Some projects train the last block of the language model in stage 1, too. In `partly`, make the projector and the last of `language_model.blocks` trainable and nothing else, then count the trainable parameters.

# %% tags=["exercise"]
partly = fresh()
trainable = ...
last = sum(p.numel() for p in partly.language_model.blocks[-1].parameters())
check("18.2", trainable, sizes["projector"] + last)

# %% [markdown] tags=["zh"]
# **18.3 找错。** 这个函数要量出第 2 阶段把语言模型的权重移动了多远（‖新 − 旧‖ / ‖旧‖），却总是返回 0。改好它。

# %% [markdown] tags=["en"]
# **18.3 Find the bug.** This function is to measure how far a step moves the language model's weights, ‖new − old‖ / ‖old‖, and always returns 0. Mend it.


# %% tags=["exercise"]
def moved_by_a_step():
    network = copy.deepcopy(pretrained)
    old = list(network.language_model.parameters())
    train(network, STAGE_2, batches[:1])
    new = list(network.language_model.parameters())
    change = sum((a - b).pow(2).sum() for a, b in zip(new, old))
    return (change / sum(b.pow(2).sum() for b in old)).sqrt().detach()


check("18.3", moved_by_a_step() > 0, torch.tensor(True))

# %% [markdown] tags=["zh"]
# ## 别人在这里摔过跤
#
# [jingyaogong/minimind-v#59](https://github.com/jingyaogong/minimind-v/issues/59)：有人发现 LLaVA 预训练时冻结整个语言模型，minimind-v 却放开了最后一层，问为什么。作者的回答是折中：不想让语言模型忘掉太多，又担心只学一个投影层表达能力不够；并说明这只是一种选择，完全照 LLaVA 做也可以。[haotian-liu/LLaVA#195](https://github.com/haotian-liu/LLaVA/issues/195) 是另一面：读者发现论文写着第 1 阶段只训练投影层，代码里却还更新了词嵌入；作者后来回复，去掉相关的附加 token 不影响效果，已经去掉。两件事都能用同一个办法看清：训练前打印可训练参数的名字。
#
# ## 到库里看看
#
# - [`nanovlm/training/freezing.py`](../../nanovlm/training/freezing.py)，`freeze` 与 `describe`：只训练最后几层、LoRA、词嵌入，以及开始时打印的那张表。
# - [`nanovlm/training/optim/optimizer.py`](../../nanovlm/training/optim/optimizer.py)，`build_optimizer` 与 `schedule`：每个部分自己的学习率，逐层衰减。
# - [`nanovlm/presets/tiny.toml`](../../nanovlm/presets/tiny.toml)：两个阶段的全部设置，每个数旁边写着理由。
#
# 论文：Liu 等，2023，*Visual Instruction Tuning*（LLaVA，两个阶段），[arXiv:2304.08485](https://arxiv.org/abs/2304.08485)；Karamcheti 等，2024，*Prismatic VLMs*，在大模型上比较过一个阶段与两个阶段，[arXiv:2402.07865](https://arxiv.org/abs/2402.07865)。

# %% [markdown] tags=["en"]
# ## In the wild
#
# [jingyaogong/minimind-v#59](https://github.com/jingyaogong/minimind-v/issues/59): someone noticed that LLaVA freezes the whole language model in pretraining while minimind-v leaves the last layer trainable, and asked why. The author called it a compromise: the language model should not forget too much, and a single projector might express too little; following LLaVA in full would be fine as well. [haotian-liu/LLaVA#195](https://github.com/haotian-liu/LLaVA/issues/195) is the other side: the paper said that stage 1 trains the projector alone, and a reader found that the code also updated word embeddings. The author later answered that removing the additional tokens did not affect the performance, and that they were removed. One habit shows both: print the names of the trainable parameters before training.
#
# ## Look in the package
#
# - [`nanovlm/training/freezing.py`](../../nanovlm/training/freezing.py), `freeze` and `describe`: the last blocks only, LoRA, word embeddings, and the table that a run prints.
# - [`nanovlm/training/optim/optimizer.py`](../../nanovlm/training/optim/optimizer.py), `build_optimizer` and `schedule`: a learning rate for each part, and one that decays from block to block.
# - [`nanovlm/presets/tiny.toml`](../../nanovlm/presets/tiny.toml): all settings of both stages, with the reason beside each number.
#
# The papers: Liu et al. 2023, *Visual Instruction Tuning* (LLaVA, two stages), [arXiv:2304.08485](https://arxiv.org/abs/2304.08485); Karamcheti et al. 2024, *Prismatic VLMs*, which compares one stage with two on large models, [arXiv:2402.07865](https://arxiv.org/abs/2402.07865).
