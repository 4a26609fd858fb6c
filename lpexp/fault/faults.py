"""The faults: another field of the rollout's precision, a module left out, a scale not loaded, updates dropped, another
temperature. Each is a mistake that a public stack has made (docs/alarms.md)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, ValidationError

from lpexp.errors import Mistake
from lpexp.fault import Fault

if TYPE_CHECKING:
    from lpexp.data import Param
    from lpexp.experiment import Experiment
    from lpexp.precision import Parts


def _serving(exp: Experiment, precision: Any) -> Experiment:
    return exp.model_copy(update={"rollout": exp.rollout.model_copy(update={"precision": precision})})


def _covered(exp: Experiment) -> list[Param]:
    model = exp.model.sized()
    return [param for param in model.params() if exp.wire.covers(param, model.moe is not None)]


class OtherField(Fault):
    """The rollout's precision has another value in one field: a group size, a rule for scales."""

    field: str
    value: Any

    def judge(self, exp: Experiment) -> Iterator[Mistake]:
        wire, model = exp.wire, exp.model.sized()
        if self.field in ("name", "scope") or self.field not in type(wire).model_fields:
            known = ", ".join(name for name in type(wire).model_fields if name not in ("name", "scope")) or "none"
            message = f"{self.field!r} is no field of {wire.name} that this fault can change (there are: {known})"
            yield Mistake("fault.field", f"{message}; choose another precision, or type fault=none")
            return
        if getattr(wire, self.field) == self.value:
            message = f"{self.value!r} is what the trainer has too; type another {self.field}"
            yield Mistake("fault.value", message)
            return
        try:
            other = self._other(exp)
        except ValidationError as error:
            why = error.errors()[0]["msg"]
            yield Mistake("fault.value", f"{self.value!r} is no {self.field} of {wire.name}: {why}")
            return
        for mistake in other.judge(list(model.params()), model.moe is not None):
            yield Mistake("fault.value", mistake.message)

    def _other(self, exp: Experiment) -> Any:
        return type(exp.wire).model_validate({**dict(exp.wire), self.field: self.value})

    def told(self, exp: Experiment) -> str:
        return f"the rollout has {self.field} {self.value}, the trainer {getattr(exp.wire, self.field)}"

    def rollout(self, exp: Experiment) -> Experiment:
        return _serving(exp, self._other(exp))


class OneTensor(Fault):
    """A fault of a single quantised tensor; null: the first one that the precision covers."""

    ABSTRACT: ClassVar[bool] = True
    tensor: str | None = None

    def judge(self, exp: Experiment) -> Iterator[Mistake]:
        names = [param.name for param in _covered(exp)]
        if not names:
            message = f"{exp.wire.name} quantises nothing, so no tensor can have {self.name}"
            yield Mistake("fault", f"{message}; choose a precision that does, or type fault=none")
        elif self.tensor is not None and self.tensor not in names:
            yield Mistake("fault.tensor", f"{self.tensor!r} is not quantised by {exp.wire.name}; e.g. {names[0]} is")

    def _tensor(self, exp: Experiment) -> str:
        return self.tensor or _covered(exp)[0].name


class ExcludedModule(OneTensor):
    """The rollout serves one module unquantised that the trainer quantises."""

    def judge(self, exp: Experiment) -> Iterator[Mistake]:
        yield from super().judge(exp)
        if "scope" in type(exp.wire).model_fields and len(_covered(exp)) == 1:
            yield Mistake("fault", f"{exp.wire.name} quantises a single tensor; without it nothing is quantised")

    def told(self, exp: Experiment) -> str:
        return f"the rollout serves {self._tensor(exp)} unquantised, the trainer quantises it"

    def rollout(self, exp: Experiment) -> Experiment:
        left = tuple(param.name for param in _covered(exp) if param.name != self._tensor(exp))
        return _serving(exp, exp.wire.model_copy(update={"scope": left}))


class MissingScale(OneTensor):
    """The scales of one tensor were not loaded: they are 1."""

    def told(self, exp: Experiment) -> str:
        return f"the engines did not load the scales of {self._tensor(exp)}: they are 1"

    def held(
        self, exp: Experiment, given: Mapping[str, Parts], before: Mapping[str, Parts] | None, version: int
    ) -> Mapping[str, Parts]:
        name = self._tensor(exp)
        ones = {suffix: part.new_ones(part.shape) for suffix, part in given[name].items() if "scale" in suffix}
        assert ones, f"{exp.wire.name} stores no scales of {name}"
        return {**given, name: given[name] | ones}


class StaleWeights(Fault):
    """Engines drop every update from version `since` on and say that they took it."""

    since: int = Field(default=1, ge=1)

    def told(self, exp: Experiment) -> str:
        return f"the engines drop every weight update from version {self.since} on"

    def held(
        self, exp: Experiment, given: Mapping[str, Parts], before: Mapping[str, Parts] | None, version: int
    ) -> Mapping[str, Parts]:
        return given if before is None or version < self.since else before


class OtherTemperature(Fault):
    """Engines sample, and report log-probabilities, at the config's temperature times `factor`."""

    factor: float = Field(gt=0)

    def judge(self, exp: Experiment) -> Iterator[Mistake]:
        if self.factor == 1:
            yield Mistake("fault.factor", "1 changes no temperature; type another factor, or fault=none")

    def told(self, exp: Experiment) -> str:
        return f"the engines sample at temperature {self.temperature(exp.rollout.temperature):g}, the config says " + (
            f"{exp.rollout.temperature:g}"
        )

    def temperature(self, given: float) -> float:
        return given * self.factor

    def rollout(self, exp: Experiment) -> Experiment:
        changed = {"temperature": self.temperature(exp.rollout.temperature)}
        return exp.model_copy(update={"rollout": exp.rollout.model_copy(update=changed)})
