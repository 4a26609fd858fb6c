"""Every wrong command line in wrong_configs.yaml: its exact text, exit code 2, no traceback, nothing started."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

CORPUS: list[dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "wrong_configs.yaml").read_text())


def label(case: dict[str, Any]) -> str:
    return " ".join([*(f"{name}={value}" for name, value in case.get("env", {}).items()), *case["typed"]])


@pytest.mark.parametrize("case", CORPUS, ids=label)
def test_a_wrong_config_is_refused_with_the_key_and_the_way_out(
    case: dict[str, Any], type_line: Callable[..., Any], files: Path, repo: Path
) -> None:
    said = type_line(*case["typed"], **case.get("env", {}))
    text = said.err.replace(str(files), "HERE").replace(str(repo), "REPO").rstrip("\n")
    assert text == case["says"]
    assert said.code == 2


def test_the_corpus_has_at_least_fifty_cases_and_each_names_a_key_that_was_typed() -> None:
    assert len({label(case) for case in CORPUS}) == len(CORPUS) >= 50
    for case in CORPUS:
        words = [*(word for word in case["typed"] if not word.startswith("=")), *case.get("env", {})]
        keys = [re.sub(r"^[+~]*(precision@)?", "", word.partition("=")[0]) for word in words]
        keys += (
            {"-cn": ["--config-name"], "-cd": ["--config-dir", "own/", "precision", "stpes"]}.get(words[0], [])
            if words
            else ["=3"]
        )
        assert any(key in case["says"] for key in keys), label(case)


def test_no_message_advises_the_plus_sign() -> None:
    """`+key` would add a dead key."""
    advice = re.compile(r"(^|[\s'(])\+{1,2}[a-z]")
    for case in CORPUS:
        told = case["says"]
        for word in case["typed"]:
            told = told.replace(f"given as {word}", "")
        assert not advice.search(told), label(case)
    assert advice.search("To append to your config use +stesp=3")


def test_a_refused_run_leaves_no_file(type_line: Callable[..., Any], here: Path) -> None:
    for words in (["steps=0"], ["stpes=1"], ["-m", "steps=0,1"], ["output_dir=runs/mine", "-m", "steps=0,1"]):
        assert type_line(*words).code == 2
        assert list(here.iterdir()) == [], words


def test_a_right_config_reaches_the_loop(type_line: Callable[..., Any]) -> None:
    """Without this the corpus could pass because everything is refused."""
    assert type_line("steps=1").code == 99


def test_the_user_who_asks_for_tracebacks_gets_them(type_line: Callable[..., Any]) -> None:
    from hydra.errors import HydraException

    with pytest.raises(HydraException):
        type_line("stpes=5", HYDRA_FULL_ERROR="1")
