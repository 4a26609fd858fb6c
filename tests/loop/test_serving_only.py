"""Precisions that only serve: an embedded engine serves them to a bf16 trainer, and the gap follows their error."""

from __future__ import annotations

MEAN = "mismatch/logprob_abs_diff_mean"


def test_every_serving_precision_runs_and_more_bits_leave_a_smaller_gap(inline):
    gap = {}
    for name in ("w8a16", "fp8_channel", "fp8_tensor", "int4_qat"):
        run = inline("precision=bf16", f"precision@rollout.precision={name}", "steps=2", name=name)
        assert run.code == 0, name
        gap[name] = max(run.steps(MEAN))
    assert 0 < gap["w8a16"] < gap["fp8_channel"] / 3 and gap["fp8_tensor"] < gap["int4_qat"]
    assert gap["fp8_channel"] < gap["int4_qat"]
