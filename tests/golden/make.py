"""Writes the golden vectors beside this file: bit patterns of inputs, codes, scales, packed words and decoded values.

    python -m tests.golden.make [directory]

Inputs come from a counter hash and exactly rounded operations only, and the arrays are stored uncompressed, so every
machine writes the same bytes; manifest.json holds their SHA-256. A change needs a new version of the identity strings.
The answers are those of tests/precision/oracle.py, which knows nothing of torch.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from tests.precision import oracle

GENERATOR = "1"
HERE = Path(__file__).parent
FP8 = "fp8:e4m3fn:w128x128:x1x128:g1x128:scale={}:floor=1e-10/grad=448p-126:div:v1"
INT4 = "int4:g{}:div={}:range={}:scale=bf16:floor=1e-5:rne:v1"
GRIDS = {(32, 7.0): (-7, 7), (128, 7.0): (-7, 7), (32, 7.5): (-8, 7)}  # (group, divisor): codes
DECODED = ("random/normal", "boundary/midpoints", "maxes/sizes")  # fp8 cases with decoded values: the files stay small


def uniform(label: str, n: int) -> np.ndarray:
    """n numbers in [0, 1), multiples of 2^-32."""
    digests = b"".join(hashlib.sha256(f"{label}:{i}".encode()).digest() for i in range(-(-n // 8)))
    return np.frombuffer(digests, "<u4")[:n] * 2.0**-32


def normal(label: str, *shape: int) -> np.ndarray:
    """Nearly normal: twelve uniform numbers, summed; exact in float64."""
    return (uniform(label, 12 * int(np.prod(shape))).reshape(12, *shape)).sum(0) - 6.0


def mixture(label: str, *shape: int) -> np.ndarray:
    """Values whose size varies by powers of two."""
    size = np.floor(normal(label + "/size", *shape) * 2)
    return np.ldexp(normal(label, *shape), size.astype(int))


def student(label: str, *shape: int) -> np.ndarray:
    """Heavy tails: t with three degrees of freedom, nearly."""
    return normal(label, *shape) / np.sqrt((normal(label + "/chi", 3, *shape) ** 2).sum(0) / 3)


def neighbours(bits: np.ndarray) -> np.ndarray:
    """Each bf16 pattern with the next lower and the next higher one."""
    return np.stack([bits - 1, bits, bits + 1], -1).reshape(-1).astype(np.uint16)


def _row(groups: list[np.ndarray], width: int) -> np.ndarray:
    """bf16 patterns of one row: each group padded with zeros to `width`."""
    return np.concatenate([np.pad(g, (0, width - len(g))) for g in groups]).astype(np.uint16)[None]


def common_inputs(prefix: str, cols: int) -> dict[str, np.ndarray]:
    """Random, zeros and maxes, [rows, a multiple of cols] each; bf16 patterns."""
    b = oracle.bf16_bits
    zeros = np.zeros((2, 2 * cols), np.uint16)
    zeros[0, 1], zeros[1, cols + 3] = 0x8000, 0x3F80  # a negative zero; one non-zero group
    top = np.full((2, 2 * cols), 0x4049, np.uint16)
    top[:, 1::2] |= 0x8000
    top[1, :] = b(normal(prefix + "/outlier", 2 * cols))
    top[1, 7] = b(np.array(1e4))
    tiny = [b(normal(f"{prefix}/{size}", cols) * size) for size in (1e-38, 1e-12, 1e-10, 1e-5, 1e37)]
    tiny[-1][0] = 0x7F7F  # the largest bf16
    return {
        "random/normal": b(normal(prefix + "/normal", 2, 2 * cols) * 0.02),
        "random/mixture": b(mixture(prefix + "/mixture", 1, 2 * cols)),
        "random/student": b(student(prefix + "/student", 1, 2 * cols)),
        "random/scales": _row([b(normal(f"{prefix}/{k}", cols) * 10.0**k) for k in range(-8, 5, 3)], cols),
        "zeros/mostly": zeros,
        "maxes/outlier": top,
        "maxes/sizes": _row(tiny, cols),
    }


def _ties(top: float, halfway: np.ndarray, scale: int) -> np.ndarray:
    """A block with this scale, and the values halfway between its codes that bf16 holds exactly."""
    values = halfway * scale
    exact = values[oracle.round_bf16(values) == values]
    return oracle.bf16_bits(np.concatenate([[top * scale], exact, -exact])[:128])


def fp8_inputs() -> dict[str, np.ndarray]:
    midpoints = oracle.bf16_bits((oracle.E4M3[1:] + oracle.E4M3[:-1]) / 2)
    near = neighbours(np.concatenate([midpoints, oracle.bf16_bits(np.array([2.0**-10, 448.0, 240.0]))]))
    signed = np.concatenate([near, near[::3] | 0x8000])
    signed = signed[np.abs(oracle.bf16_values(signed)) <= 448]
    planted = [np.concatenate([[0x43E0], signed[i : i + 127]]) for i in range(0, len(signed), 127)]
    steps = neighbours(oracle.bf16_bits(448.0 * 2.0 ** np.array([-9, 0, 4])))
    ties = [_ties(448, (oracle.E4M3[1:] + oracle.E4M3[:-1]) / 2, odd) for odd in (3, 5, 7, 9, 11, 13, 15)]
    shapes = ((1, 1), (3, 127), (2, 129), (129, 5))
    ragged = {f"random/ragged_{r}x{c}": normal(f"ragged{r}x{c}", r, c) for r, c in shapes}
    return {
        **common_inputs("fp8", 128),
        **{name: oracle.bf16_bits(x) for name, x in ragged.items()},
        "boundary/midpoints": _row(planted, 128),
        "boundary/ties": _row(ties, 128),
        "boundary/power_of_two_steps": _row([np.array([a, 0x3F80, 0xBF80, 0x3C01]) for a in steps], 128),
    }


def int4_inputs(group: int) -> dict[str, np.ndarray]:
    rows = []
    for k in (-12, -3, 2):
        halves = neighbours(oracle.bf16_bits((np.arange(7) + 0.5) * 2.0**k))
        rows.append(np.concatenate([[oracle.bf16_bits(np.array(7 * 2.0**k))], halves[: group - 1]]))
        rows.append(rows[-1] | 0x8000)
    significands = [np.array([0x3F80 + i, 0x3F10, 0xBE90, 0x3D80]) for i in range(128)]
    floor = [np.array([a, 0x3728, 0xB728, 0x36A8]) for a in neighbours(oracle.bf16_bits(np.array([7e-5, 7.5e-5])))]
    ties = [_ties(7, np.arange(7) + 0.5, odd) for odd in range(3, 37, 2 if group == 32 else 8)]
    return {
        **common_inputs(f"int4/{group}", group),
        "boundary/halves": _row(rows, group),
        "boundary/ties": _row(ties, group),
        "boundary/significands": _row(significands[:: 2 if group == 32 else 16], group),
        "boundary/floor": _row(floor, group),
    }


def fp8_answers() -> dict[str, np.ndarray]:
    # The scale rule is also asked by itself: float32 maxima come nearer to the powers of two than bf16 ones.
    powers = (448.0 * 2.0 ** np.arange(-30, 31, 4)).astype(np.float32).view(np.uint32)
    amax = (powers[:, None] + np.arange(-3, 4)[None]).astype(np.uint32).reshape(-1)
    found = {f"{name}/x_bits": bits for name, bits in fp8_inputs().items()} | {"scale/amax_bits": amax}
    for mode in ("fp32", "pow2"):
        pow2 = mode == "pow2"
        found[f"scale/{mode}/scale_bits"] = float_bits(oracle.e4m3_scales(amax.view(np.float32).astype(float), pow2))
        for name, bits in fp8_inputs().items():
            x = oracle.bf16_values(bits)
            for kind, block in (("tile", (128, 128)), ("row", (1, 128))):
                codes, scales = oracle.quantize_e4m3(x, block, pow2)
                found[f"{name}/{mode}/{kind}_codes"] = codes
                found[f"{name}/{mode}/{kind}_scale_bits"] = float_bits(scales)
            if name not in DECODED:
                continue
            decoded = float_bits(oracle.decode_e4m3(x, (128, 128), pow2)).view(np.float32)
            found[f"{name}/{mode}/decoded_bits"] = oracle.bf16_bits(decoded.astype(float))
    return found


def float_bits(x: np.ndarray) -> np.ndarray:
    """float64 -> the bits of the nearest float32; the largest bf16 decodes to infinity where its code rounds up."""
    with np.errstate(over="ignore"):
        return x.astype(np.float32).view(np.uint32)


def int4_answers(group: int, divisor: float, low: int, high: int) -> dict[str, np.ndarray]:
    found = {}
    for name, bits in int4_inputs(group).items():
        codes, scales, decoded = oracle.quantize_int4(oracle.bf16_values(bits), group, divisor, low, high)
        found[f"{name}/x_bits"] = bits
        found[f"{name}/packed"] = oracle.pack_int4(codes)
        found[f"{name}/scale_bits"] = oracle.bf16_bits(scales)
        found[f"{name}/decoded_bits"] = oracle.bf16_bits(decoded + 0.0)  # an integer code has no negative zero
    return found


def write(directory: Path) -> None:
    """All vectors and the manifest into `directory`."""
    files = {"fp8": ([FP8.format(mode) for mode in ("fp32", "pow2")], fp8_answers())}
    for (group, divisor), (low, high) in GRIDS.items():
        identity = INT4.format(group, f"{divisor:g}", f"{low}..{high}")
        files[f"int4_g{group}_{divisor:g}"] = ([identity], int4_answers(group, divisor, low, high))
    manifest = {}
    for name, (identities, arrays) in files.items():
        path = directory / f"{name}.npz"
        np.savez(path, **{key.replace("/", "|"): value for key, value in arrays.items()})  # type: ignore[arg-type]
        manifest[path.name] = {"identities": identities, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    text = json.dumps({"generator": GENERATOR, "files": manifest}, indent=2, sort_keys=True)
    (directory / "manifest.json").write_text(text + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
