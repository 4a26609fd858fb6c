"""sort_letters, reverse and add: what a prompt depends on, the held-out split, the reward, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lpexp.config import load
from lpexp.data import Group, Prompt, Sample
from lpexp.errors import ConfigError
from lpexp.model.tokenizer import STOP, CharTokenizer
from lpexp.task import HELD_OUT, Task, is_held_out
from lpexp.task.add import Add
from lpexp.task.generated import Generated
from lpexp.task.reverse import Reverse
from lpexp.task.sort_letters import SortLetters

CHAR = CharTokenizer()
KINDS = {"sort_letters": SortLetters, "reverse": Reverse, "add": Add}
SIZES = {"max_prompt": 16, "max_response": 16, "prompts_per_step": 16}


def make(name: str, **given: Any) -> Generated:
    return load({"name": name, **SIZES, **given}, KINDS[name])


TASKS = [make(name) for name in KINDS]
SMALL = [make("sort_letters", length=4, alphabet=6), make("reverse", length=2, alphabet=26), make("add", digits=1)]
every_task = pytest.mark.parametrize("task", [*TASKS, *SMALL], ids=lambda task: f"{task.name}-{task.size()}")


def texts(prompts: list[Prompt]) -> list[str]:
    return [prompt.text for prompt in prompts]


# -- prompts --
def test_prompts_and_answers_look_as_documented() -> None:
    # Committed curves and warm-up caches depend on these very prompts.
    def shown(name: str, **given: Any) -> list[tuple[str, str]]:
        return [(p.text, p.answer) for p in make(name, prompts_per_step=2, **given).train(0, 0, CHAR)]

    assert shown("sort_letters") == [("rtxbsc>", "bcrstx"), ("ekcjdw>", "cdejkw")]
    assert make("sort_letters").solve("qzbxaf>") == "abfqxz"
    assert make("reverse").solve("abcdefgh>") == "hgfedcba"
    assert make("add").solve("12+34=") == "46"
    assert make("add").solve("99+1=") == "100"


@every_task
def test_a_prompt_carries_its_tokens_its_answer_and_a_unique_id(task: Generated) -> None:
    for step in (0, 1, 7):
        for index, prompt in enumerate(task.train(3, step, CHAR)):
            assert prompt.id == step * 16 + index
            assert prompt.tokens == tuple(CHAR.encode(prompt.text))
            assert prompt.answer == task.solve(prompt.text)
            longest_prompt, longest_answer = task.longest()
            assert len(prompt.text) <= longest_prompt
            assert len(prompt.answer) <= longest_answer
    assert [p.id for p in task.held_out(3, 3, CHAR)] == [HELD_OUT, HELD_OUT + 1, HELD_OUT + 2]


@every_task
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), step=st.integers(0, 10**6))
def test_training_and_held_out_prompts_never_overlap(task: Generated, seed: int, step: int) -> None:
    training = texts(task.train(seed, step, CHAR)) + texts([p for p, _ in task.examples(seed, step, 8, CHAR)])
    held_out = texts(task.held_out(seed, 8, CHAR))
    assert not any(is_held_out(text) for text in training)
    assert all(is_held_out(text) for text in held_out)


@every_task
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), step=st.integers(0, 10**6))
def test_the_prompts_of_a_step_are_distinct(task: Generated, seed: int, step: int) -> None:
    assert len(set(texts(task.train(seed, step, CHAR)))) == 16
    assert len(set(texts(task.held_out(seed, 8, CHAR)))) == 8


@every_task
def test_prompts_depend_on_nothing_but_seed_and_step(task: Generated) -> None:
    again = load(task.dump(), Task)
    first = {(seed, step): task.train(seed, step, CHAR) for seed in (1, 2) for step in (0, 1, 2)}
    np.random.default_rng().random()  # no generator state is shared
    for seed, step in reversed(first):  # nor does the order matter
        again.held_out(seed, 3, CHAR)
        assert again.train(seed, step, CHAR) == first[seed, step]
    sets = [frozenset(texts(prompts)) for prompts in first.values()]
    assert len(set(sets)) == len(sets)  # and on both of them


def test_prompts_are_the_same_in_another_process_with_another_hash_seed() -> None:
    code = (
        "from lpexp.task.sort_letters import SortLetters; from lpexp.model.tokenizer import CharTokenizer; import sys;"
        "task = SortLetters(name='sort_letters', max_prompt=16, max_response=16, prompts_per_step=16);"
        "print(*[p.text for p in task.train(5, 6, CharTokenizer())]); sys.exit('torch' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONHASHSEED": "77"}, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == texts(make("sort_letters").train(5, 6, CHAR))


@pytest.mark.parametrize("given", [{}, {"alphabet": 6}, {"distinct": False, "alphabet": 3}])
def test_letters_are_distinct_unless_asked_otherwise_and_come_from_the_alphabet(given: dict[str, Any]) -> None:
    prompts = make("sort_letters", **given).held_out(0, 40, CHAR)
    letters = "abcdefghijklmnopqrstuvwxyz"[: given.get("alphabet", 26)]
    assert set("".join(texts(prompts))) == set(letters) | {">"}
    assert all(len(set(text)) == len(text) for text in texts(prompts)) == given.get("distinct", True)


def test_letters_are_drawn_evenly() -> None:
    task = make("sort_letters", alphabet=8)
    counts = np.zeros((6, 8))
    for key in range(4000):
        for place, letter in enumerate(task.draw(key)[:-1]):
            counts[place, ord(letter) - ord("a")] += 1
    # 500 expected with a standard deviation of 21: 5 of those leave a chance below 1e-4 for all 48 cells
    assert np.abs(counts - 500).max() < 5 * 21


@pytest.mark.parametrize("length", [4, 5, 6, 7, 8, 9, 10])
def test_every_length_that_the_knob_offers_works(length: int) -> None:
    prompts = make("sort_letters", length=length).train(0, 0, CHAR)
    assert {len(prompt.answer) for prompt in prompts} == {length}
    assert {len(prompt.tokens) for prompt in prompts} == {length + 1}


@every_task
def test_warm_up_examples_come_with_the_right_answer(task: Generated) -> None:
    examples = task.examples(0, 2, 10, CHAR)
    assert len({prompt.text for prompt, _ in examples}) == 10
    for prompt, answer in examples:
        score = task.reward(prompt, answer, "stop")
        assert score.correct
        assert score.reward == pytest.approx(1.0)


# -- how many there are --
@pytest.mark.parametrize("task", SMALL, ids=lambda task: task.name)
def test_a_small_task_hands_out_every_prompt_it_has_and_refuses_one_more(task: Generated) -> None:
    training, held_out = task.supply()
    every = list(task.texts())
    assert training + held_out == task.size() == len(set(every))
    assert sorted(texts(task.held_out(0, held_out, CHAR))) == sorted(filter(is_held_out, every))
    with pytest.raises(
        ConfigError, match=f"{task.name} has {held_out} different held-out prompts, but {held_out + 1} are"
    ):
        task.held_out(0, held_out + 1, CHAR)
    with pytest.raises(ConfigError, match=f"{task.name} has {training} different training prompts"):
        task.examples(0, 0, training + 1, CHAR)


def test_the_supply_of_a_task_too_large_to_list_is_never_overestimated() -> None:
    task = make("sort_letters", length=4, alphabet=13)  # 17160 prompts: just too many to be listed when judged
    held_out = sum(map(is_held_out, task.texts()))
    training = task.size() - held_out
    assert 0.7 * training < task.supply()[0] <= training
    assert 0.7 * held_out < task.supply()[1] <= held_out


# -- reward --
@pytest.mark.parametrize(
    ("answer", "finish", "reward", "partial", "correct"),
    [
        ("abfqxz", "stop", 1.0, 1.0, True),
        ("abfqxz", "length", 0.2, 1.0, False),  # truncated: it never said that it was done
        ("abfqxzz", "stop", 0.2, 1.0, False),
        ("abfqx", "stop", 0.2 * 5 / 6, 5 / 6, False),
        ("abfqzx", "stop", 0.2 * 4 / 6, 4 / 6, False),
        ("xabfqz", "stop", 0.2 * 1 / 6, 1 / 6, False),  # positions count, not the order
        ("", "stop", 0.0, 0.0, False),
        ("\ufffdbfqxz", "stop", 0.2 * 5 / 6, 5 / 6, False),
    ],
)
def test_the_reward_is_a_fifth_for_positions_and_four_for_the_exact_answer(
    answer: str, finish: str, reward: float, partial: float, correct: bool
) -> None:
    score = make("sort_letters").reward(Prompt(0, (), "qzbxaf>", "abfqxz"), answer, finish)
    assert score.reward == pytest.approx(reward)
    assert score.correct == correct
    assert score.parts == {"partial": pytest.approx(partial), "exact": float(correct)}


def test_scoring_decodes_the_tokens_up_to_the_stop_token() -> None:
    prompt = Prompt(0, (), "qzbxaf>", "abfqxz")
    answers = [[*CHAR.encode("abfqxz"), STOP], CHAR.encode("abfqxz"), [STOP]]
    samples = tuple(
        Sample(
            0, g, np.array(ids, np.int32), np.zeros(len(ids), np.float32), 0, "stop" if ids[-1] == STOP else "length"
        )
        for g, ids in enumerate(answers)
    )
    [group] = make("sort_letters").score([Group(prompt, samples)], CHAR)
    assert group.texts == ("abfqxz", "abfqxz", "")
    assert group.rewards_G == pytest.approx(np.array([1.0, 0.2, 0.0]))
    assert group.parts["correct"].tolist() == [1.0, 0.0, 0.0]
    assert group.errors == 0


# -- what is refused --
@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("sort_letters", {"length": 3}, r"length: .*greater than or equal to 4, got 3"),
        ("sort_letters", {"length": 11}, r"length: .*less than or equal to 10, got 11"),
        ("sort_letters", {"alphabet": 27}, r"alphabet: .*less than or equal to 26, got 27"),
        ("sort_letters", {"length": 8, "alphabet": 5}, r"length: 8 distinct letters cannot come from alphabet 5"),
        ("sort_letters", {"max_prompt": 6}, r"max_prompt: 6 is less than a prompt's 7 characters; use 7"),
        (
            "sort_letters",
            {"max_response": 6},
            r"max_response: 6 is less than .* 6 characters and its stop token; use 7",
        ),
        ("sort_letters", {"lenght": 5}, r"lenght: unknown key.* -- did you mean 'length'\?"),
        ("add", {"max_response": 3}, r"max_response: 3 is less than .* 3 characters and its stop token; use 4"),
        ("add", {"digits": 0}, r"digits: .*greater than or equal to 1"),
        (
            "add",
            {"digits": 1, "prompts_per_step": 100},
            r"prompts_per_step: 100 is more than all \d\d training prompts",
        ),
        ("reverse", {"length": 2, "alphabet": 2}, r"none of the 2 possible prompts is held out"),
        (
            "add",
            {"digits": 1, "warmup": {"batch_size": 100}},
            r"warmup\.batch_size: 100 is more than all \d\d training prompts",
        ),
    ],
)
def test_a_task_that_cannot_work_is_refused_when_judged(name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(name, **given)
