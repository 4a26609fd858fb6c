"""Seconds a step of lpexp beside TRL's GRPOTrainer, on the same work, alternating on one machine.

Same work: the model card's sizes from a random start, the same task with its own reward function, 16 prompts x 16
samples, at most `task.max_response` tokens, temperature 1, one optimiser step a batch, no reference. lpexp runs as a
user runs it (`python launch.py`, lag 0, every mismatch metric on, two trainer ranks and two engines of one thread).
TRL is given every advantage that its options offer here: no logging, no gradient checkpointing, no checkpoints, fp32
beside its default bf16, one thread beside two; the fastest of these counts. A step's time is the wall clock from
the end of one step to the end of the next; the first `--skip` steps of each run are left out.

  python benchmarks/vs_trl.py                 # five alternating repeats, a table of medians and ratios
  python benchmarks/vs_trl.py --check         # and exit 1 unless bf16 <= 0.5 x TRL, fp8 and int4_qat <= 1.0 x TRL

Left out: vLLM, which has no CPU build that TRL starts here; several TRL processes on one model of this size.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `lpexp` is read from this checkout, installed or not

TRL_ARMS = {"trl fp32 2 threads": ("fp32", 2), "trl fp32 1 thread": ("fp32", 1), "trl bf16 2 threads": ("bf16", 2)}
SLOW = ("trl bf16 2 threads",)  # ten times slower on a CPU without bf16 units: five steps a run are measured
LPEXP_ARMS = {"lpexp bf16": 0.5, "lpexp fp8": 1.0, "lpexp int4_qat": 1.0}  # arm -> at most this part of TRL's time
SAME = ["lag=0", "task.warmup=null", "model=qwen3_tiny", "task=sort_letters"]
SAME += ["task.prompts_per_step=16", "algorithm.samples_per_prompt=16", "algorithm.updates_per_batch=1"]


def main() -> int:
    args = arguments()
    if args.arm:
        print(json.dumps(trl_steps(*TRL_ARMS[args.arm], steps=args.steps)))
        return 0
    arms = [arm for arm in (*LPEXP_ARMS, *TRL_ARMS) if not args.only or any(word in arm for word in args.only)]
    medians: dict[str, list[float]] = {arm: [] for arm in arms}
    for repeat in range(args.repeats):
        for arm in arms:
            steps = args.skip + 5 if arm in SLOW else args.steps
            seconds = lpexp_run(arm, steps) if arm in LPEXP_ARMS else trl_run(arm, steps)
            medians[arm].append(statistics.median(seconds[args.skip :]))
            print(f"repeat {repeat + 1}: {arm:18} {medians[arm][-1]:.4f} s a step", file=sys.stderr)
    result = summary(medians, args)
    print(table(result))
    if args.out:
        write_page(args.out, "vs_trl", table(result), f"medians of {args.repeats} alternating repeats")
    if args.check:
        return check(result)
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30, help="of each run")
    parser.add_argument("--skip", type=int, default=5, help="first steps left out of each run's median")
    parser.add_argument("--only", action="append", help="arms whose name holds this word; may be repeated")
    parser.add_argument("--out", type=Path, help="write the result as a page")
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    parser.add_argument("--arm", choices=TRL_ARMS, help=argparse.SUPPRESS)  # one TRL run, in this process
    args = parser.parse_args()
    if args.steps <= args.skip:
        parser.error(f"--steps {args.steps} leaves nothing after --skip {args.skip}")
    if args.check and args.only:
        parser.error("--check needs every arm; leave out --only")
    return args


def lpexp_run(arm: str, steps: int) -> list[float]:
    """Seconds of each step of `python launch.py`, from its metrics.jsonl."""
    with tempfile.TemporaryDirectory(prefix="lpexp-bench-") as folder:
        run = Path(folder) / "run"
        words = [*SAME, f"precision={arm.split()[1]}", f"steps={steps}", f"output_dir={run}", "wandb.mode=disabled"]
        words += [f"eval.every={steps}", f"checkpoint.every={steps}"]  # neither inside the steps that are measured
        execute([sys.executable, "launch.py", *words], threads=1)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == steps, f"{arm} logged {len(lines)} of {steps} steps"
    missing = [line["step"] for line in lines if "mismatch/kl_k3" not in line]
    assert not missing, f"steps {missing} of {arm} were measured without mismatch metrics"
    return [line["time/step"] for line in lines][:-1]  # the last step evaluates too


def trl_run(arm: str, steps: int) -> list[float]:
    """Seconds of each step of a TRL run in a process of its own."""
    words = [sys.executable, __file__, "--arm", arm, "--steps", str(steps)]
    return json.loads(execute(words, threads=TRL_ARMS[arm][1]).splitlines()[-1])


def execute(words: list[str], threads: int) -> str:
    """Standard output of a command that must end well; OpenMP threads are the arm's, whatever the shell says."""
    fixed = {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(words, cwd=ROOT, env=os.environ | fixed, capture_output=True, text=True, check=False)
    if done.returncode:
        said = f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        raise SystemExit(f"{' '.join(words)} ended with {done.returncode}:\n{said}")
    return done.stdout


def setting() -> Any:
    """The typed config of the work that both sides do."""
    from lpexp import frontend

    return frontend.experiment(*SAME)


def trl_steps(dtype: str, threads: int, steps: int) -> list[float]:
    """Train `steps` steps with TRL's GRPOTrainer in this process; seconds of each."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    exp = setting()
    from lpexp.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(exp.model)
    prompts = [prompt for step in range(steps) for prompt in exp.task.train(exp.seed, step, tokenizer)]
    by_text, stop_id = {prompt.text: prompt for prompt in prompts}, tokenizer.stop_id

    def reward(
        prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any
    ) -> list[float | None]:
        return [
            exp.task.reward(by_text[text], answer, "stop" if stop_id in ids else "length").reward
            for text, answer, ids in zip(prompts, completions, completion_ids, strict=True)
        ]

    class Clock(TrainerCallback):
        ends: list[float] = []

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.ends.append(time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.ends.append(time.perf_counter())

    batch = exp.task.prompts_per_step * exp.algorithm.samples_per_prompt
    with tempfile.TemporaryDirectory(prefix="trl-bench-") as folder:
        config = GRPOConfig(
            output_dir=folder,
            bf16=dtype == "bf16",
            use_cpu=True,
            gradient_checkpointing=False,
            per_device_train_batch_size=batch,
            num_generations=exp.algorithm.samples_per_prompt,
            num_iterations=1,
            max_completion_length=exp.task.max_response,
            temperature=1.0,
            beta=0.0,
            learning_rate=exp.trainer.lr,
            epsilon=exp.algorithm.clip_low,
            epsilon_high=exp.algorithm.clip_high,
            max_steps=steps,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            generation_kwargs={"use_cache": True},
        )
        trainer = GRPOTrainer(
            model=hf_model(exp.model),
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_list([{"prompt": prompt.text} for prompt in prompts]),
            processing_class=hf_tokenizer(),
            callbacks=[clock := Clock()],
        )
        trainer.train()
    assert len(clock.ends) == steps + 1, f"TRL made {len(clock.ends) - 1} of {steps} steps"
    return [after - before for before, after in zip(clock.ends, clock.ends[1:], strict=False)]


STOP = "<stop>"


def hf_model(model: Any) -> Any:
    """The card's model in transformers, from a random start."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    assert model.architecture == "qwen3", f"{model.name} is {model.architecture}; this benchmark compares qwen3"
    sizes = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    sizes += ["num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings"]
    sizes += ["initializer_range"]
    config = Qwen3Config(
        **{name: getattr(model, name) for name in sizes},
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    built = Qwen3ForCausalLM(config)
    count = sum(parameter.numel() for parameter in built.parameters())
    assert count == model.num_params(), f"transformers built {count} parameters, the card has {model.num_params()}"
    return built


def hf_tokenizer() -> Any:
    """lpexp's character table as a transformers tokenizer: no file and no network."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from lpexp.model.tokenizer import SYMBOLS

    inner = Tokenizer(
        models.WordLevel({"<pad>": 0, STOP: 1} | {char: i + 2 for i, char in enumerate(SYMBOLS)}, "<pad>")
    )
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # type: ignore[assignment]
    inner.decoder = decoders.Fuse()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token=STOP, padding_side="left")


def summary(medians: dict[str, list[float]], args: argparse.Namespace) -> dict[str, Any]:
    """Medians over repeats, and each lpexp arm's ratio to the fastest TRL arm."""
    seconds = {arm: statistics.median(values) for arm, values in medians.items()}
    trl = {arm: value for arm, value in seconds.items() if arm in TRL_ARMS}
    fastest = min(trl, key=trl.__getitem__) if trl else None
    return {
        "steps": args.steps,
        "skip": args.skip,
        "repeats": args.repeats,
        "seconds_per_step": seconds,
        "each_repeat": medians,
        "fastest_trl": fastest,
        "ratio": {arm: seconds[arm] / trl[fastest] for arm in LPEXP_ARMS if arm in seconds and fastest},
    }


def write_page(path: Path, name: str, table: str, *notes: str) -> None:
    """A dated page: when, of which commit, on what machine, by which command; without these a number means nothing."""
    words = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    command = f"python benchmarks/{name}.py {' '.join(sys.argv[1:])}".replace(str(ROOT) + "/", "")
    lines = [
        f"# {name}",
        "",
        f"- date: {datetime.now(UTC).isoformat(timespec='minutes')}",
        f"- commit: {commit}",
        f"- machine: {os.cpu_count()} cores of {processor()}, load {os.getloadavg()[2]:.1f} over 15 minutes",
        f"- versions: Python {platform.python_version()}, "
        + ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "trl")),
        f"- command: `{command}`",
        *(f"- {note}" for note in notes),
        "",
        table,
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def table(result: dict[str, Any]) -> str:
    lines = ["| arm | s/step (median) | lowest | highest | x fastest TRL |", "| --- | --- | --- | --- | --- |"]
    fastest = result["seconds_per_step"].get(result["fastest_trl"])
    for arm, seconds in result["seconds_per_step"].items():
        each = result["each_repeat"][arm]
        ratio = f"{seconds / fastest:.2f}" if fastest else "-"
        lines.append(f"| {arm} | {seconds:.4f} | {min(each):.4f} | {max(each):.4f} | {ratio} |")
    return "\n".join(lines)


def check(result: dict[str, Any]) -> int:
    missed = [
        f"{arm} takes {result['ratio'][arm]:.2f} x {result['fastest_trl']}; the target is at most {target}"
        for arm, target in LPEXP_ARMS.items()
        if result["ratio"][arm] > target
    ]
    print("\n".join(missed) or "every target is met", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
