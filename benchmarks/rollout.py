"""Tokens a second of lpexp's rollout engines beside transformers' `generate`, on the same weights and prompts.

lpexp serves as in a run (two engines of one thread, trainer's weights published once) and keeps a log-probability of
every token. `generate` gets one process with two threads, and again with one, in fp32 and bf16, and keeps none. Both
sample at temperature 1 until the stop token or `--tokens`. Only generated tokens count, the stop token included, and
nothing after it. The first of the repeats warms up and is left out; the arms alternate.

  python benchmarks/rollout.py --tokens 64
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from vs_trl import write_page  # it puts the checkout on the path

Arm = Callable[[int], int]  # repeat -> tokens generated


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=16, help="a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="at most, a sample")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", default="qwen3_tiny", help="a card of conf/model/ that starts from scratch")
    parser.add_argument("--out", type=Path, help="write the result as a page")
    args = parser.parse_args()
    rates = measure(args)
    lines = ["| arm | tokens/s (median) | lowest | highest |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {arm} | {statistics.median(each):.0f} | {min(each):.0f} | {max(each):.0f} |" for arm, each in rates.items()
    ]
    print("\n".join(lines))
    if args.out:
        work = f"{args.prompts} prompts x {args.samples} samples of at most {args.tokens} tokens, {args.model}"
        write_page(args.out, "rollout", "\n".join(lines), work)
    return 0


def measure(args: argparse.Namespace) -> dict[str, list[float]]:
    """Tokens a second of every arm, one value a repeat."""
    from lpexp import frontend

    words = [f"model={args.model}", f"task.max_response={args.tokens}", f"task.prompts_per_step={args.prompts}"]
    words += [f"algorithm.samples_per_prompt={args.samples}"]
    precisions = ("bf16", "fp8", "int4_qat")
    rates: dict[str, list[float]] = {}
    for repeat in range(args.repeats + 1):
        for precision in precisions:
            exp = frontend.experiment(*words, "task.warmup=null", f"precision={precision}")
            with served(exp) as arm:
                arm(0)  # a fresh engine's first call allocates
                clock(rates, f"lpexp {precision}", arm, repeat, args)
        for dtype in ("float32", "bfloat16"):
            for threads in (2, 1):
                arm = generated(frontend.experiment(*words, "precision=fp32"), dtype, threads, args)
                clock(rates, f"transformers {dtype}, {threads} thread{'s' * (threads > 1)}", arm, repeat, args)
    return rates


def clock(rates: dict[str, list[float]], name: str, arm: Arm, repeat: int, args: argparse.Namespace) -> None:
    begin = time.perf_counter()
    tokens = arm(repeat)
    seconds = time.perf_counter() - begin
    if repeat:
        rates.setdefault(name, []).append(tokens / seconds)
        print(f"repeat {repeat} of {args.repeats}: {name}: {tokens / seconds:.0f} tokens/s", file=sys.stderr)


@contextmanager
def served(exp: Any) -> Iterator[Arm]:
    """lpexp's engines with the start weights, as the loop opens them."""
    from lpexp.cluster import Workers
    from lpexp.model.tokenizer import load_tokenizer
    from lpexp.rollout import Sampling

    with tempfile.TemporaryDirectory(prefix="lpexp-bench-") as folder:
        workers = Workers(exp.cluster, lambda *_, **__: None, Path(folder))
        try:
            trainer, rollout = exp.trainer.build(exp, workers), exp.rollout.build(exp, workers)
            trainer.restore(None)
            trainer.publish(rollout, 0).result()
            tokenizer = load_tokenizer(exp.model)
            sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, samples=exp.algorithm.samples_per_prompt)

            def sample(step: int) -> int:
                groups = rollout.sample(exp.task.train(exp.seed, step, tokenizer), sampling, step).result()
                return sum(len(sample.tokens_T) for group in groups for sample in group.samples)

            yield sample
        finally:
            workers.close()


def generated(exp: Any, dtype: str, threads: int, args: argparse.Namespace) -> Arm:
    """transformers with the same start weights, through a checkpoint directory."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from lpexp.model import hf
    from lpexp.model.decoder import initial_tensors
    from lpexp.model.tokenizer import load_tokenizer

    logging.disable_progress_bar()
    model, tokenizer = exp.model.sized(), load_tokenizer(exp.model)
    with tempfile.TemporaryDirectory(prefix="lpexp-bench-") as folder:
        at = hf.save(Path(folder) / "hf", model, initial_tensors(model, exp.seed).items(), exp.precision)
        network: Any = AutoModelForCausalLM.from_pretrained(at, dtype=getattr(torch, dtype)).eval()

    def generate(step: int) -> int:
        torch.set_num_threads(threads)
        prompts = exp.task.train(exp.seed, step, tokenizer)
        rows = torch.tensor([prompt.tokens for prompt in prompts for _ in range(args.samples)])
        with torch.inference_mode():
            made = network.generate(
                rows,
                attention_mask=torch.ones_like(rows),
                max_new_tokens=args.tokens,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                eos_token_id=tokenizer.stop_id,
                pad_token_id=0,
            )[:, rows.shape[1] :]
        stops = (made == tokenizer.stop_id).int()
        before = stops.cumsum(1) - stops  # 0 up to and at the first stop token
        return int((before == 0).sum())

    return generate


if __name__ == "__main__":
    sys.exit(main())
