"""Every algorithm on the loop as it is: the zero baseline holds, ranks change nothing, a critic resumes bitwise."""

from __future__ import annotations

import pytest

from lpexp import loop, record
from lpexp.compare import compare
from lpexp.errors import RunError
from lpexp.groups import choices
from lpexp.trainer.critic import Critic
from tests.loop.conftest import SMALL, Ran, compose

MAX = "mismatch/logprob_abs_diff_max"
FULL = (  # the default batch and evaluation, which the small runs of the other tests change
    "task.prompts_per_step=16",
    "algorithm.samples_per_prompt=16",
    "rollout.slots=128",
    "eval.prompts=128",
    "eval.samples=4",
)
# Everything that needs the whole batch before its first update: credit, a critic, a reference, normalised weights.
WHOLE = (
    "algorithm=ppo",
    "algorithm.kl_reward_coef=0.01",
    "algorithm.updates_per_batch=2",
    "precision=bf16",
    "precision@rollout.precision=int4_qat",
    "correction=tis_sequence",
    "correction.batch_normalise=true",
    "lag=1",
    "steps=4",
    "checkpoint.every=2",
)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("name", choices("algorithm"))
def test_each_algorithm_runs_with_a_mismatch_of_exactly_zero(inline, name: str, lag: int) -> None:
    run = inline(f"algorithm={name}", f"lag={lag}", "steps=3")
    assert run.code == 0
    assert run.steps(MAX) == [0.0] * 3
    assert min(run.steps("train/grad_norm")) > 0
    assert run.steps("update/clip_frac") == [0.0] * 3  # one update a batch
    if lag == 0:
        assert run.steps("correction/weight_min") == [1.0] * 3


def test_later_updates_move_the_ratio_that_the_algorithm_compares(inline) -> None:
    moved = {}
    for name in ("grpo", "gspo", "rloo"):
        run = inline(f"algorithm={name}", "steps=1", "algorithm.updates_per_batch=2", "trainer.lr=1e-2", name=name)
        moved[name] = run.steps("update/clip_frac")[0]
    assert moved["gspo"] > moved["grpo"] > 0 and moved["rloo"] > 0  # GSPO's bounds are a thousand times narrower


def test_a_reference_charges_the_reward_once_the_policy_leaves_it(inline) -> None:
    plain = inline("algorithm=reinforce_pp", "steps=2", "trainer.lr=1e-2", name="plain")
    charged = inline(
        "algorithm=reinforce_pp", "algorithm.kl_reward_coef=5", "steps=2", "trainer.lr=1e-2", name="charged"
    )
    assert plain.steps("train/grad_norm")[0] == charged.steps("train/grad_norm")[0]  # the policy is the reference
    assert plain.steps("train/grad_norm")[1] != charged.steps("train/grad_norm")[1]
    assert charged.steps("train/kl_ref_k3")[1] > 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The directory of a run of WHOLE in one process, and its lines."""
    at = tmp_path_factory.mktemp("whole") / "run"
    return Ran(loop.run(compose("cluster=inline", *SMALL, f"output_dir={at}", *WHOLE), WHOLE), at)


def test_the_critic_learns_what_answers_are_worth(whole) -> None:
    assert whole.steps("train/value_mean")[0] == 0.0
    assert whole.steps("train/value_mean")[-1] > 0
    assert all(loss > 0 for loss in whole.steps("train/value_loss"))


@pytest.fixture
def broken_off(inline, monkeypatch) -> None:
    """The same run, ended by an error in its last step; the newest checkpoint is that of step 2."""
    honest = record.save

    def breaks(run_dir, report, keep):
        if report.batch.step == 3:
            raise RunError("broken off")
        honest(run_dir, report, keep)

    with monkeypatch.context() as patch:
        patch.setattr(record, "save", breaks)
        with pytest.raises(RunError, match="broken off"):
            inline(*WHOLE)


def test_a_run_with_a_critic_that_breaks_off_resumes_to_the_same_bytes(whole, inline, broken_off) -> None:
    run = inline(*WHOLE, "resume=auto")
    assert [event["step"] for event in run.events if event["kind"] == "start"] == [0, 2]
    assert compare(whole.directory, run.directory, exact=True) == 0


def test_a_critic_that_is_not_restored_shows(whole, inline, broken_off, monkeypatch) -> None:
    monkeypatch.setattr(Critic, "load", lambda self, state: None)
    assert compare(whole.directory, inline(*WHOLE, "resume=auto").directory, exact=True) == 1


def test_two_ranks_give_the_bits_of_one(whole, launch) -> None:
    run = launch(*WHOLE, "trainer.ranks=2", "cluster=local")
    assert run.code == 0, run.output
    assert compare(whole.directory, run.directory, exact=True) == 0


@pytest.mark.evidence
@pytest.mark.parametrize("name", choices("algorithm"))
def test_each_algorithm_learns_the_default_task(inline, name: str) -> None:
    """At least +0.15 sampled accuracy on held-out prompts in 100 steps, as GRPO in its three precisions."""
    run = inline(*FULL, f"algorithm={name}", "steps=100")
    found = {event["version"]: event["metrics"] for event in run.events if event["kind"] == "eval"}
    sampled = [found[version]["eval/sort_letters/sampled_acc"] for version in sorted(found)]
    assert sampled[0] <= 0.25
    assert sampled[-1] - sampled[0] >= 0.15
    assert set(run.steps(MAX)) == {0.0}
