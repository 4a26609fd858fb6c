"""A typed experiment to save and resume, and child processes that are killed."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from lpexp.experiment import Experiment

CONF = Path(__file__).parents[2] / "conf"


@pytest.fixture(scope="session")
def _composed() -> Experiment:
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from lpexp.config import load

    with initialize_config_dir(str(CONF), version_base=None):
        cfg = compose("config", overrides=["output_dir=outputs/x/2026-01-02_03-04-05"])
    return load(OmegaConf.to_container(cfg, resolve=True), Experiment)  # type: ignore[arg-type]


@pytest.fixture
def exp(_composed: Experiment, tmp_path: Path) -> Experiment:
    """The default experiment, writing where the default config would: <name>/<time stamp>."""
    return _composed.model_copy(update={"output_dir": str(tmp_path / "name" / "2026-01-02_03-04-05")})


@pytest.fixture
def child() -> Callable[[Callable[[], str]], tuple[int, str]]:
    """Run a function in a forked process: (-signal or exit code, what it returned or its traceback)."""

    def run(function: Callable[[], str]) -> tuple[int, str]:
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(reader)
            code = 1
            try:
                text, code = function(), 0
            except BaseException:
                text = traceback.format_exc()
            os.write(writer, text.encode()[-4000:])
            os._exit(code)
        os.close(writer)
        with os.fdopen(reader) as file:
            text = file.read()
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text

    return run
