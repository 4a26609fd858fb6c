"""Who sits where: the workers of a run, as Ray actors or in this process.

`Workers.spawn` gives handles; a handle's `call` gives a future. Trainer and rollout are written against these two
words only, so `cluster=inline` runs the same classes in one process. ray is imported when a Ray cluster is opened.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lpexp.config import Spec


class Cluster(Spec):
    """A machine, or many alike. `kind: inline` is this process; `ray` starts or joins a Ray cluster."""

    name: str
    kind: Literal["inline", "ray"]
    nodes: int = Field(ge=1)
    gpus_per_node: int = Field(ge=0)
    gpu: str | None  # "H100", "H200", "B200"; None: CPU only
    gpu_memory_gb: float | None
    dashboard: bool  # Ray's dashboard
    threads: int = Field(ge=1)  # OpenMP threads of each worker


class Workers:
    """Opened on a Cluster; owns every worker process of the run."""
