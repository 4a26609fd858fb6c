"""Perplexity of SmolLM2-135M on a fixed text in every precision that serves it, beside bf16.

The text is `prose.txt`: the whole of "In the Year 2889" (Jules and Michel Verne, 1889; public domain), read in
windows that start anew. Weights are quantised by the precision itself and served from the parts;
`--served NAME=DIR` adds a directory as it is stored, e.g. a calibrated one.
The bf16 baseline is itself a dequantised 4-bit file (Q4_1, groups of 32): the table says what a second rounding costs.

  lpexp fetch smollm2_135m
  python benchmarks/perplexity.py --served gptq_32=DIR --out docs/results/perplexity.json
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent))
from vs_trl import provenance  # it puts the checkout on the path

if TYPE_CHECKING:
    from lpexp.model import Model
    from lpexp.model.decoder import ServedWeights

TEXT = Path(__file__).resolve().parent / "prose.txt"
BASELINE = "bf16"
ARMS = {
    BASELINE: ("precision=bf16",),
    "fp8": ("precision=fp8",),
    "int4 rtn, groups of 32": ("precision=int4_qat", "precision.group_size=32"),
    "int4 rtn, groups of 64": ("precision=int4_qat", "precision.group_size=64"),
}
NOTE = "bf16 is SmolLM2-135M-Instruct dequantised from Q4_1, not its authors' bf16"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--served", action="append", default=[], metavar="NAME=DIR", help="a directory, as stored")
    parser.add_argument("--window", type=int, default=1024, help="tokens")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    found: dict[str, float] = {}
    from lpexp.errors import ConfigError

    try:
        served = [named(word) for word in args.served]
        tokens, model = read_text()
        for name, weights in arms(model, served):
            start = time.perf_counter()
            found[name] = perplexity(model, weights, tokens, args.window)
            print(f"{name}: {found[name]:.4f} ({time.perf_counter() - start:.0f} s)", file=sys.stderr, flush=True)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    command = shlex.join(["python", "benchmarks/perplexity.py", *sys.argv[1:]])
    print(f"{len(tokens)} tokens of {TEXT.name}, windows of {args.window}; {NOTE}; made by `{command}`\n")
    print("| precision | perplexity | beside bf16 |\n| --- | ---: | ---: |")
    for name, value in found.items():
        print(f"| {name} | {value:.3f} | {value / found[BASELINE] - 1:+.2%} |")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        facts = {"command": command, "note": NOTE, "tokens": len(tokens), "window": args.window, "perplexity": found}
        args.out.write_text(json.dumps(provenance() | facts, indent=2) + "\n")
    return 0


def named(word: str) -> tuple[str, str]:
    from lpexp.errors import ConfigError

    name, equals, directory = word.partition("=")
    if not (name and equals and directory):
        raise ConfigError(f"--served {word}: should be NAME=DIR")
    return name, directory


def read_text() -> tuple[list[int], Model]:
    """The text's tokens, and the fetched model."""
    from lpexp import fetch
    from lpexp.model import hf
    from lpexp.model.tokenizer import HfTokenizer

    directory = fetch.find("fetched:smollm2_135m")
    if directory is None:
        from lpexp.errors import ConfigError

        raise ConfigError("the weights of smollm2_135m are not here yet; type: lpexp fetch smollm2_135m")
    return HfTokenizer(directory).encode(TEXT.read_text()), hf.read_model(directory)


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


def perplexity(model: Model, weights: ServedWeights, tokens: list[int], window: int) -> float:
    """exp of the mean negative log-probability of every token but a window's first."""
    import torch

    from lpexp.model.decoder import Decoder, token_logprobs

    decoder, total, count = Decoder(model), 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(tokens) - 1, window):
            ids = torch.tensor([tokens[start : start + window]])
            hidden = decoder.hidden(weights, ids)[:, :-1]
            logprobs, _ = token_logprobs(decoder.head(weights, hidden), ids[:, 1:], 1.0)
            total -= float(logprobs.double().sum())
            count += logprobs.numel()
    return math.exp(total / count)


if __name__ == "__main__":
    sys.exit(main())
