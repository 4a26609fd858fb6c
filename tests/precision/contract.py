"""What every precision promises, as checks that take any one of them.

`test_contract.py` runs all of them on each YAML file in conf/precision/; a new precision is tested by existing.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from torch import Tensor

import lpexp.precision
from lpexp.config import load
from lpexp.data import Param
from lpexp.errors import NonFiniteWeightError
from lpexp.model import Model
from lpexp.precision import Parts, Precision, Tally, expected, from_hf

ROOT = Path(__file__).parents[2]
CARDS = sorted((ROOT / "conf/precision").glob("*.yaml"))
MODELS = ("qwen3_tiny", "qwen3_moe_tiny", "deepseek_tiny")
ROWS = (1, 3, 16, 17, 256)
OUT, IN = 192, 256  # both a multiple of every group; OUT ends in half a tile


def from_card(path: Path, **changes: object) -> Precision:
    """The precision that a YAML file describes, with some keys changed."""
    return load(yaml.safe_load(path.read_text()) | changes, Precision)


@cache
def model(name: str) -> Model:
    return load(yaml.safe_load((ROOT / f"conf/model/{name}.yaml").read_text())["model"], Model)


def params(name: str) -> list[Param]:
    return list(model(name).params())


def values(precision: Precision, *shape: int, seed: int, magnitude: float = 1.0) -> Tensor:
    """Normal values as this precision carries them."""
    return precision.round(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * magnitude)


def same_bytes(a: Parts, b: Parts) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype
        and a[k].shape == b[k].shape
        and torch.equal(a[k].contiguous().view(torch.uint8), b[k].contiguous().view(torch.uint8))
        for k in a
    )


def inputs(precision: Precision) -> dict[str, Tensor]:
    """Random, boundary, zero and maximum weights [OUT, IN]."""
    normal = values(precision, OUT, IN, seed=0, magnitude=0.05)
    sparse = torch.zeros(OUT, IN)
    sparse[100:, 200:] = normal[100:, 200:]
    sparse[3, 7] = -0.0
    steps = (torch.arange(OUT * IN).view(OUT, IN) % 29 - 14) / 2.0
    outlier = normal.clone()
    outlier[5, 9] = 1e4
    tiny = normal * torch.exp2(-torch.arange(OUT, dtype=torch.float32))[:, None]
    return {
        "random": normal,
        "boundary": steps,
        "zeros": torch.zeros(OUT, IN),
        "nearly zeros": sparse,
        "maxes": torch.full((OUT, IN), 3.0) * (-1.0) ** torch.arange(IN),
        "outlier": outlier,
        "tiny": precision.round(tiny),
    }


def trainer_exporter_engine_and_reload_hold_the_same_bytes(precision: Precision) -> None:
    """What the trainer multiplies with, what is written, and what is read back are one weight."""
    x = values(precision, 5, IN, seed=1)
    for kind, weight in inputs(precision).items():
        parts = precision.quantize(weight)
        assert same_bytes(parts, precision.quantize(weight.clone())), kind
        stored = io.BytesIO(safetensors.torch.save({k: v.contiguous() for k, v in parts.items()}))
        reloaded = safetensors.torch.load(stored.getvalue())
        assert same_bytes(parts, reloaded), kind
        assert torch.equal(precision.dequantize(parts), precision.dequantize(reloaded)), kind
        trained = precision.linear(x, weight.clone().requires_grad_())
        assert torch.equal(trained, precision.serve(x, precision.operand(reloaded))), kind


def one_changed_byte_changes_what_is_served(precision: Precision) -> None:
    """The check above can fail: no part of the weight is idle."""
    x, weight = values(precision, 32, IN, seed=1), inputs(precision)["random"]
    parts = precision.quantize(weight)
    served = precision.serve(x, precision.operand(parts))
    flipped = {k: v.clone() for k, v in parts.items()}
    largest = max(parts, key=lambda k: parts[k].numel() * parts[k].element_size())
    flipped[largest].view(torch.uint8).view(-1)[-1] ^= 0x40
    assert not torch.equal(served, precision.serve(x, precision.operand(flipped)))


def linear_and_serve_agree_bitwise_for_any_number_of_rows(precision: Precision) -> None:
    """Decoding one token and scoring a whole batch give a row the same bits."""
    weight = inputs(precision)["random"]
    operand = precision.operand(precision.quantize(weight))
    x = values(precision, max(ROWS), IN, seed=2)
    everything = precision.linear(x, weight.clone().requires_grad_(), operand)
    for rows in ROWS:
        for start in (0, max(ROWS) - rows):
            part = x[start : start + rows]
            expected = everything[start : start + rows]
            assert torch.equal(precision.serve(part, operand), expected), rows
            assert torch.equal(precision.linear(part, weight, operand), expected), rows
            assert torch.equal(precision.linear(part, weight), expected), rows
    assert torch.equal(precision.serve(x.view(4, 64, IN), operand).view(-1, OUT), everything)


def an_expert_without_tokens_computes_nothing_and_gets_no_gradient(precision: Precision) -> None:
    weight = inputs(precision)["random"].clone().requires_grad_()
    x = torch.zeros(0, IN, requires_grad=True)
    y = precision.linear(x, weight)
    assert y.shape == (0, OUT)
    if not precision.trains:
        return
    y.sum().backward()
    assert weight.grad is not None and not weight.grad.any() and x.grad is not None and x.grad.shape == (0, IN)


def head_and_router_sums_agree_bitwise_for_any_number_of_rows(precision: Precision) -> None:
    weight, x = inputs(precision)["random"], values(precision, max(ROWS), IN, seed=2)
    everything = precision.accumulate(x, weight.clone().requires_grad_())
    for rows in ROWS:
        assert torch.equal(precision.accumulate(x[:rows], weight), everything[:rows]), rows
    exact = (x.double() @ precision.plain.dequantize(precision.plain.quantize(weight)).double().t()).float()
    assert (everything - exact).abs().max() < 1e-5


def linear_multiplies_with_the_served_weight(precision: Precision) -> None:
    """Against float64 products of the activations and the decoded weight; the rest is rounding of activations."""
    weight, x = inputs(precision)["random"], values(precision, 64, IN, seed=3)
    served = precision.dequantize(precision.quantize(weight))
    found, exact = precision.linear(x, weight).double(), x.double() @ served.double().t()
    assert ((found - exact).norm() / exact.norm()).item() < 0.03


def gradients_reach_every_input_and_every_weight(precision: Precision) -> None:
    """Straight through the rounding: close to the gradients of the plain product of what was multiplied."""
    if not precision.trains:
        return
    x = values(precision, 256, IN, seed=4).requires_grad_()
    weight = inputs(precision)["random"].clone().requires_grad_()
    grad = values(precision, 256, OUT, seed=5, magnitude=1e-3)
    precision.linear(x, weight).backward(grad)
    assert x.grad is not None and weight.grad is not None
    served = precision.dequantize(precision.quantize(weight))
    for found, exact in ((x.grad, grad @ served), (weight.grad, grad.t() @ x.detach())):
        assert found.shape == exact.shape
        assert ((found - exact).norm() / exact.norm()).item() < 0.06
        assert (found != 0).float().mean() > 0.999


def a_weight_that_is_not_finite_is_named(precision: Precision) -> None:
    for index in ((0, 0), (130, 130), (OUT - 1, IN - 1)):
        for bad in (float("nan"), float("inf"), -float("inf")):
            weight = inputs(precision)["random"].clone()
            weight[index] = bad
            with pytest.raises(NonFiniteWeightError) as caught:
                precision.quantize(weight, "some.weight")
            assert caught.value.index == index and caught.value.name == "some.weight"


def non_finite_activations_do_not_vanish(precision: Precision) -> None:
    """A broken activation shows in the output of its row, so that the guard on the loss sees it."""
    operand = precision.operand(precision.quantize(inputs(precision)["random"]))
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = values(precision, 4, IN, seed=6)
        x[2, 70] = bad
        finite = torch.isfinite(precision.serve(x, operand)).all(1)
        assert finite.tolist() == [True, True, False, True]


def the_contract_names_every_tensor_with_its_own_format(precision: Precision) -> None:
    for name in MODELS:
        moe = model(name).moe is not None
        contract = precision.contract(params(name), moe)
        assert list(contract) == [p.name for p in params(name)]
        formats = {p.name: precision if precision.covers(p, moe) else precision.plain for p in params(name)}
        assert contract == {n: json.dumps(p.format(), sort_keys=True) for n, p in formats.items()}
        for p in params(name):
            if p.kind in ("embed", "head", "norm", "bias", "router", "router_bias"):
                assert not precision.covers(p, moe), p.name
    assert precision.plain.plain == precision.plain and precision.plain.hf(params(name), moe) is None


def a_served_checkpoint_leads_back_to_the_same_contract(precision: Precision) -> None:
    for name in MODELS:
        moe = model(name).moe is not None
        config = precision.hf(params(name), moe)
        if config is None:
            assert not any(precision.covers(p, moe) for p in params(name)) or not type(precision).reads
            continue
        found = from_hf(json.loads(json.dumps(config)), params(name), moe)
        assert found.contract(params(name), moe) == precision.contract(params(name), moe)


def tensors_that_it_leaves_out_pass_through_its_plain_precision(precision: Precision) -> None:
    """Norms and biases of one dimension too."""
    for weight in (torch.randn(7), torch.randn(3, 4)):
        parts = precision.plain.quantize(weight)
        assert list(parts) == ["weight"]
        assert torch.equal(precision.plain.dequantize(parts), precision.plain.round(weight))


def stats_are_finite_numbers_of_the_metric_dictionary(precision: Precision) -> None:
    known = {"rel_error", "sqnr_db", "saturated_frac", "zero_block_frac", "scale_min", "scale_max"}
    for weight in inputs(precision).values():
        stats = precision.stats(weight, precision.quantize(weight))
        assert {"rel_error", "sqnr_db"} <= set(stats) <= known
        assert all(isinstance(v, float) and v == v for v in stats.values())


def the_layout_is_what_quantising_makes(precision: Precision) -> None:
    """So that a file can be planned before anything is read."""
    for shape in ((OUT, IN), (128, 128), (1, 256), (257, 128)):
        parts = precision.quantize(torch.randn(shape))
        found = {suffix: (tuple(part.shape), str(part.dtype).removeprefix("torch.")) for suffix, part in parts.items()}
        assert found == expected(precision, shape) and list(found) == list(expected(precision, shape))
        told = precision.served_bytes(shape)
        assert told in (None, sum(part.nbytes for part in parts.values()))
        assert same_bytes(precision.fixed(shape), {k: parts[k] for k in precision.fixed(shape)})


def rows_quantised_in_pieces_have_the_bytes_of_the_whole(precision: Precision) -> None:
    """The converter streams a tensor: `rows` at a time, there and back, with a tally that adds up."""
    if precision.rows is None:
        return
    for kind, weight in inputs(precision).items():
        whole = precision.quantize(weight)
        pieces = [precision.quantize(rows) for rows in weight.split(precision.rows)]
        fixed = precision.fixed((OUT, IN))
        joined = {k: torch.cat([piece[k] for piece in pieces]) for k in whole if k not in fixed}
        assert same_bytes(joined | fixed, whole), kind
        back = torch.cat([precision.dequantize(piece) for piece in pieces])
        assert torch.equal(back, precision.dequantize(whole)), kind
        tallies = zip(weight.split(precision.rows), pieces, strict=True)
        added = sum((precision.tally(rows, piece) for rows, piece in tallies), Tally()).stats()
        assert added == pytest.approx(precision.stats(weight, whole), rel=1e-5), kind  # sums in float32


def judging_it_imports_no_torch(precision: Precision) -> None:
    """Config, coverage, contract and the neighbours' data come without torch."""
    if type(precision).__module__.split(".")[:2] != ["lpexp", "precision"]:
        raise AssertionError("a precision is one file in lpexp/precision/")
    paths = [str(Path(p).resolve()) for p in lpexp.precision.__path__]
    program = (
        f"import sys, lpexp.precision as package\npackage.__path__[:] = {paths!r}\n"
        "from lpexp.data import Param\n"
        f"p = package.Precision.model_validate({precision.dump()!r})\n"
        "ps = [Param('model.layers.0.mlp.down_proj.weight', (128, 256), 'mlp_down')]\n"
        "p.contract(ps, False), list(p.judge(ps, False)), p.hf(ps, False), p.environment()\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


CHECKS: list[Callable[[Precision], None]] = [
    trainer_exporter_engine_and_reload_hold_the_same_bytes,
    one_changed_byte_changes_what_is_served,
    linear_and_serve_agree_bitwise_for_any_number_of_rows,
    an_expert_without_tokens_computes_nothing_and_gets_no_gradient,
    head_and_router_sums_agree_bitwise_for_any_number_of_rows,
    linear_multiplies_with_the_served_weight,
    gradients_reach_every_input_and_every_weight,
    a_weight_that_is_not_finite_is_named,
    non_finite_activations_do_not_vanish,
    the_contract_names_every_tensor_with_its_own_format,
    a_served_checkpoint_leads_back_to_the_same_contract,
    tensors_that_it_leaves_out_pass_through_its_plain_precision,
    stats_are_finite_numbers_of_the_metric_dictionary,
    the_layout_is_what_quantising_makes,
    rows_quantised_in_pieces_have_the_bytes_of_the_whole,
    judging_it_imports_no_torch,
]
