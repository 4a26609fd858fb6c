"""`lpexp convert ... --method gptq`: codes chosen with text, by llm-compressor.

llm-compressor runs GPTQ on the transformers model with the precision's own group size; what it found, scales and
weights that lie on their grid, is written by lpexp in its own layout, so it reads, serves and compares like any other.
Left out: GPTQ itself; more than one process; resuming. Note that the first weight update of a run replaces calibrated
values by rounded ones.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpexp.convert import Report, open_source
from lpexp.errors import ConfigError
from lpexp.model import hf
from lpexp.precision import Parts, Tally
from lpexp.precision.targets import INSTALL, Calibration

if TYPE_CHECKING:
    from torch import Tensor

NEEDED = ("llmcompressor", "compressed_tensors", "transformers", "datasets")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tiktoken.model", "vocab.json")
KINDS = (".parquet", ".txt", ".jsonl")


def calibrate(source: Path, directory: Path, wish: Calibration) -> Report:
    """Write `source` with GPTQ's codes; the report compares with the source's weights."""
    precision = wish.precision
    hf.judge_new(directory)
    stored = open_source(source, precision)
    if lacking := [name for name in NEEDED if find_spec(name) is None]:
        raise ConfigError(f"--method gptq needs {', '.join(lacking)}: {INSTALL}, or use --method rtn")
    if wish.length > stored.model.max_position_embeddings:
        most = stored.model.max_position_embeddings
        raise ConfigError(f"--max-sequence-length {wish.length}: the model has {most} positions; use at most {most}")
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"  # read when its first user is imported, which is transformers below
    tokens_NT = draw(_tokens(source, Path(wish.data), wish), wish)
    found = _gptq(source, stored, wish, tokens_NT)
    kinds: dict[str, list[Any]] = {}

    def parts() -> Iterator[tuple[str, Tensor | Parts]]:
        for param in stored.model.params():
            weight = stored.parts(param)["weight"]
            if not precision.covers(param, stored.moe):
                yield param.name, weight
                continue
            at = param.name.removesuffix(".weight")
            adopted = precision.adopt(found[param.name], found[f"{at}.weight_scale"], param.name)
            row = kinds.setdefault(param.kind, [0, Tally()])
            row[0] += 1
            row[1] += precision.tally(weight.float(), adopted)
            yield param.name, adopted

    hf.save(directory, stored.model, parts(), precision, config=hf.read_config(source))
    return Report({kind: (count, tally) for kind, (count, tally) in kinds.items()})


# -- text --------------------------------------------------------------------------------------------------------------
def texts(path: Path) -> Iterator[str]:
    """The text of a .txt, a .jsonl or .parquet file with a column "text", or of every such file of a directory."""
    if not path.exists():
        raise ConfigError(f"--data-dir: {path} does not exist; name a {', '.join(KINDS)} file or a directory of them")
    files = sorted(p for p in path.iterdir() if p.suffix in KINDS) if path.is_dir() else [path]
    if not files or files[0].suffix not in KINDS:
        raise ConfigError(f"--data-dir: {path} holds no text that can be read; name a {', '.join(KINDS)} file")
    for file in files:
        try:
            yield from _read(file)
        except (OSError, ValueError, KeyError, TypeError) as error:  # pyarrow's errors are ValueErrors and OSErrors
            raise ConfigError(f'--data-dir: {file} cannot be read as text under the key "text": {error!r}') from None


def _read(file: Path) -> Iterator[str]:
    if file.suffix == ".txt":
        yield file.read_text()
    elif file.suffix == ".jsonl":
        yield from (json.loads(line)["text"] for line in file.read_text().splitlines() if line.strip())
    else:
        from pyarrow import parquet

        for batch in parquet.ParquetFile(file).iter_batches(columns=["text"]):
            yield from (text for text in batch.column("text").to_pylist() if text)


def _tokens(source: Path, data: Path, wish: Calibration) -> list[int]:
    from transformers import AutoTokenizer

    text = "\n\n".join(texts(data))
    if not text.strip():
        raise ConfigError(f"--data-dir: {data} holds no text; name one that does")
    if not any((source / name).is_file() for name in TOKENIZERS):
        raise ConfigError(f"{source} has no tokenizer ({', '.join(TOKENIZERS)}); copy the model's own there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=wish.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{source} has no tokenizer that transformers reads: {str(error).splitlines()[0]}") from None
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # its length warning is not for us


def draw(tokens: list[int], wish: Calibration) -> list[list[int]]:
    """Windows of the text at random places, the same for the same seed."""
    import numpy as np

    if len(tokens) < wish.length:
        raise ConfigError(
            f"--data-dir: {wish.data} holds {len(tokens)} tokens, fewer than one sample of {wish.length}; "
            f"give more text or a smaller --max-sequence-length"
        )
    starts = np.random.default_rng(wish.seed).integers(0, len(tokens) - wish.length + 1, wish.samples)
    return [tokens[start : start + wish.length] for start in starts.tolist()]


# -- GPTQ --------------------------------------------------------------------------------------------------------------
def _gptq(source: Path, stored: hf.Stored, wish: Calibration, tokens_NT: list[list[int]]) -> dict[str, Tensor]:
    """The model's tensors after GPTQ: weights on their grid, and a scale beside each."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is in the source directory
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from loguru import logger
    from transformers import AutoModelForCausalLM

    logger.remove()  # what llm-compressor added when it was imported
    logger.add(sys.stderr, level="WARNING")
    torch.manual_seed(wish.seed)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, trust_remote_code=wish.trust_remote_code)
    told = wish.precision.hf(stored.model.params(), stored.moe)
    for group in told["config_groups"].values():  # its observer has one grid, ours says it in words
        group["weights"].pop("observer_kwargs", None)
    recipe = GPTQModifier(config_groups=told["config_groups"], ignore=told["ignore"], dampening_frac=wish.damp)
    ones = [[1] * len(row) for row in tokens_NT]
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": tokens_NT, "attention_mask": ones}),
        recipe=recipe,
        num_calibration_samples=wish.samples,
        max_seq_length=wish.length,
        shuffle_calibration_samples=False,
    )
    return model.state_dict()
