"""Megatron-core with Transformer Engine: its products beside the emulation, packing, context parallelism, whole steps.

A machine that lacks a library or a second card fails the test with what it lacks; nothing is skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    pass

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]
NEEDED = {"transformer_engine.pytorch": "transformer-engine[pytorch]", "megatron.core": "megatron-core"}
ROOT = Path(__file__).resolve().parents[2]
SHAPE = ("model=qwen3_0_6b", "model.path=null", "rollout=embedded", "task=sort_letters", "task.warmup=null")
SMALL = ("task.prompts_per_step=4", "algorithm.samples_per_prompt=4", "eval.prompts=4", "eval.samples=1", "eval.show=0")


@pytest.fixture(autouse=True)
def _libraries() -> None:
    lacking = []
    for module, package in NEEDED.items():
        try:
            __import__(module)
        except ImportError as error:
            lacking.append(f"{package} ({error})")
    if lacking:
        pytest.fail(f"needs {', '.join(lacking)}; pip install 'lpexp[megatron,te]'")


@pytest.mark.parametrize("scale", ["fp32", "pow2"])
def test_eight_bit_products_of_the_engine_are_the_emulations_within_two_steps(
    scale: str, tell: Callable[[str], None]
) -> None:
    """Forward and both backward products. A step is one bf16 unit; where sums cancel the bound is absolute."""
    done = subprocess.run(
        [sys.executable, "-c", PRODUCTS.format(root=str(ROOT), scale=scale)],
        env=os.environ | {"NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "0" if scale == "pow2" else "1"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for product, (histogram, far) in found.items():
        tell(f"{scale} {product}: share of outputs by bf16 steps {histogram}, {far} beyond 2 away from cancellation")
        assert far == 0
        assert histogram["0"] > 0.9


PRODUCTS = """
import json, sys
sys.path.insert(0, {root!r})
import torch, transformer_engine.pytorch as te
from transformer_engine.common.recipe import Float8BlockScaling
from lpexp import frontend
precision = frontend.experiment("precision=fp8", "precision.scale_format={scale}").precision
torch.manual_seed(1)
layer = te.Linear(1024, 1024, bias=False, params_dtype=torch.bfloat16, device="cuda")
x = torch.randn(512, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
dy = torch.randn(512, 1024, device="cuda", dtype=torch.bfloat16)
with te.fp8_autocast(enabled=True, fp8_recipe=Float8BlockScaling()):
    y = layer(x)
y.backward(dy)
a = x.detach().float().requires_grad_()
w = layer.weight.detach().float().requires_grad_()
b = precision.linear(a, w)
b.backward(dy.float())
found = {{}}
for name, ours, theirs in (("Y", b, y), ("dX", a.grad, x.grad), ("dW", w.grad, layer.weight.grad)):
    ours, theirs = ours.detach().bfloat16(), theirs.detach().bfloat16()
    order = lambda t: (lambda i: torch.where(i < 0, -32768 - i, i))(t.view(torch.int16).int())
    steps = (order(ours) - order(theirs)).abs()
    cancelled = ours.float().abs() < 0.05 * ours.float().std()
    far = int(((steps > 2) & ~cancelled).sum())
    histogram = {{str(n): round(float((steps == n).float().mean()), 6) for n in range(4)}}
    found[name] = (histogram, far)
print(json.dumps(found))
"""


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int4_qat"])
def test_one_step_of_a_small_real_shape_trains(tmp_path: Path, precision: str, tell: Callable[[str], None]) -> None:
    (line,) = trained(tmp_path / "run", f"precision={precision}", "cluster=gpu")
    tell(f"{precision}: loss {line['train/loss']:.4g}, mismatch {line['mismatch/logprob_abs_diff_mean']:.3g}")
    assert line["train/grad_norm"] > 0
    assert line["sync/checksum_ok"] == 1
    assert 0 < line["mismatch/logprob_abs_diff_mean"] < 0.1


def test_a_reference_beside_fake_quantised_weights_is_not_quantised(tmp_path: Path) -> None:
    words = ("cluster=gpu", "algorithm.kl_coef=0.1", "trainer.lr=0", "precision=int4_qat")
    (line,) = trained(tmp_path / "run", *words)
    assert line["train/kl_penalty"] > 0  # with the same rounding on both sides it would be 0


def test_packed_sequences_score_as_padded_ones(tmp_path: Path) -> None:
    """A micro-batch of everything and one sequence a micro-batch: what lies beside a sequence changes nothing."""
    one, all_at_once = (
        trained(tmp_path / name, "precision=bf16", "cluster=gpu", "trainer.lr=0", f"trainer.max_tokens_per_gpu={room}")
        for name, room in (("one", 1), ("all", 100_000))
    )
    for key in ("train/loss", "train/grad_norm"):
        assert abs(one[0][key] - all_at_once[0][key]) < 2e-2 * max(abs(one[0][key]), 1e-2)


def test_two_context_parallel_ranks_score_as_one(tmp_path: Path) -> None:
    import torch

    if torch.cuda.device_count() < 2:
        pytest.fail(f"needs two GPUs, this machine has {torch.cuda.device_count()}")
    one = trained(tmp_path / "one", "precision=bf16", "cluster=gpu", "trainer.lr=0")
    words = ("cluster=gpu", "cluster.gpus_per_node=2", "trainer.cp=2", "model.parallel.cp=2")
    two = trained(tmp_path / "two", "precision=bf16", "trainer.lr=0", *words)
    for key in ("train/loss", "train/grad_norm"):
        assert abs(one[0][key] - two[0][key]) < 2e-2 * max(abs(one[0][key]), 1e-2)


def trained(folder: Path, *words: str) -> list[dict[str, Any]]:
    """The lines of one training step."""
    typed = [*SHAPE, *SMALL, "steps=1", "trainer=megatron", "wandb.mode=disabled", f"output_dir={folder}", *words]
    done = subprocess.run([sys.executable, str(ROOT / "launch.py"), *typed], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "train/loss" in line]
