"""Which run continues: never another one, never in silence, and never two processes in one directory."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from lpexp import checkpoint
from lpexp.errors import ConfigError
from lpexp.experiment import MAY_CHANGE, Experiment


def but(exp: Experiment, **changes: Any) -> Experiment:
    """The experiment with other values, given as plain data."""
    return Experiment.model_validate({**exp.dump(), **changes})


def start(exp: Experiment, *steps: int, finished: bool = False) -> Path:
    """A run that saved these steps and ended or died."""
    with checkpoint.Claim(checkpoint.resolve(exp), exp) as claim:
        run = claim.path.parent
        for step in steps:
            write_step(exp, run, step)
        if finished:
            checkpoint.finish(run, {"reward": 1.0})
    return run


def write_step(exp: Experiment, run: Path, step: int) -> Path:
    state = checkpoint.describe(exp, step, step)
    return checkpoint.save(run, step, state, lambda d: (d / "w").write_text(str(step)), keep=9)


def refused(exp: Experiment, run_dir: Path | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        checkpoint.resolve(exp, run_dir)
    return str(error.value)


# -- resume=none -------------------------------------------------------------------------------------------------------


def test_a_new_run_starts_at_step_0_and_resolving_writes_nothing(exp, tmp_path):
    resume = checkpoint.resolve(exp)
    assert (resume.step, resume.checkpoint, resume.notes) == (0, None, ())
    assert resume.run_dir == Path(exp.output_dir)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("steps", [(), (5,), (5, 10)])
def test_a_directory_that_holds_a_run_is_refused_with_the_two_ways_on(exp, steps):
    run = start(exp, *steps)
    message = refused(exp)
    assert f"output_dir: {run} already holds a run" in message
    assert f"resume=auto output_dir={run}" in message and "another output_dir" in message
    assert f"checkpoint {steps[-1]:06d}" in message if steps else "checkpoint" not in message


def test_the_way_on_that_the_refusal_names_works(exp):
    run = start(exp, 5)
    assert checkpoint.resolve(but(exp, resume="auto", output_dir=str(run))).step == 5


def test_a_directory_that_holds_other_things_is_no_run(exp):
    Path(exp.output_dir).mkdir(parents=True)
    (Path(exp.output_dir) / "notes.txt").write_text("mine")
    assert checkpoint.resolve(exp).step == 0


def test_metrics_alone_make_a_run(exp):
    """Some other tool's or an older run's log must not be appended to."""
    Path(exp.output_dir).mkdir(parents=True)
    (Path(exp.output_dir) / "metrics.jsonl").write_text("{}\n")
    assert "already holds a run" in refused(exp)


# -- resume=DIR --------------------------------------------------------------------------------------------------------


def test_a_named_run_continues_from_its_newest_checkpoint(exp):
    run = start(exp, 5, 10)
    resume = checkpoint.resolve(but(exp, resume=str(run), output_dir=f"{run.parent}/2026-09-09_00-00-00"))
    assert resume.run_dir == run and resume.step == 10 and resume.state["version"] == 10
    assert resume.checkpoint is not None and (resume.checkpoint / "w").read_text() == "10"


def test_a_named_run_that_does_not_exist_is_refused_with_those_that_do(exp):
    run = start(exp, 5)
    missing = run.parent / "nowhere"
    message = refused(but(exp, resume=str(missing)))
    assert f"resume: {missing} does not exist" in message and str(run) in message


def test_a_named_run_without_a_checkpoint_is_refused_with_what_is_there(exp):
    run = start(exp)
    message = refused(but(exp, resume=str(run)))
    assert f"{run} has no complete checkpoint; not starting over silently" in message
    assert "There: checkpoints, run.lock" in message and f"resume=auto output_dir={run}" in message


def test_a_named_run_whose_checkpoints_are_all_torn_is_refused_with_each(exp):
    run = start(exp, 5, 10)
    for step in ("000005", "000010"):
        (run / "checkpoints" / step / "w").write_text("other")
    for resume in (str(run), "auto"):
        message = refused(but(exp, resume=resume, output_dir=str(run)))
        assert "000005" in message and "000010" in message and "not starting over silently" in message


def test_a_checkpoint_directory_is_answered_with_its_run(exp):
    run = start(exp, 5)
    assert f"use resume={run}" in refused(but(exp, resume=str(run / "checkpoints" / "000005")))


def test_a_named_run_and_another_output_dir_are_refused(exp, tmp_path):
    run = start(exp, 5)
    assert "two directories" in refused(but(exp, resume=str(run), output_dir=str(tmp_path / "mine")))
    assert "two directories" in refused(but(exp, resume=str(run)), tmp_path / "2026-01-01_00-00-00")


# -- resume=auto -------------------------------------------------------------------------------------------------------


def later(exp: Experiment, stamp: str = "2026-12-31_00-00-00", **changes: Any) -> Experiment:
    """The same command at a later time: the default output_dir has another time stamp."""
    return but(exp, output_dir=str(Path(exp.output_dir).with_name(stamp)), **changes)


def test_auto_takes_the_newest_unfinished_run_of_this_config_and_names_it(exp):
    start(later(exp, "2026-01-01_00-00-01"), 5)
    newest = start(later(exp, "2026-01-01_00-00-02"), 10)
    start(later(exp, "2026-01-01_00-00-03"), 100, finished=True)
    start(later(exp, "2026-01-01_00-00-04", seed=2), 15)
    resume = checkpoint.resolve(later(exp, resume="auto"))
    assert resume.run_dir == newest and resume.step == 10
    assert str(newest) in resume.notes[0] and exp.hash() in resume.notes[0]


def test_auto_takes_a_run_that_died_before_its_first_checkpoint(exp):
    run = start(exp)
    resume = checkpoint.resolve(later(exp, resume="auto"))
    assert (resume.run_dir, resume.step, resume.continues) == (run, 0, True)
    assert any("no checkpoint yet" in note for note in resume.notes)


def test_auto_without_such_a_run_starts_and_says_so(exp):
    start(later(exp, seed=2), 5)
    resume = checkpoint.resolve(but(exp, resume="auto"))
    assert resume.run_dir == Path(exp.output_dir) and resume.step == 0
    assert "no unfinished run" in resume.notes[0]


def test_auto_with_a_chosen_output_dir_looks_nowhere_else(exp, tmp_path):
    start(later(exp), 5)
    chosen = tmp_path / "name" / "mine"
    resume = checkpoint.resolve(but(exp, resume="auto", output_dir=str(chosen)))
    assert (resume.run_dir, resume.step) == (chosen, 0)
    stamped = tmp_path / "name" / "2027-01-01_00-00-00"
    assert checkpoint.resolve(but(exp, resume="auto"), stamped).run_dir == stamped


def test_auto_falls_back_from_a_torn_checkpoint_and_says_which(exp):
    run = start(exp, 5, 10)
    (run / "checkpoints" / "000010" / "w").write_text("99")
    resume = checkpoint.resolve(but(exp, resume="auto"))
    assert resume.step == 5
    assert any("000010" in note and "w has sha256" in note for note in resume.notes)


def test_a_finished_run_has_nothing_left_to_do(exp):
    run = start(exp, exp.steps, finished=True)
    resume = checkpoint.resolve(but(exp, resume="auto"))
    assert resume.finished and resume.step == exp.steps
    with checkpoint.Claim(resume, exp):
        pass
    assert (run / "finished.json").exists()


def test_more_steps_for_a_finished_run_withdraw_its_end(exp):
    run = start(exp, exp.steps, finished=True)
    longer = but(exp, resume="auto", steps=exp.steps + 50, resume_force=True)
    resume = checkpoint.resolve(longer)
    assert not resume.finished and resume.step == exp.steps
    with checkpoint.Claim(resume, longer):
        assert not (run / "finished.json").exists()


# -- changed configs ---------------------------------------------------------------------------------------------------


def test_a_changed_config_is_refused_with_every_differing_key(exp):
    start(exp, 5)
    trainer = {**exp.trainer.dump(), "lr": 0.5}
    message = refused(but(exp, resume="auto", seed=9, trainer=trainer, precision=precision("fp8")))
    assert f"seed: {exp.seed} -> 9" in message
    assert f"trainer.lr: {exp.trainer.dump()['lr']} -> 0.5" in message
    assert "precision.name: bf16 -> fp8" in message and "precision.scale_format: absent -> fp32" in message
    assert "resume_force=true" in message and "another output_dir" in message
    assert "steps" not in message


def precision(name: str) -> dict[str, Any]:
    return {"_target_": "lpexp.precision.fp8.Fp8", "name": name, "scope": "auto", "scale_format": "fp32"}


def test_force_continues_and_notes_what_differs(exp):
    start(exp, 5)
    forced = but(exp, resume="auto", seed=9, resume_force=True)
    resume = checkpoint.resolve(forced)
    assert resume.step == 5 and any(f"seed: {exp.seed} -> 9" in note for note in resume.notes)
    with checkpoint.Claim(resume, forced):
        pass
    assert checkpoint.resolve(but(forced, resume_force=False)).step == 5, "the run now is what it was forced to be"
    assert "seed: 9 -> 1" in refused(but(exp, resume="auto"))


def test_keys_that_decide_no_number_may_change(exp):
    start(exp, 5)
    changed = but(
        exp,
        resume="auto",
        stop_grace_s=99.0,
        checkpoint={"every": 3, "keep": 7},
        record={"keep": 0},
        wandb={**exp.wandb.dump(), "project": "other"},
    )
    assert changed.hash() == exp.hash()
    assert checkpoint.resolve(changed).step == 5


def test_a_key_is_free_to_change_exactly_when_the_hash_leaves_it_out(exp):
    for key in Experiment.model_fields:
        other = exp.model_copy(update={key: "something else"})
        assert (other.hash() == exp.hash()) == (key in MAY_CHANGE), key


# -- one process a directory -------------------------------------------------------------------------------------------


def claim(exp: Experiment) -> checkpoint.Claim:
    return checkpoint.Claim(checkpoint.resolve(exp), exp)


@pytest.fixture
def holder(exp):
    """A living process that runs in the directory."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        claim(exp)
        os.write(writer, b".")
        time.sleep(60)
        os._exit(0)
    assert os.read(reader, 1) == b"."
    yield pid
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass  # the test ended it


def test_a_directory_with_a_living_run_is_refused_with_its_pid(exp, holder):
    auto = but(exp, resume="auto")
    assert f"process {holder} on {socket.gethostname()} is running in {exp.output_dir}" in refused(auto)
    assert f"process {holder}" in refused(later(exp, resume="auto")), "found as a candidate"
    blind = checkpoint.Resume(Path(exp.output_dir), continues=True)  # resolved before the other one started
    with pytest.raises(ConfigError, match=f"process {holder}"):
        checkpoint.Claim(blind, exp)


def test_the_lock_of_a_killed_process_is_taken_over_even_before_it_is_reaped(exp, holder):
    os.kill(holder, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while checkpoint._born(holder) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    with claim(but(exp, resume="auto")) as taken:  # the holder is a zombie here
        assert json.loads(taken.path.read_text())["pid"] == os.getpid()


STALE = {
    "released": "",
    "torn": "{",
    "incomplete": '{"pid": 1}',
    "dead": json.dumps({"pid": 2**22 + 7, "born": "x", "host": socket.gethostname()}),
    "the pid is another process now": json.dumps({"pid": 1, "born": "earlier", "host": socket.gethostname()}),
}


@pytest.mark.parametrize("text", STALE.values(), ids=STALE)
def test_a_stale_lock_is_taken_over(exp, text):
    run = start(exp, 5)
    (run / checkpoint.LOCK).write_text(text)
    with claim(but(exp, resume="auto")):
        pass


def test_the_lock_of_another_machine_is_respected_with_the_way_out(exp):
    run = start(exp, 5)
    (run / checkpoint.LOCK).write_text(json.dumps({"pid": 7, "born": "x", "host": "elsewhere"}))
    assert f"process 7 on elsewhere is running in {run}; if that machine no longer" in refused(but(exp, resume="auto"))


def test_a_released_directory_is_free(exp):
    with claim(exp):
        pass
    with claim(but(exp, resume="auto")):
        pass


def test_of_many_processes_that_start_at_once_one_runs(exp, tmp_path):
    """All resolve first; the claim alone decides."""
    go = tmp_path / "go"
    pids = []
    for _ in range(8):
        pid = os.fork()
        if not pid:
            code = 3
            try:
                resume = checkpoint.resolve(exp)
                while not go.exists():
                    time.sleep(0.001)
                try:
                    checkpoint.Claim(resume, exp)
                    code = 0
                    time.sleep(1.0)
                except ConfigError:
                    code = 2
            finally:
                os._exit(code)
        pids.append(pid)
    time.sleep(0.2)
    go.touch()
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert sorted(codes) == [0, *[2] * 7]


def test_a_run_that_appeared_after_resolving_is_not_overwritten(exp):
    resume = checkpoint.resolve(exp)
    start(exp, 5)
    with pytest.raises(ConfigError, match="already holds a run"):
        checkpoint.Claim(resume, exp)


def test_an_output_dir_that_cannot_be_made_is_refused(exp, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=rf"output_dir: {tmp_path / 'file'}/run cannot be written"):
        claim(but(exp, output_dir=str(tmp_path / "file" / "run")))


def test_resolving_and_claiming_load_neither_torch_nor_ray(exp, tmp_path):
    import subprocess
    import sys

    (tmp_path / "exp.json").write_text(json.dumps(exp.dump()))
    script = (
        "import json, sys; from lpexp import checkpoint; from lpexp.config import load;"
        "from lpexp.experiment import Experiment;"
        f"exp = load(json.load(open({str(tmp_path / 'exp.json')!r})), Experiment);"
        "checkpoint.Claim(checkpoint.resolve(exp), exp).release();"
        "print(sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
