"""Joint law of several tokens across cycles, with the runtime's own counter noise (see `chi_square` for rates and
power)."""

import chi_square
import numpy as np
import pytest
from toy_loop import Toy, sample

from specproxy_kernels import noise, reference

# Three tokens over V = 5 (125 cells). Full size: power above 0.999 against a total variation of 0.01; the small size
# reaches it at 0.03. Each rule has one case of full size in every run.
FULL, SMALL = 560_000, 60_000

TOYS = [
    Toy("rejection", seed=1),
    Toy("rejection", settings={"temperature": 0.8, "top_k": 4, "top_p": 0.95, "min_p": 0.05}, seed=2),
    Toy("rejection", num_drafts=4, length=3, ragged=True, seed=3),
    Toy("rejection", certain=True, seed=4),
    Toy("rejection", settings={"repetition_penalty": 1.8}, seed=5),
    Toy("rejection", num_drafts=4, stops="law", seed=8),
    Toy("block", seed=1),
    Toy("block", settings={"temperature": 0.8, "top_k": 4, "top_p": 0.95, "min_p": 0.05}, seed=2),
    Toy("block", num_drafts=4, length=3, ragged=True, seed=3),
    Toy("block", certain=True, seed=4),
    Toy("block", vocab_size=3, num_drafts=3, length=5, seed=6),
    Toy("block", num_drafts=4, stops="law", seed=8),
    Toy("coupled", seed=1),
    Toy("coupled", settings={"temperature": 0.8, "top_k": 4, "top_p": 0.95, "min_p": 0.05}, seed=2),
]


def test_power_is_as_stated() -> None:
    assert chi_square.power(FULL, 125, 0.01) > 0.999
    assert chi_square.power(SMALL, 125, 0.03) > 0.999


@pytest.mark.parametrize("toy", TOYS, ids=str)
def test_joint_law_across_cycles(toy: Toy) -> None:
    assert chi_square.p_value(sample(reference, noise, toy, SMALL, seed=11), toy.joint_law()) > chi_square.LEVEL


@pytest.mark.parametrize(
    "toy", [pytest.param(toy, id=str(toy), marks=[pytest.mark.slow] if toy.seed != 1 else []) for toy in TOYS]
)
def test_joint_law_across_cycles_at_full_power(toy: Toy) -> None:
    assert chi_square.p_value(sample(reference, noise, toy, FULL, seed=12), toy.joint_law()) > chi_square.LEVEL


@pytest.mark.parametrize("rule", ["rejection", "block"])
def test_a_draft_discarded_because_of_its_token_is_noticed(rule: str) -> None:
    toy = Toy(rule, num_drafts=4, stops="token", seed=8)
    assert chi_square.p_value(sample(reference, noise, toy, SMALL, seed=11), toy.joint_law()) < chi_square.LEVEL


def test_toys_cross_cycle_boundaries_at_every_position() -> None:
    """The comparison means something only where cycles end early and where they end with a bonus token."""
    toy = Toy("rejection", seed=1)
    law = toy.joint_law()
    base, expert, anti_expert = toy.tables()
    row = toy.context(toy.vocab_size, toy.vocab_size)
    draft = np.exp(expert[row]) / np.exp(expert[row]).sum()
    target = law.sum((1, 2))
    np.testing.assert_allclose(
        target, np.exp(base + expert - anti_expert)[row] / np.exp(base + expert - anti_expert)[row].sum()
    )
    assert 0.1 < chi_square.total_variation(draft, target) < 0.7


@pytest.mark.parametrize("name", ["plain", "filters"])
def test_coupled_tokens_do_not_depend_on_the_window(name: str) -> None:
    settings = {} if name == "plain" else {"temperature": 0.8, "top_k": 3, "top_p": 0.9}
    toy = Toy("coupled", settings=settings, length=6, seed=7)
    per_step = sample(reference, noise, toy, 4000, seed=13, num_drafts=0)
    for num_drafts in (1, 2, 4):
        np.testing.assert_array_equal(sample(reference, noise, toy, 4000, seed=13, num_drafts=num_drafts), per_step)


def test_wrong_law_is_noticed() -> None:
    """The statistic has teeth: a law 0.03 away fails, one sampled exactly passes."""
    toy = Toy("rejection", seed=1)
    law = toy.joint_law()
    shifted = law.copy()
    order = np.argsort(law.ravel())
    shifted.ravel()[order[-1]] -= 0.03
    shifted.ravel()[order[:-1]] += 0.03 / (law.size - 1)
    drawn = np.random.default_rng(0).choice(law.size, size=SMALL, p=shifted.ravel())
    tokens = np.stack(np.unravel_index(drawn, law.shape), 1)
    assert chi_square.p_value(tokens, law) < chi_square.LEVEL
    assert chi_square.p_value(tokens, shifted) > chi_square.LEVEL
