"""Joint law of the tokens that `ProxyTunedModel.generate` draws, against full enumeration (see `chi_square` for power).

Every batch mixes two prompts of unequal length; drafts oppose the target; ids that the tokenizer does not know would be
the likeliest of all.
"""

import chi_square
import numpy as np
import pytest
from loop_law import PROMPTS, LoopCase, exact_law, sample, smallest_p_value

from specproxy import ProxyTunedModel

SMALL, FULL = 3_000, 60_000

FILTERS = {"temperature": 1.3, "top_k": 4, "top_p": 0.95, "min_p": 0.02}
CASES = [
    LoopCase("rejection", 0),
    LoopCase("rejection", 2),
    LoopCase("rejection", 3, FILTERS, seed=1),
    LoopCase("rejection", 2, {"repetition_penalty": 1.7}, ids=(0, 1, 2, 4, 5), extra=2),
    LoopCase("rejection", 2, {"presence_penalty": 0.5, "frequency_penalty": 0.4}, seed=1, extra=1),
    LoopCase("block", 1),
    LoopCase("block", 3),
    LoopCase("block", 2, FILTERS, seed=1, extra=2),
    LoopCase("coupled", 2, extra=1),
    LoopCase("coupled", 3, FILTERS, seed=1, ids=(0, 1, 2, 4, 5)),
]


def test_power_is_as_stated() -> None:
    assert chi_square.power(SMALL, 125, 0.14) > 0.999
    assert chi_square.power(FULL, 125, 0.03) > 0.999


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tokens_follow_the_target(case: LoopCase) -> None:
    assert smallest_p_value(ProxyTunedModel, case, SMALL, seed=5) > chi_square.LEVEL


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_tokens_follow_the_target_at_full_size(case: LoopCase) -> None:
    assert smallest_p_value(ProxyTunedModel, case, FULL, seed=6) > chi_square.LEVEL


def test_the_laws_are_worth_testing() -> None:
    """No token is nearly certain, and the two prompts differ."""
    for case in CASES:
        laws = [exact_law(case, prompt) for prompt in PROMPTS]
        for law in laws:
            np.testing.assert_allclose(law.sum(), 1)
            assert law.max() < 0.35
        assert chi_square.total_variation(*laws) > 0.05


@pytest.mark.parametrize("settings", [{}, FILTERS], ids=["plain", "filters"])
def test_coupled_tokens_do_not_depend_on_the_window(settings: dict[str, float]) -> None:
    per_step = sample(ProxyTunedModel, LoopCase("coupled", 0, settings, length=6), 200, seed=7)
    for num_drafts in (1, 2, 4):
        drawn = sample(ProxyTunedModel, LoopCase("coupled", num_drafts, settings, length=6), 200, seed=7)
        np.testing.assert_array_equal(np.stack(drawn), np.stack(per_step))
