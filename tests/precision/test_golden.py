"""Golden vectors: the committed bits are what the oracle writes and what the quantisers compute."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import pytest

from lpexp import kernels
from lpexp.precision import e4m3, integers, numeric
from lpexp.precision.fp8 import Fp8
from lpexp.precision.int4 import Int4Qat
from tests.golden import make
from tests.precision import vectors


def test_the_eight_bit_quantisers_reproduce_every_golden_bit():
    assert vectors.differing_fp8(numeric) == []


def test_the_four_bit_quantisers_reproduce_every_golden_bit():
    assert vectors.differing_int4(numeric) == []


def test_golden_vectors_regenerate_to_the_same_bytes(tmp_path: Path):
    make.write(tmp_path)
    for path in sorted(tmp_path.iterdir()):
        assert path.read_bytes() == (vectors.GOLDEN / path.name).read_bytes(), path.name


def test_golden_vectors_stay_below_200_kilobytes():
    assert sum(path.stat().st_size for path in vectors.GOLDEN.glob("*.npz")) < 200_000


def test_identities_in_the_manifest_are_those_of_the_precisions():
    written = {identity for entry in vectors.manifest().values() for identity in entry["identities"]}
    kinds = [Fp8(name="fp8"), Fp8(name="fp8", scale_format="pow2")]
    kinds += [Int4Qat(name="int4_qat", group_size=g, divisor=d) for g, d in ((32, 7.0), (32, 7.5), (128, 7.0))]
    assert written == {kind.format()["identity"] for kind in kinds}


# One entry a rule that has been got wrong elsewhere: what the source says, what a mistake would say, who must notice.
FP8_MUTATIONS = {
    "multiplies by the reciprocal": ("tiles / scale[:, None, :, None]", "tiles * (1 / scale[:, None, :, None])"),
    "has a floor of 1e-12": ("FLOOR = 1e-10", "FLOOR = 1e-12"),
    "takes the power of two by a floating logarithm": (
        "((bits + 0x7FFFFF) & ~0x7FFFFF).view(torch.float32)",
        "torch.exp2(torch.ceil(torch.log2(scale)))",
    ),
    "loses the sign of zero": ("codes = to_e4m3(tiles", "codes = to_e4m3(0.0 + tiles"),
    "forgets the last row of a ragged tile": (
        "padded = pad_to(w, BLOCK, BLOCK)",
        "w[-1] = 0; padded = pad_to(w, BLOCK, BLOCK)",
    ),
}
KERNEL_MUTATIONS = {  # of the loops that a CPU runs
    "multiplies by the reciprocal": ("y = x / scale", "y = x * (np.float32(1.0) / scale)"),
    "takes the power of two below": ("bits + np.int32(0x7FFFFF)", "bits + np.int32(0)"),
    "rounds away one bit more": ("np.float32(1.5 * 2**20)", "np.float32(1.5 * 2**21)"),
    "multiplies weights by the reciprocal": (
        "y = wide(row[i]) / scale",
        "y = wide(row[i]) * (np.float32(1.0) / scale)",
    ),
    "loses the sign of a weight's zero": ("& np.int32(0x80)))", "& np.int32(0x80 if size else 0)))"),
    "rounds a weight's ties up": ("np.int32(0x7FFFF) + odd", "np.int32(0x80000)"),
    "does not know the smallest codes": ("size < np.int32(0x3C800000)", "size < np.int32(0)"),
    "forgets the last row of a tile": (
        "top = np.int32(0)\n            for r in range(first, last)",
        "top = np.int32(0)\n            for r in range(first, max(last - 1, first + 1))",
    ),
}
PACKING_MUTATIONS = {
    "multiplies by the reciprocal": ("y = wide(group[i]) / scale", "y = wide(group[i]) * (np.float32(1.0) / scale)"),
    "computes codes from a scale of more bits than it stores": ("scale = np.int32(stored).view(np.float32)", "pass"),
    "does not clamp": ("y = high if y > high else y", "pass"),
    "packs the first element highest": (
        "codes[2 * i] | (codes[2 * i + 1] << 4)",
        "codes[2 * i + 1] | (codes[2 * i] << 4)",
    ),
    "has no floor": ("scale = floor if scale < floor else scale", "pass"),
    "rounds a scale down": ("bits + np.int32(0x7FFF) + odd", "bits"),
}
INT4_MUTATIONS = {
    "multiplies by the reciprocal": (
        "groups / scale.to(torch.float32)[:, :, None]",
        "groups * (1 / scale.to(torch.float32)[:, :, None])",
    ),
    "computes codes from a scale of more bits than it stores": (
        "torch.round(groups / scale.to(torch.float32)[:, :, None])",
        "torch.round(groups / (amax / divisor).clamp(min=INT4_FLOOR)[:, :, None])",
    ),
    "multiplies the maximum by a seventh and keeps the float32 scale": (
        "scale = (amax / torch.full_like(amax, divisor)).clamp(min=INT4_FLOOR).to(torch.bfloat16)",
        "scale = (amax * (1 / divisor)).clamp(min=INT4_FLOOR)",
    ),
    "does not clamp": (".clamp(low, high)", ""),
    "keeps codes in floating point, where -0 exists": ("codes.to(torch.int8).view(w.shape)", "codes.view(w.shape)"),
    "packs the first element highest": ("v[:, 0::2] | (v[:, 1::2] << 4)", "v[:, 1::2] | (v[:, 0::2] << 4)"),
    "has no floor": ("INT4_FLOOR = 1e-5", "INT4_FLOOR = 0.0"),
    "does not round the product": ("return bf16(groups * scale", "return (groups * scale"),
}


def mutated(old: str, new: str, of: types.ModuleType = numeric) -> Any:
    """A module of ours with one piece of its source replaced."""
    source = Path(str(of.__file__)).read_text()
    assert source.count(old) == 1, f"the mutation no longer fits the source: {old!r}"
    module = types.ModuleType("mutated")
    source = source.replace(old, new)
    exec(compile(source, "mutated", "exec"), vars(module))
    return module


@pytest.mark.parametrize("mistake", FP8_MUTATIONS)
def test_golden_vectors_notice_an_eight_bit_quantiser_that(mistake: str):
    assert vectors.differing_fp8(mutated(*FP8_MUTATIONS[mistake])) != []


@pytest.mark.parametrize("mistake", KERNEL_MUTATIONS)
def test_golden_vectors_notice_a_kernel_that(mistake: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "compiled", compiled)
    monkeypatch.setattr(numeric, "e4m3", mutated(*KERNEL_MUTATIONS[mistake], of=e4m3))
    assert vectors.differing_fp8(numeric) != []


@pytest.mark.parametrize("mistake", PACKING_MUTATIONS)
def test_golden_vectors_notice_a_packing_kernel_that(mistake: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "compiled", compiled)
    monkeypatch.setattr(numeric, "integers", mutated(*PACKING_MUTATIONS[mistake], of=integers))
    assert vectors.differing_int4(numeric) != []


def compiled(*types: Any) -> Any:
    """As kernels.compiled, but on the first call, and kept nowhere."""

    def later(function: Callable[..., None]) -> Callable[..., None]:
        made = functools.cache(lambda: numba.njit(numba.void(*types), error_model="numpy")(function))
        return lambda *arguments: made()(*arguments)

    return later


@pytest.mark.parametrize("mistake", INT4_MUTATIONS)
def test_golden_vectors_notice_a_four_bit_quantiser_that(mistake: str):
    assert vectors.differing_int4(mutated(*INT4_MUTATIONS[mistake])) != []
