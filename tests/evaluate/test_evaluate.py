"""`lpexp eval`: rows are checkpoints, columns serving precisions; what a cell holds, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lpexp import cli, evaluate, frontend
from lpexp.metric.mismatch import k3
from lpexp.model import hf
from lpexp.task.generated import Generated
from tests.small_run import SMALL, calibrated, events, exported, train

FEW = ("--prompts", "24", "--samples", "3")


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs from the task's warm-up, and directories of the first one's weights."""
    at = tmp_path_factory.mktemp("evaluated")
    train(at / "bf16", "steps=2", "eval.prompts=24")
    train(at / "qat", "steps=2", "precision=int4_qat", "precision.group_size=32", "rollout.precision=fp8")
    for name, words in {"plain": "bf16", "g32": "int4_qat group_size=32", "fp8": "fp8"}.items():
        exported(at / "bf16", words, at / name)
    calibrated(at / "g32", at / "cal")
    return at


@pytest.fixture
def measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command: {(checkpoint, precision): cell}, and what it printed."""

    def run(*words: object) -> tuple[dict[tuple[str, str], dict[str, Any]], str]:
        capsys.readouterr()
        typed = ["eval", *map(str, words), *FEW, "--json", str(tmp_path / "cells.json")]
        assert cli.main(typed) == 0
        facts = json.loads((tmp_path / "cells.json").read_text())
        return {(Path(c["checkpoint"]).name, c["precision"]): c for c in facts["cells"]}, capsys.readouterr().out

    return run


# -- cells -------------------------------------------------------------------------------------------------------------


def test_a_row_is_a_checkpoint_and_a_column_a_precision(at, measured):
    cells, told = measured(at / "bf16", at / "qat", "--precisions", "bf16", "fp8", "int4_qat", "group_size=32")
    columns = ("bf16", "fp8", "int4_qat group_size=32")
    assert list(cells) == [(row, column) for row in ("bf16", "qat") for column in columns]
    assert told.startswith("sort_letters, 24 held-out prompts, seed 1; 1 greedy and 3 sampled answers a prompt")
    matrix = told.split("accuracy, sampled (95 % interval)\n")[1].split("\n\n")[0].splitlines()
    assert [line.split("  ")[1] for line in matrix[1:]] == [
        f"{at / 'bf16'} (step 2, bf16)",
        f"{at / 'qat'} (step 2, int4_qat)",
    ]
    assert matrix[1].count("*") == matrix[2].count("*") == 1
    own = cells["qat", columns[2]]
    low, high = own["sampled_acc_95"]
    assert f"{own['sampled_acc']:.3f} [{low:.3f}, {high:.3f}]*" in matrix[2]


def test_served_in_bf16_the_gap_is_exactly_zero_and_otherwise_not(at, measured):
    cells, told = measured(at / "bf16", "--precisions", "bf16", "fp8", "int4_qat")
    assert (cells["bf16", "bf16"]["logprob_abs_diff_max"], cells["bf16", "bf16"]["kl_k3"]) == (0, 0)
    assert 0 < cells["bf16", "fp8"]["logprob_abs_diff_mean"] < cells["bf16", "int4_qat"]["logprob_abs_diff_mean"]
    assert told.count("exactly 0*") == 2


def test_a_cell_has_the_scores_that_the_run_itself_had(at, measured):
    """The run's last evaluation: the same weights, prompts and engine; greedy draws no random number."""
    cells, _ = measured(at / "bf16", "--precisions", "bf16")
    last = events(at / "bf16", "eval")[-1]
    assert last["version"] == 2
    assert cells["bf16", "bf16"]["greedy_acc"] == last["metrics"]["eval/sort_letters/greedy_acc"] > 0


def test_numbers_depend_neither_on_slots_nor_on_the_rows_beside(at, measured):
    alone, _ = measured(at / "bf16", "--precisions", "fp8")
    beside, _ = measured(at / "qat", at / "bf16", "--precisions", "bf16", "fp8", "--slots", "5")
    assert alone["bf16", "fp8"] == beside["bf16", "fp8"]
    other, _ = measured(at / "bf16", "--precisions", "fp8", "--seed", "2")
    assert alone["bf16", "fp8"] != other["bf16", "fp8"]


def test_the_gap_is_that_of_the_sampled_tokens_scored_again(at):
    """By hand, one sequence at a time: d = lp_bf16 - lp_served over the answers' tokens."""
    import torch

    from lpexp.model.decoder import Decoder, ServedWeights, token_logprobs
    from lpexp.model.tokenizer import load_tokenizer
    from lpexp.rollout import Sampling

    row = evaluate.opened(at / "bf16")
    values = dict(evaluate.weights(row.saved))  # type: ignore[arg-type]
    exp = frontend.experiment(*SMALL)
    fp8 = frontend.experiment("precision=fp8").precision
    engine = evaluate._engine(exp, fp8, evaluate._shipped(row, values, fp8), 16)
    by_bf16 = evaluate._engine(exp, evaluate.BF16, evaluate._shipped(row, values, evaluate.BF16), 16)
    prompts = exp.task.held_out(1, 5, load_tokenizer(exp.model))
    groups, _ = engine.sample(prompts, Sampling(samples=2), 0)
    scored, served, mask, _ = evaluate.rescored(by_bf16, groups, 1.0)
    decoder = Decoder(exp.model)
    weights = ServedWeights(exp.model, evaluate.BF16, evaluate._shipped(row, values, evaluate.BF16))
    gaps = []
    for group in groups:
        for sample in group.samples:
            tokens = torch.tensor([[*group.prompt.tokens, *sample.tokens_T.tolist()]])
            logits = decoder.logits(weights, tokens)[:, :-1]
            lp = token_logprobs(logits, tokens[:, 1:], 1.0)[0][0, len(group.prompt.tokens) - 1 :]
            gaps.append(lp.numpy() - sample.logprobs_T)
    d = np.concatenate(gaps).astype(np.float64)
    assert np.array_equal((scored - served)[mask], d.astype(np.float32)) and np.abs(d).max() > 0
    assert k3(d).mean() > 0


def test_without_precisions_a_row_is_served_as_it_was_trained_and_served(at, measured):
    cells, _ = measured(at / "qat")
    assert list(cells) == [("qat", "bf16"), ("qat", "int4_qat group_size=32"), ("qat", "fp8")]


# -- directories -------------------------------------------------------------------------------------------------------


def test_a_directory_of_a_run_s_weights_has_the_run_s_numbers(at, measured):
    task = ("--task", "sort_letters")
    run, _ = measured(at / "bf16", "--precisions", "bf16", "fp8", "int4_qat", "group_size=32")
    plain, _ = measured(at / "plain", "--precisions", "fp8", *task)
    assert _numbers(plain["plain", "fp8"]) == _numbers(run["bf16", "fp8"])
    stored, told = measured(at / "fp8", *task)
    assert list(stored) == [("fp8", "bf16"), ("fp8", "fp8")]
    scores = ("greedy_acc", "sampled_acc", "logprob_mean")
    assert [stored["fp8", "fp8"][key] for key in scores] == [run["bf16", "fp8"][key] for key in scores]
    assert f"{at / 'fp8'} (fp8)" in told


def test_a_served_directory_is_evaluated_with_its_own_codes(at, measured):
    cells, _ = measured(at / "g32", at / "cal", "--task", "sort_letters")
    own = "int4_qat group_size=32"
    assert cells["g32", own]["logprob_mean"] != cells["cal", own]["logprob_mean"]
    # Dequantised INT4 weights are 16-bit values: served in bf16 they are the same policy.
    assert cells["cal", own]["logprob_abs_diff_max"] == 0


def test_a_quantised_directory_is_never_quantised_again(at, measured):
    cells, told = measured(at / "bf16", at / "fp8", "--precisions", "bf16", "fp8", "int4_qat")
    assert ("fp8", "int4_qat") not in cells and ("bf16", "int4_qat") in cells
    rows = [line for line in told.splitlines() if line.startswith(f"  {at / 'fp8'} (fp8)")]
    assert len(rows) == len(evaluate.SHOWN) and all(line.endswith("  -") for line in rows)


# -- what is refused ---------------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    try:
        code: Any = cli.main(["eval", *(str(word) for word in words)])
    except SystemExit as exit:  # argparse
        code = exit.code
    assert code == 2
    said = capsys.readouterr()
    assert said.out == "" and "Traceback" not in said.err and "evaluating" not in said.err
    return said.err


@pytest.mark.parametrize(("typed", "says"), [
    (("bf16", "--precisions", "fp9"), "--precisions: there is no 'fp9' -- did you mean 'fp8'? there are "),
    (("bf16", "--precisions", "bf16", "int4_qat", "group_size=48"), "int4_qat.group_size: 48 does not divide 128"),
    (("none",), "none is no directory; name a run"),
    ((".",), "neither a run nor a model directory: it has no checkpoints/ and no config.json"),
    (("plain",), "--task: a model directory does not say what it was trained on; type --task NAME"),
    (("plain", "--task", "ad"), "--task: there is no 'ad' -- did you mean 'add'?"),
    (("plain", "--task", "add", "sort_letters"), "--task: add, sort_letters: rows share one task; name one"),
    (("plain", "--task", "add", "digits=x"), "add.digits: should be a valid integer, got 'x'"),
    (("g32", "--task", "add", "--precisions", "fp8"), "add --precisions int4_qat group_size=32"),
    (("bf16", "--prompts", "99999999"), "--prompts: 99999999 is more than the 16576560 held-out prompts"),
    (("bf16", "--prompts", "0"), "argument --prompts: '0' is no whole number of at least 1"),
    (("bf16", "--seed", "-1"), "--seed"),
    (("bf16", "--temperature", "0"), "--temperature: 0 is not above 0"),
    (("bf16", "--json", "none/cells.json"), "--json: none/cells.json cannot be a file"),
    (("bf16", "--task", "sort_letters", "max_response=900"), "is more than the 512 positions of qwen3_tiny"),
])  # fmt: skip
def test_a_wrong_command_is_refused_in_words(at, monkeypatch, capsys, typed, says):
    monkeypatch.chdir(at)
    assert says in refused(capsys, *typed)


def test_runs_of_different_tasks_are_refused(at, tmp_path, capsys):
    train(tmp_path / "other", "task=add", "task.warmup=null", "steps=1")
    said = refused(capsys, at / "bf16", tmp_path / "other")
    assert f"{at / 'bf16'} was trained on sort_letters" in said and "type one" in said


def test_broken_directories_are_refused_before_the_first_answer(at, tmp_path, capsys):
    task = ("--task", "sort_letters")
    shutil.copytree(at / "g32", tmp_path / "gap")
    (shard,) = (tmp_path / "gap").glob("*.safetensors")
    shard.unlink()
    assert f"{shard} is missing" in refused(capsys, at / "bf16", tmp_path / "gap", *task)
    shutil.copytree(at / "g32", tmp_path / "odd")
    config = json.loads((tmp_path / "odd" / hf.CONFIG).read_text())
    (tmp_path / "odd" / hf.CONFIG).write_text(json.dumps(config | {"architectures": ["MambaForCausalLM"]}))
    assert "architecture MambaForCausalLM is not supported" in refused(capsys, tmp_path / "odd", *task)
    shutil.copytree(at / "g32", tmp_path / "mute")
    (tmp_path / "mute" / "tokenizer.json").unlink()
    assert "has no readable tokenizer.json" in refused(capsys, tmp_path / "mute", *task)
    shutil.copytree(at / "bf16", tmp_path / "torn")
    for path in (tmp_path / "torn" / "checkpoints").glob("*/master.safetensors"):
        path.unlink()
    assert "has no complete checkpoint" in refused(capsys, tmp_path / "torn")


def test_every_answer_of_a_task_that_is_always_right_counts(at, measured, monkeypatch):
    """Accuracy comes from the task's own reward, its interval from the number of prompts."""
    honest = Generated.reward
    monkeypatch.setattr(Generated, "reward", lambda *args: honest(*args)._replace(correct=True))
    cell = measured(at / "bf16", "--precisions", "bf16")[0]["bf16", "bf16"]
    assert cell["greedy_acc"] == cell["sampled_acc"] == 1
    z2 = 1.959963984540054**2
    assert cell["sampled_acc_95"] == pytest.approx([24 / (24 + z2), 1]) == cell["greedy_acc_95"]
    assert math.isfinite(cell["logprob_mean"])


def _numbers(cell: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in cell.items() if key not in ("checkpoint", "precision")}
