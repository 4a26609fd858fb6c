"""The tables of `lpexp attribute`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from lpexp.attribute.causes import WORDS, Attribution
from lpexp.attribute.modules import Ranking
from lpexp.attribute.rescore import ROLLOUT, TRAINER, Rescorer
from lpexp.metric.mismatch import PROB_BINS, mismatch_metrics, worst_places
from lpexp.model.tokenizer import load_tokenizer
from lpexp.plan import table

SHOWN, CONTEXT = 12, 4  # modules; tokens before a bad one


def heading(run: Path, scorer: Rescorer) -> str:
    stored = scorer.stored
    sides = f"trainer {scorer.precision(TRAINER).name}, rollout {scorer.precision(ROLLOUT).name}"
    batch = f"{len(scorer.batch)} samples, {int(scorer.batch.mask_NT.sum())} response tokens"
    lines = [f"{run}, step {stored.step}: {sides}; {batch}"]
    if said := stored.exp.fault.told(stored.exp):
        lines.append(f"this run was made with a fault: {said}")
    return "\n".join(lines) + "\n"


def causes(found: Attribution) -> str:
    """What to mend, then every factor."""
    if found.whole == 0:
        return "the sides agree exactly: every token has the same log-probability, so there is nothing to explain\n"

    def percent(value: float) -> str:
        return f"{value / found.whole:7.1%}"

    lines = [f"what makes the gap (k3 {found.whole:.3e} nat, {found.passes} passes over the batch)"]
    lines += [f"  {percent(value)}  {cause}: {told}" for cause, told, value in found.causes]
    lines += [f"  {percent(found.unexplained)}  unexplained", ""]
    rows: list[list[str]] = [["factor", "cause", "share", "k3 (nat)", "alone", "least .. most in any order"]]
    for factor, share, alone in zip(found.factors, found.shares, found.alone, strict=True):
        error = "" if share.error is None else f" +- {share.error:.1e}"
        spread = f"{share.low:.2e} .. {share.high:.2e}"
        row = [
            WORDS[factor.name],
            factor.cause,
            percent(share.value),
            f"{share.value:.3e}{error}",
            f"{alone:.3e}",
            spread,
        ]
        rows.append(row)
    lines += [table(rows, "  "), ""]
    lines += ["cannot matter here", *(f"  {WORDS[name]}: {why}" for name, why in found.inactive.items())]
    return "\n".join(lines) + "\n"


def modules(ranking: Ranking) -> str:
    """The largest contributions, sums by layer and class, and what to keep plain."""
    whole = ranking.gap
    rows: list[list[str]] = [
        ["layer", "module", "contribution", "k3 (nat)", "alone", "missed without it", "parameters"]
    ]
    for one in ranking.modules[:SHOWN]:
        shares = [f"{one.contribution / whole:.1%}", *(f"{v:.2e}" for v in (one.contribution, one.alone, one.missed))]
        rows.append([str(one.layer), one.kind, *shares, f"{one.parameters:,}"])
    lines = ["which modules make it (one class of matrices in one layer)", table(rows, "  ")]
    if len(ranking.modules) > SHOWN:
        lines.append(f"  and {len(ranking.modules) - SHOWN} more, in the JSON file")
    for title, key in (("by layer", "layer"), ("by class", "kind")):
        sums: dict[Any, float] = {}
        for one in ranking.modules:
            sums[getattr(one, key)] = sums.get(getattr(one, key), 0.0) + one.contribution
        told = ", ".join(
            f"{name} {value / whole:.1%}" for name, value in sorted(sums.items(), key=lambda x: -x[1])[:SHOWN]
        )
        lines.append(f"  {title}: {told}")
    if proposal := ranking.proposal:
        names = ", ".join(f"{one.kind} of layer {one.layer}" for one in proposal.modules[:SHOWN])
        more = f" and {len(proposal.modules) - SHOWN} more" if len(proposal.modules) > SHOWN else ""
        lines += [
            "",
            f"keep {names}{more} unquantised, {proposal.share:.0%} of the quantised parameters:",
            f"  predicted {proposal.predicted:.0%} less k3, measured on this batch {proposal.measured:.0%} less",
            f"  type {proposal.override}",
        ]
    return "\n".join(lines) + "\n"


def tokens(scorer: Rescorer) -> str:
    """The worst tokens, and the gap by probability."""
    rows: list[list[str]] = [["token", "after", "sample", "position", "p rollout", "p trainer", "|d| (nat)", "entropy"]]
    for one in worst(scorer):
        values = [f"{one[key]:.4f}" for key in ("p_rollout", "p_trainer", "abs_diff", "entropy")]
        rows.append([repr(one["text"]), repr(one["after"]), one["sample"], str(one["position"]), *values])
    lines = [
        "worst tokens",
        table(rows, "  ") if len(rows) > 1 else "  none differs",
        "",
        "gap by probability in the rollout",
    ]
    bins: list[list[str]] = [["probability", "tokens", "mean |d|", "k3", "share of k3"]]
    for name, one in by_probability(scorer).items():
        share = f"{one['kl_share']:.1%}" if "kl_share" in one else "-"
        bins.append(
            [name, f"{one['token_frac']:.1%}", f"{one['logprob_abs_diff_mean']:.2e}", f"{one['kl_k3']:.2e}", share]
        )
    return "\n".join([*lines, table(bins, "  ")])


def worst(scorer: Rescorer) -> list[dict[str, Any]]:
    """The tokens with the largest gap, in words."""
    batch, tokenizer = scorer.batch, load_tokenizer(scorer.model)
    size = len(batch)
    lp_T, entropy = scorer.stored.target[:size], scorer.stored.found["entropy"][:size]
    found = []
    for row, column in worst_places(lp_T, batch.logprobs_rollout_NT, batch.mask_NT):
        token = int(batch.tokens_NT[row, column])
        before = batch.tokens_NT[row, max(column - CONTEXT, 0) : column].tolist()
        lp_R = float(batch.logprobs_rollout_NT[row, column])
        found.append(
            {
                "text": "<stop>" if token == tokenizer.stop_id else tokenizer.decode([token]),
                "after": tokenizer.decode(before),
                "token": token,
                "sample": f"{int(batch.prompt_ids_N[row])}/{int(batch.sample_index_N[row])}",
                "position": column - int(batch.prompt_lengths_N[row]),
                "p_rollout": float(np.exp(lp_R)),
                "p_trainer": float(np.exp(lp_T[row, column])),
                "abs_diff": abs(float(lp_T[row, column]) - lp_R),
                "entropy": float(entropy[row, column]),
            }
        )
    return found


def by_probability(scorer: Rescorer) -> dict[str, dict[str, float]]:
    """mismatch/by_prob/* of the recorded log-probabilities, bin by bin."""
    batch = scorer.batch
    size = len(batch)
    entropy = scorer.stored.found["entropy"][:size]
    found = mismatch_metrics(scorer.stored.target[:size], batch.logprobs_rollout_NT, batch.mask_NT, entropy)
    at = {name: f"mismatch/by_prob/{name}/" for name in PROB_BINS}
    bins = {
        name: {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
        for name, prefix in at.items()
    }
    return {name: values for name, values in bins.items() if values}


def shown(items: Iterable[Any], count: int) -> Iterable[Any]:
    """The same items with a bar on the terminal."""
    from rich.console import Console
    from rich.progress import track

    out = Console(stderr=True)
    return track(items, "modules", count, console=out, transient=True, disable=not out.is_terminal)
