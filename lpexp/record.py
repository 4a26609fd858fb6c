"""Stored rollouts: one safetensors file a step, so that later tools can re-score what happened.

Layout: `<run>/record/<step:06d>.safetensors` with tokens, masks, lp_R, lp_T, rewards, advantages, versions, ids and the
router's choices; the newest `keep` stay.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lpexp.data import Batch, LearnReport

FOLDER = "record"


def save(run_dir: Path, report: LearnReport, keep: int) -> None:
    """Write this step's file whole or not at all, then drop the ones beyond `keep`."""
    if keep == 0:
        return
    from safetensors.numpy import save_file

    folder = run_dir / FOLDER
    folder.mkdir(exist_ok=True)
    arrays = {name: value for name, value in vars(report.batch).items() if isinstance(value, np.ndarray)}
    arrays |= {name: getattr(report, name) for name in ("lp_T", "lp_P", "lp_C", "entropy", "weights")}
    arrays |= report.more
    path = folder / f"{report.batch.step:06d}.safetensors"
    made = path.with_suffix(".tmp")
    facts = {"step": str(report.batch.step), "version": str(report.version), "group_size": str(report.batch.group_size)}
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, made, facts)
    made.replace(path)
    for old in sorted(folder.glob("*.safetensors"))[:-keep]:
        old.unlink()


def load(path: Path) -> tuple[Batch, dict[str, np.ndarray]]:
    """The batch of a step, and what the trainer found: lp_T, lp_P, lp_C, entropy, weights and all of `more`."""
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        facts, arrays = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    fields = {name: arrays.pop(name) for name in list(arrays) if name in Batch.__dataclass_fields__}
    return Batch(step=int(facts["step"]), group_size=int(facts["group_size"]), **fields), arrays
