"""The plan of a run: who sits where, which tensors are quantised how, what each worker's environment is, what fits.

Printed before a full-size run and by `dry_run=true`; made from the config alone, so it is the same on any machine.
Left out: activations, fragmentation, and what a production engine allocates beside its weights.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lpexp.cluster import Cluster
from lpexp.config import Spec
from lpexp.console import served_first
from lpexp.experiment import Experiment
from lpexp.fetch import lacking
from lpexp.precision import digest, side
from lpexp.seats import span

TRAINED_BYTES = 16  # a parameter: float32 master, gradient and two Adam moments


class Kind(NamedTuple):
    """All tensors of one module class."""

    kind: str
    tensors: int
    elements: int
    trained: str
    served: str
    served_bytes: int | None


def text(exp: Experiment) -> str:
    """The whole plan, plain text."""
    model = exp.model.sized()
    rows = kinds(exp)
    elements = sum(row.elements for row in rows)
    sizes = [row.served_bytes for row in rows]
    wire = None if None in sizes else sum(size for size in sizes if size is not None)
    params, moe = list(model.params()), model.moe is not None
    reference = exp.reference.precision.name if exp.uses_reference else "none (algorithm.kl_coef is 0)"
    task, updates = exp.task, exp.algorithm.updates_per_batch
    samples = task.prompts_per_step * exp.algorithm.samples_per_prompt
    picked = f" (the best to learn from of {exp.sampled.prompts_per_step} prompts)" if exp.oversample > 1 else ""
    head = [
        ("model", f"{model.name} ({model.architecture}, {elements:,} parameters, {len(params):,} tensors)"),
        ("trainer", _describe(exp.precision, exp.precision.name)),
        ("rollout", _describe(exp.wire, exp.wire.name) + (" (the trainer's)" if exp.rollout.precision is None else "")),
        *([("checkpoint", said)] if (said := served_first(exp)) else []),
        ("reference", reference),
        ("algorithm", _describe(exp.algorithm, type(exp.algorithm).__name__.lower())),
        ("correction", _describe(exp.correction, exp.correction.name)),
        ("cluster", _machines(exp.cluster)),
        (
            "batch",
            f"{task.prompts_per_step} prompts x {exp.algorithm.samples_per_prompt} samples of {task.name}{picked}, "
            f"{updates} optimiser step{'s' if updates > 1 else ''} of {samples // updates} samples, lag {exp.lag}, "
            f"{exp.steps} steps",
        ),
        (
            "answers",
            f"at most {task.max_response} tokens after at most {task.max_prompt}, "
            f"temperature {exp.rollout.temperature:g}",
        ),
        (
            "evaluation",
            f"every {exp.eval.every} steps, {exp.eval.prompts} prompts x {exp.eval.samples} samples of at most "
            f"{task.held_out_response} tokens, temperature {exp.eval.temperature:g}, top-p {exp.eval.top_p:g}",
        ),
        ("checkpoints", f"every {exp.checkpoint.every} steps, the newest {exp.checkpoint.keep} kept"),
        ("contract", _contract(exp, params, moe)),
    ]
    workers = [("driver", 1, "the loop, metrics, checkpoints' manifest; holds no weights")]
    workers += [(row["role"], row["count"], row["what"]) for row in (*exp.trainer.plan(exp), *exp.rollout.plan(exp))]
    environments = [("trainer", exp.trainer.environment(exp)), ("rollout", exp.rollout.environment(exp))]
    tensors = [(r.kind, f"{r.tensors:,}", f"{r.elements:,}", r.trained, r.served, _size(r.served_bytes)) for r in rows]
    memory = [
        (
            "training state",
            _size(elements * TRAINED_BYTES),
            f"float32 weights, gradients, Adam ({TRAINED_BYTES} bytes a parameter); split or repeated over ranks",
        ),
        ("served weights", _size(wire), "one copy; an engine holds one, and so much moves in every weight update"),
        ("key/value cache", _size(_cache_bytes(exp)), "16 bits each, all samples of a step at full length"),
    ]
    return "\n".join(
        [
            f"plan of {exp.name}",
            table(head, "  "),
            "\nwho sits where",
            table([("worker", "count", "what it does"), *workers], "  "),
            *([placement(exp)] if exp.cluster.world else []),
            "\nwhich tensors are quantised how",
            table([("module class", "tensors", "elements", "trained as", "served as", "served bytes"), *tensors], "  "),
            "\nenvironment that each worker gets",
            table(
                [
                    (who, " ".join(f"{k}={v}" for k, v in sorted(env.items())) or "nothing beside the shell's")
                    for who, env in environments
                ],
                "  ",
            ),
            "\nmemory, estimated",
            table(memory, "  "),
        ]
    )


def placement(exp: Experiment) -> str:
    """Which GPU does what: a row a node. The trainer's ranks come first, in order; so do the engines'."""
    cluster, each = exp.cluster, exp.cluster.gpus_per_node
    last = cluster.world - cluster.engine_gpus  # the engines' first GPU
    rows = []
    for node in range(cluster.nodes):
        cells = [f"node {node}", f"{each} {cluster.gpu or ''} GPUs"]
        for first, told in ((0, exp.trainer.plan(exp)), (last, exp.rollout.plan(exp))):
            for row in told:
                here = [n for n in range(row["count"]) if _overlap(first + n * row["gpus"], row["gpus"], node, each)]
                plural = "s" if len(here) > 1 else ""
                cells.append(f"{row['role']}{plural} {span(here)}" if here else "")
        rows.append(cells)
    how = "a placement group, one bundle a node" if exp.cluster.kind == "ray" else "this process"
    turns = "trainer and engines take turns on every GPU" if cluster.colocate else "trainer and engines sit apart"
    return f"\nwhich GPU does what ({how}; {turns})\n{table(rows, '  ')}"


def _overlap(start: int, count: int, node: int, each: int) -> bool:
    """Has a worker with GPUs start..start + count one of this node's? One that is given none sits on the first node."""
    return start < (node + 1) * each and start + count > node * each if count else node == 0


def kinds(exp: Experiment) -> list[Kind]:
    """The model's tensors by module class, in the order of a forward pass; a class that is split has two rows."""
    model = exp.model.sized()
    moe = model.moe is not None
    found: dict[tuple[str, str, str], list[Any]] = {}
    for param in model.params():
        trained, served = side(param, exp.precision, moe), side(param, exp.wire, moe)
        row = found.setdefault((param.kind, trained.name, served.name), [0, 0, 0])
        size = served.served_bytes(param.shape)
        row[0] += 1
        row[1] += math.prod(param.shape)
        row[2] = None if size is None or row[2] is None else row[2] + size
    return [Kind(kind, row[0], row[1], trained, served, row[2]) for (kind, trained, served), row in found.items()]


def missing(exp: Experiment) -> str | None:
    """One sentence on what this machine lacks for this run and what to type instead; None: it can run here."""
    cluster, here = exp.cluster, gpus_here()
    if cluster.joins is None and cluster.world > len(here):  # a joined cluster's GPUs are counted when it is joined
        kind = "" if cluster.gpu in (None, "any") else f"{cluster.gpu} "
        many = f" ({cluster.nodes} nodes of {cluster.gpus_per_node})" if cluster.nodes > 1 else ""
        asked = f"{cluster.world} {kind}GPU{'s' if cluster.world > 1 else ''}{many}"
        has = f"{len(here)} ({here[0]})" if here else "none"
        small = exp.model.sized().num_params() < 10_000_000
        join = "join a Ray cluster that has them (cluster.address=...), or "
        way = (
            "type cluster=local to run on its cores" if small else f"{join}type scale=laptop to run its small twin here"
        )
        what = f"model={exp.model.name} precision={exp.precision.name} on cluster={cluster.name}"
        return f"{what} needs {asked} and this machine has {has}; {way}"
    for part in (exp.trainer, exp.rollout):
        if said := part.missing(exp):
            return said
    if typed := lacking(exp.model.sized().path):
        return f"the weights of model={exp.model.name} are not here yet; type: {typed}"
    return exp.task.missing()


def gpus_here() -> list[str]:
    """Names of the NVIDIA GPUs that this process may use, from the driver's files: no library is loaded."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return []
    names = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        found = re.search(r"^Model:\s*(.+)$", path.read_text(), re.MULTILINE)
        names.append(found[1].strip() if found else "unknown GPU")
    devices = [path for path in Path("/dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()]
    return names[: len(devices)]


def _describe(part: Spec, name: str) -> str:
    """The part's name and its fields."""
    fields = {key: value for key, value in part.dump().items() if key not in ("_target_", "name")}
    return name + (f" ({', '.join(f'{key} {value}' for key, value in fields.items())})" if fields else "")


def _machines(cluster: Cluster) -> str:
    """Its GPUs, and whose Ray it is."""
    gpus = f"{cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu or ''} GPUs" if cluster.world else "CPU"
    if cluster.world and not cluster.colocate:
        gpus += f", {cluster.trainer_gpus} for the trainer and {cluster.engine_gpus} for the engines"
    return f"{cluster.name}: {gpus}" + (f", of the Ray cluster at {cluster.joins}" if cluster.joins else "")


def _contract(exp: Experiment, params: Sequence[Any], moe: bool) -> str:
    trained, served = digest(exp.precision.contract(params, moe)), digest(exp.wire.contract(params, moe))
    return (
        f"{served} on both sides"
        if trained == served
        else f"{trained} trained, {served} served: they differ, as asked for"
    )


def _cache_bytes(exp: Experiment) -> int:
    model = exp.model.sized()
    if model.mla:
        entry = model.mla.kv_lora_rank + model.mla.qk_rope_head_dim
    else:
        entry = 2 * model.num_key_value_heads * model.head_dim
    samples = exp.sampled.prompts_per_step * exp.algorithm.samples_per_prompt
    return 2 * entry * model.num_hidden_layers * samples * (exp.task.max_prompt + exp.task.max_response)


def _size(count: int | None) -> str:
    if count is None:
        return "-"
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= factor:
            return f"{count / factor:,.1f} {unit}"
    return f"{count} B"


def table(rows: Sequence[Sequence[Any]], indent: str = "") -> str:
    """Columns as wide as their widest cell, plain text."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[at]) for row in cells) for at in range(len(cells[0]))]
    return "\n".join(
        indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )
