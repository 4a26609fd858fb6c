"""Small runs in this process and directories of their weights, for the tests of what is served, exported, evaluated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lpexp import frontend, loop
from lpexp.export import chosen, export, saved
from lpexp.model import hf
from lpexp.precision import Parts, Precision

SMALL = (
    "cluster=inline",
    "task=sort_letters",
    "task.prompts_per_step=8",
    "algorithm.samples_per_prompt=8",
    "eval.prompts=8",
    "eval.samples=2",
    "eval.show=0",
    "wandb.mode=disabled",
    "trainer.lr=1e-3",
    "checkpoint.every=1",
    "checkpoint.keep=9",
)


def train(at: Path, *words: str) -> Path:
    """The run directory of a small run."""
    typed = [*SMALL, f"output_dir={at}", *words]
    assert loop.run(frontend.experiment(*typed), typed) == 0
    return at


def named(words: str) -> Precision:
    return chosen("precision", words.split(), Precision, "--precision")[0][1]


def exported(run: Path, words: str, out: Path, step: int | None = None) -> Path:
    export(saved(run, step), named(words), out)
    return out


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    told = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [event for event in told if event["kind"] == kind]


def calibrated(directory: Path, out: Path, name: str = "model.layers.0.mlp.up_proj.weight") -> Path:
    """A copy of an INT4 directory in which one code is what rounding to nearest would not choose."""
    shutil.copytree(directory, out)
    (shard,) = out.glob("*.safetensors")
    tensors = load_file(shard)
    packed = tensors[hf.part_name(name, "weight_packed")].view(-1)
    at = int((packed & 15 == 8).nonzero()[0])  # a code 0, stored as 8, becomes 1
    packed[at] += 1
    save_file(tensors, shard, {"format": "pt"})
    return out


def same(left: dict[str, Parts], right: dict[str, Parts]) -> list[str]:
    """Names of the tensors whose parts differ in a byte."""
    assert left.keys() == right.keys()
    return [name for name in left if not _alike(left[name], right[name])]


def _alike(left: Parts, right: Parts) -> bool:
    return left.keys() == right.keys() and all(
        left[suffix].dtype == right[suffix].dtype
        and torch.equal(left[suffix].reshape(-1).view(torch.uint8), right[suffix].reshape(-1).view(torch.uint8))
        for suffix in left
    )
