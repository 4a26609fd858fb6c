"""The shape of the house: who may name a format, how long the loop is, what judging a config loads.

Who imports whom is checked by `make check` (import-linter, pyproject.toml).
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

FORMATS = re.compile(r"(fp8|int4|mxfp8|nvfp4|e4m3)")
WALK = ("README.md", "launch.py", "lpexp/loop.py", "lpexp/data.py", "lpexp/precision/fp8.py")
BRANCHES = (ast.If, ast.IfExp, ast.For, ast.While, ast.comprehension, ast.ExceptHandler, ast.match_case)
HEAVY = ("torch", "ray", "transformers", "matplotlib", "wandb", "megatron", "sglang")


def named_formats(package: Path) -> list[str]:
    """Every line of Python under `package`, outside its folder `precision`, that names a format."""
    return [
        f"{path.relative_to(package)}:{number}: {line.strip()}"
        for path in sorted(package.rglob("*.py"))
        if path.relative_to(package).parts[0] != "precision"
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if FORMATS.search(line)
    ]


def branches(code: str) -> int:
    return sum(isinstance(node, BRANCHES) for node in ast.walk(ast.parse(code)))


def test_a_number_format_is_named_only_in_the_precision_package(repo: Path) -> None:
    assert named_formats(repo / "lpexp") == []


def test_a_format_named_elsewhere_is_found(tmp_path: Path) -> None:
    for name in ("precision/fp8.py", "rollout/engine.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text('"""Serves weights."""\nif name == "fp8": pass\n')
    assert named_formats(tmp_path) == ['rollout/engine.py:2: if name == "fp8": pass']


def test_the_loop_has_at_most_60_lines_and_no_function_more_than_4_branches(repo: Path) -> None:
    """The lines of `run` and of what it is made of are added up, so that nothing hides in a helper."""
    code = (repo / "lpexp" / "loop.py").read_text()
    functions = {node.name: node for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)}
    lines = {name: len(ast.get_source_segment(code, node).splitlines()) for name, node in functions.items()}  # type: ignore[union-attr]
    assert "run" in functions
    assert sum(lines.values()) <= 60, lines
    assert max(branches(ast.unparse(node)) for node in functions.values()) <= 4


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("x = 1", 0),
        ("if a:\n    pass\nelif b:\n    pass", 2),
        ("try:\n    pass\nexcept E:\n    pass\nfor i in a:\n    x = 1 if i else 2", 3),
        ("x = [i for i in a]\nwhile x:\n    pass", 2),
    ],
)
def test_a_branch_is_counted_however_it_is_written(code: str, count: int) -> None:
    assert branches(code) == count


def test_the_readers_walk_is_under_500_lines(repo: Path) -> None:
    lengths = {name: len((repo / name).read_text().splitlines()) for name in WALK}
    assert sum(lengths.values()) < 500, lengths


@pytest.mark.parametrize(
    "words", [(), ("model=qwen3_30b", "precision=fp8"), ("precision=int4_qat", "precision.group_size=48")]
)
def test_judging_a_config_loads_nothing_heavy(repo: Path, words: tuple[str, ...]) -> None:
    """A good config, one that needs GPUs, and one with mistakes: none imports torch, ray or a backend."""
    code = (
        "import sys; from lpexp import frontend; from lpexp.errors import ConfigError\n"
        f"try: frontend.experiment(*{words!r})\n"
        "except ConfigError as error: print('refused', error)\n"
        f"print('loaded', sorted(name for name in {HEAVY!r} if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repo, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded []"
    assert ("refused" in done.stdout) == ("precision.group_size=48" in words)


def test_the_public_packages_open_with_what_they_are(repo: Path) -> None:
    silent = [
        str(path.relative_to(repo))
        for path in sorted((repo / "lpexp").rglob("*.py"))
        if path.read_text().strip() and ast.get_docstring(ast.parse(path.read_text())) is None
    ]
    assert silent == []
