"""What is asked of Transformer Engine's layers, as far as it shows without them: recipes, and what is rounded.

The layers themselves: tests/gpu/test_megatron.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from lpexp import frontend
from lpexp.errors import RunError
from tests.trainer.megatron import cases

if TYPE_CHECKING:
    from lpexp.experiment import Experiment


class Given(torch.nn.Module):
    """Gives its weights as the library's linears do; grouped ones are numbered."""

    weight: torch.Tensor

    def __init__(self, **weights: torch.Tensor):
        super().__init__()
        for name, weight in weights.items():
            self.register_parameter(name, torch.nn.Parameter(weight))

    def _get_weight_tensors(self) -> list[torch.Tensor]:
        return [weight for name, weight in self.named_parameters() if name.startswith("weight")]


def network(**modules: torch.nn.Module) -> torch.nn.Module:
    """Modules under dotted names, dots spelt `__`."""
    root = torch.nn.Module()
    for path, module in modules.items():
        *above, last = path.split("__")
        at = root
        for name in above:
            if name not in dict(at.named_children()):
                at.add_module(name, torch.nn.Module())
            at = dict(at.named_children())[name]
        at.add_module(last, module)
    return root


def hooked(exp: Experiment, net: torch.nn.Module, active: bool = True) -> list[str]:
    from lpexp.trainer.megatron.engine import quantise_weights
    from lpexp.trainer.megatron.names import Place, Table

    return quantise_weights(net, Table(exp.model.sized(), Place()), exp.precision, lambda: active)


def random(*shape: int) -> torch.Tensor:
    return (torch.randn(shape) * 0.02).bfloat16()


def test_only_covered_rows_of_a_fused_matrix_are_rounded() -> None:
    scope = "precision.scope=[model.layers.0.self_attn.k_proj.weight]"
    exp = cases.experiment("precision=int4_qat", "precision.group_size=32", scope)
    qkv = Given(weight=random(512, 128), layer_norm_weight=torch.ones(128))
    net = network(decoder__layers__0__self_attention__linear_qkv=qkv)
    assert hooked(exp, net) == ["model.layers.0.self_attn.k_proj.weight"]
    (given,) = qkv._get_weight_tensors()
    served = exp.precision.fake(qkv.weight)
    rows = torch.zeros(512, dtype=torch.bool)
    rows[128:192] = rows[384:448] = True  # the key of each of two groups: 128 rows of queries, then 64 of it
    assert torch.equal(given[rows], served[rows]) and torch.equal(given[~rows], qkv.weight[~rows])
    assert not torch.equal(served[rows], qkv.weight[rows])


def test_every_expert_of_a_grouped_linear_is_rounded_and_dense_linears_are_when_the_scope_says_so() -> None:
    experts = {f"weight{i}": random(256, 128) for i in range(8)}
    for scope, names in (("experts", 16), ("linears", 18)):
        exp = cases.experiment("model=qwen3_moe_tiny", "precision=int4_qat", f"precision.scope={scope}")
        grouped, dense = Given(**experts), Given(weight=random(512, 128))
        net = network(
            decoder__layers__0__mlp__experts__linear_fc1=grouped, decoder__layers__0__self_attention__linear_qkv=dense
        )
        assert len(hooked(exp, net)) == names + (scope == "linears")
        given = grouped._get_weight_tensors()
        assert all(torch.equal(w, exp.precision.fake(experts[f"weight{i}"])) for i, w in enumerate(given))
        rounded = not torch.equal(dense._get_weight_tensors()[0], dense.weight)
        assert rounded == (scope == "linears")


def test_a_forward_that_is_not_the_actors_reads_the_weights_as_they_are() -> None:
    exp = cases.experiment("precision=int4_qat")
    proj = Given(weight=random(128, 256))
    hooked(exp, network(decoder__layers__0__self_attention__linear_proj=proj), active=False)
    assert torch.equal(proj._get_weight_tensors()[0], proj.weight)


def test_a_stage_without_a_covered_weight_and_a_layer_that_gives_none_are_refused() -> None:
    exp = cases.experiment("model=qwen3_moe_tiny", "precision=int4_qat")
    with pytest.raises(RunError, match="covers nothing of this rank's layers"):
        hooked(exp, network(decoder__layers__0__self_attention__linear_qkv=Given(weight=random(512, 128))))
    silent = torch.nn.Linear(128, 256, bias=False)
    with pytest.raises(RunError, match="Linear gives its weights to no one"):
        hooked(exp, network(decoder__layers__0__mlp__experts__local_experts__0__linear_fc1=silent))


def test_the_recipe_and_its_environment_come_from_the_precision() -> None:
    from lpexp.trainer.megatron import engine

    for scale, variable in (("fp32", "1"), ("pow2", "0")):
        exp = cases.experiment("precision=fp8", f"precision.scale_format={scale}")
        assert exp.trainer.environment(exp)["NVTE_FP8_BLOCK_SCALING_FP32_SCALES"] == variable
        fields = engine.fields(exp, exp.trainer)  # type: ignore[arg-type]
        assert (fields["fp8"], fields["fp8_recipe"], fields["fp8_param"]) == ("e4m3", "blockwise", False)
        assert fields["params_dtype"] == torch.bfloat16
    for precision in ("bf16", "int4_qat"):
        exp = cases.experiment(f"precision={precision}")
        assert "fp8" not in engine.fields(exp, exp.trainer)  # type: ignore[arg-type]


def test_a_scope_that_the_recipe_cannot_leave_out_is_refused() -> None:
    from lpexp.trainer.megatron import engine

    exp = frontend.experiment("trainer=megatron", "cluster=local", "precision=fp8", "precision.scope=[mlp_up]")
    with pytest.raises(RunError, match=r"precision\.scope leaves out attn_out, attn_qkv, mlp_down"):
        engine.fields(exp, exp.trainer)  # type: ignore[arg-type]
