"""Weights on their way: from a directory into shards and back, and from shards to the engines."""

from __future__ import annotations

import filecmp
from pathlib import Path

import pytest
import torch

from lpexp.model import hf
from lpexp.model.hf import read_config
from tests.model import small
from tests.trainer.megatron import cases
from tests.trainer.megatron.processes import Processes

LAYOUTS = {
    "qwen3_tiny": ("", "trainer.tp=2", "trainer.pp=2", "trainer.ranks=2"),
    "qwen2_tiny": ("trainer.tp=2",),
    "llama_tiny": ("trainer.pp=2",),
    "qwen3_moe_tiny": ("", "trainer.ep=2", "trainer.tp=2 trainer.etp=2", "trainer.pp=2", "trainer.tp=2 trainer.ep=2"),
    "deepseek_tiny": ("", "trainer.ep=2", "trainer.tp=2", "trainer.pp=2", "trainer.tp=2 trainer.ep=2"),
}
CASES = [(model, layout) for model, layouts in LAYOUTS.items() for layout in layouts]


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_a_directory_goes_through_the_shards_and_comes_back_to_the_byte(
    pair: Processes, tmp_path: Path, model: str, layout: str
) -> None:
    words = (f"model={model}", "precision=bf16", *layout.split())
    exp = cases.experiment(*words)
    card = exp.model.sized()
    hf.save(tmp_path / "source", card, small.weights(card).items(), exp.precision.plain)
    pair.run(cases.went_through, words, str(tmp_path / "source"), str(tmp_path / "out"), ranks=exp.trainer.world(exp))  # type: ignore[attr-defined]
    assert read_config(tmp_path / "out") == read_config(tmp_path / "source")
    names = sorted(path.name for path in (tmp_path / "source").iterdir())
    assert filecmp.cmpfiles(tmp_path / "source", tmp_path / "out", names, shallow=False) == (names, [], [])


def test_tied_embeddings_and_more_ranks_than_key_heads_come_back(pair: Processes, tmp_path: Path) -> None:
    words = ("model.tie_word_embeddings=true", "model.num_key_value_heads=1", "precision=bf16")
    for number, layout in enumerate(("trainer.pp=2", "trainer.tp=2")):
        card = cases.experiment(*words, layout).model.sized()
        source, out = tmp_path / f"source-{number}", tmp_path / f"out-{number}"
        hf.save(source, card, small.weights(card).items(), small.PRECISIONS["bf16"])
        pair.run(cases.went_through, (*words, layout), str(source), str(out))
        (shard,) = (path.name for path in source.glob("*.safetensors"))
        assert (source / shard).read_bytes() == (out / shard).read_bytes()


@pytest.mark.parametrize(
    ("words", "layout"),
    [
        (("precision=bf16",), "trainer.tp=2"),
        (("precision=fp8",), "trainer.pp=2"),
        (("precision=int4_qat", "model=qwen3_moe_tiny"), "trainer.ep=2"),
        (("precision=int4_qat", "model=deepseek_tiny"), "trainer.tp=2 trainer.ep=2"),
        (("precision=bf16", "precision@rollout.precision=fp8"), "trainer.tp=2"),
    ],
)
def test_what_is_published_is_what_the_embedded_trainer_serves(
    pair: Processes, words: tuple[str, ...], layout: str
) -> None:
    (buckets, report), (_, nothing) = pair.run(cases.shipped, (*words, *layout.split()), 1 << 16)
    ((frozen, theirs, quant),) = pair.run(cases.shipped_embedded, words, ranks=1)
    assert nothing is None and len(buckets) > 3
    ours = {name: parts for bucket in buckets for name, parts in bucket.items()}
    assert ours.keys() == frozen.keys() and sum(map(len, buckets)) == len(ours)
    for name, parts in frozen.items():
        assert {s: (d, shape, raw.tobytes()) for s, (d, shape, raw) in ours[name].items()} == {
            s: (d, shape, raw.tobytes()) for s, (d, shape, raw) in parts.items()
        }, name
    assert (report.checksum_sent, report.bytes) == (theirs.checksum_sent, theirs.bytes)
    assert report.quant == quant and report.quantized_param_frac == theirs.quantized_param_frac


def test_a_bucket_holds_no_more_than_its_bytes_or_one_tensor(pair: Processes) -> None:
    limit = 1 << 16
    ((buckets, _),) = pair.run(cases.shipped, ("precision=bf16",), limit, ranks=1)
    sizes = [[raw.nbytes for _, _, raw in (parts["weight"] for parts in bucket.values())] for bucket in buckets]
    assert all(sum(own) <= limit or len(own) == 1 for own in sizes)
    assert any(len(own) > 1 for own in sizes)


def test_a_tensor_that_does_not_come_is_named(pair: Processes) -> None:
    with pytest.raises(AssertionError, match=r"1 tensors did not come, model\.norm\.weight among them"):
        pair.run(_without_the_last_norm, ranks=1)


def _without_the_last_norm(rank: int, ranks: int, meet: str) -> None:
    exp = cases.experiment("precision=bf16")
    with cases.rank_of(exp, rank, ranks, meet) as made:
        made.load((name, t) for name, t in cases.start(exp).items() if name != "model.norm.weight")


def test_the_masters_are_not_rounded_by_loading(pair: Processes) -> None:
    (found,) = pair.run(_masters, ranks=1)
    assert torch.equal(torch.from_numpy(found), cases.start(cases.experiment("precision=bf16"))["model.norm.weight"])


def _masters(rank: int, ranks: int, meet: str) -> object:
    with cases.rank_of(cases.experiment("precision=bf16"), rank, ranks, meet) as made:
        return made.tensors["decoder.final_layernorm.weight"].detach().clone().numpy()
