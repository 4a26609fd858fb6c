"""What became of a run, from its directory alone: numbers for the summary, and report.png."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lpexp import journal
from lpexp.console import count, gap
from lpexp.errors import ConfigError

PICTURE = "report.png"
ENDS = 5  # steps averaged at either end of a curve
BLUE, ORANGE, GREEN, GREY = "#1f6feb", "#d9730d", "#1a7f5a", "#6b7280"
Points = tuple[np.ndarray, np.ndarray]  # x, y


def summarise(run_dir: Path) -> dict[str, Any]:
    """First and last values of what matters, as plain numbers; absent where nothing was measured.

    ConfigError when the directory holds no step. Ends of curves are means of up to 5 steps.
    """
    lines = _lines(run_dir)
    found: dict[str, Any] = {"steps": len(lines)}
    for name, scores in _evaluations(run_dir).items():
        versions = sorted(scores)
        first, last = scores[versions[0]], scores[versions[-1]]
        found[f"eval/{name}"] = {"versions": [versions[0], versions[-1]]} | {
            key: [first[key], last[key]] for key in ("greedy_acc", "sampled_acc", "pass_at_k", "mean_reward")
        }
    for key in ("reward/mean", "train/entropy"):
        if len(values := _curve(lines, key)[1]):
            ends = max(1, min(ENDS, len(values) // 2))
            found[key] = [float(values[:ends].mean()), float(values[-ends:].mean())]
    for key in ("mismatch/logprob_abs_diff_mean", "mismatch/kl_k3", "mismatch/mult_prob_error"):
        if len(values := _curve(lines, key)[1]):
            found[key] = float(values.mean())
    if len(values := _curve(lines, "mismatch/logprob_abs_diff_max")[1]):
        found["mismatch/logprob_abs_diff_max"] = float(values.max())
    for key in ("time/step", "throughput/samples_per_s", "throughput/rollout_tokens_per_s"):
        if len(values := _curve(lines, key)[1]):
            found[key] = float(np.median(values))
    found["seconds"] = float(_curve(lines, "time/step")[1].sum())
    alarms = [event for event in journal.read(run_dir / journal.EVENTS) if event["kind"] == "alarm"]
    once = {(one["step"], one["sentinel"]): one for one in alarms}  # a resume raises those of its steps again
    found["alarms"] = [
        {key: one[key] for key in ("sentinel", "step", "key", "value", "expected")} for one in once.values()
    ]
    return found


def rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The summary table: (what, value), in the order in which a person reads it."""
    table = [("trainer", found["trainer"]), ("rollout", found["rollout"]), ("contract", found["contract"])]
    table += [(name, found[key]) for key, name in (("checkpoint",) * 2, ("fault", "FAULT")) if key in found]
    for name, scores in ((k.removeprefix("eval/"), v) for k, v in found.items() if k.startswith("eval/")):
        table += [
            (f"{name} accuracy, sampled", _change(scores["sampled_acc"])),
            (f"{name} accuracy, greedy", _change(scores["greedy_acc"])),
        ]
    if "reward/mean" in found:
        table.append(("reward", _change(found["reward/mean"])))
    if "mismatch/logprob_abs_diff_max" in found:
        table.append(("mismatch |d|, mean and max (nat)", gap(found)))
        table.append(("mismatch KL k3 (nat)", _exactly(found["mismatch/kl_k3"])))
    if "train/entropy" in found:
        table.append(("entropy (nat)", _change(found["train/entropy"])))
    speed = f"{found['time/step']:.2f} s a step"
    if "throughput/rollout_tokens_per_s" in found:
        speed += f", rollout {count(found['throughput/rollout_tokens_per_s'])} tokens/s"
    table.append(("alarms", ", ".join(f"{one['sentinel']} at step {one['step']}" for one in found["alarms"]) or "none"))
    table.append(("speed (median)", speed))
    table.append(("steps", f"{found['steps']} in {found['seconds']:.0f} s"))
    table.append(("run", found["run_dir"]))
    return table


def draw(run_dir: Path) -> Path:
    """Draw reward and accuracy, mismatch, and entropy over the steps into report.png; returns its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = _lines(run_dir)
    evaluations = _evaluations(run_dir)
    figure = Figure(figsize=(8.5, 9.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_title(run_dir), fontsize=11, x=0.02, ha="left")
    reward, mismatch, entropy = figure.subplots(3, 1, sharex=True, gridspec_kw={"height_ratios": [1.25, 1.25, 0.8]})

    _line(reward, _curve(lines, "reward/mean"), GREY, "reward, training", width=1.2)
    for (name, scores), marker in zip(evaluations.items(), "osD^v", strict=False):
        versions = np.array(sorted(scores))
        for key, color in (("greedy_acc", BLUE), ("sampled_acc", ORANGE)):
            values = np.array([scores[version][key] for version in versions])
            _line(reward, (versions, values), color, f"{name} accuracy, {key.removesuffix('_acc')}", marker=marker)
    low, high = reward.get_ylim()
    if low >= -0.1 and high <= 1.1:
        reward.set_ylim(-0.03, 1.03)
    reward.set_ylabel("reward, accuracy")
    _legend(reward)

    curves = (
        ("mismatch/logprob_abs_diff_max", ORANGE, "log-prob gap, worst token"),
        ("mismatch/logprob_abs_diff_mean", BLUE, "log-prob gap, mean"),
        ("mismatch/kl_k3", GREEN, "KL (k3)"),
    )
    _draw_logarithmic(mismatch, [(_curve(lines, key), color, label) for key, color, label in curves])
    mismatch.set_ylabel("train/rollout mismatch (nat)")
    _legend(mismatch)

    _line(entropy, _curve(lines, "train/entropy"), BLUE, "entropy")
    entropy.set_ylim(bottom=0)
    entropy.set_ylabel("policy entropy (nat)")
    entropy.set_xlabel("step; evaluations: weight version")
    for axes in (reward, mismatch, entropy):
        axes.grid(True, color="#e5e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#9ca3af")
        axes.tick_params(colors="#374151", labelsize=9)
    figure.align_ylabels()
    path = run_dir / PICTURE
    figure.savefig(path)
    return path


def _draw_logarithmic(axes: Any, curves: list[tuple[Points, str, str]]) -> None:
    """Curves on a log scale; zeros of the first, the largest, stand on a line of their own that says "exactly 0"."""
    positive = np.concatenate([y[y > 0] for (_, y), _, _ in curves] or [np.array([])])
    zeros = bool((curves[0][0][1] == 0).any())
    axes.set_yscale("log")
    low = 10.0 ** np.floor(np.log10(positive.min())) if len(positive) else 1e-9
    high = 10.0 ** np.ceil(np.log10(positive.max()) + 0.1) if len(positive) else 1e-1
    floor = low / 10
    for (x, y), color, label in curves:
        # Beside zeros a lone positive value has no neighbour to draw a line to: a marker shows it.
        _line(axes, (x, np.where(y > 0, y, np.nan)), color, label, marker="o" if zeros else None)
    exponents = np.arange(round(np.log10(low)), round(np.log10(high)) + 1)
    exponents = exponents[:: -(-len(exponents) // 8)]
    ticks, labels = [10.0**e for e in exponents], [f"$10^{{{e}}}$" for e in exponents]
    if zeros:
        axes.axhline(floor, color="#9ca3af", linewidth=0.8, linestyle=":")
        (x, y), color, label = curves[0]
        axes.plot(x[y == 0], np.full((y == 0).sum(), floor), "o", color=color, markersize=4)
        said = f"{label}: exactly 0 at {(y == 0).sum()} of {len(y)} steps"
        axes.annotate(said, (x[0], floor), (0, 9), textcoords="offset points", fontsize=9, color="#374151")
        ticks, labels = [floor, *ticks], ["exactly 0", *labels]
    axes.set_yticks(ticks, labels)
    axes.minorticks_off()
    axes.set_ylim(floor / 3 if zeros else low, high)


def _line(axes: Any, points: Points, color: str, label: str, width: float = 1.8, marker: str | None = None) -> None:
    x, y = points
    if not len(x):
        return
    if len(x) == 1 and marker is None:
        marker = "o"
    axes.plot(x, y, color=color, label=label, linewidth=width, marker=marker, markersize=4.5)


def _legend(axes: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9, ncols=3, loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0.2)


def _title(run_dir: Path) -> str:
    import yaml

    path = run_dir / "config.yaml"
    if not path.exists():
        return run_dir.name
    config = yaml.safe_load(path.read_text())
    trainer, served = config["precision"]["name"], config["rollout"].get("precision")
    sides = f"trainer {trainer}, rollout {served['name'] if served else trainer}"
    return f"{config['name']}\n{sides}, lag {config['lag']}, seed {config['seed']}"


def _lines(run_dir: Path) -> list[dict[str, Any]]:
    lines = journal.read(run_dir / journal.METRICS)
    if not lines:
        raise ConfigError(f"{run_dir} holds no step of a run ({journal.METRICS} is missing or empty)")
    return lines


def _evaluations(run_dir: Path) -> dict[str, dict[int, dict[str, float]]]:
    """{set: {weight version: {score: value}}}; one that was made again after a resume counts once, the later one."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for event in journal.read(run_dir / journal.EVENTS):
        if event["kind"] == "eval":
            scores = {key.rpartition("/")[2]: value for key, value in event["metrics"].items()}
            found.setdefault(event["set"], {})[event["version"]] = scores
    return found


def _curve(lines: list[dict[str, Any]], key: str) -> Points:
    there = [(line["step"], line[key]) for line in lines if key in line]
    return np.array([x for x, _ in there]), np.array([y for _, y in there], dtype=float)


def _change(ends: list[float]) -> str:
    return f"{ends[0]:.3f} -> {ends[1]:.3f}"


def _exactly(value: float) -> str:
    return "exactly 0" if value == 0 else f"{value:.1e}"
