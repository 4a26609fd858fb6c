"""Every test here needs megatron-core: `make test-megatron` installs it and runs them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.trainer.megatron.processes import Processes

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.megatron)


@pytest.fixture(scope="session")
def pair() -> Iterator[Processes]:
    """Two processes for the ranks of one trainer after the other."""
    made = Processes(2)
    yield made
    made.close()
