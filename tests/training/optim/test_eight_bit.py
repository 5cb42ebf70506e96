"""Numbers in 8 bits: the published table, the nearest of its codes, and the largest error."""

import pytest
import torch
from torch import Tensor

from nanovlm.training.optim.eight_bit import BLOCK, dequantize, dynamic_table, quantize, tables


def encode(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """(n,) → codes, (n,), and scales, block by block; the last one may be shorter."""
    parts = [quantize(block[None], tables(signed)) for block in values.split(BLOCK)]
    return torch.cat([codes[0] for codes, _ in parts]), torch.cat([scale for _, scale in parts])


def decode(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    blocks = zip(codes.split(BLOCK), scales.split(1))
    return torch.cat([dequantize(codes[None], scale, tables(signed))[0] for codes, scale in blocks])


def written_out(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Block by block, every number against every code."""
    table, decoded, scales = dynamic_table(signed), [], []
    for block in values.split(BLOCK):
        scales.append(block.abs().max())
        shares = block / scales[-1] if scales[-1] > 0 else block
        decoded.append(table[(shares[:, None] - table).abs().argmin(dim=1)] * scales[-1])
    return torch.cat(decoded), torch.stack(scales)


def test_the_tables_are_the_published_ones():
    signed, unsigned = dynamic_table(True), dynamic_table(False)
    assert len(signed) == 256 and len(unsigned) == 255
    for table in (signed, unsigned):
        assert (
            torch.equal(table, table.sort().values)
            and len(table.unique()) == len(table)
            and table[-1] == 1
        )
    assert torch.equal(signed[:127], -signed[128:255].flip(0)) and signed[127] == 0
    # One fraction in the lowest power of ten, 64 in the highest; without a sign twice as many.
    assert signed[128].item() == pytest.approx(0.55e-6) and unsigned[0].item() == pytest.approx(
        0.325e-6
    )
    assert [
        ((signed >= 10.0 ** (power - 1)) & (signed < 10.0**power)).sum().item()
        for power in range(-6, 1)
    ] == [1, 2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("count", [1, BLOCK - 1, BLOCK, 7 * BLOCK + 13])
def test_each_number_gets_the_nearest_code(signed, count):
    generator = torch.Generator().manual_seed(count)
    values = torch.randn(count, generator=generator) * 10 ** torch.empty(count).uniform_(
        -8, 3, generator=generator
    )
    values = values if signed else values.square()
    codes, scales = encode(values, signed)
    assert codes.dtype == torch.uint8 and len(scales) == -(-count // BLOCK)
    decoded, expected_scales = written_out(values, signed)
    assert torch.equal(scales, expected_scales)
    torch.testing.assert_close(decode(codes, scales, signed), decoded, rtol=1e-6, atol=0)


@pytest.mark.parametrize("signed", [True, False])
def test_blocks_are_encoded_together_as_one_by_one(signed):
    values = torch.randn(5 * BLOCK, generator=torch.Generator().manual_seed(0)).abs()
    codes, scales = quantize(values.view(-1, BLOCK), tables(signed))
    assert torch.equal(codes.view(-1), encode(values, signed)[0])
    together = dequantize(codes, scales, tables(signed)).view(-1)
    assert torch.equal(together, decode(codes.view(-1), scales, signed))


@pytest.mark.parametrize("signed", [True, False])
def test_the_search_is_exact_at_every_border(signed):
    table = dynamic_table(signed)
    borders = (table[1:] + table[:-1]) / 2
    shares = torch.cat(
        [
            table,
            borders,
            borders.nextafter(torch.tensor(2.0)),
            borders.nextafter(torch.tensor(-2.0)),
        ]
    )
    values = torch.cat(
        [torch.cat([torch.ones(1), part]) for part in shares.split(BLOCK - 1)]
    )  # 1 is each block's largest
    assert torch.equal(encode(values, signed)[0].long(), torch.bucketize(values, borders))


def test_the_round_trip_error_is_what_the_table_promises():
    """At most half a piece of a power of ten: 0.9 / 64 / 2 of the largest magnitude if signed."""
    values = torch.randn(64 * BLOCK, generator=torch.Generator().manual_seed(0))
    for signed, worst in ((True, 0.9 / 64 / 2), (False, 0.9 / 128 / 2)):
        exact = values if signed else values.square()
        codes, scales = encode(exact, signed)
        error = (decode(codes, scales, signed) - exact).abs().view(-1, BLOCK)
        assert worst / 2 < (error / scales[:, None]).max() < worst * 1.001
        exact = exact.view(-1, BLOCK).abs()
        small = (
            exact < scales[:, None] / 100
        )  # where equal steps of 8 bits would be as large as the numbers
        assert (error[small] / exact[small]).mean() < 0.1


def test_zeros_stay_zeros_and_a_second_moment_never_becomes_one():
    for signed in (True, False):
        codes, scales = encode(torch.zeros(BLOCK + 3), signed)
        assert not decode(codes, scales, signed).any()
    codes, scales = encode(torch.tensor([1.0, 1e-12]), signed=False)
    assert decode(codes, scales, signed=False)[1] == pytest.approx(0.325e-6)
