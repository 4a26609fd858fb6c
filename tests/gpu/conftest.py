"""What the GPU tests found, as a dated page with card and versions."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import pytest

from tests.conftest import REPO

PACKAGES = ("torch", "triton", "transformer-engine", "megatron-core")
FOUND: list[tuple[str, str]] = []


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Notes a finding of this test for the page."""
    return lambda text: FOUND.append((request.node.name, text))


def pytest_sessionfinish() -> None:
    if not FOUND:
        return
    import torch

    lines = [f"# On {torch.cuda.get_device_name()}, {datetime.date.today()}", "", "Written by `make test-gpu`.", ""]
    lines += [f"- {name} {_version(name)}" for name in PACKAGES] + ["", "| test | found |", "| --- | --- |"]
    lines += [f"| `{name}` | {text} |" for name, text in FOUND]
    (REPO / "docs" / "results" / f"{datetime.date.today()}-gpu.md").write_text("\n".join(lines) + "\n")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "is not installed"
