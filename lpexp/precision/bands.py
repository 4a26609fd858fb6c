"""Where the first batch's mismatch should lie for a pair of precisions; the numbers are the precisions' own (`gap`).

On backends that compute alike, equal precisions agree exactly. Two stacks with kernels of their own are held to what
others accept: mean |d| up to 0.1 (slime's CI), k3 up to 0.015 (prime-rl's admission of a model): docs/alarms.md.
"""

from __future__ import annotations

from collections.abc import Sequence

from lpexp.data import Param
from lpexp.precision import Band, Precision

EXACT = Band((0.0, 0.0), (0.0, 0.0))
LEAST = 1e-12  # nat: not exactly 0
TWO_STACKS = Band((0.0, 0.1), (0.0, 0.015))


def expected(trainer: Precision, rollout: Precision, params: Sequence[Param], moe: bool, exact: bool) -> Band | None:
    """The band of a pair on this model; `exact`: both sides run the same arithmetic. None: nobody has measured it."""
    if trainer.contract(params, moe) == rollout.contract(params, moe):
        return EXACT if exact else TWO_STACKS
    gaps = [precision.gap for precision in (trainer, rollout) if precision.gap is not None]
    if not gaps:
        return None
    band = _both(*gaps) if len(gaps) == 2 else gaps[0]
    if trainer.format() == rollout.format():  # they differ in which tensors they take, perhaps in a single one
        band = Band(*((LEAST, high) for _, high in band))
    if exact:
        return band
    return Band(*((low, high + more) for (low, high), (_, more) in zip(band, TWO_STACKS, strict=True)))


def _both(one: Band, other: Band) -> Band:
    """Two roundings of the same weights: errors add, as root mean squares for k3."""
    return Band(
        (min(one.abs_mean[0], other.abs_mean[0]), one.abs_mean[1] + other.abs_mean[1]),
        (min(one.kl_k3[0], other.kl_k3[0]), (one.kl_k3[1] ** 0.5 + other.kl_k3[1] ** 0.5) ** 2),
    )
