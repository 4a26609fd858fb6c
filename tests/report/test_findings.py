"""Verdicts, marks, alarms and tables of made-up studies whose truth is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from lpexp.report.advice import advise
from lpexp.report.findings import Findings, find, sci, size, spread
from lpexp.report.study import collect
from tests import made_up_runs as made_up

FP8 = ("precision=fp8",)
INT4 = ("precision=int4_qat",)
PTQ = ("precision=bf16", "rollout.precision=int4_qat")


def found(at: Path, arms: dict[tuple[str, ...], float], seeds: int, margin: float = 0.05, **more) -> Findings:
    """Each arm's true accuracy; runs of one seed share its prompts, and its random answers too."""
    for words, accuracy in arms.items():
        for seed in range(1, seeds + 1):
            made_up.run(at / f"{len(list(at.glob('*'))):03d}", *words, seed=seed, accuracy=accuracy, **more)
    return find(collect([at]), margin)


def statuses(findings: Findings) -> dict[str, str]:
    return {verdict.arm.name: verdict.status for verdict in findings.verdicts}


def test_arms_are_told_apart_by_their_truth(tmp_path: Path) -> None:
    arms = {(): 0.7, FP8: 0.69, INT4: 0.5}
    findings = found(tmp_path, arms, seeds=5)
    assert statuses(findings) == {"fp8": "within", "int4_qat": "worse"}
    within, worse = (verdict.sentence for verdict in findings.verdicts)
    assert within.startswith("fp8 is within 0.05 of bf16 on held-out accuracy, 95 % (difference −0.0")
    assert worse.startswith("int4_qat is below bf16 on held-out accuracy, 95 % by more than 0.05 (difference −0.")
    assert findings.answer == "fp8 is not worse than bf16 by more than 0.05; int4_qat is below bf16."
    assert findings.marks == [] and findings.alarms == []


def test_what_is_not_decided_says_how_many_seeds_are_missing_and_the_advice_types_them(tmp_path: Path) -> None:
    findings = found(tmp_path, {(): 0.7, FP8: 0.69}, seeds=2, margin=0.01)
    (verdict,) = findings.verdicts
    assert verdict.status == "undecided" and verdict.more is not None
    assert f"is not decided, about {verdict.more} more seed" in verdict.sentence
    assert any(f"More seeds: fp8 {verdict.more}." in case for piece in advise(findings) for case, _ in piece.cases)


def test_one_seed_decides_nothing(tmp_path: Path) -> None:
    findings = found(tmp_path, {(): 0.7, FP8: 0.2}, seeds=1)
    assert statuses(findings) == {"fp8": "undecided"}
    assert "one seed says nothing of the next; 2 more are the least" in findings.verdicts[0].sentence
    assert findings.answer == "fp8 is not decided."


def test_the_same_prompts_for_every_seed_widen_the_interval(tmp_path: Path) -> None:
    arms = {(): 0.7, FP8: 0.66}
    widths = []
    for crossed in (False, True):
        difference = found(tmp_path / str(crossed), arms, seeds=3, crossed=crossed).verdicts[0].found
        assert difference is not None
        widths.append(difference.prompts_half)
    assert widths[0] == 0 < widths[1]


def test_an_arm_with_a_foreign_setting_gets_no_verdict_and_is_marked(tmp_path: Path) -> None:
    findings = found(tmp_path, {(): 0.7, (*FP8, "trainer.lr=1e-4"): 0.7}, seeds=2)
    assert statuses(findings) == {"fp8": "apart"}
    assert "trainer.lr 0.0001 against 0.0002" in findings.verdicts[0].sentence
    assert "--allow trainer.lr" in findings.marks[0]
    allowed = find(collect([tmp_path], allowed=["trainer.lr"]))
    assert statuses(allowed)["fp8"] != "apart" and allowed.marks == []
    head = allowed.tables["What sets the arms apart"].head
    assert "trainer.lr" in head


def test_an_unfinished_run_is_in_no_verdict(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        made_up.run(tmp_path / f"a{seed}", seed=seed)
        made_up.run(tmp_path / f"b{seed}", *FP8, seed=seed, done=None if seed < 3 else 15)
    findings = find(collect([tmp_path]))
    difference = findings.verdicts[0].found
    assert difference is not None and difference.seeds == 2
    assert "b3 (15 of 40 steps)" in findings.marks[0]


def test_alarms_stand_apart_from_other_events(tmp_path: Path) -> None:
    events = ({"kind": "alarm", "step": 3, "message": "mismatch left its band"}, {"kind": "engine_healed", "engine": 0})
    made_up.run(tmp_path / "a", events=events)
    findings = find(collect([tmp_path]))
    assert findings.alarms == [("bf16, seed 1", "step 3: mismatch left its band")]
    assert findings.others == [("bf16, seed 1", "engine healed: engine 0")]
    assert findings.answer.startswith("There is one arm, bf16")


def test_the_mismatch_table_calls_an_exact_zero_one_and_names_the_tokens(tmp_path: Path) -> None:
    made_up.run(tmp_path / "a")
    made_up.run(tmp_path / "b", *PTQ, gap=0.04)
    rows = find(collect([tmp_path])).tables["Mismatch"].rows
    assert rows[0][:5] == ("bf16", *["exactly 0"] * 4)
    assert rows[1][0] == "bf16 / int4_qat" and rows[1][1].startswith("0.04")
    assert rows[1][-1] == "p < 0.1, 50% of tokens"


# -- advice -----------------------------------------------------------------------------------------------------------
def titles(findings: Findings) -> list[str]:
    return [piece.title for piece in advise(findings)]


def cases(findings: Findings, title: str) -> list[tuple[str, str]]:
    return next(piece.cases for piece in advise(findings) if piece.title == title)


def test_accuracy_below_bf16_asks_for_smaller_groups_with_the_runs_own_numbers(tmp_path: Path) -> None:
    findings = found(tmp_path, {(): 0.7, INT4: 0.5}, seeds=3)
    ((measured, typed),) = cases(findings, "Smaller groups")
    assert "from bf16, rounding error 10.0 %, groups of 128" in measured and measured.startswith("int4_qat ended −0.")
    assert typed == "precision.group_size=64"


def test_the_smallest_groups_get_no_such_advice_and_a_good_arm_none_at_all(tmp_path: Path) -> None:
    bad = found(tmp_path / "a", {(): 0.7, (*INT4, "precision.group_size=32"): 0.5}, seeds=3)
    assert "Smaller groups" not in titles(bad)
    assert titles(found(tmp_path / "b", {(): 0.7, INT4: 0.7}, seeds=3)) == []


def test_rounding_that_the_trainer_never_saw_asks_for_training_in_it(tmp_path: Path) -> None:
    findings = found(tmp_path, {(): 0.7, PTQ: 0.5}, seeds=3, gap=0.02)
    assert cases(findings, "Train in what is served")[0][1] == "precision=int4_qat"
    assert cases(findings, "Smaller groups")[0][1] == "rollout.precision.group_size=64"
    assert "Correct for the mismatch" not in titles(findings)
    made_up.run(tmp_path / "none", *PTQ, "correction=none", gap=0.02)
    assert cases(find(collect([tmp_path])), "Correct for the mismatch")[0][1] == "correction=tis_token"


def test_slower_on_a_cpu_is_told_as_such_and_on_a_gpu_asks_for_the_graphs(tmp_path: Path) -> None:
    made_up.run(tmp_path / "a")
    made_up.run(tmp_path / "b", *FP8, **{"time/step": 0.5})
    assert "Slower here is not slower there" in titles(find(collect([tmp_path])))
    (tmp_path / "b" / "hardware.json").write_text('{"gpus": ["H100"]}')
    ((measured, _),) = cases(find(collect([tmp_path])), "Cover the batches that occur")
    assert "fp8 takes 0.50 s a step, bf16 0.2" in measured and "an engine gets 256 sequences at once" in measured


def test_a_gap_between_equal_sides_and_a_gap_that_grows_ask_for_its_cause(tmp_path: Path) -> None:
    matched = made_up.run(tmp_path / "a", *FP8, gap=0.01)
    assert cases(find(collect([matched])), "Find the gap of a matched pair")[0][1] == f"lpexp attribute {matched}"
    mixed = made_up.run(tmp_path / "b", *PTQ, gap=0.01)
    assert "The mismatch grows" not in titles(find(collect([mixed])))
    path = mixed / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text(
        "\n".join(
            line.replace('diff_mean": 0.0', 'diff_mean": 0.1') if n > 20 else line for n, line in enumerate(lines)
        )
        + "\n"
    )
    assert "The mismatch grows" in titles(find(collect([mixed])))


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (3.2e-5, "3.2e-05"), (0.0123, "0.012"), (1.94, "1.9"), (812, "812")]
)
def test_numbers_keep_two_digits_that_count(value: float, text: str) -> None:
    assert sci(value) == text


def test_a_spread_is_mean_lowest_and_highest() -> None:
    assert spread([0.5, 0.7, 0.9], 2) == "0.70 (0.50 to 0.90)"
    assert spread([0.5], 2) == "0.50" and spread([], 2) == "-"
    assert (size(float("nan")), size(512), size(3 * 2**20)) == ("-", "512 B", "3.00 MiB")
