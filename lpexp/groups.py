"""conf/ as data: its groups, their choices, and composing without running."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

# Our sweeper (launcher.py). Composing needs its name; it is imported when something is run.
ConfigStore.instance().store(
    group="hydra/sweeper",
    name="arms",
    node={"_target_": "hydra_plugins.lpexp.Arms", "params": {}, "arms": {}},
    provider="lpexp",
)
CONF = Path(__file__).resolve().parents[1] / "conf"
MOUNTS = ("rollout.precision", "reference.precision")  # where a precision may be named besides `precision`


@cache
def groups() -> tuple[str, ...]:
    return tuple(sorted(path.name for path in CONF.iterdir() if path.is_dir()))


@cache
def choices(group: str) -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in (CONF / group).glob("*.yaml")))


def read_choice(group: str, name: str) -> dict[str, Any]:
    """conf/GROUP/NAME.yaml as plain data, uncomposed."""
    data: Any = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{name}.yaml"), resolve=False)
    return {key: value for key, value in (data or {}).items() if key != "defaults"}


@cache
def default_choice(group: str) -> str:
    """What conf/config.yaml chooses of a group."""
    listed: Any = OmegaConf.to_container(OmegaConf.load(CONF / "config.yaml"), resolve=False)
    return next(entry[group] for entry in listed["defaults"] if isinstance(entry, dict) and group in entry)


def choices_with(key: str) -> tuple[str, list[str]] | None:
    """(group, its choices that bring this dotted key), for a key of a group that the chosen one does not have."""
    for place in (*MOUNTS, *groups()):
        if not key.startswith(f"{place}."):
            continue
        group = "precision" if place in MOUNTS else place
        names = [name for name in choices(group) if _holds(read_choice(group, name), key[len(place) + 1 :])]
        if names:
            return place, names
    return None


def compose(overrides: Sequence[str] = (), name: str = "config", directory: str | Path | None = None) -> DictConfig:
    """The composed config, as `python launch.py` would see it; raises what Hydra raises."""
    GlobalHydra.instance().clear()
    searched = [] if directory is None else [f"hydra.searchpath=[file://{CONF}]"]
    with hydra.initialize_config_dir(str(Path(directory or CONF).resolve()), version_base="1.3"):
        return hydra.compose(name, overrides=[*searched, *overrides])


def chosen(overrides: Sequence[str]) -> dict[str, str | None]:
    """{group: the choice that the composed config makes of it}, mounts as `precision@rollout.precision`."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        cfg = hydra.compose("config", overrides=list(overrides), return_hydra_config=True)
    return {str(key): value for key, value in cfg.hydra.runtime.choices.items()}


@cache
def said_by(group: str, name: str) -> dict[str, Any]:
    """{dotted key from the root: value} of what conf/GROUP/NAME.yaml says."""
    packaged = "@package _global_" not in (CONF / group / f"{name}.yaml").read_text()
    return dict(_flat(read_choice(group, name), f"{group}." if packaged else ""))


def _flat(data: dict[str, Any], at: str) -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        yield f"{at}{key}", value
        if isinstance(value, dict):
            yield from _flat(value, f"{at}{key}.")


def _holds(data: Any, path: str) -> bool:
    for part in path.split("."):
        if not isinstance(data, dict) or part not in data:
            return False
        data = data[part]
    return True
