"""What the documents say is so: commands, links, tables, identities; and no file names a machine or a registry."""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lpexp import frontend, plan
from lpexp.errors import ConfigError
from lpexp.experiment import MAY_CHANGE, Experiment
from lpexp.groups import CONF, choices
from lpexp.model import Model

REPO = Path(__file__).resolve().parent.parent
NO_SOURCE = {
    ".git",
    ".venv",
    "outputs",
    "multirun",
    "wandb",
    "__pycache__",
    ".pytest_cache",
    ".ruff_cache",
    ".hypothesis",
}
REGISTRY = re.compile(r"pypi\.org|python[h]osted|download\.pytorch|anaconda\.org|crates\.io|npmjs\.(com|org)")
MACHINE = re.compile(r"(?<![\w.*])/(work|home|root|tmp|Users)/\w")
LINK = re.compile(r"(?<!`)\]\(([^)\s]+)\)|<img[^>]* src=\"([^\"]+)\"")
WRITTEN = re.compile(r"`(python launch\.py[^`]*)`")


def source(repo: Path) -> list[Path]:
    """Tracked files; without git every file outside of the folders that git would ignore."""
    if (repo / ".git").exists():
        listed = subprocess.run(["git", "-C", str(repo), "ls-files", "-z"], capture_output=True, text=True, check=True)
        files = [repo / name for name in listed.stdout.split("\0") if name]
    else:
        files = [path for path in repo.rglob("*") if not NO_SOURCE & set(path.relative_to(repo).parts)]
    return [path for path in files if path.is_file()]


def naming(pattern: re.Pattern[str], repo: Path) -> list[str]:
    """Every line of a text file that the pattern finds."""
    found = []
    for path in source(repo):
        raw = path.read_bytes()
        if b"\0" not in raw:
            lines = enumerate(raw.decode().splitlines(), start=1)
            found += [f"{path.relative_to(repo)}:{number}: {line}" for number, line in lines if pattern.search(line)]
    return found


def dangling(repo: Path) -> list[str]:
    """Relative links of Markdown files, and docs/ pages that a Python file points to, that lead nowhere."""
    found = []
    for path in source(repo):
        if path.suffix == ".md":
            targets = ["".join(match.groups("")) for match in LINK.finditer(path.read_text())]
            places = [(target, path.parent / target.partition("#")[0]) for target in targets if "://" not in target]
        elif path.suffix == ".py" and path.is_relative_to(repo / "lpexp"):
            places = [(page, repo / page) for page in re.findall(r"docs/[\w/]+\.md", path.read_text())]
        else:
            continue
        found += [f"{path.relative_to(repo)}: {target}" for target, place in places if not place.exists()]
    return found


def commands(page: Path) -> list[str]:
    return sorted(set(WRITTEN.findall(page.read_text())))


def jobs(command: str) -> Iterator[Experiment]:
    """Every job of a written command, composed and judged; ConfigError for what would be refused."""
    flags, typed = frontend.tidy(shlex.split(command)[2:])
    values = dict(itertools.pairwise(flags))
    name, folder = values.get("--config-name", "config"), values.get("--config-dir")
    axes = [typed]
    if "-m" in flags:
        axes = [[f"{key}={one}" for one in value.split(",")] for key, _, value in (w.partition("=") for w in typed)]
        axes = [list(job) for job in itertools.product(*axes)]
    elif folder:
        sweep: Any = OmegaConf.to_container(OmegaConf.load(REPO / folder / f"{name}.yaml"), resolve=False)
        params = sweep["hydra"]["sweeper"]["params"]
        each = [[f"{key}={one}" for one in str(value).split(",")] for key, value in params.items()]
        axes = [[*typed, *job] for job in itertools.product(*each)]
    for words in axes:
        yield frontend.judge(frontend.compose(words, name, REPO / folder if folder else None))


# -- commands ------------------------------
@pytest.mark.parametrize("command", commands(REPO / "README.md"))
def test_each_command_of_the_readme_has_a_plan_and_runs_here_or_says_dry_run(command: str) -> None:
    for exp in jobs(command):
        assert "who sits where" in plan.text(exp)
        lacking = plan.missing(exp)
        assert exp.dry_run or lacking is None or lacking.endswith("type: lpexp fetch smollm2_135m")


def test_the_readme_s_commands_are_found_and_its_sweeps_are_whole_ones() -> None:
    written = commands(REPO / "README.md")
    assert len(written) >= 9
    counts = {command: len(list(jobs(command))) for command in written}
    assert sorted(counts.values())[-2:] == [3, 9], counts


def test_a_command_that_would_be_refused_is_found() -> None:
    with pytest.raises(ConfigError, match="group_size"):
        list(jobs("python launch.py -m precision=int4_qat precision.group_size=32,48"))


# -- links and names ------------------------------
def test_every_relative_link_and_every_pointer_to_a_page_leads_somewhere(repo: Path) -> None:
    assert dangling(repo) == []


def test_no_tracked_file_names_a_package_registry(repo: Path) -> None:
    assert naming(REGISTRY, repo) == []


def test_no_tracked_file_names_a_path_of_one_machine(repo: Path) -> None:
    assert naming(MACHINE, repo) == []


def test_what_must_not_be_there_would_be_found(tmp_path: Path) -> None:
    """In a tree without git: one dead link, picture and pointer beside live ones, a registry, a machine's path."""
    (tmp_path / "lpexp").mkdir()
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "ignored.md").write_text("[gone](gone.md)")
    (tmp_path / "lpexp" / "a.py").write_text('"""Table in docs/gone.md."""\n')
    (tmp_path / "b.md").write_text(
        '[live](lpexp/a.py#top) [far](https://example.org/x) [dead](no.md)\n<img alt="" src="no.png">\n'
        f"files.{'python' + 'hosted'}.org\nsee /{'home'}/someone/x, not lpexp/home/x\n"
    )
    assert sorted(dangling(tmp_path)) == ["b.md: no.md", "b.md: no.png", "lpexp/a.py: docs/gone.md"]
    assert [hit.partition(": ")[0] for hit in naming(REGISTRY, tmp_path)] == ["b.md:3"]
    assert [hit.partition(": ")[0] for hit in naming(MACHINE, tmp_path)] == ["b.md:4"]


# -- tables and identities ------------------------------
def test_the_table_of_models_has_every_card_with_its_parameters(repo: Path) -> None:
    text = (repo / "docs" / "models.md").read_text()
    told = dict(re.findall(r"^\| `(\w+)`[^|]*\|[^|]*\| ([\d,]+) \|", text, re.MULTILINE))
    cards = {name: Model.model_validate(frontend.compose([f"model={name}"]).model) for name in choices("model")}
    assert told == {name: f"{card.num_params():,}" for name, card in cards.items()}


def test_the_table_of_layouts_has_the_nodes_and_gpus_of_each(repo: Path) -> None:
    text = (repo / "docs" / "models.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|([^|]*)\|([^|]*)\|([^|]*)\| \d+ ·", text, re.MULTILINE)
    told = {
        f"{model}_{precision}": cell.split(",")[0].strip()
        for model, *cells in rows
        for precision, cell in zip(("bf16", "fp8", "int4_qat"), cells, strict=True)
        if cell.strip()
    }
    layouts: dict[str, Any] = {name: OmegaConf.load(CONF / "layout" / f"{name}.yaml") for name in choices("layout")}
    sizes = {name: layout.model.parallel for name, layout in layouts.items()}
    assert told == {name: f"{size.nodes} × {size.gpus_per_node}" for name, size in sizes.items()}


@pytest.mark.parametrize("words", [("precision=fp8",), ("precision=int4_qat",)], ids=" ".join)
def test_the_numerics_page_has_the_identity_of_each_default_format(repo: Path, words: tuple[str, ...]) -> None:
    identity = frontend.experiment(*words).precision.format()["identity"]
    assert f"`{identity}`" in (repo / "docs" / "numerics.md").read_text()


def test_the_page_on_runs_names_every_event_and_every_key_that_may_change(repo: Path) -> None:
    text = (repo / "docs" / "runs.md").read_text()
    code = "\n".join(path.read_text() for path in (repo / "lpexp").rglob("*.py"))
    kinds = set(re.findall(r"\.event\(\s*\"(\w+)\"|\bwarn\(\s*\"(\w+)\"", code))
    kinds = {one or other for one, other in kinds}
    assert {"start", "engine_healed", "wandb"} <= kinds
    listed = set(re.findall(r"`(\w+)`", text[text.index("## Events") : text.index("## Exit codes")]))
    assert kinds <= listed
    free = re.search(r"Free to change are ([^.]*)\.", text)
    assert free is not None
    assert set(re.findall(r"\w+", free[1])) - {"and"} == set(MAY_CHANGE)
