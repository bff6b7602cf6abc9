"""Drafts that stop by the entropy of their laws: the decision, what it is learnt from, and that no law changes."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import chi_square
import loop_law
import numpy as np
import pytest
import tiny
import torch
from loop_law import LoopCase
from support import role_prompts, use_policy
from test_lora import pair

import specproxy.draft.expert
from benchmarks.recordings import record
from benchmarks.replay import Costs, Recording, replay, synthetic_recording
from specproxy import ProxyTunedModel
from specproxy.auto import AutoPolicy
from specproxy.draft import ExpertDrafter
from specproxy.draft.entropy import expert_entropy
from specproxy.early_stop import EarlyStop, EntropyOdds
from specproxy.forecast import Forecast
from specproxy.policy import CycleReport, Outlook, Plan
from specproxy.state import DecodeState, Draft
from specproxy_kernels import DraftLaw, NoiseStream

ROWS = role_prompts([3, 9, 1, 6], seed=21)


@pytest.fixture(scope="module")
def model() -> ProxyTunedModel:
    return ProxyTunedModel(*tiny.shared_trio("llama").models)


class Digits:
    """In place of an `EarlyStop`: the digits of the mean entropy decide, so that all kinds of stops are seen soon."""

    planned = 2

    def __init__(self, most: int) -> None:
        self.most = most
        self.asked: list[tuple[list[list[float]], int]] = []

    def length(self, entropies: list[list[float]]) -> int:
        last = [row[-1] for row in entropies]
        done = len(entropies[0])
        digit = int(sum(last) / len(last) * 1e4) % 10
        length = min(self.most, done - 1 if digit < 2 else done if digit < 3 else self.most)
        self.asked.append((entropies, length))
        return length


class Stops:
    """Chains of at most five drafts, stopped early; keeps what it was told."""

    offers_wanted = 0

    def __init__(self) -> None:
        self.told: list[tuple[Digits, CycleReport]] = []
        self.outlooks: list[Outlook] = []

    def plan(self, outlook: Outlook) -> Plan:
        self.outlooks.append(outlook)
        most = min(5, outlook.most)
        self.stop = Digits(most)
        return Plan(most, stop=self.stop if most and outlook.stops else None)  # type: ignore[arg-type]

    def observe(self, report: CycleReport) -> None:
        self.told.append((self.stop, report))

    @property
    def lengths(self) -> set[int]:
        return {report.plan.num_drafts for _, report in self.told}


def call(model: ProxyTunedModel, num_draft_tokens: Any = "auto", rows: Any = ROWS, **settings: Any) -> Any:
    fixed = {"max_new_tokens": 24, "return_dict_in_generate": True, "pad_token_id": 0}
    return model.generate(**rows.kwargs(), num_draft_tokens=num_draft_tokens, **{**fixed, **settings})


# The measure, and what is learnt of it


def test_entropy_in_nats_over_the_shared_vocabulary():
    logits = torch.tensor([[[0.0, 0.0, 0.0, 0.0, 50.0], [100.0, 0.0, -math.inf, 0.0, 0.0], [1.0, 2.0, 3.0, 0.5, 9.0]]])
    found = expert_entropy(logits, 4)[0]
    law = logits[0, 2, :4].double().softmax(-1)
    assert found[0].item() == pytest.approx(math.log(4))
    assert found[1].item() == pytest.approx(0, abs=1e-6)
    assert found[2].item() == pytest.approx(-float((law * law.log()).sum()))
    assert expert_entropy(torch.full((1, 1, 4), math.nan), 4).isnan().all()


def test_what_low_and_high_entropies_promise_is_learnt():
    odds = EntropyOdds()
    assert odds.given(0.6, 0.05) == pytest.approx(0.6)
    rng = random.Random(0)
    for _ in range(300):
        odds.hear([(0.05, rng.random() < 0.95, 0.6), (4.5, rng.random() < 0.25, 0.6)])
    assert odds.given(0.6, 0.05) > 0.85
    assert odds.given(0.6, 4.5) < 0.4
    assert odds.given(0.6, 1.0) == pytest.approx(0.6), "a class that was never seen"
    assert odds.given(0.0, 0.05) == 0.0
    assert 0 < odds.given(0.6, math.nan) < 1


def test_a_rows_rate_is_held_back_where_its_entropy_is_known():
    expected = EntropyOdds.expected(np.array([[0.9, 0.6, 0.0]]), 0.6)[0]
    assert expected[0] == pytest.approx(math.sqrt(9 * 1.5) / (1 + math.sqrt(9 * 1.5)))
    assert expected[1] == pytest.approx(0.6) and expected[2] == 0


def test_rates_do_not_forget_what_was_dropped():
    """A draft that was dropped as unlikely counts as one that was likely to fail."""
    plain, assumed = Forecast(4), Forecast(4)
    for _ in range(50):
        for forecast in (plain, assumed):
            forecast.hear([(0, 1, 1)])
        assumed.assume([(0, 1, 0.1)])
    assert plain.acceptance([0])[0, 1] > 0.8
    assert assumed.acceptance([0])[0, 1] < 0.5 < assumed.acceptance([0])[0, 0]


# The decision


def make_stop(step: float, window: float, acceptance: float = 0.7, planned: int = 2, rows: int = 1) -> EarlyStop:
    """Low entropies promise odds of ten times the expected ones, high ones a twentieth."""
    chances = np.full((rows, 8), acceptance)
    factors = np.array([10.0] * 5 + [0.05] * 5)
    windows = 1 + window * np.arange(9)
    return EarlyStop(chances, chances, factors, windows, step, rate=1.0 * rows, planned=planned)


def test_it_goes_on_while_sure_and_stops_where_not():
    stop = make_stop(step=0.2, window=0.12)
    assert stop.length([[0.01]]) > 2
    assert stop.length([[0.01] * 5]) > 5
    assert stop.length([[0.01, 0.01, 4.5]]) == 2, "an unsure draft is not drawn"
    assert stop.length([[4.5]]) == 0


def test_a_free_position_keeps_an_unsure_draft_without_another_step():
    assert make_stop(step=0.5, window=0.0, planned=8).length([[0.01, 0.01, 4.5]]) == 3


def test_costs_decide():
    lengths = [make_stop(step=step, window=0.02).length([[0.01]]) for step in (0.02, 0.3, 0.6, 2.0)]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > lengths[-1]


def test_rows_that_differ_are_weighed_together():
    stop = make_stop(step=0.3, window=0.02, rows=2)
    assert stop.length([[0.01] * 3] * 2) > 3
    assert stop.length([[4.5] * 3] * 2) < 3
    assert stop.length([[0.01] * 3, [4.5] * 3]) >= 3, "half of the rows are worth a step"


def test_a_small_gain_leaves_the_plan_alone():
    """Entropies that say nothing: three drafts are worth 0.03 tokens more than two, and 0.09 more than four."""
    flat = dataclasses.replace(make_stop(step=0.343, window=0.02), factors=np.ones(10))
    lengths = {planned: dataclasses.replace(flat, planned=planned).length([[1.0]]) for planned in (1, 2, 3, 4)}
    assert lengths == {1: 3, 2: 2, 3: 3, 4: 3}


def test_a_budget_is_no_gain():
    stop = make_stop(step=0.02, window=0.02)
    chances = np.where(np.arange(8) < 3, stop.acceptance, 0)
    assert dataclasses.replace(stop, acceptance=chances, expected=chances).length([[0.01] * 2]) <= 3


# In the loop


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"repetition_penalty": 1.3},
        {"bad_words_ids": [[7], [9]], "no_repeat_ngram_size": 2},
        {"do_sample": True, "acceptance": "coupled", "seed": 5},
        {"do_sample": True, "acceptance": "coupled", "seed": 5, "temperature": 1.4, "top_p": 0.9, "eos_token_id": [3]},
    ],
    ids=["greedy", "penalty", "processors", "coupled", "filters"],
)
def test_no_stop_changes_a_token(model, monkeypatch, settings):
    per_step = call(model, 0, **settings).sequences.tolist()
    use_policy(monkeypatch, policy := Stops())
    assert call(model, **settings).sequences.tolist() == per_step
    assert {0, 1} <= policy.lengths and max(policy.lengths) >= 4


# peft asks Transformers by the old name of a property.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_pair_of_one_set_of_weights(monkeypatch):
    per_step = call(pair().whole, 0).sequences.tolist()
    use_policy(monkeypatch, policy := Stops())
    assert call(pair().shared).sequences.tolist() == per_step
    dropped = [stop for stop, _ in policy.told if stop.asked and stop.asked[-1][1] < len(stop.asked)]
    assert dropped, "a law that nothing was drawn from serves the bonus position, and no shared pass has to"


def test_reports_tell_of_entropies_up_to_the_first_refused_draft(model, monkeypatch):
    use_policy(monkeypatch, policy := Stops())
    output = call(model)
    dropped = 0
    for stop, report in policy.told:
        if not stop.asked:
            continue
        known, length = stop.asked[-1]
        assert report.plan.num_drafts == length
        for own, row, drafted, accepted in zip(
            known, report.entropies, report.num_drafts, report.num_accepted, strict=True
        ):
            assert drafted <= length
            assert list(row) == own[: accepted + 1]
            dropped += len(row) > drafted
    assert dropped
    stats = output.speculation
    count = {"shorter": 0, "as_planned": 0, "longer": 0}
    for stop, report in policy.told:
        if stop.asked:
            beyond = report.plan.num_drafts - stop.planned
            count["shorter" if beyond < 0 else "longer" if beyond else "as_planned"] += 1
    assert stats.entropy_stops == count == stats.to_dict()["entropy_stops"]
    assert count["shorter"] and count["longer"]
    assert stats.num_per_step_cycles == sum(report.plan.num_drafts == 0 for _, report in policy.told)


def test_entropies_are_those_of_the_experts_own_laws(model, monkeypatch):
    """A row alone, whose text says what every law was."""
    rows = role_prompts([7], seed=3)
    use_policy(monkeypatch, policy := Stops())
    text = call(model, rows=rows).sequences[0]
    prompt = torch.tensor(rows.base[0])
    ids = torch.cat([prompt, text[-24:]])[None]
    laws = expert_entropy(model.expert(input_ids=ids).logits, model.vocab_size)[0, len(prompt) - 1 :]
    place = 0
    for _, report in policy.told:
        (entropies,) = report.entropies or ((),)
        expected = laws[place : place + len(entropies)].tolist()
        assert entropies == pytest.approx(expected, abs=1e-9)
        place += report.num_accepted[0] + 1
    assert place == 24


def test_no_token_is_drawn_that_is_not_verified(model, monkeypatch):
    """What is dropped is a law that nothing was drawn from: no draft can be dropped because of what it is."""
    drawn = []
    draw = specproxy.draft.expert.draw_draft
    monkeypatch.setattr("specproxy.draft.expert.draw_draft", lambda *args: drawn.append(1) or draw(*args))
    use_policy(monkeypatch, policy := Stops())
    call(model, do_sample=True, seed=2)
    assert len(policy.lengths) > 3
    assert len(drawn) == sum(report.plan.num_drafts for _, report in policy.told)


@pytest.mark.parametrize(("rule", "is_own"), [("rejection", True), ("block", True), ("coupled", False)])
def test_no_later_cycle_comes_back_to_the_noise_of_a_stop(model, monkeypatch, rule, is_own):
    """A length, which the next plan knows, follows from tokens behind a refused one too. `coupled` comes back."""
    streams = []
    noise = DecodeState.noise

    def kept(self: DecodeState, fresh: bool = False) -> NoiseStream:
        streams.append(noise(self, fresh))
        return streams[-1]

    monkeypatch.setattr(DecodeState, "noise", kept)
    use_policy(monkeypatch, Stops())
    call(model, do_sample=True, seed=2, acceptance=rule)
    stopped = streams[:-3]  # the last cycles may have no room for a draft
    assert stopped and all((stream.block_start is not None) == is_own for stream in stopped)


CASES = [
    LoopCase("rejection", 0, ids=(0, 1, 2), correlation=-1.0),
    LoopCase("block", 0, ids=(0, 1, 2), correlation=-1.0),
]
CALLS = 1200


def loop_p_value(monkeypatch: pytest.MonkeyPatch, case: LoopCase, calls: int) -> tuple[float, Stops]:
    """Of the first tokens of one row, a call for every draw: a stop is of the whole batch, and here of this row."""
    use_policy(monkeypatch, policy := Stops())
    trio = loop_law.models(case.correlation, case.seed)
    model = ProxyTunedModel(*trio, tokenizer=loop_law.Words(case.ids), alpha=case.alpha)
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": case.length + 1, "num_draft_tokens": "auto"}
    prompt = loop_law.PROMPTS[0]
    drawn = [
        model.generate(torch.tensor([prompt]), acceptance=case.rule, seed=seed, **settings)[0, len(prompt) :][:3]
        for seed in range(calls)
    ]
    return chi_square.p_value(torch.stack(drawn).numpy(), loop_law.exact_law(case, prompt)), policy


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_tokens_follow_the_target(monkeypatch, case):
    assert chi_square.power(CALLS, 27, 0.18) > 0.999
    p_value, policy = loop_p_value(monkeypatch, case, CALLS)
    assert p_value > chi_square.LEVEL
    assert {0, 1, 2, 3} <= policy.lengths


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_stop_that_looks_at_the_drafted_token_is_caught(monkeypatch, case):
    """The last draft of a row is dropped where it is token 0."""
    propose = ExpertDrafter.propose

    def faulty(self: Any, state: Any, runners: Any, noise: Any, plan: Plan) -> Draft:
        draft = propose(self, state, runners, noise, plan)
        if draft.law is None or int(draft.tokens[0, -1]):
            return draft
        kept = draft.count - 1
        law = DraftLaw(draft.law.logits[:, :kept], None, draft.law.lse[:, :kept]) if kept else None
        logits = draft.expert_logits[:, : kept + 1]
        return Draft(draft.tokens[:, :kept], state.num_drafts(kept), law, logits, entropies=draft.entropies)

    monkeypatch.setattr(ExpertDrafter, "propose", faulty)
    assert loop_p_value(monkeypatch, case, CALLS)[0] < chi_square.LEVEL


# The policy


def test_auto_stops_where_the_loop_can(model, monkeypatch):
    """Few rows on the host; with many, or where the loop cannot, its plans leave the length alone."""
    plain = replay(AutoPolicy(), [noisy(seed) for seed in range(4)], 2, Costs.memory_bound(0.3))
    assert sum(plan.stop is not None for plan in plain.plans) > len(plain.plans) / 2
    many = replay(AutoPolicy(), [noisy(seed) for seed in range(16)], 8, Costs.memory_bound(0.3))
    assert not any(plan.stop for plan in many.plans if len(plan.stop.acceptance if plan.stop else ()) > 4)
    blind = [dataclasses.replace(noisy(seed), entropies=()) for seed in range(4)]
    assert not any(plan.stop for plan in replay(AutoPolicy(), blind, 2, Costs.memory_bound(0.3)).plans)
    never = replay(AutoPolicy(stops=False), [noisy(seed) for seed in range(4)], 2, Costs.memory_bound(0.3))
    assert not any(plan.stop for plan in never.plans)


def noisy(seed: int, length: int = 300) -> Recording:
    """A text whose entropies tell which drafts survive: most of the low ones, few of the high ones."""
    text = synthetic_recording([(0.7, length)], seed)
    rng = random.Random(seed)
    entropies = tuple(
        rng.choice([0.02, 0.2]) if (rank == 0) == (rng.random() < 0.95) else rng.choice([2.5, 4.5])
        for rank in text.ranks
    )
    behind = tuple(() if rank == 0 else (3.5,) * 4 for rank in text.ranks)
    return dataclasses.replace(text, entropies=entropies, behind=behind)


@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_entropies_that_tell_are_worth_tokens_a_second(ratio):
    texts = [noisy(seed) for seed in range(8)]
    rates = {
        stops: replay(AutoPolicy(stops=stops), texts, 1, Costs.memory_bound(ratio), noise=0.1).rate
        for stops in (False, True)
    }
    assert rates[True] > 1.1 * rates[False]


def test_entropies_that_say_nothing_cost_little():
    texts = [
        dataclasses.replace(noisy(seed), entropies=tuple(random.Random(seed).choices([0.02, 0.2, 2.5, 4.5], k=300)))
        for seed in range(8)
    ]
    rates = {
        stops: replay(AutoPolicy(stops=stops), texts, 1, Costs.memory_bound(0.3), noise=0.1).rate
        for stops in (False, True)
    }
    assert rates[True] > 0.97 * rates[False]


def test_decisions_are_made_again_from_what_was_told(model, monkeypatch):
    """A stop decides from its numbers and the entropies, so a run can be replayed down to its lengths."""

    class Recorded(AutoPolicy):
        def __init__(self) -> None:
            super().__init__(trees=False)
            self.told: list[tuple[Outlook, Plan, CycleReport]] = []

        def plan(self, outlook: Outlook) -> Plan:
            self.asked = outlook, super().plan(outlook)
            return self.asked[1]

        def observe(self, report: CycleReport) -> None:
            self.told.append((*self.asked, report))
            super().observe(report)

    use_policy(monkeypatch, policy := Recorded())
    row = role_prompts([7], seed=3)
    for seed in range(3):
        call(model, rows=row, do_sample=True, seed=seed, max_new_tokens=40)
    again = AutoPolicy(trees=False)
    stopped = 0
    for outlook, plan, report in policy.told:
        made = again.plan(outlook)
        assert (made, made.expected, made.stop is None) == (plan, plan.expected, plan.stop is None)
        # A row alone whose drafts all survived has told of every entropy that the stop had seen.
        if made.stop is not None and report.num_accepted == report.num_drafts:
            (entropies,) = report.entropies
            lengths = [made.stop.length([entropies[: i + 1]]) for i in range(len(entropies))]
            assert lengths[-1] == report.plan.num_drafts
            assert all(length > i + 1 for i, length in enumerate(lengths[:-1]))
            stopped += 1
        again.observe(report)
    assert stopped > 5


def test_recordings_tell_what_a_stop_sees(model, monkeypatch):
    """A replay's lengths and accepted drafts are those of a real run, behind wrong drafts too."""
    prompt = list(ROWS.base[1])
    for seed, law in ((None, {}), (7, {"do_sample": True, "top_k": 0, "acceptance": "coupled", "seed": 7})):
        recording = record(model, [prompt], 24, seed)
        virtual, real = Stops(), Stops()
        replay(virtual, recording, 1, Costs.memory_bound(0.1))
        use_policy(monkeypatch, real)
        model.generate(
            torch.tensor([prompt]),
            max_new_tokens=24,
            num_draft_tokens="auto",
            eos_token_id=10_000,
            pad_token_id=0,
            **law,
        )
        for (_, one), (_, other) in zip(virtual.told, real.told, strict=True):
            assert (one.plan.num_drafts, one.num_accepted) == (other.plan.num_drafts, other.num_accepted)
            assert np.allclose(one.entropies, other.entropies)
        assert len(real.lengths) > 2
