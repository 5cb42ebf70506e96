"""Attention against its formula in double precision; masks, rotary embedding and norms."""

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
    group_size = queries.shape[1] // keys.shape[1]  # query heads per key head
    attended = torch.empty(queries.shape, dtype=torch.float64)
    for row in range(queries.shape[0]):
        for head in range(queries.shape[1]):
            query = queries[row, head]
            key, value = keys[row, head // group_size], values[row, head // group_size]
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
    expected = formula(queries, keys, values, mask)
    if masked == "causal":
        attended = attend(queries, keys, values, is_causal=True)
    else:
        attended = attend(queries, keys, values, mask)
    assert attended.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(attended.double(), expected, atol=tolerance, rtol=0)


def drawing(mask: Tensor) -> list[str]:
    """A (T, S) mask as one string per query: 1 where it may attend to the key, a dot elsewhere."""
    return ["".join(".1"[allowed] for allowed in row) for row in mask.int().tolist()]


@pytest.mark.parametrize(
    "mask, expected",
    [
        # no padding, padding on the right, padding on the left: a padding token attends to itself
        # alone, and no token attends to it
        ([1, 1, 1], ["1..", "11.", "111"]),
        ([1, 1, 0, 0], ["1...", "11..", "..1.", "...1"]),
        ([0, 0, 1, 1], ["1...", ".1..", "..1.", "..11"]),
        # one prefix with two continuations that do not attend to each other
        (
            [1, 1, 1, 2, 2, 3, 3],
            ["1......", "11.....", "111....", "1111...", "11111..", "111..1.", "111..11"],
        ),
        # two samples in one row
        ([2, 2, 2, 3, 3], ["1....", "11...", "111..", "...1.", "...11"]),
        # two samples packed into one row, the first with two branches, the second with one, and
        # padding behind them
        ([1, 2, 3, 65537, 65538, 0], ["1.....", "11....", "1.1...", "...1..", "...11.", ".....1"]),
        ([2**16 * 40000 + 1, 2**16 * 40000 + 3, 1, 3], ["1...", "11..", "..1.", "..11"]),
        # generated tokens follow the padding of their prompt
        ([1, 1, 0, 1, 1], ["1....", "11...", "..1..", "11.1.", "11.11"]),
    ],
)
def test_causal_mask(mask, expected):
    allowed = causal_mask(torch.tensor([mask]), len(mask))[0]
    assert drawing(allowed) == expected
    for queries in range(1, len(mask)):
        assert torch.equal(causal_mask(torch.tensor([mask]), queries)[0], allowed[-queries:])


def test_causal_mask_treats_each_row_on_its_own():
    masks = torch.tensor([[1, 1, 1, 0], [0, 1, 2, 3], [2, 2, 3, 3]])
    together = causal_mask(masks, 4)
    for row, mask in enumerate(masks):
        assert torch.equal(together[row], causal_mask(mask[None], 4)[0])


def test_rotary_scores_depend_on_distance_alone():
    query, key = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0)).double()

    def score(query_position: int, key_position: int) -> float:
        query_rotary, key_rotary = (
            rotary_embedding(torch.tensor([[position]]), rotary_frequencies(8, 100.0))
            for position in (query_position, key_position)
        )
        return float((rotate(query, query_rotary) * rotate(key, key_rotary)).sum())

    assert score(0, 0) == pytest.approx(float((query * key).sum()))  # position 0: no rotation
    assert score(9, 4) == pytest.approx(score(25, 20), abs=1e-5)
    assert abs(score(9, 4) - score(9, 5)) > 1e-2


def rms_norm_formula(hidden_states: Tensor, weight: Tensor) -> Tensor:
    return hidden_states / (hidden_states.pow(2).mean(dim=-1, keepdim=True) + 0.5).sqrt() * weight


def test_rms_norm_equals_its_formula():
    norm = RMSNorm(6, eps=0.5)  # large, so that a wrong place in the formula is noticed
    norm.weight.data = torch.arange(1.0, 7)
    hidden_states = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(norm(hidden_states), rms_norm_formula(hidden_states, norm.weight))


def test_rms_norm_gradients_equal_those_of_its_formula():
    norm = RMSNorm(6, eps=0.5)
    norm.weight.data = torch.arange(1.0, 7)
    hidden_states = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    hidden_states.requires_grad_()
    weight = norm.weight.detach().clone().requires_grad_()
    factors = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((norm(hidden_states) * factors).sum(), (hidden_states, norm.weight))
    output = rms_norm_formula(hidden_states, weight)
    expected = torch.autograd.grad((output * factors).sum(), (hidden_states, weight))
    for gradient, expected_gradient in zip(ours, expected):
        torch.testing.assert_close(gradient, expected_gradient)


def test_a_token_beyond_the_length_of_the_cache_is_refused():
    cache = KVCache((1, 1, 1, 3, 2), torch.float32, torch.device("cpu"))
    pair = torch.ones(1, 1, 2, 2)
    keys, _ = cache.append(0, pair, pair)
    assert keys.shape == (1, 1, 2, 2)
    cache.length = 2
    with pytest.raises(NanoVLMError, match="holds 3 tokens and cannot take token 4"):
        cache.append(0, pair, pair)


def test_bidirectional_mask_joins_tokens_of_one_group_in_one_row():
    groups = torch.tensor([[0, 1, 1, 0, 2], [1, 1, 0, 0, 1]])
    allowed = bidirectional_mask(groups, 5)
    expected = [
        [".....", ".11..", ".11..", ".....", "....1"],
        ["11..1", "11..1", ".....", ".....", "11..1"],
    ]
    assert [drawing(mask) for mask in allowed] == expected
    assert torch.equal(bidirectional_mask(groups, 2), allowed[:, -2:])


def test_layer_norm_keeps_the_dtype_of_its_input_under_autocast_too():
    norm = LayerNorm(6, eps=0.5)
    norm.weight.data, norm.bias.data = torch.arange(1.0, 7), torch.arange(6.0)
    hidden_states = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.layer_norm(hidden_states, (6,), norm.weight, norm.bias, 0.5)
    torch.testing.assert_close(norm(hidden_states), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = norm(hidden_states.bfloat16())
        assert norm(hidden_states).dtype == torch.float32 and half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), expected, atol=0.1, rtol=0.02)
