"""The agreement on a fault: one mistake on the rollout's side, made on purpose, for teaching and for tests.

The trainer computes as the config says; what is shipped, held or drawn with is not that. Contract and checksums find
a fault and refuse the run. With `hidden` the engines report what they should hold, as an engine does that nobody can
ask: then it is for the sentinels to notice, and for `lpexp attribute` to name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar

from lpexp.config import Spec
from lpexp.errors import Mistake

if TYPE_CHECKING:
    from lpexp.experiment import Experiment
    from lpexp.precision import Parts


class Fault(Spec):
    """One kind of mistake; `name` is the word in conf/fault/."""

    ABSTRACT: ClassVar[bool] = True
    name: str
    hidden: bool = False  # the engines report what they should hold: contract and checksums find nothing

    def judge(self, exp: Experiment) -> Iterable[Mistake]:
        """Mistakes where this experiment cannot have the fault; keys from the root."""
        return ()

    def told(self, exp: Experiment) -> str | None:
        """One sentence for the header and the summary; None: there is no fault."""
        raise NotImplementedError

    def rollout(self, exp: Experiment) -> Experiment:
        """The rollout's own copy of the config: what is quantised, shipped and drawn by."""
        return exp

    def held(
        self, exp: Experiment, given: Mapping[str, Parts], before: Mapping[str, Parts] | None, version: int
    ) -> Mapping[str, Parts]:
        """What an engine holds once it was given the parts of a version; `before` is what it held until then."""
        return given

    def temperature(self, given: float) -> float:
        """What an engine draws at that was asked to draw at `given`."""
        return given


class NoFault(Fault):
    """Nothing is wrong."""

    def told(self, exp: Experiment) -> str | None:
        return None
