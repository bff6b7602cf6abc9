"""The operations written a second time in NumPy: one row, one position, float64, from the formulas alone.

Nothing here imports torch or specproxy_kernels. `Warped.margin` says how close a kept or dropped value lies to the
boundary of a filter; where it is small, rounding decides and a comparison means nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

INF = float("inf")


@dataclass(frozen=True)
class Warped:
    """Scaled logits z, the kept set and log-probabilities, each [V]."""

    z: np.ndarray
    kept: np.ndarray
    log_prob: np.ndarray
    margin: float

    @property
    def prob(self) -> np.ndarray:
        return np.exp(self.log_prob)


def combine(
    base: np.ndarray, pairs: Sequence[tuple[np.ndarray, np.ndarray | None, float]], vocab_size: int
) -> tuple[np.ndarray, bool]:
    """base + sum alpha * (expert - anti_expert) for one position, and whether the position is unusable."""
    out = np.empty(vocab_size)
    bad = False
    for v in range(vocab_size):
        value = float(base[v])
        masked = value == -INF
        for expert, anti_expert, alpha in pairs:
            up, down = float(expert[v]), 0.0 if anti_expert is None else float(anti_expert[v])
            masked |= up == -INF
            value += alpha * (up - down) if np.isfinite(up - down) else np.nan
        out[v] = -INF if masked else value
        bad |= not out[v] < INF
    return out, bad


def log_sum_exp(values: np.ndarray) -> float:
    top = values.max()
    return float(top) if top == -INF else float(top + np.log(np.exp(values - top).sum()))


def warp(
    scores: np.ndarray,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seen: Collection[int] = (),
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    output: Sequence[int] = (),
    allowed: np.ndarray | None = None,
) -> Warped:
    """Penalties, temperature, top-k, top-p, min-p, in this order; ties at a boundary are kept."""
    z = np.array(scores, dtype=np.float64)
    if allowed is not None:
        z[~allowed] = -INF
    for token in set(seen):
        z[token] = z[token] * repetition_penalty if z[token] < 0 else z[token] / repetition_penalty
    for token in set(output):
        z[token] -= presence_penalty + frequency_penalty * list(output).count(token)
    if temperature > 0:
        z = z / temperature
    kept = z > -INF
    margin = INF
    if temperature > 0:
        if top_k > 0:
            kth = sorted(z, reverse=True)[min(top_k, len(z)) - 1]
            kept &= z >= kth
        if top_p < 1:
            prob = np.where(kept, np.exp(z - log_sum_exp(np.where(kept, z, -INF))), 0.0)
            keep = np.zeros_like(kept)
            for v in np.flatnonzero(kept):
                above = prob[z > z[v]].sum()
                keep[v] = above < top_p or z[v] == z.max()
                if z[v] != z.max():
                    margin = min(margin, abs(above - top_p))
            kept = keep
        if min_p > 0:
            threshold = z.max() + np.log(min_p)
            near = np.abs(z[np.isfinite(z) & (z < z.max())] - threshold)
            margin = min(margin, near.min(initial=INF))
            kept &= (z >= threshold) | (z == z.max())
    z_kept = np.where(kept, z, -INF)
    with np.errstate(invalid="ignore"):
        log_prob = z_kept - log_sum_exp(z_kept)
    return Warped(z, kept, log_prob, float(margin))


def residual(target: np.ndarray, draft: np.ndarray) -> np.ndarray:
    """(target - draft)+ of probabilities."""
    return np.maximum(target - draft, 0.0)


def verify(
    rule: str,
    targets: Sequence[np.ndarray],
    drafts: Sequence[int],
    draft_laws: Sequence[np.ndarray],
    coins: Sequence[float],
) -> tuple[int, np.ndarray, float]:
    """One row of `rejection` or `block`: drafts kept, unnormalised law of the next token, distance of a coin to its
    threshold.

    `targets` are the G + 1 laws p, `draft_laws` the G laws q (one-hot for certain drafts); all probabilities [V].
    """
    count = len(drafts)
    ratio = [targets[i][drafts[i]] / draft_laws[i][drafts[i]] for i in range(count)]
    if rule == "rejection":
        threshold = [min(1.0, r) for r in ratio]
        margin = min([abs(u - t) for u, t in zip(coins, threshold, strict=False)], default=INF)
        kept = next((i for i in range(count) if not coins[i] < threshold[i]), count)
        weight = 1.0
    else:
        weights = [1.0]
        for r in ratio:
            weights.append(min(1.0, weights[-1] * r))
        threshold = []
        for i in range(1, count + 1):
            if i == count:
                threshold.append(weights[i])
                continue
            mass = residual(weights[i] * targets[i], draft_laws[i]).sum()
            rest = mass + 1 - weights[i]
            threshold.append(mass / rest if rest > 0 else 1.0)
        margin = min([abs(u - t) for u, t in zip(coins, threshold, strict=False)], default=INF)
        kept = max([i + 1 for i in range(count) if coins[i] < threshold[i]], default=0)
        weight = weights[kept]
    if kept == count:
        return kept, targets[count], margin
    return kept, residual(weight * targets[kept], draft_laws[kept]), margin
