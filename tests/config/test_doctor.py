"""`lpexp doctor`: a table of what is here and what runs."""

from __future__ import annotations

import pytest

from lpexp import cli, doctor


def test_doctor_prints_what_runs_and_ends_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in ("cores", "memory", "GPUs", "torch", "ray", "wandb", "megatron-core", "sglang", "python launch.py"):
        assert word in out


def test_doctor_says_why_not() -> None:
    nothing = {name: None for name, _ in doctor.PACKAGES}
    lacking = {check.what: check.lacking for check in doctor.checks(nothing, 0)}
    assert "torch is not installed" in str(lacking["python launch.py"])
    everything = {name: "1.0" for name, _ in doctor.PACKAGES}
    lacking = {check.what: check.lacking for check in doctor.checks(everything, 0)}
    assert lacking["python launch.py"] is None
    assert lacking["python launch.py cluster=gpu"] == "no NVIDIA GPU is visible to this process"
    assert {check.what: check.lacking for check in doctor.checks(everything, 1)}["python launch.py cluster=gpu"] is None


def test_an_unknown_command_is_refused() -> None:
    with pytest.raises(SystemExit) as refused:
        cli.main(["docter"])
    assert refused.value.code == 2
