"""`lpexp explain`: every logged key and every config field has a meaning, and it is said who set a value."""

from __future__ import annotations

from pathlib import Path

import pytest

from lpexp import cli, glossary
from lpexp.experiment import Experiment
from lpexp.fields import FIELDS
from lpexp.metric import BANDS, METRICS, find
from tests import made_up_runs as made_up


def told(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, str]:
    assert cli.main(["explain", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {line[2:12].strip(): line[12:] for line in lines[1:] if line.startswith("  ")}


# -- walks ------------------------------------------------------------------------------------------------------------
def test_every_config_field_has_a_meaning_and_every_meaning_a_field() -> None:
    keys = glossary.every_key()
    assert len(keys) > 150 and {"steps", "rollout.precision.group_size", "model.moe.top_k", "trainer.tp"} <= set(keys)
    assert [key for key in keys if not glossary.meaning(key)] == []
    assert [key for key in FIELDS if key not in keys] == []


def test_a_field_of_a_composed_config_is_a_known_key() -> None:
    """The walk over classes misses nothing that a config has."""
    exp = made_up.composed("model=qwen3_moe_tiny", "precision=fp8", "rollout.precision=int4_qat")
    assert isinstance(exp, Experiment)
    from lpexp.checkpoint import flat

    keys = [key for key, _ in flat(exp.dump()) if not key.endswith("_target_")]
    assert len(keys) > 90 and [key for key in keys if key not in glossary.every_key()] == []


def test_a_meaning_is_one_sentence_or_two_and_ends_with_a_full_stop() -> None:
    assert [key for key, text in FIELDS.items() if not text.endswith(".") or "\n" in text or len(text) > 120] == []


def test_every_logged_key_prints_formula_unit_band_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    for metric in METRICS:
        (text, *_) = glossary.explain(metric.key)
        for row in ("meaning", "formula", "unit", "over", "band", "default", "set by"):
            assert f"\n  {row} " in text, (metric.key, row)
        assert metric.formula in text and metric.text in text


def test_every_key_that_a_run_logs_is_explained(tmp_path: Path) -> None:
    from tests.small_run import lines, train

    logged = lines(train(tmp_path, "steps=1", "precision=bf16", "rollout.precision=fp8"))[0]
    assert len(logged) > 150
    for key in logged:
        if key != "step":
            assert next(glossary.explain(key)).startswith(key)


def test_every_band_is_of_a_logged_key() -> None:
    assert [key for key in BANDS if find(key) is None or find(key).key != key] == []  # type: ignore[union-attr]


# -- single keys ------------------------------------------------------------------------------------------------------
def test_a_metric_says_formula_and_band(capsys: pytest.CaptureFixture[str]) -> None:
    rows = told(capsys, "mismatch/kl_k3")
    assert (rows["formula"], rows["unit"]) == ("<exp(d) - 1 - d>", "nat")
    assert rows["band"].startswith("exactly 0 where both sides share a precision")


def test_an_instance_of_a_pattern_is_explained_by_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "quant/mlp_up/rel_error"]) == 0
    said = capsys.readouterr().out
    assert (
        said.startswith("quant/mlp_up/rel_error  (an instance of quant/<class>/rel_error)") and "groups of 32" in said
    )


@pytest.mark.parametrize(
    ("words", "now", "by"),
    [
        (("steps",), "100", "conf/config.yaml"),
        (("steps", "steps=7"), "7", "typed: steps=7"),
        (("eval.every", "eval={every: 5}"), "5", "typed: eval={every: 5}"),
        (("trainer.lr",), "0.0002", "conf/trainer/embedded.yaml"),
        (("model.initializer_range",), "0.036", "conf/model/qwen3_tiny.yaml"),
        (("model.parallel.nodes", "model=qwen3_30b", "precision=fp8"), "2", "conf/layout/qwen3_30b_fp8.yaml"),
        (
            ("precision.group_size", "precision=int4_qat"),
            "128",
            "conf/precision/int4_qat.yaml, chosen by precision=int4_qat",
        ),
        (
            ("rollout.precision.divisor", "rollout.precision=int4_qat", "rollout.precision.divisor=7.5"),
            "7.5",
            "typed: rollout.precision.divisor=7.5",
        ),
        (
            ("trainer.lr", "experiment=smollm2_arithmetic"),
            "2e-05",
            "conf/experiment/smollm2_arithmetic.yaml, chosen by experiment=smollm2_arithmetic",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_it_is_said_what_a_key_is_now_and_who_set_it(capsys, words: tuple[str, ...], now: str, by: str) -> None:
    rows = told(capsys, *words)
    assert (rows["now"], rows["set by"]) == (now, by)


def test_a_key_that_only_some_choices_have_is_shown_with_one_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    rows = told(capsys, "precision.group_size")
    assert rows["with"] == "precision=int4_qat, precision=w8a16" and rows["default"] == "128"
    assert rows["set by"].endswith("chosen by precision=int4_qat here, since it has the key")


def test_values_are_those_of_the_type(capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, "precision.backward")["values"] == "quantised | high_precision | dequantised"
    assert told(capsys, "eval.top_p")["values"] == "a number, above 0, at most 1"
    assert told(capsys, "dry_run")["values"] == "true | false"


def test_a_run_says_what_it_had(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = made_up.run(tmp_path / "run", "trainer.lr=1e-4")
    (run / "overrides.yaml").write_text("[trainer.lr=1e-4]\n")
    rows = told(capsys, "trainer.lr", "--run", str(run))
    assert (rows["now"], rows["set by"]) == ("0.0001", "typed: trainer.lr=1e-4")
    assert told(capsys, "steps", "--run", str(run))["set by"] == "the file that the run was started from"
    assert cli.main(["explain", "steps", "--run", str(tmp_path)]) == 2


def test_a_part_lists_what_is_under_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "eval", "quant"]) == 0
    said = capsys.readouterr().out
    assert "\n  eval.prompts " in said and "\n  quant/<class>/sqnr_db " in said


@pytest.mark.parametrize(
    ("word", "near"),
    [("mismatch/kl_k33", "mismatch/kl_k3"), ("precision.groupsize", "precision.group_size"), ("lags", "lag")],
)
def test_an_unknown_key_is_refused_with_the_nearest(capsys, word: str, near: str) -> None:
    assert cli.main(["explain", word]) == 2
    assert f"did you mean {near}?" in capsys.readouterr().err
    assert cli.main(["explain", "steps=3"]) == 2
