"""`lpexp replay RUN --correction C ...`: what other corrections would have done to a run's stored batches, untrained.

From a stored batch alone: the weights that each correction gives its tokens, their effective sample size, what is cut
and removed. Where the weights of that step are at hand too (its checkpoint), the gradient that its first update would
have followed is taken again under each correction, and compared with the uncorrected one and with the one of a trainer
that computes without quantisation, uncorrected. The trainer's own code scores and differentiates (trainer/embedded.py).
Left out: later updates on a batch, and what another correction would have made of the steps after it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lpexp import checkpoint, journal, record
from lpexp.config import load
from lpexp.correction import Correction, Gap
from lpexp.data import Batch, Metrics
from lpexp.errors import ConfigError, Mistake
from lpexp.experiment import Experiment
from lpexp.export import chosen
from lpexp.metric.correction import correction_metrics
from lpexp.plan import table
from lpexp.trainer.embedded import MASTER, EmbeddedRank, EmbeddedTrainerSpec

if TYPE_CHECKING:
    from torch import Tensor

UNCORRECTED = Correction()
# What the console shows of a correction's keys: title, key.
SHOWN = (
    ("ESS", "correction/ess"),
    ("mean w'", "correction/weight_mean"),
    ("max w'", "correction/weight_max"),
    ("raised", "correction/clip_frac_low"),
    ("cut", "correction/clip_frac_high"),
    ("tokens out", "correction/masked_token_frac"),
    ("answers out", "correction/masked_seq_frac"),
)
COSINES = ("cosine_uncorrected", "cosine_plain", "norm_ratio")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory with stored batches (record.keep)")
    words = (
        "NAME[+NAME ...] [KEY=VALUE ...]: cards of conf/correction/ and what is changed in them; without it the run's"
    )
    parser.add_argument("--correction", nargs="+", default=[], metavar="C", help=words)
    parser.add_argument("--step", type=int, nargs="+", metavar="N", help="of these steps; else of all that are stored")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every number, written when all are known")


def main(args: argparse.Namespace) -> int:
    if args.json and (args.json.is_dir() or not args.json.parent.is_dir()):
        raise ConfigError(f"--json: {args.json} cannot be a file; its directory is missing, or it is one itself")
    named = chosen("correction", args.correction, Correction, "--correction")
    served = Served.of(args.run)
    steps = served.asked(args.step)
    named = dict(named) or {served.experiment.correction.name: served.experiment.correction}
    found = [row for step in steps for row in replay(served, step, named)]
    print(f"{served.told()}\n")
    for step in steps:
        print(_shown(step, served, [row for row in found if row["step"] == step]), end="\n\n")
    if args.json:
        facts = {"run": str(args.run), "corrections": {name: one.dump() for name, one in named.items()}, "rows": found}
        journal.write(args.json, json.dumps(facts, indent=1) + "\n")
    return 0


class Served(NamedTuple):
    """A run, and what of it can be replayed."""

    run: Path
    experiment: Experiment
    batches: dict[int, Path]  # step -> its stored batch
    weights: dict[int, Path]  # step, of those -> the checkpoint of the weights before it

    @classmethod
    def of(cls, run: Path) -> Served:
        """ConfigError when the directory is no run, or stores nothing."""
        import yaml

        config = run / "config.yaml"
        if not config.is_file():
            raise ConfigError(
                f"{run} is no run directory: it has no config.yaml; name one, e.g. outputs/NAME/DATE_TIME"
            )
        try:
            experiment = load(yaml.safe_load(config.read_text()), Experiment)
        except ConfigError as error:
            raise ConfigError(error.mistakes, f"{config} is no experiment for this version and this machine:") from None
        batches = {int(path.stem): path for path in sorted((run / record.FOLDER).glob("[0-9]*.safetensors"))}
        if not batches:
            raise ConfigError(f"{run} stores no batch; a run keeps the newest record.keep of them")
        return cls(run, experiment, batches, {step: at for step in batches if (at := _checkpoint(run, step))})

    def asked(self, steps: Sequence[int] | None) -> list[int]:
        missing = sorted(set(steps or ()) - set(self.batches))
        if missing:
            raise ConfigError([Mistake("--step", f"step {step} cannot be served; {self.told()}") for step in missing])
        return sorted(set(steps)) if steps else sorted(self.batches)

    def told(self) -> str:
        """Which steps can be served, and with what."""
        gradients = ", ".join(map(str, self.weights)) or "none (no checkpoint of the weights before a stored step)"
        return f"stored batches: {', '.join(map(str, self.batches))}; gradients too: {gradients}"


def _checkpoint(run: Path, step: int) -> Path | None:
    """The checkpoint of the weights before a step, if it is there and verifies."""
    at = run / checkpoint.FOLDER / f"{step:06d}"
    return at if (at / MASTER).exists() and checkpoint.verify(at) is None else None


def replay(served: Served, step: int, corrections: dict[str, Correction]) -> Iterator[Metrics]:
    """One row a correction: its correction/* keys and, where the weights are at hand, its gradient beside others."""
    batch, arrays = record.load(served.batches[step])
    if missing := sorted({"lp_T", "lp_P", "lp_C"} - set(arrays)):
        raise ConfigError(f"{served.batches[step]} lacks {', '.join(missing)}; another version of lpexp wrote it")
    gap = Gap.of(batch, arrays)
    gradients = Gradients(served, step, batch, arrays) if step in served.weights else None
    for name, correction in corrections.items():
        weighed = correction.weigh(gap, correction.norm(gap))
        row: Metrics = {"step": step, "correction": name}
        row |= correction_metrics(weighed, arrays["lp_T"], batch.logprobs_rollout_NT, batch.mask_NT, batch.rewards_N)
        yield row | (gradients.beside(correction) if gradients else {})


class Gradients:
    """Gradients of one stored batch at the weights before its step: uncorrected, without quantisation, corrected."""

    def __init__(self, served: Served, step: int, batch: Batch, arrays: dict[str, np.ndarray]):
        self.served, self.step, self.batch, self.arrays = served, step, batch, arrays
        self.uncorrected = self._taken(UNCORRECTED)
        plain = served.experiment.precision.plain
        same = plain == served.experiment.precision
        self.plain = self.uncorrected if same else self._taken(UNCORRECTED, precision=plain)

    def beside(self, correction: Correction) -> Metrics:
        """Cosine to the uncorrected gradient and to the one without quantisation, and the first's length as a unit.

        `rescored_max` is how far this machine's log-probabilities are from the stored ones, nat: 0 where it is the
        machine of the run. A gradient of nothing but zeros has no cosine.
        """
        ours = self._taken(correction.model_copy(update={"observe": False}))
        found: Metrics = {"rescored_max": self.rescored}
        for key, other in (("cosine_uncorrected", self.uncorrected), ("cosine_plain", self.plain)):
            lengths = float(ours.norm() * other.norm())
            if lengths > 0:
                found[key] = float(ours @ other) / lengths
        if self.uncorrected.norm() > 0:
            found["norm_ratio"] = float(ours.norm() / self.uncorrected.norm())
        return found

    def _taken(self, correction: Correction, **changes: Any) -> Tensor:
        """float64, flat: of the whole batch, as its first update would take it."""
        exp = self.served.experiment
        algorithm = exp.algorithm.model_copy(update={"updates_per_batch": 1})
        exp = exp.model_copy(update={"correction": correction, "algorithm": algorithm, **changes})
        assert isinstance(exp.trainer, EmbeddedTrainerSpec)
        rank = EmbeddedRank(exp, exp.trainer, 0, 1, None)
        version = rank.restore(str(self.served.weights[self.step]))
        assert version == self.step, (version, self.step)
        gradient, found = rank.gradient(self.batch)
        if not changes:
            gap = np.abs(found["lp_P"] - self.arrays["lp_P"])[self.batch.mask_NT]
            self.rescored = float(gap.max())
        return gradient.double()


def _shown(step: int, served: Served, rows: Sequence[Metrics]) -> str:
    plain = served.experiment.precision.plain.name
    titles = ("cos uncorrected", f"cos {plain}", "|g| / uncorrected") if step in served.weights else ()
    head = [f"step {step}", *(title for title, _ in SHOWN), *titles]
    keys = [*(key for _, key in SHOWN), *(COSINES if titles else ())]
    cells = [[row["correction"], *(f"{row[key]:.4f}" if key in row else "-" for key in keys)] for row in rows]
    far = max((row.get("rescored_max", 0.0) for row in rows), default=0.0)
    note = f"\nthis machine's log-probabilities differ from the stored ones by up to {far:.2g} nat" if far else ""
    return table([head, *cells]) + note
