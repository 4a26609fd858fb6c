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

from lpexp.console import served_first
from lpexp.experiment import Experiment
from lpexp.fetch import FETCHED
from lpexp.precision import Precision, digest, side

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
    params = list(model.params())
    reference = exp.reference.precision.name if exp.uses_reference else "none (algorithm.kl_coef is 0)"
    world = exp.cluster.nodes * exp.cluster.gpus_per_node
    machine = f"{exp.cluster.nodes} x {exp.cluster.gpus_per_node} {exp.cluster.gpu or ''} GPUs" if world else "CPU"
    head = [
        ("model", f"{model.name} ({model.architecture}, {elements:,} parameters, {len(params):,} tensors)"),
        ("trainer", _describe(exp.precision)),
        ("rollout", _describe(exp.wire) + (" (the trainer's)" if exp.rollout.precision is None else "")),
        *([("checkpoint", said)] if (said := served_first(exp)) else []),
        ("reference", reference),
        ("correction", exp.correction.name),
        ("cluster", f"{exp.cluster.name}: {machine}"),
        (
            "batch",
            f"{exp.task.prompts_per_step} prompts x {exp.algorithm.samples_per_prompt} samples of {exp.task.name}, "
            f"lag {exp.lag}, {exp.steps} steps",
        ),
        ("contract", _contract(exp)),
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
    path = exp.model.sized().path or ""
    if path.startswith(FETCHED):
        return f"the weights of model={exp.model.name} are not here yet; type: lpexp fetch {path.removeprefix(FETCHED)}"
    nodes, each = exp.cluster.nodes, exp.cluster.gpus_per_node
    here = gpus_here()
    if nodes * each > len(here):
        kind = "" if exp.cluster.gpu in (None, "any") else f"{exp.cluster.gpu} "
        asked = f"{nodes * each} {kind}GPU{'s' if nodes * each > 1 else ''}" + (
            f" ({nodes} nodes of {each})" if nodes > 1 else ""
        )
        has = f"{len(here)} ({here[0]})" if here else "none"
        small = exp.model.sized().num_params() < 10_000_000
        way = "type cluster=local to run on its cores" if small else "type scale=laptop to run its small twin here"
        what = f"model={exp.model.name} precision={exp.precision.name} on cluster={exp.cluster.name}"
        return f"{what} needs {asked} and this machine has {has}; {way}"
    for part in (exp.trainer, exp.rollout):
        if lacking := part.missing(exp):
            return lacking
    return None


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


def _describe(precision: Precision) -> str:
    fields = {key: value for key, value in precision.dump().items() if key not in ("_target_", "name")}
    return precision.name + (f" ({', '.join(f'{key} {value}' for key, value in fields.items())})" if fields else "")


def _contract(exp: Experiment) -> str:
    trained, served = digest(exp.contract(exp.precision)), digest(exp.contract())
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
    samples = exp.task.prompts_per_step * exp.algorithm.samples_per_prompt
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
