"""What speculation can give: expected tokens and cost of a cycle from acceptance and cost ratio alone.

With acceptance a, cost ratio c = t_small / t_base and G drafts a cycle, where a window costs the base as much as one
token:

    E = (1 - a^(G+1)) / (1 - a)          tokens a cycle
    T = G c + c + 1 + a^G c              drafts, anti-expert in one pass, base, the expert where the bonus is reached

Where the pair has no anti-expert its c is missing from T, and from the cost of per-step decoding.

Source: Leviathan et al. 2023, arXiv 2211.17192, theorem 3.8, with the cost of proxy-tuning's cycle.
"""

from __future__ import annotations

__all__ = ["best_num_draft_tokens", "expected_tokens", "speedup_over_base", "speedup_over_per_step"]


def expected_tokens(acceptance: float, num_draft_tokens: int) -> float:
    """E: tokens a cycle, bonus or residual token included."""
    if acceptance >= 1:
        return num_draft_tokens + 1.0
    return (1 - acceptance ** (num_draft_tokens + 1)) / (1 - acceptance)


def _cycle_cost(acceptance: float, cost_ratio: float, num_draft_tokens: int, has_anti_expert: bool) -> float:
    return 1 + cost_ratio * (num_draft_tokens + has_anti_expert + acceptance**num_draft_tokens)


def speedup_over_per_step(
    acceptance: float, cost_ratio: float, num_draft_tokens: int, has_anti_expert: bool = True
) -> float:
    """Tokens a second over those of per-step decoding, which costs 1 + 2 c a token, 1 + c without an anti-expert."""
    tokens = expected_tokens(acceptance, num_draft_tokens)
    per_step = 1 + (1 + has_anti_expert) * cost_ratio
    return tokens * per_step / _cycle_cost(acceptance, cost_ratio, num_draft_tokens, has_anti_expert)


def speedup_over_base(
    acceptance: float, cost_ratio: float, num_draft_tokens: int, has_anti_expert: bool = True
) -> float:
    """Tokens a second over those of the base alone, which costs 1 a token."""
    tokens = expected_tokens(acceptance, num_draft_tokens)
    return tokens / _cycle_cost(acceptance, cost_ratio, num_draft_tokens, has_anti_expert)


def best_num_draft_tokens(acceptance: float, cost_ratio: float, most: int = 16, has_anti_expert: bool = True) -> int:
    """The number of drafts, 0 to `most`, with the largest expected speed."""
    return max(range(most + 1), key=lambda count: speedup_over_base(acceptance, cost_ratio, count, has_anti_expert))
