"""`lpexp convert` beside the machine's own copy of the same bytes: GB of source a second, and memory.

A synthetic sharded bf16 checkpoint is copied (file by file, by the kernel) and converted, each time ending in fsync of
files and directory; the arms alternate and the medians are compared. A conversion is timed as its command, start-up
included. Memory is the private memory (USS) of the command and its workers, added up and looked at every 20 ms in runs
of their own, so that looking slows no timed run. Source and results are deleted afterwards.

  python benchmarks/convert.py --repeats 5 --out docs/results/2026-11-25-convert.md
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent))
from vs_trl import write_page  # it puts the checkout on the path

from lpexp.disk import sync, sync_tree
from lpexp.model import Model, hf

PROMISED = {"fp8": 0.40, "int4": 0.25}  # of the copy's GB/s, with two workers
USS_LIMIT = 1.5e9
LOOK_S = 0.02


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=40, help="of 50 million parameters; 40 make 4.6 GB")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; it must hold three times the checkpoint")
    parser.add_argument("--out", type=Path, help="write the page")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="convert-") as folder:
        table, note, held = report(args, Path(folder))
    print(table)
    if args.out:
        write_page(args.out, "convert", table, note)
    return 0 if held else 1


def synthetic(at: Path, layers: int) -> Path:
    """A llama of hidden size 2048 with normal weights, in shards of 1 GiB."""
    import torch

    from lpexp.precision.bf16 import Bf16

    model = Model(
        name="synthetic",
        architecture="llama",
        vocab_size=65536,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        rope_theta=1e4,
        rms_norm_eps=1e-6,
        max_position_embeddings=4096,
    )
    generator = torch.Generator().manual_seed(0)
    tensors = ((p.name, torch.randn(p.shape, generator=generator).mul_(0.02).bfloat16()) for p in model.params())
    return hf.save(at, model, tensors, Bf16(name="bf16"), shard_bytes=2**30)


def copy(source: Path, out: Path) -> None:
    out.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, out / path.name)  # sendfile on Linux: the bytes stay in the kernel
    sync_tree(out)
    sync(out.parent)


def command(word: str, source: Path, out: Path, workers: int) -> list[str]:
    words = ["convert", word, "--model-dir", str(source), "--save-dir", str(out), "--max-workers", str(workers)]
    return [sys.executable, "-c", f"from lpexp import cli; raise SystemExit(cli.main({words!r}))"]


def seconds(arm: str, source: Path, out: Path, workers: int) -> float:
    os.sync()
    start = time.perf_counter()
    if arm == "copy":
        copy(source, out)
    else:
        subprocess.run(command(arm, source, out, workers), check=True, stdout=subprocess.DEVNULL)
    taken = time.perf_counter() - start
    shutil.rmtree(out)
    return taken


def peak_uss(word: str, source: Path, out: Path, workers: int) -> int:
    """The largest sum of private memory over the command and its workers."""
    peak = 0
    with subprocess.Popen(command(word, source, out, workers), stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, sum(_uss(psutil.Process(process.pid))))
            time.sleep(LOOK_S)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, word)
    shutil.rmtree(out)
    return peak


def _uss(root: psutil.Process) -> Iterator[int]:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        for process in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                yield process.memory_full_info().uss


def report(args: argparse.Namespace, folder: Path) -> tuple[str, str, bool]:
    """(table, what was converted, do all promises hold)"""
    source = synthetic(folder / "source", args.layers)
    size = sum(path.stat().st_size for path in source.iterdir())
    arms = ("copy", *PROMISED)
    taken: dict[str, list[float]] = {arm: [] for arm in arms}
    for repeat in range(args.repeats):
        for arm in arms:
            taken[arm].append(seconds(arm, source, folder / f"{arm}-{repeat}", args.workers))
            print(f"{arm} {repeat}: {taken[arm][-1]:.2f} s", file=sys.stderr, flush=True)
    memory = {word: peak_uss(word, source, folder / f"{word}-memory", args.workers) for word in PROMISED}
    speed = {arm: size / statistics.median(each) / 1e9 for arm, each in taken.items()}
    lines = [
        "Seconds from command to fsync, alternated; GB/s are bytes of the source over the median.",
        "",
        "| arm | seconds | median | GB/s | of the copy | promised | peak private memory, all processes |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    held = True
    for arm, each in taken.items():
        share, least = speed[arm] / speed["copy"], PROMISED.get(arm)
        cells = [arm, ", ".join(f"{one:.2f}" for one in each), f"{statistics.median(each):.2f}", f"{speed[arm]:.3f}"]
        cells += [f"{share:.0%}", "" if least is None else f"at least {least:.0%}"]
        cells += [f"{memory[arm] / 1e9:.2f} GB (limit {USS_LIMIT / 1e9} GB)" if arm in memory else ""]
        lines.append(f"| {' | '.join(cells)} |")
        held &= least is None or (share >= least and memory[arm] < USS_LIMIT)
    lines += ["", "All promises hold." if held else "**A promise does not hold.**"]
    shards = len(list(source.glob("*.safetensors")))
    note = f"source: {size / 1e9:.2f} GB of bf16 in {shards} shards, in the page cache; {args.workers} workers"
    return "\n".join(lines), note, held


if __name__ == "__main__":
    sys.exit(main())
