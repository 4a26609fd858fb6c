"""task=reasoning_gym: prompts are a function of seed and step, held-out ones are not trained on, scorers its own."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from lpexp import frontend
from lpexp.config import load
from lpexp.errors import ConfigError
from lpexp.task import HELD_OUT
from lpexp.task.reasoning_gym import UNSTABLE, ReasoningGym

SUMS = {
    "min_terms": 2,
    "max_terms": 2,
    "min_digits": 1,
    "max_digits": 1,
    "operators": ["+"],
    "allow_parentheses": False,
}


class Chat:
    """A tokenizer with a chat template: a letter a token, each message after its role."""

    stop_id, vocab_size = 0, 256

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids: Any) -> str:
        return "".join(map(chr, ids))

    def encode_prompt(self, prompt: Any, chat: bool = False) -> list[int]:
        assert chat
        assert not isinstance(prompt, str)
        return [ord(c) for message in prompt for c in f"{message['role'][0]}:{message['content']}\n"]


def make(**given: Any) -> ReasoningGym:
    sizes = {"name": "reasoning_gym", "max_prompt": 512, "max_response": 8, "prompts_per_step": 8}
    return load({"dataset": "basic_arithmetic", **sizes, **given}, ReasoningGym)


def texts(prompts: Any) -> list[str]:
    return [prompt.text for prompt in prompts]


def refused(**given: Any) -> str:
    with pytest.raises(ConfigError) as error:
        make(**given)
    return str(error.value).removeprefix("config has mistakes:\n  ")


# -- prompts -----------------------------------------------------------------------------------------------------------
def test_training_and_held_out_prompts_never_overlap_and_none_comes_twice_in_a_step() -> None:
    task = make(options=SUMS, held_out_one_in=2, shots=2)
    held_out = texts(task.held_out(1, 50, Chat()))
    steps = [texts(task.train(1, step, Chat())) for step in range(40)]
    assert len(set(held_out)) == 50
    assert all(len(set(step)) == 8 for step in steps)
    trained = {text for step in steps for text in step}
    assert len(trained) >= 45 and not trained & set(held_out)  # of 121: a rule that failed now and then would show
    shown = set(task._before()[1])
    assert len(shown) == 2 and not shown & (trained | set(held_out))


def test_prompts_are_a_function_of_seed_and_step_in_every_process() -> None:
    program = (
        "from tests.task.test_reasoning_gym import *\n"
        "task = make(dataset='letter_counting')\n"
        "print(texts(task.train(1, 7, Chat())) + texts(task.held_out(1, 4, Chat())))"
    )
    run = [sys.executable, "-c", program]
    said = {
        subprocess.run(run, env={"PYTHONHASHSEED": s}, capture_output=True, text=True, check=True).stdout for s in "12"
    }
    task = make(dataset="letter_counting")
    assert said == {f"{texts(task.train(1, 7, Chat())) + texts(task.held_out(1, 4, Chat()))}\n"}
    assert texts(task.train(1, 7, Chat())) != texts(task.train(1, 8, Chat())) != texts(task.train(2, 7, Chat()))


def test_ids_system_message_and_worked_examples() -> None:
    task = make(options=SUMS, system="You add.", shots=1)
    prompts = task.train(1, 3, Chat())
    assert [prompt.id for prompt in prompts] == list(range(24, 32))
    assert task.held_out(1, 2, Chat())[1].id == HELD_OUT + 1
    lines = "".join(map(chr, prompts[0].tokens)).splitlines()
    assert lines[0] == "s:You add." and lines[1].startswith("u:Calculate ") and lines[2].startswith("a:")
    assert lines[3] == f"u:{prompts[0].text}" and len(lines) == 4


def test_a_prompt_that_is_too_long_is_left_out_and_too_few_are_refused() -> None:
    options = {**SUMS, "max_terms": 6}
    assert max(len(prompt.tokens) for prompt in make(options=options, max_prompt=24).train(1, 0, Chat())) <= 24
    with pytest.raises(ConfigError) as error:
        make(options=SUMS).held_out(1, 50, Chat())
    assert str(error.value) == (
        "config has mistakes:\n  task.options: basic_arithmetic gave 12 different held-out prompts in 10000 draws, "
        "50 are needed; ask for fewer, or widen the options"
    )
    with pytest.raises(ConfigError, match="had more than max_prompt=5 tokens"):
        make(options=SUMS, max_prompt=5).train(1, 0, Chat())


# -- scores ------------------------------------------------------------------------------------------------------------
def test_the_data_set_s_own_scorer_judges_what_is_extracted_and_a_cut_answer_is_worth_nothing() -> None:
    whole, number, tag = (make(options=SUMS, extract=how) for how in ("whole", "number", "tag"))
    prompt = whole.train(1, 0, Chat())[0]
    right = prompt.answer
    assert whole.reward(prompt, f" {right}\n", "stop") == (1.0, True, {"exact": 1.0, "format": 1.0})
    said = f"It is {right}."
    partial = whole.reward(prompt, said, "stop")
    assert partial.reward == pytest.approx(len(right) / len(said)) and not partial.correct
    assert whole.reward(prompt, right, "length") == (0.0, False, {"exact": 0.0, "format": 1.0})
    assert number.reward(prompt, f"1000 - 7 is {right}.", "stop").correct
    assert not number.reward(prompt, f"{right} or 1000", "stop").correct
    assert number.reward(prompt, "none", "stop") == (0.0, False, {"exact": 0.0, "format": 0.0})
    assert tag.reward(prompt, f"so <answer>{right}</answer>", "stop").correct
    assert tag.reward(prompt, right, "stop").parts["format"] == 0.0


def test_a_scorer_that_needs_more_than_the_answer_gets_its_entry() -> None:
    task = make(dataset="countdown")  # many right answers; the scorer evaluates the expression
    prompt = task.train(1, 0, Chat())[0]
    entry = task._entry(prompt.source or 0)[1]
    assert task.reward(prompt, entry["metadata"]["expression"], "stop").correct
    assert not task.reward(prompt, "1 + 1", "stop").correct


@pytest.mark.parametrize(
    ("text", "found"), [("7 - 9 = -2", "-2"), ("a 3/4", "3/4"), ("1,000.5!", "1,000.5"), ("12.", "12"), ("no", None)]
)
def test_the_last_number(text: str, found: str | None) -> None:
    assert make(extract="number").extracted(text) == found


# -- refusals ----------------------------------------------------------------------------------------------------------
def test_wrong_names_and_options_are_refused_in_words() -> None:
    assert refused(dataset="basic_arithmetics") == (
        "dataset: reasoning-gym has no 'basic_arithmetics'; the nearest is basic_arithmetic"
    )
    assert refused(options={"max_term": 3}) == (
        "options.max_term: is no option of basic_arithmetic; did you mean 'max_terms'?"
    )
    assert refused(options={"seed": 3}) == "options.seed: is set by the run"
    assert refused(options={"min_terms": 9}) == (
        "options: basic_arithmetic refuses {'min_terms': 9}: max_terms must be >= min_terms"
    )
    assert refused(dataset="ransom_note") == (
        "dataset: 'ransom_note' asks other questions in each process, so a run could not be resumed or repeated; "
        "choose another"
    )
    assert refused(warmup={}) == "warmup: reasoning-gym tasks start from a trained model; use task.warmup=null"
    with pytest.raises(ConfigError) as error:
        frontend.experiment("task=reasoning_gym")
    assert str(error.value).removeprefix("config has mistakes:\n  ") == (
        "task.dataset: 'basic_arithmetic' asks through a chat template, which a model without model.path does not "
        "have; set model.path, or choose model=smollm2_135m"
    )


def test_a_missing_package_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from lpexp.task import reasoning_gym

    monkeypatch.setattr(reasoning_gym.importlib.util, "find_spec", lambda name: None)
    assert refused() == "dataset: needs the package reasoning-gym; pip install 'lpexp[reasoning-gym]'"


def test_options_are_typed_one_by_one_or_as_a_table() -> None:
    words = ["model=smollm2_135m", "task=reasoning_gym", "eval.prompts=8"]
    one = frontend.experiment(*words, "task.options.max_terms=2", "task.options.max_digits=1")
    table = frontend.experiment(*words, "task.options={max_terms: 2, max_digits: 1}")
    assert one.task == table.task
    assert one.task.dump()["options"] == {"max_terms": 2, "max_digits": 1}


@pytest.mark.evidence
def test_only_the_data_sets_that_are_refused_depend_on_the_hash_seed() -> None:
    """All of reasoning-gym, in two processes."""
    program = (
        "import json, reasoning_gym\n"
        "from reasoning_gym.factory import DATASETS\n"
        "found = {}\n"
        "for name in sorted(set(DATASETS) - {'composite'}):\n"
        "    asked = [reasoning_gym.create_dataset(name, seed=s, size=1)[0] for s in (7, 123456789)]\n"
        "    found[name] = [(one['question'], str(one['answer'])) for one in asked]\n"
        "print('\\n' + json.dumps(found))"
    )
    run = [sys.executable, "-W", "ignore", "-c", program]
    out = [subprocess.run(run, env={"PYTHONHASHSEED": s}, capture_output=True, text=True, check=True) for s in "12"]
    first, second = (json.loads(one.stdout.splitlines()[-1]) for one in out)
    assert {name for name in first if first[name] != second[name]} == set(UNSTABLE)
