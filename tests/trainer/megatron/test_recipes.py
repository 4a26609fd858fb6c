"""Each production recipe's twin: `scale=laptop trainer=megatron`, three steps on cores."""

from __future__ import annotations

from pathlib import Path

import pytest

from lpexp import frontend, loop
from tests.config.test_recipes import TABLE
from tests.loop.conftest import Ran


@pytest.mark.parametrize("name", TABLE)
def test_the_twin_of_a_recipe_trains_three_steps_without_mismatch(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its precision, scope, algorithm and batch; only sizes, machine, engine and task are small."""
    words = [f"experiment={name}", "scale=laptop", "trainer=megatron", "cluster=inline", "steps=3"]
    words += ["task.warmup=null", "eval.show=0", "wandb.mode=disabled", f"output_dir={tmp_path / 'run'}"]
    full, twin = frontend.experiment(f"experiment={name}"), frontend.experiment(*words)
    assert type(twin.trainer) is type(full.trainer)
    assert (twin.precision, twin.algorithm, twin.correction) == (full.precision, full.algorithm, full.correction)
    asked = [exp.task.prompts_per_step * exp.oversample for exp in (full, twin)]
    assert asked[0] == asked[1] == TABLE[name].sampled_prompts
    for variable, value in twin.trainer.environment(twin).items():
        monkeypatch.setenv(variable, value)  # an inline worker sets it in this process: it is taken back here
    assert loop.run(twin, words) == 0
    run = Ran(0, tmp_path / "run")
    assert run.steps("mismatch/logprob_abs_diff_max") == [0.0] * 3  # on one rank
    assert max(run.steps("train/grad_norm")) > 0
