"""What the emulated layers multiply with: the codes of the contract, under the checkpoint's names, shard by shard."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lpexp import frontend
from lpexp.errors import ConfigError
from lpexp.precision import LINEARS, side
from tests.trainer.megatron import cases
from tests.trainer.megatron.processes import Processes

CODES = [
    (("precision=fp8",), ""),
    (("precision=fp8", "precision.scale_format=pow2"), ""),
    (("precision=fp8", "model=qwen3_moe_tiny"), "trainer.ep=2"),
    (("precision=fp8", "model=deepseek_tiny"), ""),
    (("precision=int4_qat", "precision.group_size=32"), "trainer.tp=2"),
    (("precision=int4_qat", "model=qwen3_moe_tiny"), "trainer.ep=2"),
    (("precision=int4_qat", "model=deepseek_tiny", "precision.group_size=32"), "trainer.tp=2 trainer.etp=2"),
    (("precision=int4_qat", "precision.divisor=7.5", "precision.scope=[attn_qkv]"), ""),
]


@pytest.mark.parametrize(("words", "layout"), CODES, ids=str)
def test_layers_multiply_with_the_exporters_codes_and_values_of_just_the_contracts_tensors(
    pair: Processes, words: tuple[str, ...], layout: str
) -> None:
    exp = cases.experiment(*words, *layout.split())
    model, moe = exp.model.sized(), exp.model.moe is not None
    weights, params = cases.start(exp), {param.name: param for param in model.params()}
    elements: dict[str, int] = {}
    for found in pair.run(cases.effective, (*words, *layout.split()), ranks=exp.trainer.world(exp)):  # type: ignore[attr-defined]
        for name, spans, cols, raw, values in found:
            exported = side(params[name], exp.precision, moe).quantize(weights[name], name)
            whole = side(params[name], exp.precision, moe).dequantize(exported)
            rows = torch.cat([whole[first:last] for first, last in spans])
            same = (rows if cols is None else rows[:, slice(*cols)]).contiguous().numpy()
            assert np.array_equal(values.view(np.uint32), same.view(np.uint32)), name
            if values.shape == whole.shape:
                parts = {suffix: t.contiguous().view(torch.uint8).numpy() for suffix, t in exported.items()}
                assert raw.keys() == parts.keys(), name
                assert all(np.array_equal(raw[suffix], parts[suffix]) for suffix in parts), name
            elements[name] = elements.get(name, 0) + values.size
    assert elements.keys() == {name for name, param in params.items() if param.kind in LINEARS}
    assert all(size >= np.prod(params[name].shape) for name, size in elements.items())


@pytest.mark.parametrize(("words", "layout"), CODES, ids=str)
def test_the_quantised_tensors_are_those_that_the_contract_covers(
    pair: Processes, words: tuple[str, ...], layout: str
) -> None:
    exp = cases.experiment(*words, *layout.split())
    model, moe = exp.model.sized(), exp.model.moe is not None
    quantised = set()
    for found in pair.run(cases.effective, (*words, *layout.split()), ranks=exp.trainer.world(exp)):  # type: ignore[attr-defined]
        quantised |= {name for name, _, _, raw, _ in found if set(raw) != {"weight"}}
    assert quantised == {param.name for param in model.params() if exp.precision.covers(param, moe)} != set()


def test_a_scope_that_covers_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="covers nothing: the model has no routed experts; use linears"):
        frontend.experiment("trainer=megatron", "cluster=local", "precision=int4_qat", "precision.scope=experts")


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (("precision=fp8", "trainer.tp=2"), "trainer.tp"),  # 128 rows of k_proj over two ranks
        (("precision=fp8", "model=qwen3_moe_tiny", "trainer.tp=2", "trainer.etp=2"), "trainer"),
        (("precision=int4_qat", "precision.group_size=128", "model=qwen3_moe_tiny", "trainer.etp=2"), "trainer.etp"),
    ],
)
def test_a_split_that_cuts_a_block_or_a_group_is_refused(words: tuple[str, ...], key: str) -> None:
    with pytest.raises(ConfigError) as refused:
        frontend.experiment("trainer=megatron", "cluster=local", *words)
    assert any(mistake.key.startswith(key) for mistake in refused.value.mistakes), refused.value


def test_the_gradient_passes_the_rounding_unchanged(pair: Processes) -> None:
    """A product's weight gradient is dY^T X whatever the codes are; of one rounding to 16 bits nothing else remains."""
    ((quantised, plain, values),) = pair.run(_gradients, ranks=1)
    assert np.array_equal(quantised, plain) and np.abs(quantised).max() > 0
    assert not np.array_equal(*values)


def _gradients(rank: int, ranks: int, meet: str) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    gradients, outputs = [], []
    for words in (("precision=int4_qat", "precision.group_size=32"), ("precision=bf16",)):
        exp = cases.experiment(*words)
        with cases.rank_of(exp, rank, ranks, f"{meet}-{words[0]}") as made:
            layer = made.network.decoder.layers[0].mlp.linear_fc2
            generator = torch.Generator().manual_seed(3)
            x = torch.randn(16, 1, 256, generator=generator).bfloat16().float()
            dy = torch.randn(16, 1, 128, generator=generator).bfloat16().float()
            y = layer(x)[0]
            (gradient,) = torch.autograd.grad(y, layer.weight, dy)
            gradients.append(gradient.numpy())
            outputs.append(y.detach().numpy())
    return gradients[0], gradients[1], (outputs[0], outputs[1])


def test_weights_alone_pass_through_the_same_round_trip_for_products_that_are_the_librarys() -> None:
    precision = frontend.experiment("precision=int4_qat", "precision.group_size=32").precision
    weight = (torch.randn(64, 96) * 0.02).bfloat16().requires_grad_()
    served = precision.fake(weight)
    assert torch.equal(served.detach().float(), precision.dequantize(precision.quantize(weight)))
    gradient = torch.randn(64, 96).bfloat16()
    served.backward(gradient)
    assert torch.equal(weight.grad, gradient)  # type: ignore[arg-type]
