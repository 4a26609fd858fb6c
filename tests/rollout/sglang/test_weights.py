"""What travels to a server and what it then must hold: buckets, memory that two processes see, shards, hashes."""

from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from lpexp import frontend
from lpexp.model.decoder import initial_tensors
from lpexp.precision import Parts
from lpexp.precision.wire import ship
from lpexp.rollout.sglang.held import hash_of, held
from lpexp.rollout.sglang.transport import buckets, handles, named, pieces, together

MODELS = ("qwen3_tiny", "qwen2_tiny", "llama_tiny", "qwen3_moe_tiny", "deepseek_tiny")


def served(*words: str):
    exp = frontend.experiment(*words)
    model = exp.model.sized()
    moe = model.moe is not None
    made: dict[str, Parts] = {
        p.name: parts for p, parts in ship(initial_tensors(model, 1), model.params(), exp.wire, moe)
    }
    return exp, model, made


# -- buckets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [(), ("precision=fp8",), ("precision=int4_qat",)], ids=str)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("limit", [1, 300_000, 1 << 30])
def test_buckets_hold_every_tensor_once_in_order_and_no_more_bytes_than_they_may(model, words, limit):
    exp, card, parts = served(f"model={model}", *words)
    made = pieces(card, exp.wire)
    cuts = list(buckets(made, limit))
    assert [param for bucket in cuts for param in bucket] == list(card.params())
    for bucket in cuts:
        tensors = named(bucket, parts)
        told = [(piece.name, piece.dtype, piece.shape) for param in bucket for piece in made[param]]
        assert told == [(name, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors]
        blocks = {param.name.partition(".self_attn.")[0] for param in bucket}
        assert sum(t.nbytes for _, t in tensors) <= limit or len(blocks) == 1
    if limit == 1:
        for bucket in cuts:  # what must stay together stays: an attention block, and the parts of a tensor
            layers = {p.name.split(".")[2] for p in bucket if ".self_attn." in p.name}
            assert len(layers) <= 1
        for layer in range(card.num_hidden_layers):
            at = [i for i, bucket in enumerate(cuts) if any(f"layers.{layer}.self_attn." in p.name for p in bucket)]
            assert len(at) == 1


def test_another_process_opens_the_memory_and_finds_the_same_bytes(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = [
        ("a.weight", torch.randn(7, 5, generator=generator)),
        ("b.weight", torch.randn(3, 3, generator=generator).bfloat16()),
        ("c.weight_shape", torch.tensor([4, 8])),
        ("d.weight_packed", torch.arange(9, dtype=torch.int32)),
        ("e.empty", torch.empty(0)),
    ]
    shared = together(tensors, "cpu")
    assert len({tensor.untyped_storage().data_ptr() for _, tensor in shared}) == 1
    told = tmp_path / "handles"
    told.write_bytes(handles(shared))
    assert told.stat().st_size < 4000
    code = (
        "import pickle, sys, torch\n"
        "found = pickle.load(open(sys.argv[1], 'rb'))\n"
        "pickle.dump([(n, t.dtype, t.clone()) for n, t in found], open(sys.argv[1] + '.out', 'wb'))\n"
    )
    subprocess.run([sys.executable, "-c", code, told], check=True)
    found = pickle.loads(told.with_name("handles.out").read_bytes())
    for (name, tensor), (other, dtype, copy) in zip(tensors, found, strict=True):
        assert (name, tensor.dtype) == (other, dtype) and torch.equal(tensor, copy)


# -- what a server's ranks hold ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 1), (2, 2), (4, 2), (4, 4)])
def test_the_shards_of_all_ranks_are_the_model(model, tp, ep):
    """Fused parameters are taken apart again by their rows; every element of the model is on some rank."""
    _, card, parts = served(f"model={model}", "precision=bf16")
    if card.moe is None and ep > 1:
        pytest.skip("no experts to share out")
    exp = frontend.experiment(f"model={model}", "precision=bf16")
    ranks = [list(held(parts, card, exp.wire, rank, tp, ep)) for rank in range(tp)]
    assert len({tuple(name for name, _, _ in rank) for rank in ranks}) == 1
    for place, (name, params, first) in enumerate(ranks[0]):
        whole = [parts[param.name]["weight"] for param in params]
        shards = [rank[place][2] for rank in ranks]
        assert len({shard.shape for shard in shards}) == 1
        values = torch.cat([tensor.flatten() for tensor in whole]).float().sort().values
        found = torch.cat([shard.flatten() for shard in shards]).float().sort().values
        if first.numel() * tp == values.numel():
            assert torch.equal(found, values), name
        else:  # held by several ranks: norms, routers, and heads that are fewer than ranks
            assert torch.isin(values, found).all(), name


def test_heads_that_are_fewer_than_ranks_are_held_twice():
    exp, card, parts = served("model=qwen3_tiny", "precision=bf16")  # 4 heads, 2 for keys and values, of 64
    (rank3,) = (t for n, _, t in held(parts, card, exp.wire, 3, 4) if n == "model.layers.0.self_attn.qkv_proj.weight")
    at = "model.layers.0.self_attn"
    q, k, v = (parts[f"{at}.{name}_proj.weight"]["weight"] for name in "qkv")
    assert torch.equal(rank3, torch.cat([q[192:256], k[64:128], v[64:128]]))


def test_experts_are_stacked_gate_above_up_and_shared_out_by_rank():
    exp, card, parts = served("model=qwen3_moe_tiny", "precision=bf16")
    found = {name: t for name, _, t in held(parts, card, exp.wire, 1, 2, 2)}
    at = "model.layers.0.mlp.experts"
    assert card.moe is not None and found[f"{at}.w13_weight"].shape[0] == card.moe.num_experts // 2
    mine = card.moe.num_experts // 2
    gate, up, down = (parts[f"{at}.{mine}.{name}_proj.weight"]["weight"] for name in ("gate", "up", "down"))
    assert torch.equal(found[f"{at}.w13_weight"][0], torch.cat([gate, up]))
    assert torch.equal(found[f"{at}.w2_weight"][0], down)


def test_block_scaled_weights_are_told_by_their_values_and_packed_ones_not_at_all():
    exp, card, parts = served("model=qwen3_tiny", "precision=fp8")
    name = "model.layers.0.mlp.gate_up_proj.weight"
    found = {name: t for name, _, t in held(parts, card, exp.wire)}
    values = [exp.wire.dequantize(parts[f"model.layers.0.mlp.{half}_proj.weight"]) for half in ("gate", "up")]
    assert found[name].dtype == torch.bfloat16 and torch.equal(found[name], torch.cat(values).bfloat16())
    exp, card, parts = served("model=qwen3_tiny", "precision=int4_qat")
    told = [name for name, _, _ in held(parts, card, exp.wire)]
    assert "model.norm.weight" in told and not [name for name in told if "_proj" in name]


# -- hashes ------------------------------------------------------------------------------------------------------------


def plain_gpu_hash(raw: bytes) -> int:
    """SGLang's kernel word by word, in Python's integers."""
    low, words = 0xFFFFFFFF, np.frombuffer(raw + bytes(-len(raw) % 4), "<u4").tolist()

    def mix(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x85EBCA6B) & low
        x = ((x ^ (x >> 13)) * 0xC2B2AE35) & low
        return x ^ (x >> 16)

    def turn(x: int, by: int) -> int:
        return ((x << by) | (x >> (32 - by))) & low

    seed, total = 0x243F6A88, 0
    other = ((seed * 0x9E3779B1) ^ 0xDEADBEEF) & low
    for start in range(0, len(words), 8192):
        one = two = 0
        for index, word in enumerate(words[start : start + 8192], start):
            one += mix(word ^ ((index * 0x27D4EB2D + seed) & low) ^ turn(index, 15))
            two += mix(word ^ ((index * 0x165667B1 + other) & low) ^ turn(index, 13))
        size = len(words) * 4 & low
        total += (mix((one ^ size) & low) << 32) | mix((two ^ size) & low)
    x, whole = total & (1 << 64) - 1, (1 << 64) - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & whole
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & whole
    return x ^ (x >> 31)


@pytest.mark.parametrize("count", [1, 3, 8191, 8192, 20_001])
def test_the_hash_of_a_gpu_s_kernel_is_computed_anywhere(count):
    tensor = torch.randn(count, generator=torch.Generator().manual_seed(count)).bfloat16()
    assert hash_of(tensor, "cuda") == f"{plain_gpu_hash(tensor.view(torch.uint8).numpy().tobytes()):016x}"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_hash_changes_with_one_bit_and_with_the_order(device):
    tensor = torch.arange(1000, dtype=torch.int32)
    changed = tensor.clone()
    changed[500] ^= 1
    assert len({hash_of(one, device) for one in (tensor, changed, tensor.flip(0), tensor[:999])}) == 4
