"""`lpexp report DIR...`: one self-contained HTML page that answers a question about runs.

The page loads nothing: style, pictures and text are in it, there is no script. A sweep ends with it; `lpexp compare`
prints the same findings as tables.
"""

from __future__ import annotations

import argparse
import datetime
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lpexp import journal
from lpexp.errors import ConfigError
from lpexp.metric import METRICS, Metric
from lpexp.report.findings import MARGIN, Findings, Table, count, find, show
from lpexp.report.study import collect

FILE = "report.html"
# What the page shows of the metric dictionary.
SHOWN = (
    "mismatch/logprob_abs_diff_mean", "mismatch/logprob_abs_diff_max", "mismatch/kl_k3", "mismatch/mult_prob_error",
    "mismatch/ratio_extreme_frac", "reward/mean", "eval/<set>/sampled_acc", "eval/<set>/greedy_acc", "train/entropy",
    "train/grad_norm", "correction/ess", "correction/clip_frac", "correction/masked_token_frac",
    "update/clip_frac_low_neg", "update/clip_frac_high_pos", "staleness/kl_k3", "quant/<class>/rel_error",
    "quant/<class>/sqnr_db", "sync/bytes", "sync/seconds", "time/step", "time/rollout", "time/learn", "time/sync",
    "throughput/rollout_tokens_per_s", "throughput/train_tokens_per_s", "memory/host_rss_bytes",
)  # fmt: skip
WORDS = {"within": "within the margin", "worse": "below", "undecided": "not decided", "apart": "not comparable"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("places", type=Path, nargs="+", metavar="DIR", help="sweeps, runs, or folders of them")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"the page; default: {FILE} in the first DIR")
    add_choices(parser)


def add_choices(parser: argparse.ArgumentParser) -> None:
    """What decides the comparison, for this command and for `compare`."""
    parser.add_argument("--margin", type=_margin, default=MARGIN, help=f"of held-out accuracy ({MARGIN:g})")
    parser.add_argument("--reference", metavar="ARM", help="judge against this arm; default: the one that is bf16")
    parser.add_argument("--allow", action="append", default=[], metavar="KEY", help="arms may differ in this key too")


def main(args: argparse.Namespace) -> int:
    write(args.places, args.out, args.margin, args.reference, args.allow)
    return 0


def write(
    places: Sequence[Path],
    out: Path | None = None,
    margin: float = MARGIN,
    reference: str | None = None,
    allowed: Sequence[str] = (),
) -> Path:
    """Make the page, print its answer and where it is; ConfigError when there is nothing to report."""
    found = find(collect(places, reference, allowed), margin)
    path = out or places[0] / FILE
    if not path.parent.is_dir():
        raise ConfigError(f"--out: {path.parent} is no directory")
    journal.write(path, page(found))
    print(found.answer)
    for verdict in found.verdicts:
        print(f"  {verdict.sentence}")
    for who, what in found.alarms:
        print(f"  alarm, {who}: {what}")
    print(f"report  {path}")
    return path


def page(found: Findings) -> str:
    """The whole page as HTML."""
    import jinja2
    from markupsafe import Markup

    from lpexp.report import plots
    from lpexp.report.advice import advise

    study = found.study
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["range"] = _range
    pictures = {
        "Mismatch": [plots.ladder(study), plots.buckets(study)],
        "Speed and memory": [plots.times(study)],
    }
    arms = enumerate(study.arms)
    styles = {"-": "solid", "--": "dashed", ":": "dotted", "-.": "dashed"}
    values: dict[str, Any] = {
        "found": found,
        "question": study.question or "What do these runs say?",
        "date": datetime.date.today().isoformat(),
        "home": study.home,
        "runs": f"{count(len(study.runs), 'run')}, {count(len(study.arms), 'arm')}",
        "words": WORDS,
        "alarms": count(len(found.alarms), "alarm"),
        "advice": advise(found),
        "smooth": plots.SMOOTH,
        "legend": [(arm.name, plots.hue(i), styles[plots.dash(i)]) for i, arm in arms],
        "forest": Markup(plots.forest(found) or ""),
        "curves": [Markup(svg) for _, svg in plots.curves(study)],
        "pictures": {title: [Markup(svg) for svg in drawn if svg] for title, drawn in pictures.items()},
        "terms": _terms(),
        "provenance": _provenance(found),
    }
    return environment.get_template("page.html").render(values)


def _range(cell: str) -> Any:
    """`0.68 (0.64 to 0.76)` with its brackets in small print."""
    from markupsafe import Markup, escape

    split = re.fullmatch(r"(\S+) (\(.* to .*\))", cell)
    return Markup("{} <small>{}</small>").format(split[1], split[2]) if split else escape(cell)


def _terms() -> list[Metric]:
    """The dictionary's entries of what the page shows."""
    return [metric for metric in METRICS if metric.key in SHOWN]


def _provenance(found: Findings) -> Table:
    rows = []
    for arm in found.study.arms:
        for run in arm.runs.values():
            versions, hardware = run.described("versions.json"), run.described("hardware.json")
            dirty = ", changed" if versions.get("git_dirty") else ""
            rows.append(
                (
                    f"{arm.name}, seed {run.seed}",
                    str(run.path),
                    run.state,
                    run.contract,
                    f"{(versions.get('git_commit') or '-')[:12]}{dirty}",
                    " ".join(f"{key} {show(versions.get(key))}" for key in ("python", "torch", "ray", "numpy")),
                    f"{hardware.get('cpu', '?')}, {hardware.get('cores', '?')} cores",
                    " ".join(run.typed()),
                )
            )
    head = ("run", "directory", "state", "contract", "commit", "versions", "machine", "typed")
    return Table(head, rows, "Each directory holds the whole config, every number by step, and its events.")


def _margin(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value
