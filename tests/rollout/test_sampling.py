"""Counter-based sampling: known answers, and distributions that match their definition."""

from __future__ import annotations

import numpy as np
import torch

from lpexp.rollout.sampling import draw, philox, uniforms

ONES = 0xFFFFFFFF


def test_philox_gives_the_published_words():
    zero = philox(np.zeros((1, 4), np.uint64), (0, 0))[0]
    assert [f"{w:08x}" for w in zero.tolist()] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    ones = philox(np.full((1, 4), ONES, np.uint64), (ONES, ONES))[0]
    assert [f"{w:08x}" for w in ones.tolist()] == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]


def test_a_number_depends_on_each_coordinate_and_on_nothing_else():
    ids, samples, positions = np.array([3, 3, 3, 4]), np.array([0, 1, 0, 0]), np.array([5, 5, 6, 5])
    u = uniforms(7, 2, ids, samples, positions)
    assert len(set(u.tolist())) == 4
    assert uniforms(7, 2, ids[::-1], samples[::-1], positions[::-1]).tolist() == u[::-1].tolist()
    assert uniforms(8, 2, ids, samples, positions)[0] != u[0]
    assert uniforms(7, 3, ids, samples, positions)[0] != u[0]
    assert u.min() > 0 and u.max() < 1


def test_draws_follow_the_softmax_at_the_temperature():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).expand(40_000, 4)
    u = torch.from_numpy(uniforms(1, 0, np.arange(40_000), np.zeros(40_000, int), np.zeros(40_000, int)))
    for temperature in (1.0, 0.5):
        found = torch.bincount(draw(logits, u, temperature), minlength=4) / 40_000
        expected = torch.softmax(logits[0] / temperature, -1)
        assert torch.allclose(found, expected.float(), atol=4 * 0.0025)  # 4 sigma of a share at 40000 draws


def test_the_kernel_draws_what_the_definition_draws():
    """Written out in torch; `top_k` of the whole vocabulary cuts nothing and takes torch's way too."""
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(5000, 33, generator=generator)
    u = torch.from_numpy(uniforms(1, 0, np.arange(5000), np.zeros(5000, int), np.zeros(5000, int)))
    for temperature in (1.0, 0.7):
        cdf = torch.softmax(logits.double() / temperature, -1).cumsum(-1)
        expected = (cdf < u[:, None] * cdf[:, -1:]).sum(-1)
        assert torch.equal(draw(logits, u, temperature), expected)
        assert torch.equal(draw(logits, u, temperature, top_k=33), expected)
        assert not torch.equal(draw(logits, u.flip(0), temperature), expected)
    assert draw(logits[:1], torch.tensor([1.0], dtype=torch.float64), 1.0) <= 32


def test_greedy_takes_the_most_probable():
    logits = torch.tensor([[0.1, 3.0, 2.9], [5.0, 1.0, 1.0]])
    assert draw(logits, torch.tensor([0.99, 0.99], dtype=torch.float64), 0.0).tolist() == [1, 0]


def test_top_k_and_top_p_keep_exactly_the_nucleus():
    probs = torch.tensor([0.1, 0.5, 0.15, 0.25])
    u = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    logits = probs.log().expand(999, 4)

    def kept(**cut):
        return sorted(set(draw(logits, u, 1.0, **cut).tolist()))

    assert kept() == [0, 1, 2, 3]
    assert kept(top_k=2) == [1, 3]
    assert kept(top_p=0.5) == [1]
    assert kept(top_p=0.51) == [1, 3]
    assert kept(top_p=0.9) == [1, 2, 3]
    shares = torch.bincount(draw(logits, u, 1.0, top_k=2), minlength=4) / 999
    assert abs(float(shares[1]) - 2 / 3) < 0.01
