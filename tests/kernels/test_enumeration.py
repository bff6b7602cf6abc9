"""Exact enumeration: one cycle emits tokens of the target's law, with no sampling and so no false alarm."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from enumeration import Cycle, Scenario, compare, make_parameters

from specproxy_kernels import reference

SETTINGS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 2},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.25},
    "penalty": {"repetition_penalty": 1.6},
    "all": {"temperature": 1.4, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.3},
}


def scenarios() -> list[Scenario]:
    found = []
    for rule in ("rejection", "block"):
        for seed, settings in enumerate(SETTINGS.values()):
            found.append(Scenario(rule, 3, 4, settings, seen=(1,), seed=seed))
            found.append(Scenario(rule, 4, 3, settings, seen=(0, 2), seed=100 + seed))
        allowed = ((0, 1, 2), (1, 2), (0, 2), (0, 1))
        found.append(Scenario(rule, 3, 4, allowed=allowed, seed=20))
        found.append(Scenario(rule, 3, 4, {"top_p": 0.7, "repetition_penalty": 0.6}, allowed=allowed, seed=21))
        found.append(Scenario(rule, 3, 4, certain=True, seed=22))
        found.append(Scenario(rule, 3, 4, SETTINGS["all"], certain=True, seen=(1,), seed=23))
        found.extend(Scenario(rule, 3, 4, num_drafts=used, seed=24 + used) for used in range(3))
        found.append(Scenario(rule, 3, 4, SETTINGS["all"], num_drafts=1, certain=True, seed=28))
        found.append(Scenario(rule, 2, 5, {"temperature": 1.2}, seed=29))
        found.append(Scenario(rule, 2, 1, seed=30))
        found.append(Scenario(rule, 3, 3, alpha=0.0, seed=31))
        found.append(Scenario(rule, 3, 3, alpha=-1.5, seed=32))
        found.append(Scenario(rule, 4, 3, scale=6.0, seed=33))
    return found


@pytest.mark.parametrize("scenario", scenarios(), ids=str)
def test_cycle_follows_the_target(scenario: Scenario) -> None:
    assert compare(reference, scenario).total_variation < 1e-12


def stopped(path: tuple[int, ...], goes_on: Callable[[tuple[int, ...]], bool]) -> int:
    """Drafts of a path that is drawn while what was drawn before allows one more."""
    return next((i for i in range(len(path)) if not goes_on(path[:i])), len(path))


@pytest.mark.parametrize("rule", ["rejection", "block"])
@pytest.mark.parametrize("name", ["plain", "all"])
@pytest.mark.parametrize("seed", range(4))
def test_a_draft_may_stop_by_the_law_behind_its_tokens(rule: str, name: str, seed: int) -> None:
    """Any rule of the tokens so far, so any of the law that follows them, and under `block` too."""
    scenario = Scenario(rule, 3, 4, SETTINGS[name], seen=(1,), seed=90 + seed)
    rng = np.random.default_rng(seed)
    prefixes = [prefix for depth in range(3) for prefix in itertools.product(range(3), repeat=depth)]
    allowed = {prefix: bool(rng.random() < 0.7) or not prefix for prefix in prefixes}
    lengths = {stopped(path, allowed.__getitem__) for path in itertools.product(range(3), repeat=3)}
    assert len(lengths) > 1
    assert compare(reference, scenario, lambda path: stopped(path, allowed.__getitem__)).total_variation < 1e-12


@pytest.mark.parametrize("rule", ["rejection", "block"])
def test_a_draft_discarded_because_of_its_token_is_seen(rule: str) -> None:
    scenario = Scenario(rule, 3, 4, seed=90)
    biased = compare(reference, scenario, lambda path: next((i for i, token in enumerate(path) if token == 1), 3))
    assert biased.total_variation > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["rejection", "block"])
@pytest.mark.parametrize("name", SETTINGS)
def test_longest_window_follows_the_target(rule: str, name: str) -> None:
    assert compare(reference, Scenario(rule, 4, 5, SETTINGS[name], seen=(3,), seed=40)).total_variation < 1e-12


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["plain", "top_p"])
def test_block_emits_at_least_as_many_tokens_as_rejection(seed: int, name: str) -> None:
    tokens = {
        rule: compare(reference, Scenario(rule, 3, 3, SETTINGS[name], seed=50 + seed)).expected_tokens
        for rule in ("rejection", "block")
    }
    assert tokens["block"] >= tokens["rejection"] - 1e-12
    if name == "plain":
        assert tokens["block"] > tokens["rejection"]


@pytest.mark.parametrize("rule", ["rejection", "block"])
def test_equal_laws_keep_every_draft(rule: str) -> None:
    """With base = anti-expert the target is the expert's law, and nothing may be refused or divided by zero."""
    scenario = Scenario(rule, 3, 4, {"temperature": 0.8, "top_p": 0.9}, seed=60)
    cycle = Cycle(reference, scenario)
    cycle.base = cycle.anti_expert
    drawable = torch.tensor(cycle.draft_prob > 0)
    highest = torch.full(cycle.drafts.shape, 1 - 2.0**-24, dtype=torch.float64)
    acceptance = cycle.accept(torch.arange(len(cycle.drafts)), highest)
    assert bool((acceptance.num_accepted == 3)[drawable].all())
    assert bool(acceptance.is_bonus[drawable].all())


class _FixedNoise:
    """Noise of a whole window, given; under `coupled` every token reads it, whoever draws it."""

    def __init__(self, gumbel: torch.Tensor) -> None:
        self.gumbel = gumbel

    def tokens(self, count: int, vocab_size: int) -> torch.Tensor:
        return self.gumbel[:, :count]

    def next_token(self, num_accepted: torch.Tensor, rule: str, window: int, vocab_size: int) -> torch.Tensor:
        assert rule == "coupled"
        return self.gumbel[torch.arange(len(num_accepted)), num_accepted]

    def coins(self, count: int) -> torch.Tensor:
        raise AssertionError("`coupled` flips no coin")


@pytest.mark.parametrize("certain", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_coupled_tokens_depend_on_the_noise_alone(name: str, certain: bool) -> None:
    """Whatever was drafted, the emitted tokens are those that per-step decoding draws from the same noise."""
    scenario = Scenario("coupled", 3, 4, SETTINGS[name], seen=(1,), certain=certain, seed=70)
    cycle = Cycle(reference, scenario)
    laws = cycle.tables.target(scenario)
    rng = np.random.default_rng(71)
    every = torch.arange(len(cycle.drafts))
    lengths = set()
    for _ in range(25):
        gumbel = rng.gumbel(size=(4, 3))
        path: list[int] = []
        for depth in range(4):
            with np.errstate(divide="ignore"):
                path.append(int((np.log(laws[depth][tuple(path)]) + gumbel[depth]).argmax()))
        noise = _FixedNoise(torch.tensor(gumbel).expand(len(every), -1, -1))
        inputs = cycle.inputs(every)
        kept, token, status = reference.verify_window(**inputs, num_drafts=cycle.num_drafts, noise=noise)
        assert not status.any()
        for draft, number, last in zip(cycle.drafts.tolist(), kept.tolist(), token.tolist(), strict=True):
            assert [*draft[:number], last] == path[: number + 1]
            agrees = next((i for i in range(3) if draft[i] != path[i]), 3)
            assert number == agrees
            lengths.add(number)
    assert lengths == {0, 1, 2, 3}


@pytest.mark.parametrize("rule", ["rejection", "block", "coupled"])
def test_greedy_rows_emit_the_argmax_path(rule: str) -> None:
    scenario = Scenario(rule, 3, 4, {"temperature": 0.0, "repetition_penalty": 1.5}, seen=(2,), certain=True, seed=80)
    cycle = Cycle(reference, scenario)
    settings = {"repetition_penalty": 1.5}
    laws = cycle.tables.target(Scenario(rule, 3, 4, settings, seen=(2,), seed=80))
    path: list[int] = []
    for depth in range(4):
        path.append(int(laws[depth][tuple(path)].argmax()))
    every = torch.arange(len(cycle.drafts))
    kept, token, status = reference.verify_window(**cycle.inputs(every), num_drafts=cycle.num_drafts, noise=None)
    assert not status.any()
    for draft, number, last in zip(cycle.drafts.tolist(), kept.tolist(), token.tolist(), strict=True):
        assert [*draft[:number], last] == path[: number + 1]
        assert number == next((i for i in range(3) if draft[i] != path[i]), 3)


@pytest.mark.parametrize("rule", ["rejection", "block"])
def test_impossible_draft_is_refused_by_a_zero_coin(rule: str) -> None:
    """Coins can be 0 and a target probability can be 0: only a strict comparison refuses such a draft."""
    base = torch.tensor([[[0.0, -torch.inf, 0.0]] * 2], dtype=torch.float64)
    pair = reference.LogitPair(torch.zeros(1, 2, 3).double(), torch.zeros(1, 2, 3).double(), torch.ones(1, 2).double())
    parameters = make_parameters(reference, 1, 3, {})
    law = reference.DraftLaw(torch.zeros(1, 1, 3).double(), None, torch.full((1, 1), np.log(3.0), dtype=torch.float64))

    class Zero(_FixedNoise):
        def coins(self, count: int) -> torch.Tensor:
            return torch.zeros(1, count)

    acceptance = reference.accept_window(
        rule, base, [pair], torch.tensor([[1]]), torch.tensor([1]), law, parameters, Zero(torch.zeros(0)), 3
    )
    assert acceptance.num_accepted.tolist() == [0]
