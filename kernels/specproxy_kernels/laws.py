"""Logit arithmetic and the warp: from raw logits to the law of a token. The torch reference.

    s(v)    = s_base + sum over pairs of alpha * (s_expert - s_anti)         combined logits, promote(float32, inputs)
    z(v)    = penalised s(v) / T
    logp(v) = z(v) - lse   where z(v) >= tau, else -inf

One warp serves the target and the draft law alike. This module knows nothing of acceptance, models or requests, and
never synchronises with the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "LogitPair",
    "WarpParameters",
    "WarpedLaw",
    "combine_logits",
    "pack_allowed_tokens",
    "pair_at",
    "penalised",
    "repeat_rows",
    "take_token",
    "unpack_allowed_tokens",
    "warp_law",
]


class LogitPair(NamedTuple):
    """One expert and anti-expert with their strength.

    Args:
        expert: [B, W, V_expert], floating.
        anti_expert: [B, W, V_anti], floating, or None for a term `alpha * s_expert` alone.
        alpha: [B, W], the strength at each position, of any sign.
    """

    expert: Tensor
    anti_expert: Tensor | None
    alpha: Tensor


@dataclass(frozen=True)
class WarpParameters:
    """The sampling parameters of B rows: allowed tokens, bias, penalties, temperature, top-k, top-p, min-p, in that
    order, which is Hugging Face's.

    Each optional tensor is None where no row uses it. Host integers and flags come from the host's own copy of the
    parameters, so that no operation has to ask the device.

    Args:
        temperature: floating [B]; 0 marks a greedy row.
        top_k: int64 [B]; 0 keeps all. Ties with the k-th value are kept.
        top_p: floating [B]; 1 keeps all. Ties with the last kept value are kept.
        min_p: floating [B]; 0 keeps all.
        repetition_penalty: floating [B]; 1 changes nothing (Keskar et al. 2019, arXiv 1909.05858).
        seen: bool [B, V], tokens of prompt and output so far; needed with `repetition_penalty`.
        frequency_penalty, presence_penalty: floating [B]; taken off for each, and for the first, earlier output of a
            token; given together with `counts` (OpenAI's API reference, "frequency and presence penalties").
        counts: int32 [B, V], how often the output so far holds each token.
        logit_bias: floating [B or 1, V], added to the combined logits.
        allowed: int32 [B or 1, W or 1, ceil(V / 32)], bit v % 32 of word v // 32 allows token v (see
            `pack_allowed_tokens`).
        max_top_k: largest top_k of any row that bounds a list of candidates, or 0 where some row keeps all.
        any_greedy, any_sampling: whether some row is greedy, and whether some row samples.
    """

    temperature: Tensor
    top_k: Tensor | None = None
    top_p: Tensor | None = None
    min_p: Tensor | None = None
    repetition_penalty: Tensor | None = None
    seen: Tensor | None = None
    frequency_penalty: Tensor | None = None
    presence_penalty: Tensor | None = None
    counts: Tensor | None = None
    logit_bias: Tensor | None = None
    allowed: Tensor | None = None
    max_top_k: int = 0
    any_greedy: bool = True
    any_sampling: bool = True

    @property
    def greedy(self) -> Tensor:
        """bool [B], rows of temperature 0."""
        return self.temperature == 0


def take_token(parameters: WarpParameters, token: Tensor, is_taken: Tensor) -> WarpParameters:
    """The parameters behind one more token of the rows' prefixes.

    Args:
        parameters: of B rows; they stay as they are.
        token: int64 [B].
        is_taken: bool [B], whose prefix grows; the others' tokens are not read.
    """
    changed: dict[str, Any] = {}
    index, taken = token[:, None], is_taken[:, None]
    if parameters.seen is not None:
        changed["seen"] = parameters.seen.scatter(1, index, parameters.seen.gather(1, index) | taken)
    if parameters.counts is not None:
        changed["counts"] = parameters.counts.scatter_add(1, index, taken.to(parameters.counts.dtype))
    return replace(parameters, **changed)


def repeat_rows(parameters: WarpParameters, times: int) -> WarpParameters:
    """The parameters of B * times rows, of which every row's `times` copies stand together."""

    def repeated(value: Tensor) -> Tensor:
        return value[:, None].expand(-1, times, *value.shape[1:]).flatten(0, 1)

    shared = [name for name in ("logit_bias", "allowed") if getattr(parameters, name) is not None]
    shared = [name for name in shared if getattr(parameters, name).shape[0] == 1]
    values = {field.name: getattr(parameters, field.name) for field in fields(parameters)}
    changed: dict[str, Any] = {
        name: repeated(value) for name, value in values.items() if isinstance(value, Tensor) and name not in shared
    }
    return replace(parameters, **changed)


class WarpedLaw(NamedTuple):
    """A law after warping: logits [B, W, V] with filter threshold and log-sum-exp of the kept logits, each [B, W]."""

    z: Tensor
    tau: Tensor | None
    lse: Tensor

    def kept(self) -> Tensor:
        """Logits [B, W, V] with the filtered ones at -inf."""
        return self.z if self.tau is None else self.z.masked_fill(self.z < self.tau[..., None], -inf)

    def log_prob(self) -> Tensor:
        """Log-probabilities [B, W, V]."""
        return self.kept() - self.lse[..., None]

    def log_prob_of(self, tokens: Tensor) -> Tensor:
        """Log-probabilities [B, W] of int64 tokens [B, W]."""
        z = self.z.gather(-1, tokens[..., None])[..., 0]
        log_prob = z - self.lse
        return log_prob if self.tau is None else log_prob.masked_fill(z < self.tau, -inf)


def pair_at(pair: LogitPair, positions: slice) -> LogitPair:
    """A pair's logits and strengths at some window positions (views)."""
    anti_expert = None if pair.anti_expert is None else pair.anti_expert[:, positions]
    return LogitPair(pair.expert[:, positions], anti_expert, pair.alpha[:, positions])


def combine_logits(
    base: Tensor, pairs: Sequence[LogitPair], vocab_size: int, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Combined logits s = s_base + sum alpha * (s_expert - s_anti) over the shared vocabulary.

    Args:
        base: [B, W, V_base], floating; any strides, V_base >= vocab_size.
        pairs: expert and anti-expert logits with their strengths.
        vocab_size: V; wider logits are cut.
        allowed: int32 words [B or 1, W or 1, ceil(V / 32)] as in `WarpParameters`; other tokens become -inf. Where
            Python sees no logits, the decode loop leaves it to the warp, which masks drafts alike.

    Returns:
        s: [B, W, V] in promote(float32, inputs); -inf where the base or an expert is -inf, whatever alpha: there a
            mask is meant, and alpha * -inf would be NaN at 0 and +inf below.
        bad: bool [B, W], rows with NaN or +inf, or with an infinite anti-expert alone; their s is not usable.
            Ids that the base or an expert masks with -inf are not inspected.

    Source: Liu et al. 2024, arXiv 2401.08565, section 2.
    """
    base = base[..., :vocab_size]
    dtype = torch.promote_types(base.dtype, torch.float32)
    for pair in pairs:
        dtype = torch.promote_types(dtype, pair.expert.dtype)
        if pair.anti_expert is not None:
            dtype = torch.promote_types(dtype, pair.anti_expert.dtype)
    combined = base.to(dtype)
    masked = base == -inf
    for pair in pairs:
        expert = pair.expert[..., :vocab_size].to(dtype)
        masked = masked | (expert == -inf)
        difference = expert if pair.anti_expert is None else expert - pair.anti_expert[..., :vocab_size].to(dtype)
        # Infinities that the expert's mask does not explain become NaN, so that no alpha (0, negative) can hide them.
        difference = difference.masked_fill(difference.isinf(), torch.nan)
        combined = combined + pair.alpha.to(dtype)[..., None] * difference
    combined = combined.masked_fill(masked, -inf)
    bad = ~(combined < inf).all(dim=-1)
    if allowed is not None:
        combined = combined.masked_fill(~unpack_allowed_tokens(allowed, vocab_size), -inf)
    return combined, bad


def pack_allowed_tokens(allowed: Tensor) -> Tensor:
    """Pack bool [..., V] into the int32 bit words [..., ceil(V / 32)] of `WarpParameters.allowed`."""
    vocab_size = allowed.shape[-1]
    words = torch.nn.functional.pad(allowed, (0, -vocab_size % 32)).unflatten(-1, (-1, 32)).long()
    packed = (words << torch.arange(32, device=allowed.device)).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def unpack_allowed_tokens(words: Tensor, vocab_size: int) -> Tensor:
    """Inverse of `pack_allowed_tokens`: bool [..., V] from int32 words."""
    bits = (words[..., None] >> torch.arange(32, device=words.device, dtype=torch.int32)) & 1
    return bits.flatten(-2)[..., :vocab_size].bool()


def _draft_at(drafts: Tensor, j: int, window: int) -> Tensor:
    """int64 [B, W, 1]: the j-th draft of every position's prefix, from `drafts` as in `warp_law`."""
    return drafts[:, j, None, None].expand(-1, window, 1) if drafts.ndim == 2 else drafts[:, :, j, None]


def _seen_at(seen: Tensor, drafts: Tensor, position: Tensor) -> Tensor:
    """bool [B, W, V]: tokens of the prefix at each window position, which holds the drafts before that position."""
    window = seen[:, None].expand(-1, position.shape[1], -1).clone()
    for j in range(drafts.shape[-1]):
        token = _draft_at(drafts, j, position.shape[1])
        window.scatter_(-1, token, window.gather(-1, token) | (position > j)[..., None])
    return window


def _counts_at(counts: Tensor, drafts: Tensor, position: Tensor) -> Tensor:
    """[B, W, V] in the dtype of `counts`: outputs of each token before each window position."""
    window = counts[:, None].expand(-1, position.shape[1], -1).clone()
    for j in range(drafts.shape[-1]):
        token = _draft_at(drafts, j, position.shape[1])
        window.scatter_add_(-1, token, (position > j)[..., None].to(window.dtype))
    return window


def penalised(logits: Tensor, parameters: WarpParameters, drafts: Tensor, position: Tensor) -> Tensor:
    """The warp without its filters: allowed tokens, penalties with each position's own prefix, temperature.

    Args:
        logits, parameters, drafts, position: as in `warp_law`.

    Returns:
        z, [B, W, V] in the dtype of `logits`: elementwise, so that equal inputs give equal bits.
    """
    if parameters.allowed is not None:
        words = parameters.allowed
        if words.shape[1] > 1:
            rows = torch.arange(position.shape[0], device=position.device)[:, None]
            words = words.expand(position.shape[0], -1, -1)[rows, position]
        logits = logits.masked_fill(~unpack_allowed_tokens(words, logits.shape[-1]), -inf)
    if parameters.logit_bias is not None:
        logits = logits + parameters.logit_bias.to(logits.dtype)[:, None]
    if parameters.repetition_penalty is not None:
        assert parameters.seen is not None, "a repetition penalty needs the tokens seen so far"
        penalty = parameters.repetition_penalty.to(logits.dtype)[:, None, None]
        penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
        logits = torch.where(_seen_at(parameters.seen, drafts, position), penalised, logits)
    if parameters.counts is not None:
        frequency, presence = parameters.frequency_penalty, parameters.presence_penalty
        assert frequency is not None and presence is not None, "counts go with both penalties"
        counts = _counts_at(parameters.counts, drafts, position)
        logits = logits - frequency.to(logits.dtype)[:, None, None] * counts
        logits = logits - torch.where(counts > 0, presence.to(logits.dtype)[:, None, None], 0)
    if parameters.any_sampling:
        temperature = parameters.temperature
        if parameters.any_greedy:
            temperature = torch.where(parameters.greedy, 1.0, temperature)
        logits = logits / temperature.to(logits.dtype)[:, None, None]
    return logits


def _filter_threshold(z: Tensor, parameters: WarpParameters) -> Tensor | None:
    """tau [B, W], the smallest kept logit, or None where no row filters."""
    tau: Tensor | None = None
    vocab_size = z.shape[-1]
    bounded = 0 < parameters.max_top_k < vocab_size
    candidates = None
    if parameters.top_k is not None or parameters.top_p is not None:
        candidates = z.topk(parameters.max_top_k if bounded else vocab_size, dim=-1).values
    if parameters.top_k is not None and candidates is not None:
        count = candidates.shape[-1]
        index = torch.where(parameters.top_k > 0, parameters.top_k.clamp(max=count), count) - 1
        index = index[:, None, None].expand(-1, z.shape[1], 1)
        tau = candidates.gather(-1, index)[..., 0].masked_fill((parameters.top_k == 0)[:, None], -inf)
    if parameters.top_p is not None and candidates is not None:
        # A value is kept while the mass strictly above it is below p: ties stand or fall together. The total counts
        # ties with the k-th value too, which the list of candidates may not hold.
        kept = z if tau is None else z.masked_fill(z < tau[..., None], -inf)
        mass = (candidates - kept.logsumexp(-1, keepdim=True)).exp()
        if tau is not None:
            mass = mass.masked_fill(candidates < tau[..., None], 0)
        above = mass.cumsum(-1) - mass
        top_p = parameters.top_p.to(z.dtype)[:, None, None]
        inside = (above < top_p) & (mass > 0)
        inside[..., 0] = True
        threshold = candidates.masked_fill(~inside, inf).amin(-1)
        threshold = threshold.masked_fill((parameters.top_p >= 1)[:, None], -inf)
        tau = threshold if tau is None else torch.maximum(tau, threshold)
    if parameters.min_p is not None:
        threshold = z.amax(-1) + parameters.min_p.to(z.dtype).log()[:, None]
        tau = threshold if tau is None else torch.maximum(tau, threshold)
    return tau


def warp_law(logits: Tensor, parameters: WarpParameters, drafts: Tensor, position: Tensor) -> WarpedLaw:
    """The one warp, for p and q alike: penalties, temperature, filters, with the prefix that belongs to each position.

    Args:
        logits: [B, W, V], floating, at least float32.
        parameters: of the B rows.
        drafts: int64 [B, G], the cycle's drafted tokens so far; [B, W, G] where every column has a prefix of its own.
        position: int64 [B, W], window position of each column: the prefix holds the drafts before it.

    Returns:
        The warped law of every position.
    """
    z = penalised(logits, parameters, drafts, position)
    if not parameters.any_sampling:
        return WarpedLaw(z, None, z.amax(-1))
    tau = _filter_threshold(z, parameters)
    kept = z if tau is None else z.masked_fill(z < tau[..., None], -inf)
    return WarpedLaw(z, tau, kept.logsumexp(-1))
