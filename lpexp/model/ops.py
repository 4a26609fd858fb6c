"""What lies between the decoder's matrix products, with gradients: residual sums, norms, rotations, gates, attention.

Each operation is written twice. The plain definition, in torch, is what GPUs run and what the tests compare with; on a
CPU its kernel (lpexp/kernels.py) makes one pass over memory where torch makes ten, and a small model spends most of its
time there. `half` rounds what leaves an operation to bf16, and the gradient where its value was rounded.
R rows (a token each), H hidden, D head dimension, M rows of keys and values.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lpexp import kernels
from lpexp.precision import numeric

GATHERED_BYTES = 1 << 28  # keys and values that the plain attention gathers at a time


class Rotation(NamedTuple):
    """Rotary tables [L, D] and the position [R] of each row."""

    cos: Tensor
    sin: Tensor
    at: Tensor


def _rounded(x: Tensor, half: bool) -> Tensor:
    return numeric.round_bf16(x) if half else x


def run(kind: Any, plain: Any, x: Tensor, *args: Any) -> Any:
    """The plain definition on a GPU, else the kernel."""
    return plain(x, *args) if x.is_cuda else numeric.recorded(kind, x, *args)


def _array(x: Tensor, *shape: int) -> Any:
    """The tensor's memory as a NumPy array of this shape."""
    x = x.detach() if x.requires_grad else x
    x = x if x.is_contiguous() else x.contiguous()
    return (x.view(shape) if shape else x).numpy()


# -- residual sum ------------------------------------------------------------------------------------------------------
def add(x: Tensor, y: Tensor, half: bool) -> Tensor:
    """round(x + y)"""
    return run(_Add, plain_add, x, y, half)


def plain_add(x: Tensor, y: Tensor, half: bool) -> Tensor:
    return _rounded(x + y, half)


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, half: bool) -> Tensor:
        ctx.half, out = half, torch.empty_like(x, memory_format=torch.contiguous_format)
        kernels.add(_array(x, -1), _array(y, -1), half, _array(out, -1))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        grad = numeric.bf16(grad) if ctx.half else grad
        return grad, grad, None


# -- root-mean-square norm ---------------------------------------------------------------------------------------------
def rms_norm(x: Tensor, weight: Tensor, eps: float, half: bool) -> Tensor:
    """round(x / sqrt(mean(x^2) + eps) * weight) over the last axis of [R, H], in float32."""
    return run(_RmsNorm, plain_rms_norm, x, weight, eps, half)


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float, half: bool) -> Tensor:
    return _rounded(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight, half)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, half: bool) -> Tensor:
        out, factor = x.new_empty(x.shape), x.new_empty(x.shape[0])
        kernels.norm(_array(x), _array(weight), eps, half, _array(out), _array(factor))
        ctx.save_for_backward(x, weight, factor)
        ctx.half = half
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, weight, factor = ctx.saved_tensors
        dx, dw = x.new_empty(x.shape), torch.empty_like(weight)
        arrays = (_array(t) for t in (grad, x, weight, factor))
        kernels.norm_back(*arrays, ctx.half, _array(dx), _array(dw))
        return dx, dw, None, None


# -- queries, keys and values ------------------------------------------------------------------------------------------
def heads(
    y: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float, turn: Rotation, num_q: int, num_k: int,
    half: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The joined projection y [R, (Hq + 2 Hkv) D] as q [R, Hq, D], k and v [R, Hkv, D].

    Queries and keys are normed head by head where weights [D] are given, rounded, rotated and rounded again.
    """
    return run(_Heads, plain_heads, y, q_weight, k_weight, eps, turn, num_q, num_k, half)


def plain_heads(
    y: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float, turn: Rotation, num_q: int, num_k: int,
    half: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v = y.unflatten(-1, (num_q + 2 * num_k, -1)).split((num_q, num_k, num_k), 1)
    if q_weight is not None and k_weight is not None:
        q, k = plain_rms_norm(q, q_weight, eps, half), plain_rms_norm(k, k_weight, eps, half)
    return rotate(q, turn, half), rotate(k, turn, half), v


def rotate(x: Tensor, turn: Rotation, half: bool) -> Tensor:
    """round(x cos + (-second half, first half) sin) of x [R, heads, D]."""
    low, high = x.chunk(2, -1)
    cos, sin = turn.cos[turn.at][:, None], turn.sin[turn.at][:, None]
    return _rounded(x * cos + torch.cat((-high, low), -1) * sin, half)


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float, turn: Rotation,
        num_q: int, num_k: int, half: bool,
    ) -> Any:  # fmt: skip
        rows, low = y.shape[0], y.shape[1] // (num_q + 2 * num_k) // 2
        normed = q_weight is not None
        weights = [y.new_empty(2 * low) if w is None else w for w in (q_weight, k_weight)]
        q, k, v = (y.new_empty(rows, count, 2 * low) for count in (num_q, num_k, num_k))
        factor = y.new_empty(rows, num_q + num_k)
        tables = [_array(turn.cos, -1, 2, low), _array(turn.sin, -1, 2, low), _array(turn.at)]
        kernels.heads(
            _array(y, rows, -1, 2 * low), *(_array(w) for w in weights), normed, eps, *tables, half,
            *(_array(t) for t in (q, k, v)), _array(factor),
        )  # fmt: skip
        ctx.save_for_backward(y, factor, *weights)
        ctx.tables, ctx.normed, ctx.half = tables, normed, half
        return q, k, v

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> Any:  # type: ignore[override]
        y, factor, q_weight, k_weight = ctx.saved_tensors
        rows, dim = y.shape[0], q_weight.shape[0]
        dy, dq_weight, dk_weight = y.new_empty(y.shape), torch.empty_like(q_weight), torch.empty_like(k_weight)
        kernels.heads_back(
            *(_array(t, rows, -1, dim) for t in (dq, dk, dv, y)), _array(q_weight), _array(k_weight),
            ctx.normed, *ctx.tables, ctx.half, _array(factor), _array(dy, rows, -1, dim),
            _array(dq_weight), _array(dk_weight),
        )  # fmt: skip
        if not ctx.normed:
            dq_weight = dk_weight = None
        return dy, dq_weight, dk_weight, None, None, None, None, None


# -- gated unit --------------------------------------------------------------------------------------------------------
def silu_mul(y: Tensor, half: bool) -> Tensor:
    """round(silu(gate) * up) of the joined projection y [R, 2 I]."""
    return run(_SiluMul, plain_silu_mul, y, half)


def plain_silu_mul(y: Tensor, half: bool) -> Tensor:
    gate, up = y.chunk(2, -1)
    return _rounded(gate / (1 + torch.exp(-gate)) * up, half)


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, half: bool) -> Tensor:
        rows, width = y.shape[0], y.shape[1] // 2
        out = y.new_empty(rows, width)
        kernels.silu_mul(_array(y, rows, 2, width), half, _array(out))
        ctx.save_for_backward(y)
        ctx.half = half
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        (y,) = ctx.saved_tensors
        rows, width = grad.shape
        dy = y.new_empty(y.shape)
        kernels.silu_mul_back(_array(grad), _array(y, rows, 2, width), ctx.half, _array(dy, rows, 2, width))
        return dy, None


# -- attention ---------------------------------------------------------------------------------------------------------
def attention(q: Tensor, k: Tensor, v: Tensor, seen_R4: Tensor, scale: float, half: bool) -> Tensor:
    """round(softmax(q k^T * scale) v), the softmax and its sums in float64; gradients in float32.

    q [R, Hq, D], k [M, Hkv, D], v [M, Hkv, Dv] -> [R, Hq, Dv]. Row r sees two spans of keys, one after the other:
    seen_R4[r] = (first, count, first, count). Its sums run over these keys in this order, wherever they lie, so a
    sequence scored whole and one decoded from a cache have the same bits. A row that sees nothing gets zeros.
    """
    return run(_Attention, plain_attention, q, k, v, seen_R4, scale, half)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, seen_R4: Tensor, scale: float, half: bool) -> Tensor:
    """Keys and values are gathered for some rows at a time, and again for their gradients."""
    from torch.utils.checkpoint import checkpoint

    counts = seen_R4[:, 1::2]
    j_S = torch.arange(int(counts.sum(1).max()), device=q.device)
    keys_RS = torch.where(j_S < counts[:, :1], seen_R4[:, :1] + j_S, seen_R4[:, 2:3] + j_S - counts[:, :1])
    allowed_RS = j_S < counts.sum(1, keepdim=True)
    keys_RS = keys_RS.where(allowed_RS, 0)
    each = max(GATHERED_BYTES // (8 * len(j_S) * k.shape[1] * (k.shape[2] + v.shape[2]) + 1), 1)
    parts = [
        checkpoint(_attend_rows, *rows, k, v, scale, use_reentrant=False)
        for rows in zip(q.split(each), keys_RS.split(each), allowed_RS.split(each), strict=True)
    ]
    return _rounded(torch.cat(parts), half)  # type: ignore[arg-type]


def _attend_rows(q: Tensor, keys_RS: Tensor, allowed_RS: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    grouped = q.double().unflatten(1, (k.shape[1], -1))  # [R, Hkv, Hq / Hkv, D]
    scores = torch.einsum("rgnd,rsgd->rgns", grouped, k[keys_RS].double()) * scale
    scores = scores.masked_fill(~allowed_RS[:, None, None], -torch.inf)
    share = scores.softmax(-1).where(allowed_RS[:, None, None], 0.0)
    return torch.einsum("rgns,rsgd->rgnd", share, v[keys_RS].double()).flatten(1, 2).float()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, seen_R4: Tensor, scale: float, half: bool) -> Tensor:
        rows, num_heads, _ = q.shape
        learns = any(ctx.needs_input_grad)
        out = q.new_empty(rows, num_heads, v.shape[2])
        longest = int(seen_R4[:, 1::2].sum(1).max()) if learns else 0
        share = q.new_empty(rows, num_heads, longest)
        kernels.attend(*(_array(t) for t in (q, k, v, seen_R4)), scale, half, learns, _array(out), _array(share))
        ctx.save_for_backward(q, k, v, seen_R4, share)
        ctx.scale, ctx.half = scale, half
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        q, k, v, seen_R4, share = ctx.saved_tensors
        dq, dk, dv = (torch.zeros(t.shape) for t in (q, k, v))
        arrays = [_array(t) for t in (grad, q, k, v, seen_R4, share)]
        kernels.attend_back(*arrays, ctx.scale, ctx.half, *(_array(t) for t in (dq, dk, dv)))
        return dq, dk, dv, None, None, None


# -- log-probabilities -------------------------------------------------------------------------------------------------
def log_softmax_at(logits: Tensor, at: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature) at one place of each row, and that softmax's entropy (nat, no gradient).

    logits [R, V] float32, at [R] -> two float32 [R].
    """
    return run(_LogSoftmaxAt, plain_log_softmax_at, logits, at, temperature)


def plain_log_softmax_at(logits: Tensor, at: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    z = logits / temperature
    total = z.logsumexp(-1)
    with torch.no_grad():
        entropy = total - ((z - total[:, None]).exp() * z).sum(-1)
    return z.gather(-1, at[:, None])[:, 0] - total, entropy


class _LogSoftmaxAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, at: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        rows = len(logits)
        logprob, entropy, norm = logits.new_empty(rows), logits.new_empty(rows), logits.new_empty(rows, 2)
        into = (_array(t) for t in (logprob, entropy, norm))
        kernels.log_softmax_at(_array(logits), _array(at), temperature, *into)
        ctx.save_for_backward(logits, at, norm)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logprob, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:  # type: ignore[override]
        logits, at, norm = ctx.saved_tensors
        dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
        arrays = (_array(t) for t in (grad, logits, at))
        kernels.log_softmax_at_back(*arrays, ctx.temperature, _array(norm), _array(dlogits))
        return dlogits, None, None
