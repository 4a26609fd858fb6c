"""Shared by all tests: one thread, no network, and the gate in front of the GPU tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before anything imports torch or transformers.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repo() -> Path:
    """The repository's root."""
    return REPO


def pytest_collection_finish(session: pytest.Session) -> None:
    """Tests of a lane that were asked for and cannot run are an error that says what is missing, never a skip."""
    asked = sum(item.get_closest_marker("gpu") is not None for item in session.items)
    if asked and (lacking := gpu_missing()):
        raise pytest.UsageError(f"{asked} GPU tests cannot run: {lacking}")
    served = sum(item.get_closest_marker("sglang") is not None for item in session.items)
    if served and (lacking := sglang_missing()):
        raise pytest.UsageError(f"{served} tests of a real SGLang server cannot run: {lacking}")


def gpu_missing() -> str | None:
    """One sentence on what this machine lacks for the tests in tests/gpu/, or None."""
    import torch

    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is a build without CUDA, install a CUDA build on a machine with an NVIDIA card"
        )
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} speaks CUDA {torch.version.cuda}, but sees no NVIDIA card with its driver"
    return None


def sglang_missing() -> str | None:
    """One sentence on what this machine lacks for the tests with a real SGLang server, or None."""
    from lpexp.rollout.sglang import built

    done = built().parents[1] / ".installed"
    return None if done.exists() else f"SGLang's environment is not there ({done}); type: make sglang-env"
