"""A shared row has the loss and the gradients of a row each, and a batch has everything in its
place."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nanovlm.data.collate import collate
from nanovlm.data.packing import join
from nanovlm.data.sequences import TokenSequence, share_prefix
from nanovlm.inputs.chat import IGNORED, ImageTokens, Message, Sample
from nanovlm.model.vlm import VisionLanguageModel
from tests.reference.models import tiny_vlm

A, B = Path("a.png"), Path("b.png")
PIXELS = dict(zip((A, B), torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))))


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path_factory) -> VisionLanguageModel:
    return tiny_vlm(tmp_path_factory.mktemp("vlm"), family=request.param)


def sample(model: VisionLanguageModel, images: Sequence[Path], *turns: str) -> TokenSequence:
    """Turns of user and assistant in turn, a first one that starts with "system:" aside."""
    messages = []
    if turns[0].startswith("system:"):
        messages, turns = [Message("system", (turns[0],))], turns[1:]
    messages += [
        Message.parse(("user", "assistant")[index % 2], text) for index, text in enumerate(turns)
    ]
    encoded = model.chat.encode(messages, [ImageTokens(model.image_length)] * len(images))
    return TokenSequence.of(encoded, tuple(images))


def loss_and_gradients(
    model: VisionLanguageModel, rows: Sequence[TokenSequence]
) -> dict[str, Tensor]:
    pixels = [PIXELS[path][None] for row in rows for path in row.images]
    batch = collate(rows, model.chat.image_token_id, pixels)
    model.zero_grad()
    loss = model(batch)
    loss.backward()
    return {"loss": loss.detach()} | {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None
    }


# Samples of one image each, and whether they can share a row.
GROUPS = {
    "questions": (
        [A],
        [
            ("<image>图中有几个圆形？", "三个"),
            ("<image>What is left?", "a red circle"),
            ("<image>描述图片", "一个"),
        ],
        True,
    ),
    "one question, several answers": (
        [A],
        [("<image>描述", "一个红色的圆形"), ("<image>描述", "一个圆形"), ("<image>描述", "two")],
        True,
    ),
    "one answer begins another": (
        [A],
        [("<image>描述", "一个"), ("<image>描述", "一个圆形"), ("<image>描述", "一个圆形")],
        True,
    ),
    "the same sample twice": ([A], [("<image>a", "b"), ("<image>a", "b")], True),
    "image in the middle": (
        [A],
        [("in <image> what is left?", "a"), ("in <image> what is below?", "a circle")],
        True,
    ),
    "image at the end": ([A], [("图中 <image>", "a"), ("图中 <image>", "b")], True),
    "two images": (
        [A, B],
        [("<image> or <image>?", "the first"), ("<image> or <image> larger?", "二")],
        True,
    ),
    "two images, words between differ": (
        [A, B],
        [("<image> or <image>?", "a"), ("<image> and <image>?", "b")],
        False,
    ),
    "words before the image differ": (
        [A],
        [("left of <image>", "a"), ("below <image>", "b")],
        False,
    ),
    "several turns": (
        [A],
        [("<image>a", "b", "c", "d"), ("<image>a", "b", "e", "f", "g", "h"), ("<image>x", "y")],
        True,
    ),
    "system": ([A], [("system: kind", "<image>a", "b"), ("system: kind", "<image>c", "d")], True),
    "text alone": ([], [("你好", "hi"), ("红色", "red"), ("re", "circle")], True),
    "text alone, nothing in common": ([], [("system: x", "a", "b"), ("c", "d")], True),
}


@pytest.mark.parametrize("images, texts, shared", GROUPS.values(), ids=GROUPS.keys())
def test_a_shared_row_equals_a_row_each(model, images, texts, shared):
    samples = [sample(model, images, *turns) for turns in texts]
    apart = [row for one in samples for row in share_prefix([one], model.chat.image_token_id)]
    together = share_prefix(samples, model.chat.image_token_id)
    assert len(apart) == len(samples) and len(together) == (1 if shared else len(samples))
    if shared and images:  # the images are read once, which is what sharing is for
        assert (
            together[0].input_ids.count(model.chat.image_token_id)
            == len(images) * model.image_length
        )
        assert len(together[0].input_ids) < sum(len(row.input_ids) for row in apart)
    assert_same_loss(model, together, apart)


def test_a_mixed_batch_equals_a_row_each(model):
    """Shared rows of several images, rows that could not be shared, text alone; all padded to one
    length."""
    samples = [
        [sample(model, images, *turns) for turns in texts]
        for images, texts, _ in list(GROUPS.values())[::2]
    ]
    together = [row for group in samples for row in share_prefix(group, model.chat.image_token_id)]
    apart = [
        row
        for group in samples
        for one in group
        for row in share_prefix([one], model.chat.image_token_id)
    ]
    assert len(together) < len(apart)
    assert_same_loss(model, together, apart)


def assert_same_loss(
    model: VisionLanguageModel,
    rows: Sequence[TokenSequence],
    expected_rows: Sequence[TokenSequence],
) -> None:
    ours, expected = loss_and_gradients(model, rows), loss_and_gradients(model, expected_rows)
    assert ours.keys() == expected.keys()
    torch.testing.assert_close(ours.pop("loss"), expected.pop("loss"), rtol=1e-6, atol=1e-5)
    for name, gradient in ours.items():
        scale = expected[name].abs().max().clamp(min=1)
        torch.testing.assert_close(
            gradient / scale,
            expected[name] / scale,
            atol=1e-5,
            rtol=0,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def row(input_ids: list[int], labels: list[int], *images: Path) -> TokenSequence:
    return TokenSequence(input_ids, labels, [1] * len(input_ids), images)


@pytest.mark.parametrize("pad_left", [False, True], ids=["right", "left"])
def test_collate_pads_and_finds_places(pad_left):
    placeholder, no = 9, IGNORED
    batch = collate(
        [row([9, 9, 3, 4, 5], [no, no, no, 4, 5]), row([6, 9, 7], [no, no, 7])],
        placeholder,
        pad_left=pad_left,
    )
    pad = [0, 0]
    second = [*pad, 6, 9, 7] if pad_left else [6, 9, 7, *pad]
    assert batch.input_ids.tolist() == [[9, 9, 3, 4, 5], second]
    assert batch.attention_mask.tolist() == [
        [1] * 5,
        [0, 0, 1, 1, 1] if pad_left else [1, 1, 1, 0, 0],
    ]
    shift = 2 if pad_left else 0
    assert batch.image_positions.tolist() == [0, 1, 5 + 1 + shift]
    assert batch.targets.tolist() == [4, 5, 7]
    assert batch.target_positions.tolist() == [
        2,
        3,
        5 + 1 + shift,
    ]  # the position before each label


def test_padding_is_never_taken_for_an_image():
    # 0 is also the id that padding is filled with.
    batch = collate([row([0, 5], [IGNORED, 5]), row([5], [IGNORED])], image_token_id=0)
    assert batch.image_positions.tolist() == [0]


def test_rows_of_one_length_and_a_single_row():
    batch = collate([row([1, 2], [IGNORED, 2])], image_token_id=9)
    assert batch.input_ids.tolist() == [[1, 2]] and batch.attention_mask.tolist() == [[1, 1]]
    assert batch.image_positions.tolist() == [] and batch.pixels is None


def test_collate_tells_rows_that_need_no_mask():
    plain = [row([0, 5], [IGNORED, 5]), row([5], [IGNORED])]
    branched = TokenSequence([1, 2, 3], [IGNORED, 2, 3], [1, 2, 3], ())
    assert collate(plain, 9).right_padded
    assert not collate(plain, 9, pad_left=True).right_padded
    assert not collate([*plain, branched], 9).right_padded
    assert not collate([join([plain[0], plain[1]])], 9).right_padded


def test_collate_pads_to_a_multiple():
    rows = [row([1, 2, 3], [IGNORED, 2, 3]), row([5, 6], [IGNORED, 6])]
    batch = collate(rows, 9, multiple=4)
    assert batch.input_ids.tolist() == [[1, 2, 3, 0], [5, 6, 0, 0]]
    assert batch.attention_mask is not None and batch.attention_mask.sum(dim=1).tolist() == [3, 2]
    assert batch.targets.tolist() == [2, 3, 6] and batch.target_positions.tolist() == [0, 1, 4]
    assert collate(rows, 9, multiple=3).input_ids.shape == (2, 3)


def test_a_branch_starts_before_its_first_label():
    """The token that predicts a branch's first word has to be in the branch, however much the
    beginnings agree."""
    first = TokenSequence.of(Sample([1, 2, 3, 4, 5], [IGNORED] * 2 + [3, 4, 5]))
    second = TokenSequence.of(Sample([1, 2, 3, 4, 6], [IGNORED] * 4 + [6]))
    shared = share_prefix([first, second], image_token_id=9)
    assert shared == [
        TokenSequence(
            [1, 2, 3, 4, 5, 2, 3, 4, 6],
            [IGNORED] * 2 + [3, 4, 5] + [IGNORED] * 3 + [6],
            [1, 2, 2, 2, 2, 3, 3, 3, 3],
            (),
            ("", ""),
        )
    ]
