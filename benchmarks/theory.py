"""What speculation should gain at costs as measured; `specproxy.theory` holds the formulas for windows that are free.

All costs are in units of one base forward over one token. Knows nothing of models.
"""

from __future__ import annotations

from dataclasses import dataclass

from specproxy.theory import expected_tokens

__all__ = ["Costs", "acceptance_probability", "speed_up"]


@dataclass(frozen=True)
class Costs:
    """Costs in units of one base forward over one token.

    Args:
        small: c, one step of the expert, and of the anti-expert where it steps.
        base_window: the base over a window; 1 where a window is as cheap as a token.
        anti_expert_window: the anti-expert over a window; None for c.
        rows: rows that run together; the bonus step runs where any of them reaches it.
    """

    small: float
    base_window: float = 1.0
    anti_expert_window: float | None = None
    rows: int = 1

    def per_cycle(self, a: float, num_drafts: float) -> float:
        """Cost of a cycle of G drafts: G c + anti-expert + base + P(bonus) c."""
        anti_expert = self.small if self.anti_expert_window is None else self.anti_expert_window
        bonus = 1 - (1 - a**num_drafts) ** self.rows
        return num_drafts * self.small + anti_expert + self.base_window + bonus * self.small


def speed_up(a: float, num_drafts: float, costs: Costs) -> tuple[float, float]:
    """Expected speed over per-step proxy-tuning, and over the base alone.

    Args:
        a: acceptance probability.
        num_drafts: G; a mean where it varies.
        costs: as measured. With `Costs(c)` the results are those of `specproxy.theory`.
    """
    over_base = expected_tokens(a, num_drafts) / costs.per_cycle(a, num_drafts)
    return over_base * (1 + 2 * costs.small), over_base


def acceptance_probability(accepted_per_position: list[int], drafted_per_position: list[int]) -> float | None:
    """Estimate of a: accepted drafts over those that were tested, which are all up to a window's first refusal.

    The acceptance rate, accepted over drafted, is smaller: it counts drafts behind a refusal as well.

    Args:
        accepted_per_position, drafted_per_position: as in `SpeculationStats`.

    Returns:
        None where no draft was tested.
    """
    before = [*drafted_per_position[:1], *accepted_per_position]
    tested = sum(min(pair) for pair in zip(before, drafted_per_position, strict=False))
    return sum(accepted_per_position) / tested if tested else None
