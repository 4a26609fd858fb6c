"""A correction: which tokens the loss keeps, and what each of them weighs, where two sides disagree.

Its parts are one file each and combine: sequences are vetoed, then rejected, what is left is weighed, the weights are
normalised, and last come the masks that need the gradient's own forward pass. Every statistic reads all valid tokens,
so the order decides nothing but what a weight is divided by. With equal log-probabilities every token weighs exactly 1.
Every bound in the product is on pi/mu = exp(lp_P - lp_R). Diagnostics never depend on a correction.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from lpexp.config import Spec, rule
from lpexp.correction.dppo import Dppo
from lpexp.correction.gap import Gap
from lpexp.correction.importance import Importance
from lpexp.correction.opsm import Opsm
from lpexp.correction.rejection import Rejection
from lpexp.correction.seq_error import SeqError
from lpexp.correction.veto import Veto
from lpexp.errors import Mistake

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Correction", "Gap", "Weighed"]

Removal = Veto | Rejection | SeqError | Opsm | Dppo
EARLY, LATE = ("veto", "reject", "seq_error"), ("opsm", "dppo")  # fields that remove tokens; the late ones read lp_C


class Weighed(NamedTuple):
    """What a correction makes of some samples; all [n, T], nothing outside the mask."""

    weights: Tensor  # float32, w' >= 0; 0: the token is removed
    low: Tensor  # bool: the weight was raised to a bound
    high: Tensor  # bool: the weight was cut to a bound
    clamped: Tensor  # bool: the log-ratio was held at +-20 before exp
    removed: dict[str, Tensor]  # part -> bool: the tokens that it took out; several may name the same token
    norm: float | None  # the mean that the weights were divided by; None: there is no normalisation


class Correction(Spec):
    """What a part is null for is not done; without any of them every token weighs 1."""

    observe: bool = False  # measure as if it were on; the loss weighs every token 1
    importance: Importance | None = None
    veto: Veto | None = None
    reject: Rejection | None = None
    seq_error: SeqError | None = None
    opsm: Opsm | None = None
    dppo: Dppo | None = None
    batch_normalise: bool = False  # divide the weights by their mean over the whole batch

    @rule
    def _normalised(self) -> Iterator[Mistake]:
        if self.batch_normalise and self.importance is None:
            message = "true, but importance is null, so there is no weight to divide by its mean"
            yield Mistake("batch_normalise", f"{message}; type false, or choose e.g. correction=tis_sequence")
        if self.batch_normalise and self.importance is not None and self.importance.level == "geometric":
            message = "true with importance.level geometric: such weights lie within their bounds around 1 already"
            yield Mistake("batch_normalise", f"{message}; type false, or importance.level=sequence")

    @rule
    def _observed(self) -> Iterator[Mistake]:
        if self.observe and self.name == "none":
            yield Mistake(
                "observe", "true, but there is nothing to observe; type false, or choose e.g. correction=tis_token"
            )

    @property
    def name(self) -> str:
        """What is on, in a word: none, tis_token, tis_token+veto, observed tis_token."""
        parts = [] if self.importance is None else [self.importance.name]
        parts += [part.name for part in self._removals(*EARLY, *LATE).values()]
        parts += ["batch_normalise"] if self.batch_normalise else []
        return ("observed " if self.observe and parts else "") + ("+".join(parts) or "none")

    def before(self, gap: Gap) -> Weighed:
        """Weights as they are before normalisation, without the masks that need `lp_C`."""
        import torch

        none = torch.zeros_like(gap.mask)
        if self.importance is None:
            found = Weighed(gap.mask.float(), none, none, gap.delta.abs() > gap.MOST, {}, None)
        else:
            found = self.importance.weigh(gap)
        return _without(found, self._removals(*EARLY), gap)

    def norm(self, gap: Gap) -> float:
        """The mean weight of all valid tokens, removed ones counted as 0; 1 without normalisation."""
        return self.divisor(self.before(gap).weights.double().sum(), gap.mask.sum()) if self.batch_normalise else 1.0

    @staticmethod
    def divisor(total: Tensor, count: Tensor) -> float:
        """Their mean from the sum of weights and the number of tokens; 1 where everything was removed."""
        return float(total / count) or 1.0

    def weigh(self, gap: Gap, norm: float = 1.0) -> Weighed:
        """The whole correction; `norm` is that of the whole batch, whatever part of it `gap` is."""
        found = self.before(gap)
        found = found._replace(weights=found.weights / norm, norm=norm) if self.batch_normalise else found
        return _without(found, self._removals(*LATE), gap)

    def used(self, gap: Gap, norm: float = 1.0) -> Tensor:
        """[n, T] float32: what each token weighs in the loss."""
        return gap.mask.float() if self.observe else self.weigh(gap, norm).weights

    def _removals(self, *fields: str) -> dict[str, Removal]:
        return {field: part for field in fields if (part := getattr(self, field)) is not None}


def _without(found: Weighed, removals: dict[str, Removal], gap: Gap) -> Weighed:
    import torch

    weights, removed = found.weights, dict(found.removed)
    for name, part in removals.items():
        removed[name] = part.removes(gap) & gap.mask
        weights = torch.where(removed[name], 0.0, weights)
    return found._replace(weights=weights, removed=removed)
