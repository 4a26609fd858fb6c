"""What a run prints: a header, a line a step, samples at each evaluation, a summary; on a terminal a progress bar."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpexp.data import Group, Metrics

if TYPE_CHECKING:
    from lpexp.experiment import Experiment


class Console:
    """Prints of one run of `total` steps."""

    def __init__(self, total: int, done: int):
        from rich.console import Console as RichConsole

        self._out = RichConsole(highlight=False)
        self._total, self._bar, self._task = total, None, None
        if self._out.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._out, transient=True)
            self._task = self._bar.add_task("training", total=total, completed=done)

    def say(self, text: str, style: str | None = None) -> None:
        """One line, never wrapped, so that it can be searched."""
        self._out.print(text, style=style, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        self.say(f"warning: {text}", "yellow")

    def header(self, exp: Experiment, run_dir: Path, contract: str, start_step: int) -> None:
        """What runs, in which precision, where."""
        model = exp.model.sized()
        self.say("")
        self.say(f"{exp.name}", "bold")
        self.say(f"  model      {model.name} ({model.architecture}), {count(model.num_params())} parameters")
        self.say(f"  trainer    {side(exp, exp.precision)}")
        self.say(f"  rollout    {side(exp, exp.wire)}{'' if exp.rollout.precision else ', as the trainer'}")
        if said := served_first(exp):
            self.say(f"  checkpoint {said}{'' if start_step <= exp.lag else '; that was before this resume'}")
        self.say(f"  contract   {contract}")
        if said := exp.fault.told(exp):
            self.say(
                f"  FAULT      {said} (fault={exp.fault.name}{', hidden' if exp.fault.hidden else ''})", "bold red"
            )
        self.say(f"  task       {exp.task.name}, {_batch(exp)}; correction {exp.correction.name}, lag {exp.lag}")
        for row in (*exp.trainer.plan(exp), *exp.rollout.plan(exp)):
            self.say("  " + "  ".join(str(value) for value in _in_order(row)))
        self.say(f"  run        {run_dir}" + (f", from step {start_step}" if start_step else ""))
        self.say("")
        if self._bar is not None:
            self._bar.start()

    def step(self, line: Metrics) -> None:
        """One readable line: step, reward, accuracy, mismatch mean and max, entropy, speed."""
        done, width = line["step"] + 1, len(str(self._total))  # after step n of N the weights are version n
        parts = [f"step {done:>{width}}/{self._total}"]
        for name, key in (("reward", "reward/mean"), ("acc", "reward/correct")):
            if key in line:
                parts.append(f"{name} {line[key]:.3f}")
        if "mismatch/logprob_abs_diff_max" in line:
            parts.append(f"mismatch {gap(line)}")
        if "train/entropy" in line:
            parts.append(f"entropy {line['train/entropy']:.3f}")
        if "response/length_mean" in line and line.get("throughput/samples_per_s"):
            speed = line["response/length_mean"] * line["throughput/samples_per_s"]
            parts.append(f"{count(speed)} tok/s")
        parts.append(f"{line['time/step']:.2f} s")
        self.say("  ".join(parts))
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done)

    def evaluated(self, name: str, version: int, metrics: Metrics, groups: Sequence[Group], show: int) -> None:
        """The scores of an evaluation and `show` of its greedy answers."""
        at = f"eval/{name}"
        self.say(
            f"eval {name}, weights {version}: greedy {metrics[f'{at}/greedy_acc']:.3f}  sampled "
            f"{metrics[f'{at}/sampled_acc']:.3f}  pass@k {metrics[f'{at}/pass_at_k']:.3f}  reward "
            f"{metrics[f'{at}/mean_reward']:.3f}",
            "bold",
        )
        for group in groups[:show]:
            assert group.rewards_G is not None
            question, answer = _short(group.prompt.text), _short(group.texts[0])
            self.say(f"    prompt {question}  answer {answer}  reward {group.rewards_G[0]:.2f}")

    def summary(self, title: str, rows: Sequence[tuple[str, str]], notes: Sequence[str]) -> None:
        """The table at the end, and what to do next."""
        self.close()
        width = max(len(name) for name, _ in rows)
        self.say("")
        self.say(title, "bold")
        for name, value in rows:
            self.say(f"  {name:<{width}}  {value}")
        self.say("")
        for note in notes:
            self.say(note)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def side(exp: Experiment, precision: Any) -> str:
    """How one side computes: the precision's word, and how many tensors of the model it quantises."""
    model = exp.model.sized()
    params = list(model.params())
    covered = [param for param in params if precision.covers(param, model.moe is not None)]
    if not covered:
        return f"{precision.name}, nothing quantised"
    kinds = ", ".join(sorted({param.kind for param in covered}))
    share = sum(math.prod(p.shape) for p in covered) / model.num_params()
    return (
        f"{precision.name}, quantises {len(covered)} of {len(params)} tensors, {share:.0%} of the parameters ({kinds})"
    )


def served_first(exp: Experiment) -> str | None:
    """What a served checkpoint is to a run, and for how long."""
    if exp.rollout.checkpoint is None:
        return None
    return (
        f"{exp.rollout.checkpoint} serves version 0 as it is stored; the first weight update replaces its "
        f"(calibrated) values by the trainer's own rounding to {exp.wire.name}"
    )


def gap(line: Metrics) -> str:
    """Mean and maximum of |lp_T - lp_R| in nat; an exact zero is called one."""
    mean, worst = line["mismatch/logprob_abs_diff_mean"], line["mismatch/logprob_abs_diff_max"]
    return "exactly 0" if worst == 0 else f"{mean:.1e} max {worst:.1e}"


def count(number: float) -> str:
    """412 -> 412, 409472 -> 409k, 2.1e9 -> 2.1B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            scaled = number / size
            return f"{scaled:.0f}{letter}" if scaled >= 100 else f"{scaled:.1f}{letter}"
    return f"{number:.0f}"


def _batch(exp: Experiment) -> str:
    return f"{exp.task.prompts_per_step} prompts x {exp.algorithm.samples_per_prompt} samples a step"


def _in_order(row: dict[str, Any]) -> list[Any]:
    """A plan's row: role and count first."""
    first = [f"{row['role']} x{row['count']}"] if {"role", "count"} <= set(row) else []
    return first + [value for key, value in row.items() if not first or key not in ("role", "count")]


def _short(text: str, limit: int = 60) -> str:
    return repr(text if len(text) <= limit else text[: limit - 3] + "...")
