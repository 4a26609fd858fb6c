"""`lpexp doctor`: what this machine has, what it can run, and why not the rest. Starts nothing, imports no backend."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from lpexp.plan import gpus_here, table

PACKAGES = (
    ("torch", "the embedded trainer and rollout"),
    ("ray", "cluster=local and larger; cluster=inline does without"),
    ("wandb", "curves beside metrics.jsonl; wandb.mode=disabled does without"),
    ("matplotlib", "report.png"),
    ("pyarrow", "task=prompts from parquet files"),
    ("math-verify", "task.reward=math"),
    ("transformer-engine", "the Megatron trainer in low precision, on GPUs"),
    ("megatron-core", "trainer=megatron"),
    ("sglang", "rollout=sglang"),
)
LAPTOP_GIB = 4  # what a small run takes: driver, two trainer ranks, two engines


class Check(NamedTuple):
    """One thing that can be run here, or the reason why it cannot."""

    what: str
    lacking: str | None


def report() -> str:
    """Two tables: what is here, and what runs."""
    found = {name: _version(name) for name, _ in PACKAGES}
    cores, memory, gpus = cores_here(), memory_gib(), gpus_here()
    here = [
        ("python", platform.python_version(), sys.executable),
        ("cores", str(cores), "two are enough for a small run"),
        ("memory", f"{memory:.1f} GiB" if memory else "unknown", f"a small run takes about {LAPTOP_GIB} GiB"),
        ("disk", f"{shutil.disk_usage('.').free / 2**30:.1f} GiB free", "under outputs/"),
        ("GPUs", str(len(gpus)), ", ".join(gpus) or "none: everything runs on cores"),
        *((name, found[name] or "not installed", use) for name, use in PACKAGES),
    ]
    runs = [
        (check.what, "yes" if check.lacking is None else "no", check.lacking or "")
        for check in checks(found, len(gpus))
    ]
    return "\n".join(
        [
            "what is here",
            table([("thing", "found", "for"), *here], "  "),
            "\nwhat this machine can run",
            table([("command", "runs", "why not"), *runs], "  "),
        ]
    )


def checks(found: Mapping[str, str | None], gpus: int) -> list[Check]:
    """What can be run, given package versions (None: not installed) and a number of GPUs."""
    torch = None if found["torch"] else "torch is not installed: pip install torch"
    ray = torch or (None if found["ray"] else "ray is not installed: pip install ray, or type cluster=inline")
    gpu = ray or (None if gpus else "no NVIDIA GPU is visible to this process")
    megatron = None if found["megatron-core"] else "megatron-core is not installed: pip install 'lpexp[megatron]'"
    unbuilt = "not built in this version; scale=laptop runs a small twin of every model"
    return [
        Check("python launch.py cluster=inline", torch),
        Check("python launch.py", ray),
        Check("python launch.py model=NAME scale=laptop", ray),
        Check("python launch.py cluster=gpu", gpu),
        Check("python launch.py trainer=megatron", ray or megatron),
        Check("python launch.py rollout=sglang", unbuilt),
    ]


def cores_here() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_gib() -> float | None:
    """Physical memory, or None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
