"""Forward and both backward products of every precision against float64 references of the written maths.

The references quantise with the oracle, multiply in float64 and round once. Where a 16-bit output differs it may
differ by one step, or by float32 rounding where the sum cancels.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lpexp.precision import Precision, numeric
from lpexp.precision.bf16 import Bf16
from lpexp.precision.fp8 import Fp8
from lpexp.precision.fp8_qdq import Fp8Qdq
from lpexp.precision.fp32 import Fp32
from lpexp.precision.int4 import Int4Qat
from tests.precision import oracle

M, K, N = 200, 384, 300  # M and N end inside a block
GRAD_FLOOR = 448.0 * 2.0**-126
TILE, RUN = (128, 128), (1, 128)

RNG = np.random.default_rng(7)
X = oracle.round_bf16(RNG.normal(size=(M, K)) * np.exp2(RNG.integers(-3, 4, size=(M, 1))))
W = oracle.round_bf16(RNG.normal(size=(N, K)) * 0.05)
DY = oracle.round_bf16(RNG.normal(size=(M, N)) * 1e-4)


def run(precision: Precision) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y [M, N], dx [M, K], dw [N, K] as float64."""
    x, w = (torch.from_numpy(v.astype(np.float32)).requires_grad_() for v in (X, W))
    y = precision.linear(x, w)
    y.backward(torch.from_numpy(DY.astype(np.float32)))
    assert x.grad is not None and w.grad is not None
    return y.detach().double().numpy(), x.grad.double().numpy(), w.grad.double().numpy()


def assert_one_rounding(found: np.ndarray, left: np.ndarray, right: np.ndarray, limit: float = 5e-4) -> None:
    """found [R, C] against RN16b(left [R, I] @ right [I, C])."""
    exact = left @ right
    expected, size = oracle.round_bf16(exact), np.abs(left) @ np.abs(right)
    differs = found != expected
    assert differs.mean() <= limit
    step = np.ldexp(1.0, np.frexp(exact)[1] - 8)
    assert (np.abs(found - expected)[differs] <= np.maximum(step, size * 2.0**-22)[differs]).all()


def assert_float32_sum(found: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    exact = left @ right
    assert np.linalg.norm(found - exact) / np.linalg.norm(exact) < 1e-6
    assert (np.abs(found - exact) <= 2.0**-19 * (np.abs(left) @ np.abs(right))).all()


def test_fp32_products_equal_the_float64_reference_to_float32_rounding():
    y, dx, dw = run(Fp32(name="fp32"))
    assert_float32_sum(y, X, W.T)
    assert_float32_sum(dx, DY, W)
    assert_float32_sum(dw, DY.T, X)


def test_bf16_products_are_rounded_once_and_the_weight_gradient_stays_float32():
    y, dx, dw = run(Bf16(name="bf16"))
    assert_one_rounding(y, X, W.T)
    assert_one_rounding(dx, DY, W)
    assert_float32_sum(dw, DY.T, X)
    assert (dw != oracle.round_bf16(dw)).mean() > 0.9


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("divisor", "low"), [(7.0, -7), (7.5, -8)])
def test_four_bit_products_read_the_decoded_weight_and_pass_its_gradient_unmasked(group, divisor, low):
    y, dx, dw = run(Int4Qat(name="int4_qat", group_size=group, divisor=divisor))
    _, _, served = oracle.quantize_int4(W, group, divisor, low, 7)
    assert_one_rounding(y, X, served.T)
    assert_one_rounding(dx, DY, served)
    assert_float32_sum(dw, DY.T, X)


@pytest.mark.parametrize("kind", [Fp8, Fp8Qdq])
@pytest.mark.parametrize("scale_format", ["fp32", "pow2"])
def test_eight_bit_products_read_codes_in_all_three_directions(kind: type[Fp8], scale_format: str):
    pow2 = scale_format == "pow2"
    y, dx, dw = run(kind.model_validate({"name": "fp8", "scale_format": scale_format}))
    w = oracle.decode_e4m3(W, TILE, pow2)
    assert_one_rounding(y, oracle.decode_e4m3(X, RUN, pow2), w.T)
    assert_one_rounding(dx, oracle.decode_e4m3(DY, RUN, pow2, GRAD_FLOOR), w)
    dy_along_m = oracle.decode_e4m3(DY.T, RUN, pow2, GRAD_FLOOR)
    assert_float32_sum(dw, dy_along_m, oracle.decode_e4m3(X.T, RUN, pow2).T)


def test_the_reference_tells_runs_along_rows_from_runs_along_columns():
    _, _, dw = run(Fp8(name="fp8"))
    from_forward_codes = oracle.decode_e4m3(DY, RUN, False, GRAD_FLOOR).T @ oracle.decode_e4m3(X, RUN, False)
    assert np.linalg.norm(dw - from_forward_codes) / np.linalg.norm(dw) > 1e-2


@pytest.mark.parametrize("kind", [Fp8, Fp8Qdq])
@pytest.mark.parametrize("scale_format", ["fp32", "pow2"])
def test_eight_bit_backward_in_high_precision_reads_the_16_bit_originals(kind: type[Fp8], scale_format: str):
    _, dx, dw = run(kind.model_validate({"name": "fp8", "scale_format": scale_format, "backward": "high_precision"}))
    assert_one_rounding(dx, DY, W)
    assert_float32_sum(dw, DY.T, X)


@pytest.mark.parametrize("scale_format", ["fp32", "pow2"])
def test_eight_bit_backward_dequantised_reads_rounded_decoded_operands(scale_format: str):
    pow2 = scale_format == "pow2"
    _, dx, dw = run(Fp8.model_validate({"name": "fp8", "scale_format": scale_format, "backward": "dequantised"}))
    w, x = (oracle.round_bf16(_decoded_float32(v, block, pow2)) for v, block in ((W, TILE), (X, RUN)))
    assert_one_rounding(dx, DY, w)
    assert_float32_sum(dw, DY.T, x)


def _decoded_float32(x: np.ndarray, block: tuple[int, int], pow2: bool) -> np.ndarray:
    return oracle.decode_e4m3(x, block, pow2).astype(np.float32).astype(np.float64)


def test_forward_modes_of_the_backward_pass_are_one_forward():
    first, *others = (
        run(Fp8.model_validate({"name": "fp8", "backward": mode}))[0]
        for mode in ("quantised", "high_precision", "dequantised")
    )
    assert all(np.array_equal(first, other) for other in others)


def test_faked_products_differ_from_block_products_in_few_outputs_by_one_rounding():
    """Both sum the same decoded values, one in blocks of 128, so only sums between two bf16 values may part."""
    random = torch.Generator().manual_seed(3)
    x, w = (numeric.bf16(torch.randn(512, 1024, generator=random)) for _ in range(2))
    operand = Fp8(name="fp8").operand(Fp8(name="fp8").quantize(w))
    block, faked = (kind(name="fp8").serve(x, operand) for kind in (Fp8, Fp8Qdq))
    moved = block != faked
    assert 1e-5 < moved.float().mean() < 1e-3
    step = torch.maximum(2.0**-7 * block.abs(), 2.0**-20 * (x.abs() @ w.abs().t()))
    assert ((block - faked).abs() <= step).all()


def test_small_gradients_survive_the_eight_bit_backward_pass():
    x, w = (torch.from_numpy(v.astype(np.float32)).requires_grad_() for v in (X, W))
    Fp8(name="fp8").linear(x, w).backward(torch.from_numpy((DY * 1e-18).astype(np.float32)))
    assert x.grad is not None and w.grad is not None
    assert (x.grad != 0).float().mean() > 0.99 and (w.grad != 0).float().mean() > 0.99


@pytest.mark.parametrize("place", ["x", "grad"])
def test_a_non_finite_activation_or_gradient_reaches_the_weight_gradient(place: str):
    x, w, dy = (torch.from_numpy(v.astype(np.float32)) for v in (X, W, DY))
    (x if place == "x" else dy)[150, 10] = float("inf")
    w.requires_grad_()
    Fp8(name="fp8").linear(x, w).backward(dy)
    assert w.grad is not None and not torch.isfinite(w.grad).all()


@pytest.mark.parametrize("precision", [Bf16(name="bf16"), Fp32(name="fp32"), Fp8(name="fp8")], ids=lambda p: p.name)
def test_head_sums_are_not_rounded_and_their_input_gradient_is(precision: Precision):
    x, w = (torch.from_numpy(v.astype(np.float32)).requires_grad_() for v in (X, W))
    grad = torch.from_numpy(DY.astype(np.float32)) * (1 + 2.0**-12)  # more bits than bf16 has
    y = precision.accumulate(x, w)
    y.backward(grad)
    assert x.grad is not None and w.grad is not None
    assert_float32_sum(y.detach().double().numpy(), X, W.T)
    assert_float32_sum(w.grad.double().numpy(), grad.double().numpy().T, X)
    check = assert_float32_sum if precision.name == "fp32" else assert_one_rounding
    check(x.grad.double().numpy(), grad.double().numpy(), W)


def test_the_training_product_is_the_same_for_leading_dimensions_and_strides():
    precision = Fp8(name="fp8")
    x, w = (torch.from_numpy(v.astype(np.float32)) for v in (X, W))
    flat = precision.linear(x, w)
    assert torch.equal(precision.linear(x.view(4, 50, K), w).view(M, N), flat)
    assert torch.equal(precision.linear(x.t().contiguous().t(), w), flat)


def test_gradients_are_the_same_in_every_repetition():
    first, second = run(Fp8(name="fp8")), run(Fp8(name="fp8"))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_block_sum_is_a_fused_multiply_add_in_increasing_order():
    x, w = (torch.from_numpy(v.astype(np.float32)) for v in (X[:16], W))
    q_x, s_x = numeric.quantize_rows(x, numeric.FLOOR, False)
    operand = Fp8(name="fp8").operand(Fp8(name="fp8").quantize(w))
    y = np.zeros((16, N))
    for b in range(3):
        k = slice(128 * b, 128 * b + 128)
        part = numeric.matmul_bf16(q_x[:, k], operand.codes[:, k]).numpy()  # its own order: test_products.py
        t = (part * s_x[:, b, None].numpy()).astype(np.float64)
        y = (t * operand.scale_BN[b].double().numpy() + y).astype(np.float32).astype(np.float64)
    assert np.array_equal(numeric.block_matmul(q_x, s_x, operand.codes, operand.scale_BN).double().numpy(), y)
