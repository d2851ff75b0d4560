"""Attention written out, for what "sdpa" cannot compute: capped scores, and keys exact to some queries, not to others.

Scores are where(exact, q.k, q.k^) and the output is the weights' exact part times v plus the rest times v^, one stretch
of queries after another, so that long windows fit.

Source: arXiv:2402.02750 Algorithm 1 (products with quantized and with exact tokens); arXiv:2408.00118 (soft cap).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qexp.core.placed import wide

SCORES = 1 << 26  # at most so many at a time: 256 MB of float32


class Seen(NamedTuple):
    """Keys and values [B, A_kv, K, E]; with ``exact``, bool [Q, K] for keys and for values, also the quantized ones."""

    key: Tensor
    value: Tensor
    rounded_key: Tensor
    rounded_value: Tensor
    exact: tuple[Tensor, Tensor] | None


def exactly(key: Tensor, value: Tensor) -> Seen:
    """Return what every query sees alike."""
    return Seen(key, value, key, value, None)


def plain_attention(
    query: Tensor, seen: Seen, mask: Tensor | None, scaling: float | None, softcap: float | None
) -> Tensor:
    """Return attention [B, S, A, E] for q [B, A, S, E]; without a mask it is causal. Scores at least in float32."""
    repeats = query.shape[1] // seen.key.shape[1]
    k, v, rounded_k, rounded_v = (x.repeat_interleave(repeats, 1) for x in seen[:4])
    whole = Seen(k, v, rounded_k, rounded_v, seen.exact)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    mask = _causal(query, k) if mask is None else mask
    B, A, S, _ = query.shape
    step, parts = max(1, SCORES // (B * A * k.shape[-2])), []
    for start in range(0, S, step):
        rows = slice(start, start + step)
        here = whole if whole.exact is None else whole._replace(exact=(whole.exact[0][rows], whole.exact[1][rows]))
        parts.append(_attend(query[:, :, rows], here, mask[..., rows, :], scaling, softcap))
    return torch.cat(parts, dim=-2).transpose(1, 2).contiguous()


def _attend(query: Tensor, seen: Seen, mask: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """Return [B, A, S, E] for some of the queries."""
    scores = wide(query @ seen.key.mT)
    if seen.exact is not None:
        scores = torch.where(seen.exact[0], scores, wide(query @ seen.rounded_key.mT))
    scores = scores * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    lowest = torch.finfo(scores.dtype).min  # finite: a row of padding sees nothing, and must not become NaN
    scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1).to(seen.value.dtype)
    if seen.exact is None:
        return weights @ seen.value
    recent = weights * seen.exact[1]
    return recent @ seen.value + (weights - recent) @ seen.rounded_value


def _causal(query: Tensor, key: Tensor) -> Tensor:
    S, K = query.shape[-2], key.shape[-2]
    return torch.ones(S, K, dtype=torch.bool, device=query.device).tril(K - S)
