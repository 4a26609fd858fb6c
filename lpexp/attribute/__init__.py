"""`lpexp attribute RUN [--step N]`: what makes the gap between trainer and rollout, from a stored batch.

The batch of a step that was kept whole (lpexp/record.py) is scored again and again, one factor at a time as the other
side has it. Three tables: the causes with their shares of k3, the modules with what to keep unquantised, the worst
tokens with the gap by probability. Everything is written as JSON too. Trains nothing, changes nothing in the run
but the folder attribute/.
Left out: backends that compute otherwise than the embedded ones are scored by our arithmetic; the rest is unexplained.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lpexp import journal, record
from lpexp.config import load
from lpexp.errors import ConfigError
from lpexp.experiment import Experiment

if TYPE_CHECKING:
    from lpexp.attribute.causes import Attribution
    from lpexp.attribute.modules import Ranking
    from lpexp.attribute.rescore import Rescorer

FOLDER = "attribute"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("--step", type=int, metavar="N", help="a step that was kept whole; else the newest")
    parser.add_argument("--rows", type=int, metavar="N", help="so many samples of the batch, in whole groups; else all")
    parser.add_argument("--seed", type=int, default=0, help="of the orders, where there are more than six factors (0)")
    parser.add_argument("--no-modules", action="store_true", help="leave out the table of modules, which takes longest")
    parser.add_argument("--json", type=Path, metavar="FILE", help="else RUN/attribute/STEP.json")


def main(args: argparse.Namespace) -> int:
    run, exp = args.run_dir, experiment(args.run_dir)
    step = serves(run, args.step)
    if args.rows is not None and args.rows < 1:
        raise ConfigError(f"--rows: {args.rows} is no number of samples; use 1 or more")
    out = args.json or run / FOLDER / f"{step:06d}.json"
    if args.json and (out.is_dir() or not out.parent.is_dir()):
        raise ConfigError(f"--json: {out} cannot be a file: {out.parent} is no directory, or it is one itself")

    from lpexp.attribute import tell
    from lpexp.attribute.causes import attribute
    from lpexp.attribute.modules import quantised, rank
    from lpexp.attribute.rescore import Rescorer, whole_batch
    from lpexp.attribute.rescore import load as stored

    kept = stored(run, exp, step)
    scorer = Rescorer(kept if args.rows is None else whole_batch(kept, args.rows))
    print(tell.heading(run, scorer), flush=True)
    found = attribute(scorer, args.seed)
    print(tell.causes(found), flush=True)
    ranking = None
    if not args.no_modules and len(quantised(scorer)) > 1 and found.rounds:
        ranking = rank(scorer, tell.shown)
        print(tell.modules(ranking), flush=True)
    print(tell.tokens(scorer))
    out.parent.mkdir(exist_ok=True)
    journal.write(out, json.dumps(facts(scorer, found, ranking), indent=1) + "\n")
    print(f"\nwritten to {out}")
    return 0


def experiment(run: Path) -> Experiment:
    """The config of a run; ConfigError when this is none."""
    path = run / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run} is no run: it has no config.yaml; name a run, e.g. outputs/NAME/DATE_TIME")
    try:
        return load(yaml.safe_load(path.read_text()), Experiment)
    except ConfigError as error:
        raise ConfigError(error.mistakes, f"{path} cannot be read by this version of lpexp:") from None


def serves(run: Path, step: int | None) -> int:
    """The step to look at: the one that was asked for, or the newest; ConfigError says which steps there are."""
    batches, whole = record.steps(run)
    there = ", ".join(map(str, whole)) or "none"
    also = [str(n) for n in batches if n not in whole]
    told = f"steps kept whole: {there}" + (f" (of {', '.join(also)} only the batch is stored)" if also else "")
    if not whole:
        way = "a run keeps its first two steps and every record.weights_every'th, with record.keep above 0"
        raise ConfigError(f"{run} has no step whose weights are stored ({told}); {way}")
    if step is None:
        return whole[-1]
    if step not in whole:
        raise ConfigError(f"--step: {step} cannot be served; {told}")
    return step


def facts(scorer: Rescorer, found: Attribution, ranking: Ranking | None) -> dict[str, Any]:
    """Everything that the tables show, and more digits of it."""
    from lpexp.attribute import tell

    stored, total = scorer.stored, found.whole
    told: dict[str, Any] = {
        "step": stored.step,
        "samples": len(scorer.batch),
        "tokens": int(scorer.batch.mask_NT.sum()),
        "trainer": scorer.precision("trainer").dump(),
        "rollout": scorer.precision("rollout").dump(),
        "gap": {"kl_k3": total, "unexplained": found.unexplained, "passes": found.passes},
        "mismatch/attribution/unexplained": found.unexplained,
    }
    by_factor: dict[str, float] = {}
    for factor, share in zip(found.factors, found.shares, strict=True):
        by_factor[factor.name] = by_factor.get(factor.name, 0.0) + share.value
    told |= {f"mismatch/attribution/{name}": value for name, value in by_factor.items()}
    told["causes"] = [
        {"cause": cause, "told": words, "kl_k3": value, "share": value / total if total else 0.0}
        for cause, words, value in found.causes
    ]
    told["factors"] = [
        {
            "factor": factor.name, "cause": factor.cause, "told": factor.told, "tensors": list(factor.tensors),
            "kl_k3": share.value, "share": share.value / total if total else 0.0, "low": share.low, "high": share.high,
            "standard_error": share.error, "alone": alone,
        }
        for factor, share, alone in zip(found.factors, found.shares, found.alone, strict=True)
    ]  # fmt: skip
    told["inactive"] = found.inactive
    if ranking is not None:
        told["modules"] = [module._asdict() for module in ranking.modules]
        proposal = ranking.proposal
        told["proposal"] = proposal and {
            **vars(proposal), "modules": [[module.layer, module.kind] for module in proposal.modules]
        }  # fmt: skip
    return told | {"worst_tokens": tell.worst(scorer), "by_probability": tell.by_probability(scorer)}
