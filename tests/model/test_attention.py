"""Attention against the formula in double precision, and the rule for who sees whom."""

import pytest
import torch
from torch import Tensor

from nanovlm.errors import NanoVLMError
from nanovlm.model import attention
from nanovlm.model.attention import KVCache, attend, bidirectional_mask, causal_mask
from nanovlm.model.layers import LayerNorm, RMSNorm
from nanovlm.model.rotary import rotary_embedding, rotary_frequencies, rotate

# (query heads, key heads, queries, keys)
SHAPES = [(4, 4, 7, 7), (4, 2, 7, 7), (6, 1, 5, 5), (4, 2, 1, 9), (4, 1, 1, 1), (6, 3, 3, 11)]


def heads(
    num_heads: int, num_kv_heads: int, queries: int, keys: int, dtype: torch.dtype
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(queries + keys)
    shapes = [(num_heads, queries), (num_kv_heads, keys), (num_kv_heads, keys)]
    return [
        torch.randn(2, count, length, 8, generator=generator).to(dtype) for count, length in shapes
    ]


def formula(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(Q Kᵀ / √D) V in double precision, one head at a time."""
    share = queries.shape[1] // keys.shape[1]
    attended = torch.empty(queries.shape, dtype=torch.float64)
    for row in range(queries.shape[0]):
        for head in range(queries.shape[1]):
            query, key, value = (
                queries[row, head],
                keys[row, head // share],
                values[row, head // share],
            )
            scores = query.double() @ key.double().T / query.shape[-1] ** 0.5
            if mask is not None:
                scores[~mask[row % len(mask), 0]] = -torch.inf
            attended[row, head] = scores.softmax(dim=-1) @ value.double()
    return attended


@pytest.mark.parametrize("limit", [0, 2**22], ids=["fused", "written out where faster"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape, masked",
    [
        (shape, masked)
        for shape in SHAPES
        for masked in ("all", "some", "causal")
        if masked != "causal" or shape[2] == shape[3]
    ],
    ids=str,
)
def test_attend_equals_the_formula(shape, masked, dtype, limit, monkeypatch):
    monkeypatch.setattr(attention, "WRITTEN_OUT_LIMIT", limit)
    queries, keys, values = heads(*shape, dtype)
    length, total = shape[2:]
    mask = None
    if masked == "some":
        mask = torch.rand(2, 1, length, total, generator=torch.Generator().manual_seed(3)) < 0.6
        mask[..., 0] = True
    elif masked == "causal":
        mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    attended = attend(
        queries, keys, values, None if masked == "causal" else mask, is_causal=masked == "causal"
    )
    assert attended.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(
        attended.double(), formula(queries, keys, values, mask), atol=tolerance, rtol=0
    )


@pytest.mark.parametrize(
    "mask, expected",
    [
        # a whole row, and one with padding on each side: padding sees itself alone and nobody sees
        # it
        ([1, 1, 1], ["1..", "11.", "111"]),
        ([1, 1, 0, 0], ["1...", "11..", "..1.", "...1"]),
        ([0, 0, 1, 1], ["1...", ".1..", "..1.", "..11"]),
        # one beginning with two continuations that do not see each other
        (
            [1, 1, 1, 2, 2, 3, 3],
            ["1......", "11.....", "111....", "1111...", "11111..", "111..1.", "111..11"],
        ),
        # two samples in one row
        ([2, 2, 2, 3, 3], ["1....", "11...", "111..", "...1.", "...11"]),
        # two samples packed into one row, the first with two branches, the second with one; then
        # padding
        ([1, 2, 3, 65537, 65538, 0], ["1.....", "11....", "1.1...", "...1..", "...11.", ".....1"]),
        ([2**16 * 40000 + 1, 2**16 * 40000 + 3, 1, 3], ["1...", "11..", "..1.", "..11"]),
        # a written answer goes on after the padding
        ([1, 1, 0, 1, 1], ["1....", "11...", "..1..", "11.1.", "11.11"]),
    ],
)
def test_visibility(mask, expected):
    visible = causal_mask(torch.tensor([mask]), len(mask))[0]
    assert ["".join(".1"[seen] for seen in row) for row in visible.int().tolist()] == expected
    for queries in range(1, len(mask)):
        assert torch.equal(causal_mask(torch.tensor([mask]), queries)[0], visible[-queries:])


def test_visibility_keeps_rows_apart():
    masks = torch.tensor([[1, 1, 1, 0], [0, 1, 2, 3], [2, 2, 3, 3]])
    together = causal_mask(masks, 4)
    for row, mask in enumerate(masks):
        assert torch.equal(together[row], causal_mask(mask[None], 4)[0])


def test_rotary_scores_depend_on_distance_alone():
    query, key = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0)).double()

    def score(query_position: int, key_position: int) -> float:
        at_query, at_key = (
            rotary_embedding(torch.tensor([[at]]), rotary_frequencies(8, 100.0))
            for at in (query_position, key_position)
        )
        return float((rotate(query, at_query) * rotate(key, at_key)).sum())

    assert score(0, 0) == pytest.approx(float((query * key).sum()))  # position 0 turns nothing
    assert score(9, 4) == pytest.approx(score(25, 20), abs=1e-5)
    assert abs(score(9, 4) - score(9, 5)) > 1e-2


def test_rms_norm_equals_its_formula():
    norm = RMSNorm(6, eps=0.5)  # so large that its place in the formula shows
    norm.weight.data = torch.arange(1.0, 7)
    hidden_states = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    expected = (
        hidden_states / (hidden_states.pow(2).mean(dim=-1, keepdim=True) + 0.5).sqrt() * norm.weight
    )
    torch.testing.assert_close(norm(hidden_states), expected)


def test_rms_norm_backward_is_its_derivative():
    norm = RMSNorm(6, eps=0.5)
    norm.weight.data = torch.arange(1.0, 7)
    hidden_states = torch.randn(
        2, 3, 6, generator=torch.Generator().manual_seed(0), requires_grad=True
    )

    def formula(hidden_states, weight):
        return (
            hidden_states / (hidden_states.pow(2).mean(dim=-1, keepdim=True) + 0.5).sqrt() * weight
        )

    weight = norm.weight.detach().clone().requires_grad_()
    factors = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((norm(hidden_states) * factors).sum(), (hidden_states, norm.weight))
    theirs = torch.autograd.grad(
        (formula(hidden_states, weight) * factors).sum(), (hidden_states, weight)
    )
    for mine, reference in zip(ours, theirs):
        torch.testing.assert_close(mine, reference)


def test_a_full_cache_says_so():
    cache = KVCache((1, 1, 1, 3, 2), torch.float32, torch.device("cpu"))
    pair = torch.ones(1, 1, 2, 2)
    keys, _ = cache.append(0, pair, pair)
    assert keys.shape == (1, 1, 2, 2)
    cache.length = 2
    with pytest.raises(NanoVLMError, match="holds 3 tokens and cannot take token 4"):
        cache.append(0, pair, pair)


def test_mutual_visibility_is_within_a_group_of_the_same_row():
    groups = torch.tensor([[0, 1, 1, 0, 2], [1, 1, 0, 0, 1]])
    seen = bidirectional_mask(groups, 5)
    expected = [
        [".....", ".11..", ".11..", ".....", "....1"],
        ["11..1", "11..1", ".....", ".....", "11..1"],
    ]
    assert [
        ["".join(".1"[here] for here in row) for row in rows] for rows in seen.int().tolist()
    ] == expected
    assert torch.equal(bidirectional_mask(groups, 2), seen[:, -2:])


def test_layer_norm_keeps_the_dtype_of_its_input_also_under_autocast():
    norm = LayerNorm(6, eps=0.5)
    norm.weight.data, norm.bias.data = torch.arange(1.0, 7), torch.arange(6.0)
    hidden_states = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.layer_norm(hidden_states, (6,), norm.weight, norm.bias, 0.5)
    torch.testing.assert_close(norm(hidden_states), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (
            norm(hidden_states).dtype == torch.float32
            and norm(hidden_states.bfloat16()).dtype == torch.bfloat16
        )
        torch.testing.assert_close(
            norm(hidden_states.bfloat16()).float(), expected, atol=0.1, rtol=0.02
        )
