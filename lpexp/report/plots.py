"""The report's pictures, as SVG that stands inside the page: matplotlib draws, the page's style sheet colours.

Colours are drawn as marks and replaced by the page's variables, so that one picture serves light and dark. Text stays
text. Nothing refers outside: no script, no font, no link. Left out: hovering; the tables have the numbers.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lpexp.report.findings import BINS, MAX, MEAN, Findings, by_probability, signed
from lpexp.report.study import Arm, Points, Study

MOST_POINTS = 160  # of a curve; longer ones are averaged
MOST_MARKS = 40  # of a curve whose points are shown
SMOOTH = 5  # steps of the running mean
WIDTH, HEIGHT = 4.4, 2.55  # inches of one panel: readable at the width of a phone
INK, MUTED, GRID, GOOD, BAD, OPEN, BAND = (f"#0a0a{n:02x}" for n in range(1, 8))
NAMED = {INK: "ink", MUTED: "muted", GRID: "line", GOOD: "good", BAD: "bad", OPEN: "open", BAND: "band"}
ARMS = 8  # colours; further arms repeat them with other dashes
TITLE: dict[str, Any] = {"loc": "left", "color": INK, "fontsize": 9.6, "fontweight": "bold"}
DASHES = ("-", "--", ":", "-.")


_LONG = re.compile(r"-?\d+\.\d{3,}")  # coordinates with more digits than a screen shows


class Panel(NamedTuple):
    """A curve's title and key. `marks`: held-out scores at single versions; `paired`: minus those of the reference's
    run of the same seed; `logarithmic`: with a line for zeros."""

    title: str
    key: str
    unit: str = ""
    logarithmic: bool = False
    marks: bool = False
    paired: bool = False


PANELS = (
    Panel("Held-out accuracy, sampled answers", "sampled_acc", marks=True),
    Panel("The same, minus the reference's", "sampled_acc", marks=True, paired=True),
    Panel("Held-out accuracy, greedy answers", "greedy_acc", marks=True),
    Panel("Training reward", "reward/mean"),
    Panel("Policy entropy", "train/entropy", "nat"),
    Panel("Mismatch, mean |d|", MEAN, "nat", logarithmic=True),
    Panel("Mismatch, worst token", MAX, "nat", logarithmic=True),
    Panel("Mismatch, KL k3", "mismatch/kl_k3", "nat", logarithmic=True),
    Panel("Gradient norm", "train/grad_norm"),
    Panel("Effective sample size of the correction", "correction/ess"),
    Panel("Staleness, KL k3", "staleness/kl_k3", "nat", logarithmic=True),
)


def color(index: int) -> str:
    """The mark of an arm's colour."""
    return f"#0b0b{hue(index):02x}"


def hue(index: int) -> int:
    """The number of an arm's colour; 0 is the reference's."""
    return (index - 1) % ARMS + 1 if index else 0


def dash(index: int) -> str:
    return DASHES[(index - 1) // ARMS % len(DASHES)] if index else "-"


def curves(study: Study) -> list[tuple[str, str]]:
    """(title, SVG) of every panel in which something varies."""
    drawn = []
    for panel in PANELS:
        lines = [(index, _lines(study, arm, panel)) for index, arm in enumerate(study.arms)]
        lines = [(index, found) for index, found in lines if found]
        everything = np.concatenate([y for _, found in lines for _, y in found]) if lines else np.array([])
        if len(everything) and (panel.marks or panel.key == MEAN or np.ptp(everything) > 0):
            drawn.append((panel.title, _panel(panel, lines, [arm.name for arm in study.arms])))
    return drawn


def _lines(study: Study, arm: Arm, panel: Panel) -> list[Points]:
    if panel.paired:
        if arm is study.reference or study.foreign(arm):
            return []
        pairs = [(a.evaluated(panel.key), b.evaluated(panel.key)) for a, b in study.pairs(arm)]
        return [(x, y - other) for (x, y), (at, other) in pairs if len(x) and np.array_equal(x, at)]
    runs = arm.runs.values()
    found = [run.evaluated(panel.key) if panel.marks else run.curve(panel.key) for run in runs]
    return [(x, y) for x, y in found if len(x)]


def _panel(panel: Panel, lines: Sequence[tuple[int, list[Points]]], names: Sequence[str]) -> str:
    figure, axes = _figure(WIDTH, HEIGHT)
    zero, alpha = None, 0.16 if len(lines) < 4 else 0.09
    if panel.paired:
        axes.axhline(0, color=MUTED, linewidth=0.8)
    if panel.logarithmic:
        zero = _logarithmic(axes, np.concatenate([y for _, found in lines for _, y in found]))
        flat = [names[index] for index, found in lines if not any(y.any() for _, y in found)]
        if zero is not None and flat:
            said = f"exactly 0: {', '.join(flat) if len(flat) < 4 else f'{len(flat)} arms'}"
            axes.annotate(
                said, (0.02, zero), (0, 4), ("axes fraction", "data"), "offset points", color=MUTED, fontsize=8
            )
    for index, found in lines:
        x = np.unique(np.concatenate([x for x, _ in found]))
        grid = np.full((len(found), len(x)), np.nan)
        for row, (at, y) in zip(grid, found, strict=True):
            row[np.searchsorted(x, at)] = y
        with np.errstate(all="ignore"):
            mean, low, high = np.nanmean(grid, 0), np.nanmin(grid, 0), np.nanmax(grid, 0)
        if zero is not None:
            mean, low, high = (np.where(v > 0, v, zero) for v in (mean, low, high))
        if not panel.marks:
            mean, low, high = (_smooth(v, zero is not None) for v in (mean, low, high))
        x, mean, low, high = _thin(x, mean, low, high)
        marker = "o" if (panel.marks and len(x) <= MOST_MARKS) or len(x) == 1 else None
        axes.fill_between(x, low, high, color=color(index), alpha=alpha, linewidth=0)
        axes.plot(x, mean, dash(index), color=color(index), linewidth=1.6, marker=marker, markersize=3.2)
    axes.set_xlabel("step")
    axes.set_title(panel.title + (f" ({panel.unit})" if panel.unit else ""), **TITLE)
    return _svg(figure, panel.title)


def _logarithmic(axes: Any, values: np.ndarray) -> float | None:
    """A log scale; where there are zeros, the height of a line of their own below it."""
    positive = values[values > 0]
    low = 10.0 ** np.floor(np.log10(positive.min())) if len(positive) else 1e-3
    high = 10.0 ** np.ceil(np.log10(positive.max()) + 0.05) if len(positive) else 1.0
    axes.set_ylim(low / 25, high)
    axes.set_yscale("log")
    exponents = np.arange(round(np.log10(low)), round(np.log10(high)) + 1)
    exponents = exponents[:: -(-len(exponents) // 5)]
    ticks, labels = [10.0**e for e in exponents], [_power(e) for e in exponents]
    zero = None
    if (values == 0).any():
        zero = low / 10
        ticks, labels = [zero, *ticks], ["0", *labels]
        axes.axhline(zero, color=MUTED, linewidth=0.6, linestyle=":")
    axes.set_yticks(ticks, labels)
    axes.minorticks_off()
    axes.set_ylim((zero / 2.5 if zero is not None else low), high)
    return zero


def _power(exponent: int) -> str:
    """1, 0.1, 0.01, 1e-5."""
    return f"{10.0**exponent:g}" if -3 < exponent < 4 else f"1e{exponent}"


def _smooth(values: np.ndarray, logarithmic: bool) -> np.ndarray:
    """The running mean of up to SMOOTH steps; logarithms are averaged where the axis is logarithmic."""
    if len(values) < 2 * SMOOTH:
        return values
    known = np.log(values) if logarithmic else values
    total = np.cumsum(np.concatenate([[0.0], known]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - SMOOTH, 0)
    mean = (total[ends] - total[starts]) / (ends - starts)
    return np.exp(mean) if logarithmic else mean


def _thin(x: np.ndarray, *curves: np.ndarray) -> tuple[np.ndarray, ...]:
    """Curves of at most MOST_POINTS points, each the mean of its neighbours."""
    if len(x) <= MOST_POINTS:
        return (x, *curves)
    parts = np.array_split(np.arange(len(x)), MOST_POINTS)
    return tuple(np.array([v[part].mean() for part in parts]) for v in (x, *curves))


def ladder(study: Study) -> str | None:
    """Mean |d| of each arm on one scale, a dot a seed; None when nothing was measured."""
    rows = [(index, arm, [y.mean() for y in arm.each(MEAN)]) for index, arm in enumerate(study.arms)]
    rows = [(index, arm, values) for index, arm, values in rows if values]
    if not rows:
        return None
    rows.sort(key=lambda row: float(np.mean(row[2])))
    figure, axes = _figure(WIDTH, 0.75 + 0.36 * len(rows))
    values = np.concatenate([v for _, _, v in rows])
    positive = values[values > 0]
    low = 10.0 ** np.floor(np.log10(positive.min()) - 0.2) if len(positive) else 1e-3
    high = 10.0 ** np.ceil(np.log10(positive.max()) + 0.05) if len(positive) else 1.0
    zero = low / 4
    axes.set_xscale("log")
    for height, (index, arm, each) in enumerate(rows):
        at = np.where(np.array(each) > 0, each, zero)
        axes.plot([low if at.min() > zero else zero, at.max()], [height, height], color=GRID, linewidth=1)
        axes.plot(at, np.full(len(at), height), "o", color=color(index), markersize=5, alpha=0.85)
        axes.annotate(arm.name, (zero / 1.6, height), (0, 6), textcoords="offset points", color=INK, fontsize=8.6)
    exponents = np.arange(round(np.log10(low)), round(np.log10(high)) + 1)
    axes.set_xticks([zero, *(10.0**e for e in exponents)], ["0", *(_power(e) for e in exponents)])
    axes.minorticks_off()
    axes.set_xlim(zero / 1.8, high)
    axes.set_ylim(-0.5, len(rows) - 0.25)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_title("Mismatch of the arms, mean |d| (nat)", **TITLE)
    return _svg(figure, "Mean gap between trainer and rollout of each arm, on a logarithmic scale")


def forest(found: Findings) -> str | None:
    """Each arm's difference to the reference with its interval, and the margin; None when none was judged."""
    judged = [v for v in found.verdicts if v.found is not None]
    if not judged:
        return None
    colors = {"within": GOOD, "worse": BAD, "undecided": OPEN}
    bounds = [b for v in judged if v.found for b in (v.found.low, v.found.high, v.found.mean) if np.isfinite(b)]
    reach = 1.12 * max(1.6 * found.margin, *(abs(b) for b in bounds))
    reach = min(reach, max(4 * found.margin, 1.3 * max(abs(v.found.mean) for v in judged if v.found)))
    figure, axes = _figure(WIDTH, 0.8 + 0.38 * len(judged))
    axes.axvspan(-found.margin, found.margin, color=BAND, linewidth=0)
    axes.axvline(0, color=MUTED, linewidth=0.8)
    axes.axvline(-found.margin, color=MUTED, linewidth=0.8, linestyle="--")
    for height, verdict in enumerate(reversed(judged)):
        assert verdict.found is not None
        difference, mark = verdict.found, colors[verdict.status]
        low, high = max(difference.low, -reach), min(difference.high, reach)
        axes.plot([low, high], [height, height], color=mark, linewidth=2.2, solid_capstyle="butt")
        for end, beyond, arrow in ((low, difference.low < -reach, "<"), (high, difference.high > reach, ">")):
            axes.plot([end], [height], arrow if beyond else "|", color=mark, markersize=6, markeredgewidth=1.4)
        axes.plot([difference.mean], [height], "o", color=mark, markersize=5)
        text = f"{verdict.arm.name}  {signed(difference.mean)}"
        axes.annotate(text, (-reach, height), (0, 7), textcoords="offset points", color=INK, fontsize=8.6)
    axes.set_xlim(-reach, reach)
    axes.set_ylim(-0.5, len(judged) - 0.2)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    assert found.study.reference is not None
    axes.set_xlabel("shaded: the margin")
    title = f"Held-out accuracy minus that of {found.study.reference.name}, 95 %"
    axes.set_title(title, **TITLE)
    return _svg(figure, title)


PARTS = ("rollout", "learn", "recompute", "sync", "reward", "eval", "checkpoint", "wait", "unaccounted")


def times(study: Study) -> str | None:
    """Where a step's seconds go in each arm, medians."""
    rows = []
    for arm in study.arms:
        parts = {part: [np.median(y) for y in arm.each(f"time/{part}")] for part in PARTS}
        rows.append((arm.name, {part: float(np.mean(v)) for part, v in parts.items() if v}))
    return _bars(rows, "Seconds of a step", least=0.02)


def buckets(study: Study) -> str | None:
    """Which tokens the KL comes from, by their probability; arms without a gap have no bar."""
    rows = [(arm.name, by_probability(arm, "kl_share")) for arm in study.arms]
    rows = [
        (name, {BINS[key]: share for key, share in shares.items()}) for name, shares in rows if any(shares.values())
    ]
    return _bars(rows, "Share of the KL by the token's probability", least=0.0)


def _bars(rows: Sequence[tuple[str, dict[str, float]]], title: str, least: float) -> str | None:
    """Stacked bars of named parts, one a row; parts that are nowhere more than `least` of the longest are left out."""
    if not any(parts for _, parts in rows):
        return None
    longest = max(sum(parts.values()) for _, parts in rows)
    shown = list(dict.fromkeys(p for _, parts in rows for p in parts))
    shown = [p for p in shown if any(parts.get(p, 0) > least * longest for _, parts in rows)]
    figure, axes = _figure(WIDTH, 1.0 + 0.36 * len(rows))
    for height, (name, parts) in enumerate(reversed(rows)):
        left = 0.0
        for number, part in enumerate(shown):
            width = parts.get(part, 0.0)
            axes.barh(height, width, 0.3, left, color=f"#0c0c{number:02x}", linewidth=0, label=None if height else part)
            left += width
        axes.annotate(name, (0, height), (0, 7), textcoords="offset points", color=INK, fontsize=8.6)
    figure.legend(
        loc="outside lower left", frameon=False, fontsize=8, ncols=4, labelcolor=INK, handlelength=1, columnspacing=1.2
    )
    axes.set_ylim(-0.4, len(rows) - 0.3)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_title(title, **TITLE)
    return _svg(figure, title)


# -- drawing -----------------------------------------------------------------------------------------------------------
def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    axes.grid(True, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=8.6, length=3)
    axes.xaxis.label.set(color=MUTED, fontsize=8.6)
    return figure, axes


def _svg(figure: Any, says: str) -> str:
    """The figure for inlining: sizes left to the page, marks replaced by its variables, no id of a group."""
    import matplotlib

    held = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": says, "font.family": "sans-serif"}):
        figure.savefig(held, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = held.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[\w.]*_\d+"', "", text)
    text = re.sub(r"<[^>]+>", lambda tag: _LONG.sub(lambda number: f"{float(number[0]):.2f}", tag[0]), text)
    text = re.sub(r" font-family: [^;\"]*;", "", text)  # the page's
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)  # would rule the page
    for mark, name in NAMED.items():
        text = text.replace(mark, f"var(--{name})")
    text = re.sub(r"#0([bc])0\1(\d\d)", lambda m: f"var(--{'arm' if m[1] == 'b' else 'part'}{int(m[2], 16)})", text)
    view = re.search(r'viewBox="[^"]*"', text)
    assert view is not None
    label = says.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    head = f'<svg {view[0]} role="img" aria-label="{label}" preserveAspectRatio="xMinYMin meet">'
    return re.sub(r"\s*\n\s*", "\n", re.sub(r"<svg[^>]*>", lambda _: head, text, count=1))
