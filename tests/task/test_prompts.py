"""task=prompts: reading, splitting, shuffling, rewards, and every file mistake with its line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lpexp.config import load
from lpexp.data import Group, Prompt, Sample
from lpexp.errors import ConfigError, RunError
from lpexp.frontend import experiment
from lpexp.model.tokenizer import STOP, CharTokenizer
from lpexp.task import HELD_OUT, is_held_out
from lpexp.task.prompts import Prompts, last_boxed, math_equal

CHAR = CharTokenizer()
ROWS = [{"prompt": f"{i}+1=", "label": i + 1} for i in range(100)]
HERE = "tests.task.reward_functions"
Write = Callable[..., str]


def make(path: str | None, **given: Any) -> Prompts:
    sizes = {"max_prompt": 16, "max_response": 16, "prompts_per_step": 8}
    return load({"name": "prompts", "path": path, "chat_template": False, **sizes, **given}, Prompts)


def supply(task: Prompts) -> tuple[int, int]:
    found = task.supply()
    assert found is not None
    return found


def texts(prompts: list[Prompt]) -> list[str]:
    return [prompt.text for prompt in prompts]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write rows (objects, or lines as they are) to a JSONL file."""

    def write(rows: list[Any], name: str = "questions.jsonl") -> str:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / name).write_text("".join(line + "\n" for line in lines))
        return str(tmp_path / name)

    return write


@pytest.fixture
def path(write: Write) -> str:
    return write(ROWS)


class Chat(CharTokenizer):
    """A character tokenizer whose template writes the role's first letter before each message."""

    def encode_prompt(self, prompt: Any, chat: bool = False) -> list[int]:
        assert chat
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self.encode("".join(f"{m['role'][0]}:{m['content']}." for m in messages))


# -- reading --
def test_a_prompt_carries_text_tokens_label_and_a_unique_id(path: str) -> None:
    task = make(path)
    for step in (0, 1, 30):
        for index, prompt in enumerate(task.train(1, step, CHAR)):
            assert prompt.id == step * 8 + index
            assert prompt.tokens == tuple(CHAR.encode(prompt.text))
            assert prompt.answer == str(int(prompt.text.split("+")[0]) + 1)
    assert [prompt.id for prompt in task.held_out(1, 3, CHAR)] == [HELD_OUT, HELD_OUT + 1, HELD_OUT + 2]


def test_parquet_and_jsonl_give_the_same_prompts(path: str, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "questions.parquet")
    other = make(str(tmp_path / "questions.parquet"))
    assert other.train(1, 3, CHAR) == make(path).train(1, 3, CHAR)
    assert other.held_out(1, 5, CHAR) == make(path).held_out(1, 5, CHAR)


def test_the_columns_can_have_other_names(write: Write) -> None:
    task = make(write([{"q": f"{i}=", "a": "x"} for i in range(99)]), prompt_key="q", label_key="a")
    assert {prompt.answer for prompt in task.train(0, 0, CHAR)} == {"x"}


def test_messages_go_through_the_chat_template_and_their_contents_are_the_text(write: Write) -> None:
    messages = [[{"role": "system", "content": "add"}, {"role": "user", "content": f"{i}+1"}] for i in range(99)]
    task = make(write([{"prompt": m, "label": 1} for m in messages]), chat_template=True)
    for prompt in task.train(0, 0, Chat()):
        question = prompt.text.removeprefix("add\n")
        assert prompt.tokens == tuple(CHAR.encode(f"s:add.u:{question}."))
        assert not is_held_out(prompt.text)


def test_a_text_goes_through_the_chat_template_when_asked(path: str) -> None:
    prompt = make(path, chat_template=True).train(0, 0, Chat())[0]
    assert CHAR.decode(prompt.tokens) == f"u:{prompt.text}."


def test_blank_lines_are_no_rows(write: Write) -> None:
    assert sum(supply(make(write(["", *ROWS, "  "])))) == 100


def test_repeated_rows_are_left_out_and_their_number_is_said(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    task = make(write([*ROWS, ROWS[3], ROWS[4]]))
    assert sum(supply(task)) == 100
    assert "left out 2 rows that repeat an earlier one" in caplog.text


def test_prompts_over_max_prompt_are_left_out_and_their_number_is_said(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    task = make(path, max_prompt=4)
    short = [row["prompt"] for row in ROWS if len(row["prompt"]) <= 4 and not is_held_out(row["prompt"])]
    seen = {text for step in range(40) for text in texts(task.train(1, step, CHAR))}
    assert seen == set(short)
    training = supply(task)[0]
    assert f"left out {training - len(short)} of {training} training prompts, longer than max_prompt=4" in caplog.text


def test_when_every_prompt_is_too_long_the_run_is_refused(path: str) -> None:
    with pytest.raises(
        ConfigError, match=r"task\.prompts_per_step: 8 is more than all 0 training prompts of at most max_prompt=2"
    ):
        make(path, max_prompt=2).train(0, 0, CHAR)


# -- with the rest of the experiment --
SMALL = ("task=prompts", "task.prompts_per_step=8", "task.max_prompt=16", "task.max_response=16", "eval.prompts=5")


def judged(*typed: str) -> str:
    """What the front end says of a composed config."""
    with pytest.raises(ConfigError) as caught:
        experiment(*SMALL, *typed)
    return str(caught.value)


def test_a_character_that_the_tokenizer_lacks_is_refused_with_its_line_before_the_run(write: Write) -> None:
    path = write([*ROWS, {"prompt": "What?", "label": 1}])
    said = judged(f"task.path={path}", "task.chat_template=false")
    assert f"task.path: {path}, line 101: 'W' is not in the character table" in said


def test_chat_with_a_model_that_starts_from_scratch_is_refused_before_the_run(path: str) -> None:
    assert "task.chat_template: true, but a model without model.path has the character tokenizer" in judged(
        f"task.path={path}"
    )


def test_more_evaluation_prompts_than_are_held_out_are_refused_before_the_run(path: str) -> None:
    said = judged(f"task.path={path}", "task.chat_template=false", "eval.prompts=90")
    held_out = supply(make(path))[1]
    assert (
        f"eval.prompts: 90 is more than the {held_out} held-out prompts of task prompts; use at most {held_out}" in said
    )


def test_a_file_that_fits_is_accepted(path: str) -> None:
    exp = experiment(*SMALL, f"task.path={path}", "task.chat_template=false")
    assert sum(exp.task.supply() or ()) == 100


# -- splitting and shuffling --
@pytest.mark.parametrize("seed", range(20))
def test_training_and_held_out_prompts_never_overlap(path: str, seed: int) -> None:
    task = make(path)
    training, held_out = supply(task)
    shown = {text for step in range(training // 8 + 1) for text in texts(task.train(seed, step, CHAR))}
    assert shown.isdisjoint(texts(task.held_out(seed, held_out, CHAR)))
    assert training + held_out == 100


def test_a_held_out_file_gives_the_held_out_prompts_and_leaves_the_other_whole(path: str, write: Write) -> None:
    other = write([{"prompt": f"{i}+2=", "label": i + 2} for i in range(9)], "test.jsonl")
    task = make(path, held_out_path=other)
    assert task.supply() == (100, 9)
    assert sorted(texts(task.held_out(0, 9, CHAR))) == [f"{i}+2=" for i in range(9)]


def test_an_epoch_shows_each_prompt_at_most_once_and_leaves_out_less_than_a_step(path: str) -> None:
    task = make(path)
    steps = supply(task)[0] // 8
    epochs = [[t for s in range(e * steps, (e + 1) * steps) for t in texts(task.train(5, s, CHAR))] for e in range(3)]
    for epoch in epochs:
        assert len(epoch) == len(set(epoch)) == steps * 8
    assert epochs[0] != epochs[1] != epochs[2]
    assert len(set().union(*epochs)) == supply(task)[0]  # the rows left out differ from epoch to epoch


def test_prompts_depend_on_nothing_but_file_seed_and_step(path: str) -> None:
    task = make(path)
    first = {(seed, step): task.train(seed, step, CHAR) for seed in (1, 2) for step in (0, 1, 50)}
    again = make(path, max_response=17)  # another object: nothing is remembered from the first
    for seed, step in reversed(first):
        assert again.train(seed, step, CharTokenizer()) == first[seed, step]
    assert len({frozenset(texts(prompts)) for prompts in first.values()}) == len(first)


def test_more_held_out_prompts_than_there_are_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match=r"eval\.prompts: 101 is more than all \d+ held-out prompts"):
        make(path).held_out(0, 101, CHAR)


# -- rewards --
@pytest.mark.parametrize(
    ("answer", "label", "expected"),
    [
        (r"so it is \boxed{34}", "34", (True, True)),
        (r"\boxed{35}", "34", (True, False)),
        (r"first \boxed{34}, no: \boxed{35}", "34", (True, False)),  # the last one counts
        (r"\boxed{\frac{1}{2}}", "0.5", (True, True)),
        (r"\boxed{x+1}", "$1+x$", (True, True)),
        (r"\boxed{34}", r"\boxed{34}", (True, True)),
        ("34", "34", (False, False)),  # right, but not boxed
        (r"\boxed{34", "34", (False, False)),
        (r"\boxed{}", "34", (False, False)),
        (r"\boxed{\begin{pmatrix}1\\2}", "34", (True, False)),  # broken LaTeX is a wrong answer
        ("", "34", (False, False)),
    ],
)
def test_math_compares_the_last_boxed_answer_with_the_label(
    answer: str, label: str, expected: tuple[bool, bool]
) -> None:
    assert math_equal(answer, label) == expected


def test_the_last_box_is_found_across_nested_braces() -> None:
    assert last_boxed(r"\boxed{1} \boxed{\frac{a}{b}} end") == r"\frac{a}{b}"
    assert last_boxed(r"\boxed{{}") is None
    assert last_boxed("none") is None


def test_math_gives_one_or_nothing_and_nothing_for_a_truncated_answer(path: str) -> None:
    task, prompt = make(path), Prompt(0, (), "1+1=", "2")
    assert task.reward(prompt, r"\boxed{2}", "stop") == (1.0, True, {"exact": 1.0, "format": 1.0})
    assert task.reward(prompt, r"\boxed{2}", "length") == (0.0, False, {"exact": 0.0, "format": 1.0})
    assert task.reward(prompt, r"\boxed{3}", "stop") == (0.0, False, {"exact": 0.0, "format": 1.0})
    assert task.reward(prompt, "2", "stop") == (0.0, False, {"exact": 0.0, "format": 0.0})


def test_a_function_gets_prompt_answer_and_label(path: str) -> None:
    assert make(path, reward=f"{HERE}:length").reward(Prompt(0, (), "abc", "xyzw"), "uv", "stop").reward == 324


def test_a_function_s_reward_of_one_counts_as_correct_unless_truncated(path: str) -> None:
    task, prompt = make(path, reward=f"{HERE}:same"), Prompt(0, (), "1+1=", "2")
    assert task.reward(prompt, "2", "stop") == (1.0, True, {})
    assert task.reward(prompt, "3", "stop") == (0.0, False, {})
    assert task.reward(prompt, "2", "length") == (1.0, False, {})


@pytest.mark.parametrize("function", ["broken", "nothing"])
def test_a_reward_that_raises_or_returns_no_number_is_counted_and_said(
    path: str, function: str, caplog: pytest.LogCaptureFixture
) -> None:
    sample = Sample(0, 0, np.array([2, STOP], np.int32), np.zeros(2, np.float32), 0, "stop")
    empty = Sample(0, 1, np.array([STOP], np.int32), np.zeros(1, np.float32), 0, "stop")
    group = Group(Prompt(0, (), "1+1=", "2"), (sample, empty))
    [scored] = make(path, reward=f"{HERE}:{function}").score([group], CHAR)
    assert scored.errors == 1
    assert scored.rewards_G is not None
    assert scored.rewards_G.tolist() == [0.0, 1.0]
    assert "reward of task prompts raised" in caplog.text


@pytest.mark.parametrize("function", ["broken", "nothing", "leaves"])
def test_a_reward_that_fails_on_every_answer_stops_the_run(path: str, function: str) -> None:
    sample = Sample(0, 0, np.array([2, STOP], np.int32), np.zeros(2, np.float32), 0, "stop")
    group = Group(Prompt(0, (), "1+1=", "2"), (sample, sample))
    with pytest.raises(RunError, match=r"task\.reward: .* failed on all 2 answers"):
        make(path, reward=f"{HERE}:{function}").score([group], CHAR)


# -- mistakes --
def mistakes(*args: Any, **given: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        make(*args, **given)
    return [str(mistake) for mistake in caught.value.mistakes]


def test_a_missing_file_is_named(tmp_path: Path, path: str) -> None:
    nowhere = str(tmp_path / "nowhere.jsonl")
    assert mistakes(nowhere) == [f"path: {nowhere} cannot be read: No such file or directory"]
    assert mistakes(path, held_out_path=nowhere) == [
        f"held_out_path: {nowhere} cannot be read: No such file or directory"
    ]


def test_no_file_at_all_says_what_to_type() -> None:
    assert mistakes(None) == ["path: is missing; name a JSONL or parquet file: task.path=FILE"]


@pytest.mark.parametrize(
    ("rows", "given", "expected"),
    [
        ([], {}, "path: {path} is empty; it needs one question a line"),
        (["  ", ""], {}, "path: {path} is empty; it needs one question a line"),
        (
            [*ROWS, "{oops"],
            {},
            "path: {path}, line 101: no JSON (Expecting property name enclosed in double quotes at column 2)",
        ),
        (
            [*ROWS[:3], "[1]", *ROWS[3:]],
            {},
            "path: {path}, line 4: a row is an object with 'prompt' and 'label', not [1]",
        ),
        (ROWS, {"label_key": "answer"}, "label_key: {path}, line 1: has no 'answer'; its columns are label, prompt"),
        (ROWS, {"prompt_key": "q"}, "prompt_key: {path}, line 1: has no 'q'; its columns are label, prompt"),
        ([{"prompt": "", "label": 1}, *ROWS], {}, "path: {path}, line 1: 'prompt' is empty"),
        (
            [{"prompt": 7, "label": 1}, *ROWS],
            {},
            "path: {path}, line 1: 'prompt' is neither a text nor a list of messages, but 7",
        ),
        ([{"prompt": "7", "label": None}, *ROWS], {}, "path: {path}, line 1: 'label' is None"),
        (
            [{"prompt": [{"role": "user", "content": "7"}], "label": 1}, *ROWS],
            {},
            "chat_template: {path}, line 1: 'prompt' is a list of messages; use task.chat_template=true",
        ),
        (
            [{"prompt": ["7"], "label": 1}, *ROWS],
            {"chat_template": True},
            "path: {path}, line 1: 'prompt' is a list, but not of {{'role', 'content'}} messages",
        ),
        (
            [*ROWS, {"prompt": "3+1=", "label": 5}],
            {},
            "path: {path}, line 101: the same prompt as line 4, with label '5' instead of '4'",
        ),
        (ROWS[:3], {"prompts_per_step": 5}, "prompts_per_step: 5 is more than all 3 training prompts"),
        (ROWS, {"warmup": {}}, "warmup: labels are no full answers to warm up on; use task.warmup=null"),
    ],
)
def test_a_file_mistake_is_reported_with_its_line_and_the_way_out(
    write: Write, rows: list[Any], given: dict[str, Any], expected: str
) -> None:
    path = write(rows)
    assert expected.format(path=path) in mistakes(path, **given)


def test_many_bad_rows_are_counted_not_listed(write: Write) -> None:
    path = write([*ROWS, *["{oops"] * 50])
    found = mistakes(path)
    assert len(found) == 4
    assert found[-1] == f"path: {path}: 47 more rows are wrong"


def test_a_file_that_is_no_parquet_or_lacks_a_column_is_refused(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "questions.parquet"
    path.write_text("not parquet")
    [message] = mistakes(str(path))
    assert message.startswith(f"path: {path} cannot be read: no parquet file")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert mistakes(str(path), label_key="answer") == [
        f"label_key: {path}, line 1: has no 'answer'; its columns are label, prompt"
    ]


def test_a_held_out_prompt_that_training_shows_is_refused(path: str, write: Write) -> None:
    other = write([{"prompt": "5+2=", "label": 7}, ROWS[5], ROWS[9]], "test.jsonl")
    [message] = mistakes(path, held_out_path=other)
    found = f"{other}: 2 of its prompts are in {path} too (line 2 is line 6 there)"
    assert message == f"held_out_path: {found}; take them out of one file"


def test_a_file_too_small_for_the_hash_split_is_refused(write: Write) -> None:
    rows = [row for row in ROWS if not is_held_out(row["prompt"])][:8]
    [message] = mistakes(write(rows))
    assert message.endswith("the hash split holds out none of its 8 prompts; set held_out_path")


@pytest.mark.parametrize(
    ("reward", "why"),
    [
        ("Math", "'Math' is no package.module:function"),
        ("nowhere:f", "'nowhere:f' cannot be imported (ModuleNotFoundError: No module named 'nowhere')"),
        (f"{HERE}:lenght", f"'{HERE}:lenght' is not there: {HERE} has no function lenght"),
        (f"{HERE}:NOT_A_FUNCTION", f"'{HERE}:NOT_A_FUNCTION' is not there: {HERE} has no function NOT_A_FUNCTION"),
    ],
)
def test_a_reward_that_cannot_be_imported_is_refused_by_name(path: str, reward: str, why: str) -> None:
    assert mistakes(path, reward=reward) == [f"reward: {why}; use math, or package.module:function"]


def test_math_without_its_package_says_what_to_install(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert mistakes(path) == ["reward: math needs the package math-verify; pip install 'lpexp[math]'"]


def test_mistakes_of_file_reward_and_warm_up_are_reported_together(tmp_path: Path) -> None:
    found = mistakes(str(tmp_path / "nowhere"), reward="nowhere:f", warmup={})
    assert {message.split(":")[0] for message in found} == {"path", "reward", "warmup"}


def test_a_file_that_changed_is_read_anew(write: Write) -> None:
    assert sum(supply(make(write(ROWS)))) == 100
    assert sum(supply(make(write(ROWS[:50])))) == 50


def test_the_config_keeps_its_key_reward_through_dump_and_load(path: str) -> None:
    task = make(path, reward=f"{HERE}:same")
    assert task.dump()["reward"] == f"{HERE}:same"
    assert load(task.dump(), Prompts) == task
    with pytest.raises(ConfigError, match=r"rewards: unknown key.* -- did you mean 'reward'\?"):
        make(path, rewards="math")


def test_judging_prompts_loads_neither_torch_nor_sympy(path: str) -> None:
    code = (
        "import sys; from lpexp.config import load; from lpexp.task.prompts import Prompts;"
        f"load(dict(name='p', path={path!r}, max_prompt=9, max_response=9, prompts_per_step=8), Prompts);"
        "print([m for m in ('torch', 'sympy', 'ray', 'transformers', 'pyarrow') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
