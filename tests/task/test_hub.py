"""`hub:` names: found in the Hugging Face cache, never downloaded, and asked for with a command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lpexp import fetch, frontend, hub, plan
from lpexp.errors import ConfigError

DATA, MODEL = "hub:owner/data/train.jsonl", "hub:owner/model"
WORDS = ("task=prompts", f"task.path={DATA}", "task.chat_template=false", "eval.prompts=2", "task.prompts_per_step=4")
WORDS += ("task.max_prompt=16", "task.max_response=16")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def put(cache: Path, repository: str, name: str, text: str) -> Path:
    """A file of a repository, as the hub's client keeps it."""
    at = cache / repository
    (at / "refs").mkdir(parents=True, exist_ok=True)
    (at / "refs" / "main").write_text("0" * 40)
    path = at / "snapshots" / ("0" * 40) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_prompts_that_are_not_here_are_planned_and_asked_for(cache: Path) -> None:
    exp = frontend.experiment(*WORDS)
    assert "who sits where" in plan.text(exp)
    command = "hf download --repo-type dataset owner/data train.jsonl"
    assert plan.missing(exp) == f"the prompts of task=prompts are not here yet; type: {command}"


def test_prompts_of_the_cache_are_read_and_judged(cache: Path) -> None:
    rows = [{"prompt": f"{n}+{n}=", "label": str(2 * n)} for n in range(60)]
    put(cache, "datasets--owner--data", "train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    exp = frontend.experiment(*WORDS)
    assert plan.missing(exp) is None
    assert sum(exp.task.supply() or ()) == 60
    with pytest.raises(ConfigError, match=r"task\.label_key: .*has no 'answer'"):
        frontend.experiment(*WORDS, "task.label_key=answer")


def test_a_model_s_directory_is_that_of_the_cache_or_nothing(cache: Path) -> None:
    assert fetch.find(MODEL) is None and fetch.lacking(MODEL) == "hf download owner/model"
    file = put(cache, "models--owner--model", "config.json", "{}")
    assert fetch.find(MODEL) == hub.model(MODEL) == file.parent
    assert fetch.lacking("owner/model") is None  # that name is downloaded
