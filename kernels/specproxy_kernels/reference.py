"""The torch reference of the logit arithmetic, the acceptance rules and the token draws: oracle and CPU path.

Notation (B rows, W window positions, G = W - 1 drafts, V shared vocabulary):

    s(v)    = s_base + sum over pairs of alpha * (s_expert - s_anti)         combined logits, promote(float32, input)
    z(v)    = penalised s(v) / T
    logp(v) = z(v) - lse   where z(v) >= tau, else -inf        the target law p
    logq(v)                                                    the draft law q: the drafter's logits, same warp

Glossary
    target      the proxy-tuned law p, never the base model.
    draft       a proposed token, drawn from q (or certain: q one-hot).
    residual    the normalised (w * p - q)+, drawn from where a draft was refused (w = 1 except under `block`).
    bonus       the token drawn from p after every draft survived.
    next token  residual or bonus token: the one token of a cycle that no drafter proposed.

Rules: `rejection` (Leviathan et al. 2023, arXiv 2211.17192), `block` (Sun et al. 2024, arXiv 2403.10444), `coupled`
(Daliri et al. 2024, arXiv 2408.07978). A row of temperature 0 is greedy: under any rule a draft survives while it
equals the target's argmax.

This module knows nothing of models, caches or requests, and never synchronises with the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from specproxy_kernels.laws import LogitPair, WarpedLaw, WarpParameters, combine_logits, pair_at, penalised, warp_law
from specproxy_kernels.noise import PURPOSE_RESIDUAL, PURPOSE_TOKEN, coin_noise, gumbel_noise, window_noise

__all__ = [
    "RULES",
    "STATUS_EMPTY_RESIDUAL",
    "STATUS_EMPTY_SUPPORT",
    "STATUS_NON_FINITE",
    "Acceptance",
    "DraftLaw",
    "NoiseStream",
    "accept_drafts",
    "accept_window",
    "block_acceptance",
    "emit_next_token",
    "residual_log_weights",
    "sample_candidates",
    "sample_drafts",
    "sample_next_token",
    "verify_window",
]

RULES = ("rejection", "block", "coupled")

STATUS_NON_FINITE = 1  # NaN or +inf in the combined logits, or the anti-expert alone at -inf
STATUS_EMPTY_SUPPORT = 2  # no token is left to draw
STATUS_EMPTY_RESIDUAL = 4  # a refused draft left no residual mass (rounding): drawn from p; not an error


class DraftLaw(NamedTuple):
    """What the drafts were drawn from: raw drafter logits [B, G, V_draft], and descriptors kept at the draw, [B, G]."""

    logits: Tensor
    tau: Tensor | None
    lse: Tensor


class NoiseStream:
    """Where a cycle's noise comes from.

    Token noise is kept once drawn: the drafter draws a whole window's at once, and `coupled` verification reads the
    same.

    Args:
        key: int64 [B], row keys.
        start: int64 [B], index of the window's first token among the row's generated tokens.
        block_start: int64 [B], equal to `start`, under `block`; None under the other rules.
    """

    def __init__(self, key: Tensor, start: Tensor, block_start: Tensor | None = None) -> None:
        self.key, self.start, self.block_start = key, start, block_start
        self._drawn: Tensor | None = None
        self._coins: Tensor | None = None
        self._expected = 1

    def expect(self, count: int) -> None:
        """Announce how many window positions will be asked for, so that the first call draws them together."""
        self._expected = count

    def tokens(self, count: int, vocab_size: int) -> Tensor:
        """Gumbel noise float32 [B, count, V] of the token purpose at window positions 0 .. count - 1."""
        if self._drawn is None or self._drawn.shape[1] < count:
            index = self._index(max(count, self._expected))
            self._drawn, self._coins = window_noise(self.key, index, vocab_size, self.block_start)
        return self._drawn[:, :count]

    def next_token(self, num_accepted: Tensor, rule: str, window: int, vocab_size: int) -> Tensor:
        """Gumbel noise float32 [B, V] for the token after `num_accepted` [B] drafts of `window` - 1."""
        if rule == "coupled" and self._drawn is not None and self._drawn.shape[1] >= window:
            return _row_at(self._drawn, num_accepted)[:, 0]
        purpose = PURPOSE_TOKEN if rule == "coupled" else PURPOSE_RESIDUAL
        index = (self.start + num_accepted)[:, None]
        return gumbel_noise(self.key, index, purpose, vocab_size, self.block_start)[:, 0]

    def coins(self, count: int) -> Tensor:
        """Coins float32 [B, count]."""
        if self._coins is not None and self._coins.shape[1] >= count:
            return self._coins[:, :count]
        return coin_noise(self.key, self._index(count), self.block_start)

    def at(self, position: Tensor, most: int) -> NoiseStream:
        """The noise of window positions of which none is beyond `most`, int64 [B], each as a window of its own."""
        there = NoiseStream(self.key, self.start + position, self.block_start)
        if self._drawn is not None and self._drawn.shape[1] > most:
            there._drawn = _row_at(self._drawn, position)
        return there

    def _index(self, count: int) -> Tensor:
        return self.start[:, None] + torch.arange(count, device=self.start.device)


class Acceptance(NamedTuple):
    """The outcome of a window of drafts.

    Args:
        num_accepted: int64 [B], leading drafts that survive.
        log_weight: [B], log of the weight w of the residual at the first refused position; 0 except under `block`.
        is_bonus: bool [B], whether every draft survived.
    """

    num_accepted: Tensor
    log_weight: Tensor
    is_bonus: Tensor


def _race(scores: Tensor, noise: Tensor, greedy: Tensor | None) -> Tensor:
    """First argmax [B, W] of scores + Gumbel noise: a draw from softmax(scores); of the scores alone where greedy."""
    if greedy is not None:
        noise = noise.masked_fill(greedy.view(-1, *[1] * (noise.ndim - 1)), 0)
    # In float64 the sum keeps all digits of the noise, however small the temperature.
    return (scores.double() + noise).argmax(-1)


def sample_drafts(
    logits: Tensor,
    parameters: WarpParameters,
    drafts: Tensor,
    noise: NoiseStream,
    vocab_size: int,
) -> tuple[Tensor, DraftLaw]:
    """Draw one draft per row and keep the descriptor of its law.

    Args:
        logits: [B, 1, V_draft], the drafter's logits at window position i.
        parameters: of the B rows.
        drafts: int64 [B, i], drafts before this position.
        noise: of the cycle; the draw takes the token purpose at position i.
        vocab_size: V; wider logits are cut.

    Returns:
        tokens: int64 [B, 1].
        law: with which `accept_drafts` scores them; the logits are kept, not copied.
    """
    batch, i = drafts.shape
    position = torch.full((batch, 1), i, dtype=torch.long, device=drafts.device)
    cut = logits[..., :vocab_size]
    law = warp_law(cut.to(torch.promote_types(cut.dtype, torch.float32)), parameters, drafts, position)
    if not parameters.any_sampling:
        tokens = law.z.argmax(-1)
    else:
        gumbel = noise.tokens(i + 1, vocab_size)[:, i:]
        tokens = _race(law.kept(), gumbel, parameters.greedy if parameters.any_greedy else None)
    return tokens, DraftLaw(logits, law.tau, law.lse)


def _restore(law: DraftLaw, parameters: WarpParameters, drafts: Tensor, position: Tensor, vocab_size: int) -> WarpedLaw:
    """The draft law as drawn from: the same elementwise warp on the same logits, with the kept descriptors."""
    logits = law.logits[..., :vocab_size]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return WarpedLaw(penalised(logits, parameters, drafts, position), law.tau, law.lse)


def _leading(survives: Tensor) -> Tensor:
    """Length [B] of the leading run of True in [B, G]."""
    return survives.long().cumprod(-1).sum(-1)


def sample_candidates(
    logits: Tensor,
    parameters: WarpParameters,
    drafts: Tensor,
    noise: NoiseStream,
    vocab_size: int,
    count: int,
) -> Tensor:
    """The best guesses of each node of a tree's level: largest warped logits + noise, of the logits alone where greedy.

    All nodes race with the noise of their depth. The first candidate is the draft that `sample_drafts` would draw; all
    of them are a draw without replacement from the drafter's law (Kool et al. 2019, arXiv 1903.06059, section 2.3).

    Args:
        logits: [B, n, V_draft], the drafter's logits at n nodes of one depth d.
        parameters: of the B rows.
        drafts: int64 [B, n, d], the drafts before each node.
        noise: of the cycle; the draw takes the token purpose at position d.
        vocab_size: V; wider logits are cut.
        count: k, candidates of each node.

    Returns:
        int64 [B, n, k], the best first; ids of no probability where fewer have one.
    """
    batch, nodes, depth = drafts.shape
    cut = logits[..., :vocab_size]
    position = torch.full((batch, nodes), depth, dtype=torch.long, device=drafts.device)
    law = warp_law(cut.to(torch.promote_types(cut.dtype, torch.float32)), parameters, drafts, position)
    scores = law.kept().double()
    if parameters.any_sampling:
        gumbel = noise.tokens(depth + 1, vocab_size)[:, depth, None]
        scores = scores + (gumbel.masked_fill(parameters.greedy[:, None, None], 0) if parameters.any_greedy else gumbel)
    return scores.topk(count, dim=-1).indices


def residual_log_weights(target: Tensor, draft: Tensor) -> Tensor:
    """log (exp(target) - exp(draft))+, elementwise, from log-weights; -inf where the draft is at least the target."""
    positive = draft < target
    difference = torch.where(positive, draft - target, -inf)
    return (target + torch.log1p(-difference.exp())).masked_fill(~positive, -inf)


def block_acceptance(
    log_ratio: Tensor, log_target: Tensor, log_draft: Tensor, num_drafts: Tensor
) -> tuple[Tensor, Tensor]:
    """Acceptance probabilities of block verification.

    P_0 = 1, P_i = min(1, P_{i-1} p(x_i) / q(x_i)); R_i = sum over v of (P_i p_{i+1}(v) - q_{i+1}(v))+;
    h_i = R_i / (R_i + 1 - P_i) for i below the number of drafts G (1 where the denominator vanishes), h_G = P_G.

    Args:
        log_ratio: [B, G], log p - log q at each draft.
        log_target: [B, G, V], log p at each drafted position.
        log_draft: [B, G, V], log q at each drafted position.
        num_drafts: int64 [B], drafts of each row; later columns are ignored.

    Returns:
        h: [B, G], probability that the block up to and including draft i + 1 is kept, column i.
        log_weight: [B, G + 1], log P_i.

    Source: Sun et al. 2024, arXiv 2403.10444, algorithm 2.
    """
    batch, count = log_ratio.shape
    weights = [log_ratio.new_zeros(batch)]
    for i in range(count):
        weights.append((weights[-1] + log_ratio[:, i]).clamp(max=0))
    log_weight = torch.stack(weights, dim=1)
    mass = residual_log_weights(log_target + log_weight[:, :count, None], log_draft).exp().sum(-1)
    inner_mass = torch.nn.functional.pad(mass[:, 1:], (0, 1))
    weight = log_weight[:, 1:].exp()
    denominator = inner_mass + 1 - weight
    inner = torch.where(denominator > 0, inner_mass / denominator, 1.0)
    is_last = torch.arange(1, count + 1, device=log_ratio.device) == num_drafts[:, None]
    return torch.where(is_last, weight, inner), log_weight


def accept_drafts(
    rule: str,
    target: WarpedLaw,
    drafts: Tensor,
    num_drafts: Tensor,
    draft_law: DraftLaw | None,
    parameters: WarpParameters,
    coins: Tensor | None,
    token_noise: Tensor | None,
) -> Acceptance:
    """How many leading drafts survive.

    Args:
        rule: one of `RULES`; greedy rows use equality under each of them.
        target: the target law at the G drafted positions.
        drafts: int64 [B, G].
        num_drafts: int64 [B], drafts of each row, at most G; later columns are ignored.
        draft_law: what the drafts were drawn from; None where they are certain (one-hot).
        parameters: of the B rows.
        coins: float32 [B, G], uniform in [0, 1); needed by `rejection` and `block`.
        token_noise: float32 [B, G, V], the noise of the token purpose; needed by `coupled`.

    Returns:
        The acceptance of every row.
    """
    batch, count = drafts.shape
    column = torch.arange(count, device=drafts.device)
    live = column < num_drafts[:, None]
    log_weight = torch.zeros(batch, dtype=target.z.dtype, device=drafts.device)
    if count == 0:
        return Acceptance(torch.zeros_like(num_drafts), log_weight, torch.ones_like(live.any(-1)))
    greedy = parameters.greedy if parameters.any_greedy else None
    num_accepted = None
    if parameters.any_greedy or rule == "coupled":
        if not parameters.any_sampling:
            tokens = target.z.argmax(-1)
        elif rule == "coupled":
            assert token_noise is not None, "the coupled rule needs the drafts' noise"
            tokens = _race(target.kept(), token_noise, greedy)
        else:
            tokens = target.kept().argmax(-1)
        num_accepted = _leading((tokens == drafts) & live)
    if parameters.any_sampling and rule != "coupled":
        assert coins is not None, f"the {rule} rule needs coins"
        log_target = target.log_prob_of(drafts)
        position = column.expand(batch, -1)
        vocab_size = target.z.shape[-1]
        if draft_law is None:
            law = None
            log_draft = torch.zeros_like(log_target)
        else:
            law = _restore(draft_law, parameters, drafts, position, vocab_size)
            log_draft = law.log_prob_of(drafts)
        log_ratio = log_target - log_draft
        if rule == "rejection":
            sampled = _leading((coins < log_ratio.clamp(max=0).exp()) & live)
        else:
            full_draft = _one_hot_log(drafts, vocab_size, target.z.dtype) if law is None else law.log_prob()
            keep_probability, log_weights = block_acceptance(log_ratio, target.log_prob(), full_draft, num_drafts)
            kept = (coins < keep_probability) & live
            sampled = ((column + 1) * kept).amax(-1)
            log_weight = log_weights.gather(1, sampled[:, None])[:, 0]
        if greedy is None or num_accepted is None:
            num_accepted = sampled
        else:
            num_accepted = torch.where(greedy, num_accepted, sampled)
            log_weight = log_weight.masked_fill(greedy, 0)
    assert num_accepted is not None
    return Acceptance(num_accepted, log_weight, num_accepted == num_drafts)


def _one_hot_log(tokens: Tensor, vocab_size: int, dtype: torch.dtype) -> Tensor:
    log_prob = torch.full((*tokens.shape, vocab_size), -inf, dtype=dtype, device=tokens.device)
    return log_prob.scatter_(-1, tokens[..., None], 0.0)


def sample_next_token(
    rule: str,
    target: WarpedLaw,
    acceptance: Acceptance,
    drafts: Tensor,
    draft_law: DraftLaw | None,
    parameters: WarpParameters,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Draw each row's next token: from the residual at the first refused draft, from the target after the last one.

    Args:
        rule: as in `accept_drafts`.
        target: the target law at position `num_accepted` of each row, [B, 1, V].
        acceptance: from `accept_drafts`.
        drafts: int64 [B, G].
        draft_law: as in `accept_drafts`.
        parameters: of the B rows.
        noise: float32 [B, V]; may be None where every row is greedy.

    Returns:
        next_token: int64 [B].
        status: int32 [B], `STATUS_EMPTY_RESIDUAL` or 0.
    """
    scores = target.kept()[:, 0]
    status = torch.zeros(drafts.shape[0], dtype=torch.int32, device=drafts.device)
    if not parameters.any_sampling:
        return scores.argmax(-1), status
    assert noise is not None, "sampling needs noise"
    greedy = parameters.greedy if parameters.any_greedy else None
    if rule != "coupled" and drafts.shape[1] > 0:
        log_target = target.log_prob()[:, 0]
        refused = acceptance.num_accepted.clamp(max=drafts.shape[1] - 1)[:, None]
        if draft_law is None:
            log_draft = _one_hot_log(drafts.gather(1, refused)[:, 0], scores.shape[-1], scores.dtype)
        else:
            row = DraftLaw(
                draft_law.logits.gather(1, refused[..., None].expand(-1, -1, draft_law.logits.shape[-1])),
                None if draft_law.tau is None else draft_law.tau.gather(1, refused),
                draft_law.lse.gather(1, refused),
            )
            log_draft = _restore(row, parameters, drafts, refused, scores.shape[-1]).log_prob()[:, 0]
        residual = residual_log_weights(log_target + acceptance.log_weight[:, None], log_draft)
        from_target = acceptance.is_bonus if greedy is None else acceptance.is_bonus | greedy
        empty = (residual == -inf).all(-1) & ~from_target
        status = empty.to(torch.int32) * STATUS_EMPTY_RESIDUAL
        scores = torch.where((from_target | empty)[:, None], scores, residual)
    return _race(scores, noise, greedy), status


def _target_law(
    base: Tensor,
    pairs: Sequence[LogitPair],
    parameters: WarpParameters,
    drafts: Tensor,
    position: Tensor,
    vocab_size: int,
) -> tuple[WarpedLaw, Tensor]:
    """The target law at given window positions, and what is wrong with it (int32 [B, W] of status bits)."""
    combined, bad = combine_logits(base, pairs, vocab_size)
    law = warp_law(combined, parameters, drafts, position)
    # The warp itself can overflow (a tiny temperature or penalty), which the sum of its exponentials shows.
    bad = bad | ~(law.lse < inf)
    empty = law.lse == -inf
    status = torch.where(bad, STATUS_NON_FINITE, torch.where(empty, STATUS_EMPTY_SUPPORT, 0)).to(torch.int32)
    return law, status


def accept_window(
    rule: str,
    base: Tensor,
    pairs: Sequence[LogitPair],
    drafts: Tensor,
    num_drafts: Tensor,
    draft_law: DraftLaw | None,
    parameters: WarpParameters,
    noise: NoiseStream,
    vocab_size: int,
) -> Acceptance:
    """First half of `verify_window`: logit arithmetic and acceptance at the G drafted positions.

    It needs no logits at the bonus position, so that a caller may compute those only where every draft survived. A
    draft at a position whose law is not usable (status bits) counts as refused, which leaves that position to
    `emit_next_token`.

    Args:
        base: [B, >= G, V_base]; later positions are ignored, here and in `pairs`.
        others: as in `verify_window`.

    Returns:
        The acceptance of every row.
    """
    batch, count = drafts.shape
    if count == 0:
        nothing = torch.zeros_like(num_drafts)
        return Acceptance(nothing, torch.zeros(batch, device=drafts.device), nothing == 0)
    position = torch.arange(count, device=drafts.device).expand(batch, -1)
    at_drafts = [pair_at(pair, slice(0, count)) for pair in pairs]
    law, status = _target_law(base[:, :count], at_drafts, parameters, drafts, position, vocab_size)
    samples = parameters.any_sampling
    coins = noise.coins(count) if samples and rule != "coupled" else None
    token_noise = noise.tokens(count, vocab_size) if samples and rule == "coupled" else None
    usable = torch.minimum(num_drafts, _leading(status == 0))
    acceptance = accept_drafts(rule, law, drafts, usable, draft_law, parameters, coins, token_noise)
    return acceptance._replace(is_bonus=acceptance.num_accepted == num_drafts)


def _row_at(logits: Tensor, row: Tensor) -> Tensor:
    return logits.gather(1, row[:, None, None].expand(-1, 1, logits.shape[-1]))


def emit_next_token(
    rule: str,
    base: Tensor,
    pairs: Sequence[LogitPair],
    drafts: Tensor,
    acceptance: Acceptance,
    draft_law: DraftLaw | None,
    parameters: WarpParameters,
    noise: NoiseStream,
    vocab_size: int,
) -> tuple[Tensor, Tensor]:
    """Second half of `verify_window`: each row's next token, drawn at position `num_accepted`.

    Args:
        base: [B, W, V_base]; only position `num_accepted` of each row is read, here and in `pairs`.
        acceptance: from `accept_window`.
        others: as in `verify_window`.

    Returns:
        next_token int64 [B] and status int32 [B], as in `verify_window`.
    """
    row = acceptance.num_accepted
    at_next = [
        LogitPair(
            _row_at(pair.expert, row),
            None if pair.anti_expert is None else _row_at(pair.anti_expert, row),
            pair.alpha.gather(1, row[:, None]),
        )
        for pair in pairs
    ]
    law, law_status = _target_law(_row_at(base, row), at_next, parameters, drafts, row[:, None], vocab_size)
    next_noise = noise.next_token(row, rule, drafts.shape[1] + 1, vocab_size) if parameters.any_sampling else None
    next_token, status = sample_next_token(rule, law, acceptance, drafts, draft_law, parameters, next_noise)
    return next_token, status | law_status[:, 0]


def verify_window(
    rule: str,
    base: Tensor,
    pairs: Sequence[LogitPair],
    drafts: Tensor,
    num_drafts: Tensor,
    draft_law: DraftLaw | None,
    parameters: WarpParameters,
    noise: NoiseStream,
    vocab_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logit arithmetic, acceptance and the next token of a whole window, from raw logits at all W positions.

    Args:
        rule: one of `RULES`.
        base: [B, W, V_base].
        pairs: expert and anti-expert logits at the same W positions, alpha [B, W].
        drafts: int64 [B, W - 1].
        num_drafts: int64 [B], at most W - 1.
        draft_law: what the drafts were drawn from, or None where they are certain.
        parameters: of the B rows.
        noise: keys and positions of the cycle.
        vocab_size: V, the shared vocabulary.

    Returns:
        num_accepted: int64 [B].
        next_token: int64 [B], a safe id (below V) where the status reports an error.
        status: int32 [B], bits `STATUS_*` of the law that the next token was drawn from.
    """
    acceptance = accept_window(rule, base, pairs, drafts, num_drafts, draft_law, parameters, noise, vocab_size)
    next_token, status = emit_next_token(
        rule, base, pairs, drafts, acceptance, draft_law, parameters, noise, vocab_size
    )
    return acceptance.num_accepted, next_token, status
