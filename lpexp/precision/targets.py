"""What `lpexp convert` offers: a word, the flags that go with it, and the precision that they choose.

The flags are those of slime's and miles' converters, in both spellings; the command line adds where to read and write.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError

from lpexp.config import load, nearest
from lpexp.errors import ConfigError, Mistake
from lpexp.precision import SCOPES, Precision
from lpexp.precision.bf16 import Bf16
from lpexp.precision.fp8 import Fp8
from lpexp.precision.fp8_scaled import Fp8Channel, Fp8Tensor
from lpexp.precision.int4 import Int4Qat
from lpexp.precision.int8 import W8A16
from lpexp.precision.packed import Packed

P = TypeVar("P", bound=Precision)


class Flag(NamedTuple):
    """One flag; `kind` goes to argparse. Its default is None, which means "not typed"."""

    names: tuple[str, ...]
    help: str
    kind: dict[str, Any]

    @property
    def dest(self) -> str:
        return self.names[0].removeprefix("--").replace("-", "_")


class Calibration(NamedTuple):
    """Codes chosen with text (GPTQ) instead of by rounding each to its nearest."""

    precision: Packed
    data: str  # a file or a directory
    samples: int
    length: int  # tokens of a sample
    damp: float
    seed: int
    trust_remote_code: bool


class Wish(NamedTuple):
    """What a command line asks for."""

    precision: Precision
    why: str = ""  # the reason of a choice that was not typed
    calibration: Calibration | None = None
    reading: dict[str, Any] = {}  # fields of the source's precision that its config cannot say


class Target(NamedTuple):
    word: str
    help: str
    flags: tuple[Flag, ...]
    choose: Callable[[Namespace], Wish]  # ConfigError for a contradiction


def _precision(kind: type[P], name: str, **fields: Any) -> P:
    typed = {key: value for key, value in fields.items() if value is not None}
    words = {"group_size": "--quant-group-size"}
    try:
        return load({"name": name, **typed}, kind)
    except ConfigError as error:
        raise _wrong(*(Mistake(words.get(m.key, f"--{m.key}"), m.message) for m in error.mistakes)) from None


def _wrong(*mistakes: Mistake) -> ConfigError:
    return ConfigError(mistakes, "flags have mistakes:")


def _scope(args: Namespace) -> Any:
    return args.scope[0] if args.scope and args.scope[0] in SCOPES else args.scope


SCOPE = Flag(
    ("--scope",),
    "auto | experts | linears, or module classes and tensor names; auto is what the precision's card says",
    {"nargs": "+", "metavar": "WORD"},
)
DIVISOR = Flag(
    ("--divisor",),
    "the code on which a group's maximum lands: 7 or 7.5 (W8A16: 127 or 127.5); 7.5 is the only one of gptq",
    {"type": float, "metavar": "D"},
)


# -- 8-bit floating point ----------------------------------------------------------------------------------------------
STRATEGIES = {"block": Fp8, "channel": Fp8Channel, "tensor": Fp8Tensor}
SCALES = {"fp32": "fp32", "ue8m0": "pow2"}


def _choose_fp8(args: Namespace) -> Wish:
    strategy = args.strategy or "block"
    if strategy not in STRATEGIES:
        raise _wrong(Mistake("--strategy", f"there is no {strategy!r}; use {', '.join(STRATEGIES)}"))
    if args.scale_fmt not in (None, *SCALES):
        raise _wrong(Mistake("--scale-fmt", f"there is no {args.scale_fmt!r}; use {' or '.join(SCALES)}"))
    scope = _scope(args)
    if strategy == "block":
        if args.block_size not in (None, [128, 128]):
            told = " ".join(map(str, args.block_size))
            rule = "is no block that trainer and engines share; use --block-size 128 128"
            raise _wrong(Mistake("--block-size", f"{told} {rule}"))
        return Wish(_precision(Fp8, "fp8", scope=scope, scale_format=SCALES.get(args.scale_fmt or "")))
    if args.block_size is not None:
        rule = f"blocks go with --strategy block; --strategy {strategy} has one scale a {strategy}, leave it out"
        raise _wrong(Mistake("--block-size", rule))
    if args.scale_fmt not in (None, "fp32"):
        rule = f"scales a {strategy} are fp32; use --strategy block for powers of two"
        raise _wrong(Mistake("--scale-fmt", f"{args.scale_fmt}: {rule}"))
    return Wish(_precision(STRATEGIES[strategy], f"fp8_{strategy}", scope=scope))


FP8 = Target(
    "fp8",
    "e4m3 weights with a scale a block of 128 x 128, an output row, or a tensor",
    (
        Flag(("--strategy",), "block (default) | channel | tensor; the last two only serve", {"metavar": "WORD"}),
        Flag(("--block-size",), "128 128, the only block", {"nargs": "*", "type": int, "metavar": "N"}),
        Flag(("--scale-fmt",), "fp32 (default) | ue8m0: scales that are powers of two", {"metavar": "WORD"}),
        SCOPE,
    ),
    _choose_fp8,
)


# -- integers ----------------------------------------------------------------------------------------------------------
TYPES: dict[str, tuple[type[Packed], str]] = {"W4A16": (Int4Qat, "int4_qat"), "W8A16": (W8A16, "w8a16")}
METHODS = ("rtn", "gptq")
INSTALL = "pip install 'lpexp[int4]'"  # brings what gptq needs


def _choose_int(args: Namespace) -> Wish:
    word = args.quant_type or "W4A16"
    if word not in TYPES:
        near = nearest(word.upper(), TYPES)
        hint = f"did you mean {near}?" if near else f"use {' or '.join(TYPES)}"
        raise _wrong(Mistake("--quant-type", f"there is no {word!r}; {hint}"))
    if args.is_symmetric not in (None, "True", "true", "1"):
        raise _wrong(
            Mistake("--is-symmetric", f"{args.is_symmetric}: asymmetric grids are not supported; leave it out")
        )
    method, why = args.method, ""
    if method is None:
        method = "gptq" if args.data_dir is not None else "rtn"
        why = f"method {method}: {'--data-dir was' if method == 'gptq' else 'no --data-dir was'} given"
    if method not in METHODS:
        raise _wrong(Mistake("--method", f"there is no {method!r}; use {' or '.join(METHODS)}"))
    kind, name = TYPES[word]
    fields = {"scope": _scope(args), "group_size": args.quant_group_size}
    if method == "rtn":
        if typed := [flag.names[0] for flag in CALIBRATING if getattr(args, flag.dest) is not None]:
            rule = "says how to calibrate, and --method rtn reads no text; leave it out or use --method gptq"
            raise _wrong(*(Mistake(flag, rule) for flag in typed))
        return Wish(_precision(kind, name, divisor=args.divisor, **fields), why)
    if args.data_dir is None:
        rule = "gptq needs text: a wikitext .parquet, a .txt or a .jsonl file, or a directory of them"
        raise _wrong(Mistake("--data-dir", rule))
    grid = max(kind.ranges)
    if args.divisor not in (None, grid):
        raise _wrong(Mistake("--divisor", f"{args.divisor:g}: gptq's grid is that of divisor {grid:g}"))
    precision = _precision(kind, name, divisor=grid, **fields)
    return Wish(precision, why, _calibration(args, precision))


def _calibration(args: Namespace, precision: Packed) -> Calibration:
    made = Calibration(
        precision,
        args.data_dir,
        256 if args.num_calibration_samples is None else args.num_calibration_samples,
        2048 if args.max_sequence_length is None else args.max_sequence_length,
        0.01 if args.dampening_frac is None else args.dampening_frac,
        args.seed or 0,
        bool(args.trust_remote_code),
    )
    mistakes = []
    if made.samples < 1:
        mistakes.append(Mistake("--num-calibration-samples", f"{made.samples} is too few; use 1 or more"))
    if made.length < 2:
        mistakes.append(Mistake("--max-sequence-length", f"{made.length} is too short; use 2 or more"))
    if not 0 < made.damp < 1:
        mistakes.append(Mistake("--dampening-frac", f"{made.damp:g} should be between 0 and 1; 0.01 is usual"))
    if mistakes:
        raise _wrong(*mistakes)
    return made


CALIBRATING = (
    Flag(("--data-dir",), "gptq: text to calibrate with, .parquet, .txt or .jsonl, or a directory of them", {}),
    Flag(("--num-calibration-samples",), "gptq: samples drawn from the text (256)", {"type": int, "metavar": "N"}),
    Flag(("--max-sequence-length",), "gptq: tokens of a sample (2048)", {"type": int, "metavar": "N"}),
    Flag(("--dampening-frac",), "gptq: share of the mean added to the Hessian's diagonal (0.01)", {"type": float}),
    Flag(("--seed",), "gptq: which samples are drawn (0)", {"type": int, "metavar": "N"}),
    Flag(("--trust-remote-code",), "gptq: let the model's directory bring its own code", {"action": "store_true"}),
)
INT4 = Target(
    "int4",
    "integer weights in groups along the inputs: W4A16, or W8A16, which only serves",
    (
        Flag(("--method",), "rtn | gptq; without it gptq if --data-dir is given, else rtn", {"metavar": "WORD"}),
        Flag(("--quant-type",), "W4A16 (default) | W8A16", {"metavar": "WORD"}),
        Flag(("--quant-group-size", "--group-size"), "32 | 64 | 128 (default)", {"type": int, "metavar": "N"}),
        Flag(("--is-symmetric",), "the only kind there is", {"nargs": "?", "const": "True", "metavar": "True"}),
        DIVISOR,
        SCOPE,
        *CALIBRATING,
    ),
    _choose_int,
)


# -- back --------------------------------------------------------------------------------------------------------------
def _choose_bf16(args: Namespace) -> Wish:
    return Wish(Bf16(name="bf16"), reading={} if args.divisor is None else {"divisor": args.divisor})


BF16 = Target(
    "bf16",
    "a quantised directory back to 16 bits",
    (DIVISOR._replace(help="of the source, where its config cannot say it: 7.5 for what other tools calibrated"),),
    _choose_bf16,
)
TARGETS = (FP8, INT4, BF16)


def read_as(precision: Precision, fields: dict[str, Any]) -> Precision:
    """The source's precision with fields that its config could not say; ConfigError where it has none such."""
    if not fields:
        return precision
    try:
        return type(precision).model_validate({**dict(precision), **fields})
    except ValidationError as error:
        told = ", ".join(f"--{key} {value:g}" for key, value in fields.items())
        raise _wrong(Mistake("", f"{told} does not go with {precision.name}: {error.errors()[0]['msg']}")) from None
