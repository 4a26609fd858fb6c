"""Between the matrix products: each kernel computes its plain definition, values and gradients, a row at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from lpexp import kernels
from lpexp.model import ops
from lpexp.model.decoder import spans
from lpexp.precision import numeric

ROWS, HEADS, GROUPS, DIM, LENGTH = 37, 4, 2, 24, 9
TURN = ops.Rotation(torch.randn(64, DIM), torch.randn(64, DIM), torch.arange(ROWS) % 50)
RNG = torch.Generator().manual_seed(5)


def random(*shape: int) -> torch.Tensor:
    return numeric.bf16(torch.randn(*shape, generator=RNG))


def sees() -> torch.Tensor:
    """Rows that see one span, two, one key only, and nothing."""
    first, count = torch.arange(ROWS) % 5, 1 + torch.arange(ROWS) % LENGTH
    seen = spans(first, count, torch.full_like(first, 20), torch.arange(ROWS) % 3)
    seen[-1] = 0
    return seen


def plain_heads_normless(y: torch.Tensor, turn: ops.Rotation, half: bool) -> Any:
    return ops.plain_heads(y, None, None, 1e-6, turn, HEADS, GROUPS, half)


# name -> kernel, plain definition, tensors that take gradients, further arguments
CASES: dict[str, tuple[Callable, Callable, Sequence[torch.Tensor], tuple]] = {
    "add": (ops.add, ops.plain_add, (random(ROWS, 40), random(ROWS, 40)), ()),
    "rms_norm": (ops.rms_norm, ops.plain_rms_norm, (random(ROWS, 40), random(40)), (1e-6,)),
    "silu_mul": (ops.silu_mul, ops.plain_silu_mul, (3 * random(ROWS, 80),), ()),
    "heads": (
        ops.heads,
        ops.plain_heads,
        (random(ROWS, (HEADS + 2 * GROUPS) * DIM), random(DIM), random(DIM)),
        (1e-6, TURN, HEADS, GROUPS),
    ),
    "heads without norms": (
        lambda y, turn, half: ops.heads(y, None, None, 1e-6, turn, HEADS, GROUPS, half),
        plain_heads_normless,
        (random(ROWS, (HEADS + 2 * GROUPS) * DIM),),
        (TURN,),
    ),
    "attention": (
        ops.attention,
        ops.plain_attention,
        (random(ROWS, HEADS, DIM), random(ROWS, GROUPS, DIM), random(ROWS, GROUPS, DIM - 8)),
        (sees(), DIM**-0.5),
    ),
}


def computed(function: Callable, inputs: Sequence[torch.Tensor], rest: tuple, half: bool) -> list[torch.Tensor]:
    """Outputs, then the gradients of a weighted sum of them."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    made = function(*leaves, *rest, half)
    outputs = list(made) if isinstance(made, tuple) else [made]
    generator = torch.Generator().manual_seed(9)
    sum((torch.randn(y.shape, generator=generator) * y).sum() for y in outputs).backward()  # type: ignore[union-attr]
    return [y.detach() for y in outputs] + [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_computes_its_plain_definition_in_float32(name: str):
    kernel, plain, inputs, rest = CASES[name]
    found, expected = (computed(f, inputs, rest, False) for f in (kernel, plain))
    assert len(found) == len(expected) > len(inputs)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        # Sums of at most some dozens of terms of order 1, each rounded to 2^-24.
        assert torch.allclose(a, b, rtol=2e-5, atol=2e-5), float((a - b).abs().max())


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_rounds_where_its_plain_definition_does(name: str):
    """Sums in another order may turn the rounding of a value, but of few, and by one step."""
    kernel, plain, inputs, rest = CASES[name]
    found, expected = (computed(f, inputs, rest, True) for f in (kernel, plain))
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=2**-6, atol=2**-6)
    for a, b in zip(found[: len(found) - len(inputs)], expected, strict=False):
        assert torch.equal(a, numeric.bf16(a)) and (a == b).double().mean() > 0.99


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_plain_definition_would_be_noticed(name: str):
    kernel, plain, inputs, rest = CASES[name]
    wrong = [inputs[0] * 1.001, *inputs[1:]]
    found, expected = computed(kernel, inputs, rest, False), computed(plain, wrong, rest, False)
    assert not all(torch.allclose(a, b, rtol=2e-5, atol=2e-5) for a, b in zip(found, expected, strict=True))


def test_a_row_has_the_same_bits_alone_and_among_others():
    q, k, v = random(ROWS, HEADS, DIM), random(ROWS, GROUPS, DIM), random(ROWS, GROUPS, DIM)
    seen, x, w = sees(), random(ROWS, 40), random(40)
    whole = ops.attention(q, k, v, seen, 0.2, False)
    for r in (0, 7, 20, ROWS - 1):
        row = slice(r, r + 1)
        assert torch.equal(ops.attention(q[row], k, v, seen[row], 0.2, False), whole[row])
        assert torch.equal(ops.rms_norm(x[row], w, 1e-6, False), ops.rms_norm(x, w, 1e-6, False)[row])
        assert torch.equal(ops.silu_mul(x[row], False), ops.silu_mul(x, False)[row])


def test_keys_count_by_their_order_and_not_by_their_place():
    q, k, v = random(1, HEADS, DIM), random(8, GROUPS, DIM), random(8, GROUPS, DIM)
    together = ops.attention(q, k, v, torch.tensor([[1, 5, 0, 0]]), 0.2, False)
    far = torch.cat((k[4:], k)), torch.cat((v[4:], v))
    assert torch.equal(ops.attention(q, *far, torch.tensor([[5, 3, 0, 2]]), 0.2, False), together)


def test_a_row_that_sees_nothing_gets_zeros_and_gives_no_gradient():
    q, k, v = (random(3, 2, DIM).requires_grad_() for _ in range(3))
    out = ops.attention(q, k, v, torch.zeros(3, 4, dtype=torch.int64), 0.2, False)
    out.sum().backward()
    assert not out.any() and not any(x.grad.any() for x in (q, k, v))  # type: ignore[union-attr]


def test_log_probabilities_entropy_and_gradient_are_those_of_float64():
    logits, at = 4 * torch.randn(ROWS, 61, generator=RNG), torch.arange(ROWS) % 61
    logits[0, 3], logits[1, 5] = -1e4, 80.0  # a token that cannot be, and one that must
    exact, inner = logits.double().requires_grad_(), 0.7
    share = (exact / inner).log_softmax(-1)
    lp, entropy = share.gather(-1, at[:, None])[:, 0], -(share.exp() * share).sum(-1)
    slopes = torch.randn(ROWS, generator=RNG)
    (lp * slopes).sum().backward()
    for function in (ops.log_softmax_at, ops.plain_log_softmax_at):
        leaf = logits.clone().requires_grad_()
        found = function(leaf, at, inner)
        (found[0] * slopes).sum().backward()
        assert not found[1].requires_grad
        for a, b in ((found[0], lp), (found[1], entropy), (leaf.grad, exact.grad)):
            assert a is not None and b is not None
            assert torch.allclose(a.double(), b, rtol=2e-5, atol=2e-5), (function, float((a - b).abs().max()))
    alone = ops.log_softmax_at(logits[7:8], at[7:8], inner)
    whole = ops.log_softmax_at(logits, at, inner)
    assert all(torch.equal(one, many[7:8]) for one, many in zip(alone, whole, strict=True))
    kernel = [float((x.detach() - y.detach()).abs().max()) for x, y in zip(whole, (lp, entropy), strict=True)]
    assert kernel[0] < 1e-3 and kernel[1] < 1e-6, kernel  # one rounding to float32 of up to 1e4, and of at most 4


def test_rounding_is_torchs_for_every_kind_of_value():
    bits = torch.randint(-(2**31), 2**31 - 1, (200_000,), generator=RNG, dtype=torch.int64).to(torch.int32)
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    x = torch.cat((bits, halves, halves + 0x8000, halves + 0x7FFF, halves + 0x8001)).view(torch.float32)
    expected, found = x.to(torch.bfloat16).float(), numeric.bf16(x)
    assert torch.equal(found.isnan(), x.isnan())
    assert torch.equal(found[~x.isnan()].view(torch.int32), expected[~x.isnan()].view(torch.int32))


@pytest.mark.parametrize("kernel, reference", [("_exp", np.float32), ("_exp64", np.float64)])
def test_exponentials_stay_within_two_units_in_the_last_place(kernel: str, reference: type):
    x = np.linspace(-86, 0, 100_001).astype(reference)
    found = np.array([getattr(kernels, kernel).py_func(reference(value)) for value in x[::50]])
    expected = np.exp(x[::50].astype(np.longdouble))
    assert np.abs(found / expected - 1).max() < 2 * np.finfo(reference).eps
