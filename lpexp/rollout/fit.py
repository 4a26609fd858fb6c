"""Does a production engine of so many GPUs fit: its shards, its node, its memory, its GPUs' kernels.

Keys are those of `rollout` in the config. Left out: what an engine allocates beside weights, which only it knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lpexp.errors import Mistake
from lpexp.model.split import Ways, cuts
from lpexp.precision import side

if TYPE_CHECKING:
    from lpexp.experiment import Experiment


def engine_fits(exp: Experiment, gpus: int, ep: int, memory: float) -> Iterator[Mistake]:
    """Mistakes of engines with `gpus` GPUs each, of which `ep` share the experts out; `memory` is a GPU's share."""
    cluster, each = exp.cluster, exp.cluster.gpus_per_node
    if gpus % ep == 0:  # else told by the engine
        yield from _shards(exp, gpus, ep)
        yield from _weights(exp, gpus, memory)
    if each % gpus and gpus % each:
        yield Mistake(
            "rollout.gpus_per_engine",
            f"{gpus} on nodes of {each} GPUs would lay an engine across two nodes; use a divisor of {each}, or a "
            "multiple for an engine of whole nodes",
        )
    if cluster.capability is not None:
        key = "rollout.precision" if exp.rollout.precision else "precision"
        for mistake in exp.wire.needs(cluster.capability, trains=False):
            yield Mistake(
                f"{key}.{mistake.key}" if mistake.key else key, f"{mistake.message} (cluster.gpu {cluster.gpu})"
            )


def _shards(exp: Experiment, gpus: int, ep: int) -> Iterator[Mistake]:
    """Attention and dense layers are cut by all GPUs, an expert by those that do not share experts out."""
    linears = Ways(
        gpus, "rollout.gpus_per_engine", f"rollout.gpus_per_engine {gpus}", "rollout.gpus_per_engine={}".format
    )
    why = f"rollout.gpus_per_engine {gpus} / rollout.ep {ep}"
    experts = Ways(gpus // ep, "rollout.ep", why, lambda ways: f"rollout.ep={gpus // ways}")
    yield from cuts(exp.model.sized(), exp.wire, linears, experts, fused=True)


def _weights(exp: Experiment, gpus: int, memory: float) -> Iterator[Mistake]:
    """One GPU's share of the served weights leaves room in the engine's part of its memory."""
    if exp.cluster.gpu_memory_gb is None:
        return
    model = exp.model.sized()
    moe, held = model.moe is not None, 0.0
    for param in model.params():
        size = side(param, exp.wire, moe).served_bytes(param.shape)
        if size is None:
            return
        held += size / gpus if len(param.shape) > 1 and param.kind != "router" else size
    room = memory * exp.cluster.gpu_memory_gb
    if held / 1e9 > room:
        yield Mistake(
            "rollout.gpus_per_engine",
            f"{gpus}: one GPU's share of the weights is {held / 1e9:.0f} GB, more than rollout.mem_fraction "
            f"{memory:g} x {exp.cluster.gpu_memory_gb:g} GB; use more GPUs an engine",
        )
