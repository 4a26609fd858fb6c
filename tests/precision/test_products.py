"""Matrix products: a row's bits do not depend on the rows beside it, whatever multiplies."""

from __future__ import annotations

import pytest
import torch

from lpexp.precision import native, numeric

SHAPES = [(128, 512), (256, 128), (64, 8), (128, 16), (16, 32), (128, 40), (576, 1536), (1536, 576)]  # K, N
UNITS = native.bf16_units()


@pytest.fixture(params=[None, UNITS] if UNITS else [None])
def units(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """What multiplies bf16 values: float32, and the CPU's own units where it has some."""
    monkeypatch.setattr(native, "bf16_units", lambda: request.param)
    return request.param


def halves(*shape: int) -> torch.Tensor:
    return numeric.bf16(torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0])))


@pytest.mark.parametrize("k, n", SHAPES)
def test_a_row_has_the_same_bits_among_any_number_of_rows(units: str | None, k: int, n: int):
    x, w = halves(1024, k), halves(n, k)
    whole = numeric.matmul_bf16(x, w)
    for rows in (1, 3, 16, 17, 48, 128, 520):
        assert torch.equal(numeric.matmul_bf16(x[:rows], w), whole[:rows]), rows
    assert torch.equal(numeric.matmul_bf16(x[500:533], w), whole[500:533])


@pytest.mark.parametrize("k, n", SHAPES)
def test_only_the_order_of_the_sums_is_the_units_own(units: str | None, k: int, n: int):
    x, w = halves(80, k), halves(n, k)
    exact = x.double() @ w.double().t()
    error = (numeric.matmul_bf16(x, w).double() - exact).abs().max()
    assert error < 2**-23 * k * 4  # K terms of order 1, each sum rounded to 24 bits
    assert error < (numeric.bf16(exact.float()).double() - exact).abs().max() / 20  # a bf16 output would lose far more


def test_other_products_stay_in_float32(units: str | None):
    x, w = torch.randn(64, 128), torch.randn(128, 128)
    numeric.matmul_bf16(halves(64, 128), halves(128, 128))
    exact = x.double() @ w.double().t()
    assert (numeric.matmul_rows(x, w).double() - exact).abs().max() < 1e-4
    lost = (numeric.matmul_rows(numeric.bf16(x), numeric.bf16(w)).double() - exact).abs().max()
    assert lost > 1e-2  # what rounding the operands would cost, if a switch had been left on
