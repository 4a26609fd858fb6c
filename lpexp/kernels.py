"""The decoder's stretches between matrix products, each one pass over memory on a CPU, compiled by numba.

Every kernel states its formula; the same formula in torch stands beside its caller, runs on GPUs, and is what the
tests hold the kernel to. Values are float32 carriers; `half` rounds what leaves a kernel to bf16. A row's result
depends on that row alone, so it has the same bits however many rows are computed beside it.
Arithmetic is IEEE without contraction; only sums over a row may be reordered, by the compiler, in the same way for
every row. Left out: threads (a process has one), and anything that a matrix product does better.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import boolean, float32, float64, int64, void

f1, f2, f3 = float32[::1], float32[:, ::1], float32[:, :, ::1]
i1, i2, d1 = int64[::1], int64[:, ::1], float64[::1]


def compiled(*arguments: Any) -> Any:
    """Compiled once for these argument types, kept on disk; division by zero gives an infinity."""
    return numba.njit(void(*arguments), cache=True, error_model="numpy")


# -- values ------------------------------------------------------------------------------------------------------------
@numba.njit(inline="always")
def _bf16(x: Any) -> Any:
    """RN16b: to nearest, ties to even; a NaN stays one."""
    bits = np.float32(x).view(np.int32)
    rounded = (bits + np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))) & np.int32(-65536)
    return np.int32(rounded).view(np.float32) if x == x else np.float32(np.nan)


@numba.njit(inline="always")
def _exp(x: Any) -> Any:
    """exp in float32 within 2 ulp, from additions and products alone, so that it vectorises (Cephes' expf)."""
    x = np.float32(88.0) if x > np.float32(88.0) else x
    x = np.float32(-87.0) if x < np.float32(-87.0) else x
    n = (x * np.float32(1.44269504088896341) + np.float32(12582912.0)) - np.float32(12582912.0)  # nearest integer
    r = (x - n * np.float32(0.693359375)) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    y = (p * (r * r) + r) + np.float32(1.0)
    return y * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@numba.njit(inline="always")
def _exp64(x: Any) -> Any:
    """exp in float64 for x <= 0, within 2 ulp: 2^n times a Taylor polynomial on |r| <= ln(2) / 2."""
    x = -700.0 if x < -700.0 else x
    n = (x * 1.4426950408889634 + 6755399441055744.0) - 6755399441055744.0  # nearest integer
    r = (x - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6
    p = 1.0 / 479001600
    p = p * r + 1.0 / 39916800
    p = p * r + 1.0 / 3628800
    p = p * r + 1.0 / 362880
    p = p * r + 1.0 / 40320
    p = p * r + 1.0 / 5040
    p = p * r + 1.0 / 720
    p = p * r + 1.0 / 120
    p = p * r + 1.0 / 24
    p = p * r + 1.0 / 6
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    return p * np.int64((np.int64(n) + 1023) << 52).view(np.float64)


# Sums, the only place where the order of operations is the compiler's. Here and below every innermost index runs from
# 0: numba lets an index be negative, and where it cannot rule that out it does not vectorise.
@numba.njit(fastmath={"reassoc"})
def _dot(a: Any, b: Any) -> Any:
    total = np.float32(0.0)
    for i in range(a.size):
        total += a[i] * b[i]
    return total


@numba.njit(fastmath={"reassoc"})
def _dot3(a: Any, b: Any, m: Any, g: Any) -> Any:
    total = np.float32(0.0)
    for i in range(a.size):
        total += a[i] * b[m, g, i]
    return total


@numba.njit(fastmath={"reassoc"})
def _dot64(a: Any, b: Any, m: Any, g: Any) -> Any:
    """Float64 a with a row of float32 b."""
    total = 0.0
    for i in range(a.size):
        total += a[i] * float64(b[m, g, i])
    return total


@numba.njit(fastmath={"reassoc"})
def _sum64(a: Any) -> Any:
    total = 0.0
    for i in range(a.size):
        total += a[i]
    return total


@numba.njit(fastmath={"reassoc"})
def _inner64(a: Any, b: Any) -> Any:
    total = 0.0
    for i in range(a.size):
        total += a[i] * b[i]
    return total


# -- rounding and sums -------------------------------------------------------------------------------------------------
@compiled(f1, f1)
def round_to(x: Any, out: Any) -> None:
    """out = RN16b(x)"""
    for i in range(x.size):
        out[i] = _bf16(x[i])


@compiled(f1)
def round_(x: Any) -> None:
    """x = RN16b(x), in place: one array, since two that may be the same are not vectorised."""
    for i in range(x.size):
        x[i] = _bf16(x[i])


@compiled(f1, f1, boolean, f1)
def add(x: Any, y: Any, half: Any, out: Any) -> None:
    """out = round(x + y)"""
    if half:
        for i in range(x.size):
            out[i] = _bf16(x[i] + y[i])
    else:
        for i in range(x.size):
            out[i] = x[i] + y[i]


# -- root-mean-square norm ---------------------------------------------------------------------------------------------
@compiled(f2, f1, float32, boolean, f2, f1)
def norm(x: Any, w: Any, eps: Any, half: Any, out: Any, factor: Any) -> None:
    """out = round(x * factor * w), factor = 1 / sqrt(mean(x^2) + eps), a row at a time"""
    rows, width = x.shape
    for r in range(rows):
        f = np.float32(1.0) / np.sqrt(_dot(x[r], x[r]) / np.float32(width) + eps)
        factor[r] = f
        for i in range(width):
            y = x[r, i] * f * w[i]
            out[r, i] = _bf16(y) if half else y


@compiled(f2, f2, f1, f1, boolean, f2, f1)
def norm_back(grad: Any, x: Any, w: Any, factor: Any, half: Any, dx: Any, dw: Any) -> None:
    """g = round(grad), n = x * factor; dw = sum over rows of g * n, dx = factor * (g * w - n * mean(g * w * n))"""
    rows, width = x.shape
    total = np.zeros(width, np.float64)
    n, dy = np.empty(width, np.float32), np.empty(width, np.float32)
    for r in range(rows):
        f = factor[r]
        for i in range(width):
            n[i] = x[r, i] * f
        for i in range(width):
            dy[i] = _bf16(grad[r, i]) if half else grad[r, i]
        for i in range(width):
            total[i] += dy[i] * n[i]
        for i in range(width):
            dy[i] *= w[i]
        mean = _dot(dy, n) / np.float32(width)
        for i in range(width):
            dx[r, i] = f * (dy[i] - n[i] * mean)
    for i in range(width):
        dw[i] = np.float32(total[i])


# -- queries, keys and values ------------------------------------------------------------------------------------------
@compiled(f3, f1, f1, boolean, float32, f3, f3, i1, boolean, f3, f3, f3, f2)
def heads(
    y: Any, q_w: Any, k_w: Any, normed: Any, eps: Any, cos: Any, sin: Any, at: Any, half: Any,
    q: Any, k: Any, v: Any, factor: Any,
) -> None:  # fmt: skip
    """y [R, Hq + 2 Hkv, D] -> q, k, v [R, heads, D]; queries and keys are normed (where `normed`) and rotated.

    n = round(y * factor * w); out = round(n * cos[at] + turned(n) * sin[at]), turned(n) = (-second half, first half);
    cos and sin [L, 2, D / 2]
    """
    rows, num_q, dim = q.shape
    num_k = k.shape[1]
    n = np.empty(dim, np.float32)
    n_low, n_high = n[: dim // 2], n[dim // 2 :]
    for r in range(rows):
        cos_low, cos_high, sin_low, sin_high = cos[at[r], 0], cos[at[r], 1], sin[at[r], 0], sin[at[r], 1]
        for h in range(num_q + num_k):
            x = y[r, h]
            out = q[r, h] if h < num_q else k[r, h - num_q]
            out_low, out_high = out[: dim // 2], out[dim // 2 :]
            if normed:
                w = q_w if h < num_q else k_w
                f = np.float32(1.0) / np.sqrt(_dot(x, x) / np.float32(dim) + eps)
                factor[r, h] = f
                for i in range(dim):
                    value = x[i] * f * w[i]
                    n[i] = _bf16(value) if half else value
            else:
                for i in range(dim):
                    n[i] = x[i]
            for i in range(n_low.size):
                value = n_low[i] * cos_low[i] - n_high[i] * sin_low[i]
                out_low[i] = _bf16(value) if half else value
            for i in range(n_high.size):
                value = n_high[i] * cos_high[i] + n_low[i] * sin_high[i]
                out_high[i] = _bf16(value) if half else value
        for h in range(num_k):
            x, out = y[r, num_q + num_k + h], v[r, h]
            for i in range(dim):
                out[i] = x[i]


@compiled(f3, f3, f3, f3, f1, f1, boolean, f3, f3, i1, boolean, f2, f3, f1, f1)
def heads_back(
    dq: Any, dk: Any, dv: Any, y: Any, q_w: Any, k_w: Any, normed: Any, cos: Any, sin: Any, at: Any, half: Any,
    factor: Any, dy: Any, dq_w: Any, dk_w: Any,
) -> None:  # fmt: skip
    """The gradients of `heads`, with y and the heads [R, heads, D]; each is rounded where its value was."""
    rows, num_q, dim = dq.shape
    num_k = dk.shape[1]
    g, n = np.empty(dim, np.float32), np.empty(dim, np.float32)
    g_low, g_high, n_low, n_high = g[: dim // 2], g[dim // 2 :], n[: dim // 2], n[dim // 2 :]
    q_total, k_total = np.zeros(dim, np.float64), np.zeros(dim, np.float64)
    for r in range(rows):
        cos_low, cos_high, sin_low, sin_high = cos[at[r], 0], cos[at[r], 1], sin[at[r], 0], sin[at[r], 1]
        for h in range(num_q + num_k):
            grad = dq[r, h] if h < num_q else dk[r, h - num_q]
            into = dy[r, h]
            for i in range(dim):
                n[i] = _bf16(grad[i]) if half else grad[i]
            for i in range(g_low.size):
                g_low[i] = n_low[i] * cos_low[i] + n_high[i] * sin_high[i]
            for i in range(g_high.size):
                g_high[i] = n_high[i] * cos_high[i] - n_low[i] * sin_low[i]
            if normed:  # the loops of `norm_back`, written out: shared as a function they take up to twice the time
                x, f = y[r, h], factor[r, h]
                w = q_w if h < num_q else k_w
                total = q_total if h < num_q else k_total
                for i in range(dim):
                    n[i] = x[i] * f
                for i in range(dim):
                    g[i] = _bf16(g[i]) if half else g[i]
                for i in range(dim):
                    total[i] += g[i] * n[i]
                for i in range(dim):
                    g[i] *= w[i]
                mean = _dot(g, n) / np.float32(dim)
                for i in range(dim):
                    into[i] = f * (g[i] - n[i] * mean)
            else:
                for i in range(dim):
                    into[i] = g[i]
        for h in range(num_k):
            into, grad = dy[r, num_q + num_k + h], dv[r, h]
            for i in range(dim):
                into[i] = grad[i]
    for i in range(dim):
        dq_w[i], dk_w[i] = np.float32(q_total[i]), np.float32(k_total[i])


# -- gated unit --------------------------------------------------------------------------------------------------------
@compiled(f3, boolean, f2)
def silu_mul(y: Any, half: Any, out: Any) -> None:
    """y [R, 2, I], gate and up -> out [R, I] = round(gate / (1 + exp(-gate)) * up)"""
    rows, width = out.shape
    for r in range(rows):
        for i in range(width):
            gate = y[r, 0, i]
            value = gate / (np.float32(1.0) + _exp(-gate)) * y[r, 1, i]
            out[r, i] = _bf16(value) if half else value


@compiled(f2, f3, boolean, f3)
def silu_mul_back(grad: Any, y: Any, half: Any, dy: Any) -> None:
    """g = round(grad); d gate = g * up * s * (1 + gate * (1 - s)), d up = g * gate * s, s = 1 / (1 + exp(-gate))"""
    rows, width = grad.shape
    one = np.float32(1.0)
    s, g = np.empty(width, np.float32), np.empty(width, np.float32)
    for r in range(rows):  # several loops: one that writes several arrays is not vectorised
        for i in range(width):
            s[i] = one / (one + _exp(-y[r, 0, i]))
        for i in range(width):
            g[i] = _bf16(grad[r, i]) if half else grad[r, i]
        for i in range(width):
            dy[r, 0, i] = g[i] * y[r, 1, i] * (s[i] * (one + y[r, 0, i] * (one - s[i])))
        for i in range(width):
            dy[r, 1, i] = g[i] * (y[r, 0, i] * s[i])


# -- attention ---------------------------------------------------------------------------------------------------------
@compiled(f3, f3, f3, i2, float64, boolean, boolean, f3, f3)
def attend(q: Any, k: Any, v: Any, seen: Any, scale: Any, half: Any, keep: Any, out: Any, share: Any) -> None:
    """round(softmax(q k^T * scale) v), the softmax and its sums in float64.

    q [R, Hq, D], k [M, Hkv, D], v [M, Hkv, Dv], out [R, Hq, Dv]. Row r sees the keys first .. first + count - 1 of
    the two spans seen[r] = (first, count, first, count), in this order; one that sees none gets zeros.
    `keep` leaves the softmax in share [R, Hq, S] for the backward pass.
    """
    rows, num_heads, dim = q.shape
    repeat, width = num_heads // k.shape[1], v.shape[2]
    most = 0
    for r in range(rows):
        most = max(most, seen[r, 1] + seen[r, 3])
    keys, weights = np.empty(most, np.int64), np.empty(most, np.float64)
    query, mixed = np.empty(dim, np.float64), np.empty(width, np.float64)
    for r in range(rows):
        count = seen[r, 1] + seen[r, 3]
        for i in range(seen[r, 1]):
            keys[i] = seen[r, 0] + i
        for i in range(seen[r, 3]):
            keys[seen[r, 1] + i] = seen[r, 2] + i
        for h in range(num_heads):
            g = h // repeat
            for d in range(dim):
                query[d] = q[r, h, d] * scale
            for d in range(width):
                mixed[d] = 0.0
            top = -np.inf
            for j in range(count):
                weights[j] = _dot64(query, k, keys[j], g)
                top = max(top, weights[j])
            total = 0.0 if count else 1.0
            for j in range(count):
                weights[j] = _exp64(weights[j] - top)
            for j in range(count):
                w, m = weights[j], keys[j]
                total += w
                for d in range(width):
                    mixed[d] += w * float64(v[m, g, d])
            for d in range(width):
                value = np.float32(mixed[d] / total)
                out[r, h, d] = _bf16(value) if half else value
            if keep:
                for j in range(count):
                    share[r, h, j] = np.float32(weights[j] / total)


@compiled(f3, f3, f3, f3, i2, f3, float32, boolean, f3, f3, f3)
def attend_back(
    dout: Any, q: Any, k: Any, v: Any, seen: Any, share: Any, scale: Any, half: Any, dq: Any, dk: Any, dv: Any
) -> None:
    """The gradients of `attend` in float32, added into dq, dk and dv in the order of the rows."""
    rows, num_heads, dim = q.shape
    repeat, width = num_heads // k.shape[1], v.shape[2]
    grad, slopes = np.empty(width, np.float32), np.empty(share.shape[2], np.float32)
    for r in range(rows):
        count = seen[r, 1] + seen[r, 3]
        for h in range(num_heads):
            g = h // repeat
            for d in range(width):
                grad[d] = _bf16(dout[r, h, d]) if half else dout[r, h, d]
            inner = np.float32(0.0)
            for j in range(count):
                m = seen[r, 0] + j if j < seen[r, 1] else seen[r, 2] + j - seen[r, 1]
                slopes[j] = _dot3(grad, v, m, g)
                inner += share[r, h, j] * slopes[j]
                for d in range(width):
                    dv[m, g, d] += share[r, h, j] * grad[d]
            for j in range(count):
                m = seen[r, 0] + j if j < seen[r, 1] else seen[r, 2] + j - seen[r, 1]
                slope = share[r, h, j] * (slopes[j] - inner) * scale
                for d in range(dim):
                    dq[r, h, d] += slope * k[m, g, d]
                for d in range(dim):
                    dk[m, g, d] += slope * q[r, h, d]


# -- log-probabilities -------------------------------------------------------------------------------------------------
@compiled(f2, i1, float64, f1, f1, f2)
def log_softmax_at(logits: Any, at: Any, temperature: Any, logprob: Any, entropy: Any, norm: Any) -> None:
    """z = (logits - max) / temperature, Z = sum exp(z), all in float64; norm [R, 2] keeps the maximum and log Z.

    logprob[r] = z[at[r]] - log Z; entropy[r] = log Z - sum exp(z) z / Z
    """
    rows, size = logits.shape
    z, e = np.empty(size, np.float64), np.empty(size, np.float64)
    for r in range(rows):
        top = logits[r, 0]
        for j in range(size):
            top = max(top, logits[r, j])
        for j in range(size):
            z[j] = (float64(logits[r, j]) - float64(top)) / temperature
        for j in range(size):
            e[j] = _exp64(z[j])
        total = _sum64(e)
        log_total = np.log(total)
        logprob[r] = np.float32(z[at[r]] - log_total)
        entropy[r] = np.float32(log_total - _inner64(e, z) / total)
        norm[r, 0], norm[r, 1] = top, np.float32(log_total)


@compiled(f1, f2, i1, float32, f2, f2)
def log_softmax_at_back(grad: Any, logits: Any, at: Any, temperature: Any, norm: Any, dlogits: Any) -> None:
    """dlogits[r, j] = grad[r] / temperature * ((j == at[r]) - softmax[r, j])"""
    rows, size = logits.shape
    for r in range(rows):
        top, log_total, slope = norm[r, 0], norm[r, 1], grad[r] / temperature
        for j in range(size):
            dlogits[r, j] = -slope * _exp((logits[r, j] - top) / temperature - log_total)
        dlogits[r, at[r]] += slope


# -- sampling ----------------------------------------------------------------------------------------------------------
@compiled(f2, d1, float64, i1)
def draw(logits: Any, u: Any, temperature: Any, drawn: Any) -> None:
    """drawn[r]: the first token whose cumulative probability, float64 in index order, reaches u[r] of the whole."""
    rows, size = logits.shape
    summed = np.empty(size, np.float64)
    for r in range(rows):
        top = logits[r, 0]
        for j in range(size):
            top = max(top, logits[r, j])
        for j in range(size):
            summed[j] = _exp64((float64(logits[r, j]) - float64(top)) / temperature)
        for j in range(size - 1):
            summed[j + 1] += summed[j]
        threshold, found = u[r] * summed[size - 1], 0
        for j in range(size):
            found += summed[j] < threshold
        drawn[r] = min(found, size - 1)
