"""The fused round trip through integer groups: the bytes of the plain maths, and what it costs beside a product."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from lpexp import frontend
from tests.gpu.test_codes import weights

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = pytest.mark.gpu
KINDS = ("normal", "heavy tails", "zero", "one large value a row", "subnormal", "ties", "largest")
ROWS, OUTPUTS, INPUTS = 4096, 4096, 4096


@pytest.mark.parametrize("divisor", ["7", "7.5"])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_the_fused_round_trip_has_the_bytes_of_the_plain_maths(kind: str, group: int, divisor: str) -> None:
    import torch

    words = ("precision=int4_qat", f"precision.group_size={group}", f"precision.divisor={divisor}")
    precision, weight = frontend.experiment(*words).precision, weights()[kind].bfloat16()
    served = precision.fake(weight.cuda()).cpu()
    plain = precision.fake(weight)
    assert torch.equal(served.view(torch.int16), plain.view(torch.int16))


def test_the_fused_round_trip_costs_a_fraction_of_the_plain_maths(tell: Callable[[str], None]) -> None:
    import torch

    precision = frontend.experiment("precision=int4_qat").precision
    weight = (torch.randn(OUTPUTS, INPUTS, device="cuda") * 0.02).bfloat16()
    x = torch.randn(ROWS, INPUTS, device="cuda").bfloat16()
    product = _ms(lambda: x @ weight.t())
    fused = _ms(lambda: precision.fake(weight))
    plain = _ms(lambda: precision.dequantize(precision.quantize(weight)).bfloat16())
    shape = f"{OUTPUTS} x {INPUTS}, {ROWS} rows"
    tell(f"{shape}: product {product:.3f} ms, fused {fused:.3f} ms ({fused / product:.0%}), plain {plain:.3f} ms")
    assert fused < plain / 3
    assert fused < product


def _ms(work: Callable[[], Tensor]) -> float:
    """Median of 20 runs behind 5."""
    import torch

    times = []
    for _ in range(25):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()  # type: ignore[no-untyped-call]
        work()
        end.record()  # type: ignore[no-untyped-call]
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times[5:])[10]
