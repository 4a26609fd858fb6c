"""Transformer Engine's layers: what a GPU trains with. The precision says in which arithmetic.

A precision that quantises activations too is the library's own recipe; one of weights alone is a fake quantisation of
the covered weights before each product, with a straight-through gradient, on routed experts and on dense linears.
Packed sequences, context parallelism and DeepEP are the library's too.
Has not run on a card yet: tests/gpu/test_megatron.py says what must hold, docs/megatron.md what is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lpexp.errors import RunError
from lpexp.precision import LINEARS, Precision
from lpexp.trainer.megatron import cpu
from lpexp.trainer.megatron.names import Table

cpu.imported()

from megatron.core.extensions import transformer_engine  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.transformer.enums import AttnBackend  # noqa: E402

if TYPE_CHECKING:
    from lpexp.experiment import Experiment
    from lpexp.trainer.megatron import MegatronTrainerSpec


def here() -> bool:
    """Does this machine have the library and a GPU for it? Without, the layers are those of layers.py."""
    return transformer_engine.HAVE_TE and not cpu.needed()


def packed_params(ends: np.ndarray, device: torch.device) -> PackedSeqParams:
    """Where each packed sequence begins and ends, in the library's words."""
    at, longest = torch.from_numpy(ends).to(device), int(np.diff(ends).max())
    return PackedSeqParams("thd", at, at, at, at, longest, longest)


def fields(exp: Experiment, spec: MegatronTrainerSpec) -> dict[str, Any]:
    """What TransformerConfig says on a GPU beyond what it says anywhere."""
    precision, model = exp.precision, exp.model.sized()
    if model.moe and model.moe.scoring == "sigmoid" and not model.moe.norm_topk:
        raise RunError(
            f"{model.name}: megatron-core's router always norms sigmoid shares, model.moe.norm_topk is false"
        )
    words = precision.megatron()
    if words:
        covered = {param.kind for param in model.params() if precision.covers(param, model.moe is not None)}
        left = {param.kind for param in model.params() if param.kind in LINEARS} - covered
        if left:
            raise RunError(
                f"precision.scope leaves out {', '.join(sorted(left))}: Transformer Engine's recipe takes every linear "
                f"of a layer; use precision.scope=linears"
            )
    return {
        "bf16": True,
        "params_dtype": torch.bfloat16,
        "pipeline_dtype": torch.bfloat16,
        "attention_backend": AttnBackend[spec.attention_backend(model)],
        "moe_token_dispatcher_type": "flex" if spec.dispatcher == "deepep" else "alltoall",
        "moe_enable_deepep": spec.dispatcher == "deepep",
        "moe_grouped_gemm": True,
        "moe_permute_fusion": True,
        "use_te_activation_func": False,
        "bias_activation_fusion": True,
        "bias_dropout_fusion": True,
        "masked_softmax_fusion": True,
        "gradient_accumulation_fusion": False,  # it would write past a weight that is quantised on the way
        "recompute_granularity": "full",  # as all recipes
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
        **words,
    }


def block_spec(config: Any) -> Any:
    """The library's own layers of this rank's stage."""
    return get_gpt_decoder_block_spec(config, use_transformer_engine=True)


def quantise_weights(
    network: torch.nn.Module, table: Table, precision: Precision, active: Callable[[], bool]
) -> list[str]:
    """Make covered weights pass through the precision before each product while `active`; their checkpoint names.

    RunError where nothing is covered, or where a layer has no place to do it.
    """
    moe = table.model.moe is not None
    params = {param.name: param for param in table.model.params()}
    covered: list[str] = []
    for at, module in network.named_modules():
        masks = {}
        for name, _ in module.named_parameters(prefix=at, recurse=False):
            if name.rpartition(".")[2].startswith("weight"):
                rows = [
                    torch.full((piece.rows[1] - piece.rows[0],), precision.covers(params[piece.name], moe))
                    for piece in sorted(table.pieces(name), key=lambda piece: piece.at)
                ]
                masks[name.rpartition(".")[2]] = torch.cat(rows)
                covered += [piece.name for piece in table.pieces(name) if precision.covers(params[piece.name], moe)]
        if any(bool(mask.any()) for mask in masks.values()):
            _hook(at, module, [masks[name] for name in sorted(masks, key=_number)], precision, active)
    if not covered:
        raise RunError(f"precision.scope of {precision.name} covers nothing of this rank's layers")
    return sorted(set(covered))


def _number(weight: str) -> int:
    """weight3 -> 3: the order of a grouped linear's experts."""
    return int(weight.removeprefix("weight") or 0)


def _hook(at: str, module: Any, masks: list[Tensor], precision: Precision, active: Callable[[], bool]) -> None:
    given = getattr(module, "_get_weight_tensors", None)
    if given is None:
        raise RunError(
            f"{at}: {type(module).__name__} gives its weights to no one; Transformer Engine 2.6 or newer does"
        )

    def quantised() -> list[Tensor]:
        weights = given()
        if not active():
            return weights
        assert len(weights) == len(masks), f"{at}: {len(weights)} weights, {len(masks)} expected"
        return [
            precision.fake(weight) if bool(mask.all())
            else torch.where(mask.to(weight.device)[:, None], precision.fake(weight), weight) if bool(mask.any())
            else weight
            for weight, mask in zip(weights, masks, strict=True)
        ]  # fmt: skip

    module._get_weight_tensors = quantised
