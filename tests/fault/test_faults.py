"""Faults: refused by contract or checksum; hidden, caught by a sentinel within two steps and told loudly."""

from __future__ import annotations

import json

import pytest

from lpexp import frontend
from lpexp.errors import ConfigError, RunError
from lpexp.groups import choices
from tests.loop.conftest import Ran, inline

__all__ = ["inline"]  # the fixture

# fault -> (a matched pair that can have it, who refuses it, the step of the alarm)
PLANTED = {
    "group_size": (("precision=int4_qat",), "rollout disagrees on model.layers.0", 0),
    "scale_rule": (("precision=fp8",), "rollout disagrees on model.layers.0", 0),
    "excluded_module": (("precision=fp8",), "rollout disagrees on model.layers.0.self_attn.q_proj", 0),
    "missing_scale": (("precision=int4_qat",), "weights of version 0: engine 0 holds", 0),
    "stale_weights": (("precision=bf16", "trainer.lr=1e-3"), "weights of version 1: engine 0 holds", 1),
    "temperature": (("precision=bf16",), "rollout disagrees on sampling", 0),
}
FAST = ("task.warmup=null", "steps=2", "eval.every=9")


def alarms(run: Ran) -> list[dict]:
    return [event for event in run.events if event["kind"] == "alarm"]


@pytest.mark.parametrize("fault", PLANTED)
def test_a_fault_is_refused_before_its_samples_are_learned_from(inline, fault):
    words, refusal, _ = PLANTED[fault]
    with pytest.raises(RunError, match=refusal):
        inline(*words, f"fault={fault}", *FAST)


@pytest.mark.parametrize("fault", PLANTED)
def test_a_hidden_fault_is_caught_within_two_steps_and_announced(inline, capsys, fault):
    words, _, step = PLANTED[fault]
    run = inline(*words, f"fault={fault}", "fault.hidden=true", *FAST)
    assert next(alarm["step"] for alarm in alarms(run)) == step
    header, _, end = capsys.readouterr().out.partition("step 1/2")
    said = json.loads((run.directory / "summary.json").read_text())["fault"]
    for text in (header, end):
        assert "FAULT" in text and said in text
    assert [event["name"] for event in run.events if event["kind"] == "fault"] == [fault]


def test_without_a_fault_nothing_is_announced_and_nothing_alarms(inline, capsys):
    run = inline("precision=fp8", *FAST)
    assert alarms(run) == [] and "FAULT" not in capsys.readouterr().out
    assert "fault" not in json.loads((run.directory / "summary.json").read_text())


def test_every_fault_is_planted_here():
    assert {*PLANTED, "none"} == set(choices("fault"))


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("fault=group_size",), "'group_size' is no field of bf16"),
        (("fault=group_size", "precision=int4_qat", "precision.group_size=32"), "32 is what the trainer has too"),
        (("fault=group_size", "precision=int4_qat", "fault.value=48"), "48 does not divide 128"),
        (("fault=scale_rule", "precision=fp8", "fault.value=pow3"), "'pow3' is no scale_format of fp8"),
        (("fault=missing_scale",), "bf16 quantises nothing"),
        (
            ("fault=excluded_module", "precision=fp8", "fault.tensor=lm_head.weight"),
            "'lm_head.weight' is not quantised",
        ),
        (("fault=temperature", "fault.factor=1"), "1 changes no temperature"),
    ],
)
def test_a_fault_that_cannot_be_made_is_refused_with_the_way_out(words, why):
    with pytest.raises(ConfigError, match=why):
        frontend.experiment(*words)
