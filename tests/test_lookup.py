"""Drafts by lookup: what is offered, that no token depends on it, and that faults of it are seen."""

from __future__ import annotations

import copy
from typing import Any

import chi_square
import numpy as np
import oracle
import pytest
import tiny
import torch
from loop_law import LoopCase, smallest_p_value
from support import PAD, RolePrompts, greedy_rows, role_prompts
from transformers import LogitsProcessor

from specproxy import ConfigurationError, LookupCorpus, ProxyTunedModel
from specproxy.draft import LookupDrafter
from specproxy.draft.lookup import Offer, look_up
from specproxy.state import BASE, DecodeState, Draft, Row
from specproxy.vocab import share_vocabulary
from specproxy_kernels import DraftLaw

THREE_OWN = role_prompts([3, 9, 1], [8, 2, 11], [4, 10, 1], seed=2)
FIVE = role_prompts([14, 2, 6, 11, 5], seed=3)
LENGTH = 16
KINDS = ("llama", "gemma3", "gpt2", "mistral", "opt")


def model(kind: str = "llama") -> ProxyTunedModel:
    return ProxyTunedModel(*tiny.shared_trio(kind).models)


def run(prompts: RolePrompts = THREE_OWN, kind: str = "llama", **settings: Any) -> Any:
    return model(kind).generate(
        **prompts.kwargs(),
        **{"max_new_tokens": LENGTH, "num_draft_tokens": 4, "pad_token_id": PAD, **settings},
        return_dict_in_generate=True,
    )


def spoilt(prompts: RolePrompts, rows: list[list[int]], every: int = 5) -> LookupCorpus:
    """A corpus of these texts, every fifth new token another one: drafts are kept for a while, then refused."""
    corpus = LookupCorpus()
    for prompt, row in zip(prompts.base, rows, strict=True):
        wrong = [3 + token % 30 if i % every == every - 1 else token for i, token in enumerate(row)]
        corpus.add([*prompt, *wrong])
        corpus.add(row)
    return corpus


# What is offered


def state_and_row(
    prompt: list[int], tokens: list[int], corpus: LookupCorpus | None = None, missing: tuple[int, ...] = ()
) -> tuple[DecodeState, Row]:
    """A state of 40 shared ids but for `missing`, and a row that is not in it."""
    vocabulary = share_vocabulary({BASE: 40}, {BASE: tiny.tiny_tokenizer(missing=missing)})
    state = DecodeState(1, torch.device("cpu"), vocabulary.size, vocabulary.allowed, "rejection", (BASE,))
    row = Row(0, {BASE: prompt}, None, (), 0, 40, frozenset(), tokens=tokens, corpus=corpus)  # type: ignore[arg-type]
    return state, row


def test_an_offer_follows_the_longest_match() -> None:
    state, row = state_and_row([5, 6, 7, 8, 9, 4, 6, 7, 3], [5, 6, 7])
    assert look_up(state, row, 3) == Offer(3, [8, 9, 4])
    row.tokens += [3]
    assert look_up(state, row, 3) == Offer(3, [5, 6, 7])
    row.tokens += [9]
    assert look_up(state, row, 3) == Offer(1, []), "a single token that occurred before is no match"
    assert look_up(state, row, 3, drafts=[4, 6]) == Offer(3, [7, 3, 5])


def test_the_longer_match_wins_and_the_rows_own_text_a_tie() -> None:
    corpus = LookupCorpus()
    corpus.add([20, 5, 6, 30, 31])
    corpus.add([21, 5, 6, 32, 33])
    state, row = state_and_row([5, 6, 7, 8, 5], [6], corpus)
    assert look_up(state, row, 2) == Offer(2, [7, 8])
    state, row = state_and_row([5, 6, 7, 20, 5], [6], corpus)
    assert look_up(state, row, 2) == Offer(3, [30, 31])
    assert look_up(state, row, 9, drafts=[30]) == Offer(4, [31])
    corpus.add([7, 20, 5, 6, 34])
    assert look_up(state, row, 2) == Offer(3, [34]), "the latest place is followed"
    row.tokens += [34, 5]
    assert look_up(state, row, 2) == Offer(1, [])


def test_a_corpus_that_forgets_while_a_row_follows_it() -> None:
    corpus = LookupCorpus(12)
    corpus.add([5, 6, 7])
    state, row = state_and_row([9, 5], [6], corpus)
    assert look_up(state, row, 2) == Offer(2, [7])
    for _ in range(4):
        corpus.add([10, 11, 12])
    row.tokens += [10]
    assert look_up(state, row, 2).tokens == []
    row.tokens += [11]
    assert look_up(state, row, 2) == Offer(2, [12])


def test_an_offer_ends_before_an_id_that_is_not_shared() -> None:
    corpus = LookupCorpus()
    corpus.add([5, 6, 7, 45, 8])
    state, row = state_and_row([9, 5], [6], corpus)
    assert look_up(state, row, 4) == Offer(2, [7])
    for missing, offered in (((7,), []), ((4,), [7])):
        state, row = state_and_row([9, 5], [6], corpus, missing)
        assert look_up(state, row, 4) == Offer(2, offered)


# No token depends on it


@pytest.mark.parametrize("with_corpus", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_equals_plain_loop(kind: str, with_corpus: bool) -> None:
    accepted = drafted = 0
    for prompts, count in ((THREE_OWN, 1), (THREE_OWN, 5), (FIVE, 8)):
        rows = greedy_rows(kind, prompts, length=LENGTH)
        corpus = spoilt(prompts, rows) if with_corpus else None
        output = run(prompts, kind, num_draft_tokens=count, drafter="lookup", corpus=corpus)
        expected = oracle.expected_output(prompts.kwargs()["input_ids"], rows, PAD)
        assert output.sequences.tolist() == expected.tolist()
        accepted += output.speculation.num_accepted_tokens
        drafted += output.speculation.num_draft_tokens
    if with_corpus:
        assert 0.2 < accepted / drafted < 0.95, "the drafts prove little"


LAWS: dict[str, dict[str, Any]] = {
    "plain": {"top_k": 0},
    "all": {"top_k": 12, "top_p": 0.95, "min_p": 0.02, "temperature": 1.2, "repetition_penalty": 1.2},
    "banned": {"top_k": 0, "suppress_tokens": [4, 9, 30], "min_new_tokens": 6, "eos_token_id": 8},
    "no 2-gram twice": {"no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("law", LAWS)
def test_coupled_equals_per_step(law: str) -> None:
    settings = {"do_sample": True, "acceptance": "coupled", "seed": 5, **LAWS[law]}
    per_step = run(num_draft_tokens=0, **settings)
    rows = [[token for token in row if token != PAD] for row in per_step.sequences[:, 9:].tolist()]
    for count in (2, 7):
        output = run(num_draft_tokens=count, drafter="lookup", corpus=spoilt(THREE_OWN, rows), **settings)
        assert output.sequences.tolist() == per_step.sequences.tolist()
        assert 0 < output.speculation.num_accepted_tokens < output.speculation.num_draft_tokens


@pytest.mark.parametrize("max_new_tokens", [1, 2, 5, 11])
def test_a_budget_cuts_a_block(max_new_tokens: int) -> None:
    """Where every draft is right, a row drafts all but the last token of each window, and nothing past its budget."""
    rows = [row[:max_new_tokens] for row in greedy_rows("llama", THREE_OWN, length=LENGTH)]
    corpus = spoilt(THREE_OWN, greedy_rows("llama", THREE_OWN, length=LENGTH), every=100)
    output = run(num_draft_tokens=7, drafter="lookup", corpus=corpus, max_new_tokens=max_new_tokens)
    assert output.sequences[:, 9:].tolist() == rows
    speculation = output.speculation
    assert speculation.num_draft_tokens <= 3 * (max_new_tokens - 1)
    if max_new_tokens == 11:
        assert speculation.num_accepted_tokens >= 20


@pytest.mark.parametrize("index", range(0, 9, 2))
def test_end_of_text_inside_a_block(index: int) -> None:
    rows = greedy_rows("llama", THREE_OWN, length=LENGTH)
    eos = rows[1][index]
    output = run(num_draft_tokens=6, drafter="lookup", corpus=spoilt(THREE_OWN, rows), eos_token_id=eos)
    cut = [oracle.cut(row, LENGTH, {eos}) for row in rows]
    expected = oracle.expected_output(THREE_OWN.kwargs()["input_ids"], cut, PAD)
    assert output.sequences.tolist() == expected.tolist()
    assert output.speculation.num_new_tokens == sum(map(len, cut))


@pytest.mark.parametrize("rule", ["rejection", "block", "coupled"])
def test_a_row_is_the_same_alone_and_in_any_batch(rule: str) -> None:
    settings = {"do_sample": True, "acceptance": rule, "drafter": "lookup", "num_draft_tokens": 5, "temperature": 0.7}
    corpus = spoilt(FIVE, greedy_rows("llama", FIVE, length=LENGTH))
    seeds = [7, 1, 99, 7, 3]
    together = run(FIVE, seed=seeds, corpus=corpus, **settings)
    assert together.speculation.num_accepted_tokens > 3
    for index, seed in enumerate(seeds):
        alone = run(FIVE.row(index), seed=[seed], corpus=corpus, **settings)
        assert alone.sequences[0, -LENGTH:].tolist() == together.sequences[index, -LENGTH:].tolist()


def test_at_the_last_position_of_a_model() -> None:
    """Learned positions end where prompt and budget do; a neighbour's longer budget must not draft past them."""
    limit = 9 + LENGTH
    trio = tiny.make_trio("gpt2", overrides=({"n_positions": limit},) * 3)
    prompts = THREE_OWN.base
    rows = [oracle.plain_greedy(trio.models, prompt, max_new_tokens=LENGTH) for prompt in prompts]
    corpus = spoilt(RolePrompts(prompts), rows, every=100)
    ids, mask = tiny.left_pad([list(prompt) for prompt in prompts])
    output = ProxyTunedModel(*trio.models).generate(
        ids, mask, max_new_tokens=LENGTH, num_draft_tokens=8, drafter="lookup", corpus=corpus
    )
    assert output[:, 9:].tolist() == rows


class NeverSeen(LogitsProcessor):
    """Fails on a prefix that holds what it has forbidden itself, as a table of allowed continuations would."""

    def __init__(self, prompt_length: int, residue: int) -> None:
        self.prompt_length, self.residue = prompt_length, residue

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        new = input_ids[:, self.prompt_length :]
        assert not bool((new % 7 == self.residue).any()), "a prefix that no text can have"
        scores = scores.clone()
        scores[:, self.residue :: 7] = -torch.inf
        return scores


@pytest.mark.parametrize("rule", ["rejection", "block", "coupled"])
def test_processors_are_spared_prefixes_that_no_text_can_have(rule: str) -> None:
    """Lookup may propose what a processor forbids: it is refused, and what stands behind it is not looked at."""
    prompts = RolePrompts((THREE_OWN.base[1],))
    rows = greedy_rows("llama", THREE_OWN, length=LENGTH)
    forbidden = NeverSeen(len(prompts.base[0]), rows[1][1] % 7)
    settings = {"logits_processor": [forbidden], "num_draft_tokens": 6, "acceptance": rule, "seed": 3}
    corpus = LookupCorpus()
    corpus.add([*prompts.base[0], *rows[1]])
    for do_sample in (False, True):
        output = run(prompts, do_sample=do_sample, drafter="lookup", corpus=corpus, **settings)
        assert output.speculation.num_draft_tokens > 0
        if not do_sample or rule == "coupled":
            per_step = run(prompts, do_sample=do_sample, **settings | {"num_draft_tokens": 0})
            assert output.sequences.tolist() == per_step.sequences.tolist()


# The law of what is drawn, with certain drafts


def pairs_corpus(favoured: int) -> LookupCorpus:
    """After every two of five ids, an id of its own: one that the target likes here and dislikes there."""
    corpus = LookupCorpus()
    for a in range(5):
        for b in range(5):
            corpus.add([a, b, (favoured + 2 * a + b) % 5, (a + b) % 5, favoured])
    return corpus


def lookup_case(rule: str, count: int, settings: dict[str, Any] | None = None, **further: Any) -> LoopCase:
    drafting = {"drafter": "lookup", "corpus": pairs_corpus(count)}
    return LoopCase(rule, count, settings or {}, drafting=drafting, **further)


FILTERS = {"temperature": 1.3, "top_k": 4, "top_p": 0.95, "min_p": 0.02}
CASES = [
    lookup_case("rejection", 2),
    lookup_case("rejection", 3, FILTERS, seed=1, extra=2),
    lookup_case("block", 3, {"repetition_penalty": 1.7}, ids=(0, 1, 2, 4, 5), extra=1),
    lookup_case("block", 3, extra=2),
    lookup_case("coupled", 3, extra=1),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tokens_follow_the_target(case: LoopCase) -> None:
    assert smallest_p_value(ProxyTunedModel, case, 3_000, seed=5) > chi_square.LEVEL


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_tokens_follow_the_target_at_full_size(case: LoopCase) -> None:
    assert smallest_p_value(ProxyTunedModel, case, 60_000, seed=6) > chi_square.LEVEL


def uniform_law(draft: Draft, state: DecodeState) -> Draft:
    """Certain drafts that claim to have been drawn."""
    if draft.count == 0:
        return draft
    shape = (state.width, draft.count)
    draft.law = DraftLaw(torch.zeros(*shape, state.vocab_size), None, torch.full(shape, np.log(5.0)).float())
    return draft


def one_late(draft: Draft, state: DecodeState) -> Draft:
    """Choosing by the token itself: where the first draft is id 0 there is no draft after all."""
    draft.num_drafts = draft.num_drafts * (draft.tokens[:, :1] != 0).all(1)
    return draft


@pytest.mark.parametrize("rule", ["rejection", "block"])
def test_a_law_that_was_not_drawn_from_is_noticed(monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    own = LookupDrafter.propose
    monkeypatch.setattr(LookupDrafter, "propose", lambda *arguments: uniform_law(own(*arguments), arguments[1]))
    assert smallest_p_value(ProxyTunedModel, lookup_case(rule, 3), 3_000, seed=5) < chi_square.LEVEL


def test_dropping_certain_drafts_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A certain draft is no draw: whether it is made may depend on it, as it may not where one is drawn."""
    own = LookupDrafter.propose
    monkeypatch.setattr(LookupDrafter, "propose", lambda *arguments: one_late(own(*arguments), arguments[1]))
    assert smallest_p_value(ProxyTunedModel, lookup_case("rejection", 2), 3_000, seed=5) > chi_square.LEVEL


# What it gives


def table_trio() -> tuple[Any, Any, Any]:
    """Models without attention: the next token follows from the last one, so that greedy text runs into a period."""
    models = copy.deepcopy(tiny.shared_trio("llama").models)
    for part in models:
        for layer in part.model.layers:
            layer.self_attn.o_proj.weight.data.zero_()
    return models


def test_repetitive_text_is_copied() -> None:
    ids = torch.tensor(THREE_OWN.base[1])[None]
    proxy = ProxyTunedModel(*table_trio())
    plain = proxy.generate(ids, max_new_tokens=110, num_draft_tokens=0)
    output = proxy.generate(ids, max_new_tokens=110, num_draft_tokens=8, drafter="lookup", return_dict_in_generate=True)
    assert output.sequences.tolist() == plain.tolist()
    period = len(set(plain[0, -60:].tolist()))
    speculation = output.speculation
    assert speculation.num_cycles <= period + 20 + 110 // 9
    assert speculation.acceptance_rate > 0.9


def test_every_model_runs_once_a_cycle(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, list[int]] = {}

    def counted(runner: Any, tokens: torch.Tensor, **arguments: Any) -> torch.Tensor:
        calls.setdefault(runner.role, []).append(tokens.shape[1])
        return forward(runner, tokens, **arguments)

    from specproxy.runner import Runner

    forward = Runner.forward
    monkeypatch.setattr(Runner, "forward", counted)
    rows = greedy_rows("llama", THREE_OWN, length=LENGTH)
    run(drafter="lookup", corpus=spoilt(THREE_OWN, rows))
    assert calls["base"] == calls["expert"] == calls["anti_expert"]
    assert 1 < max(calls["base"]) <= 5


def test_statistics_by_drafter() -> None:
    rows = greedy_rows("llama", THREE_OWN, length=LENGTH)
    speculation = run(drafter="lookup", corpus=spoilt(THREE_OWN, rows)).speculation
    own = speculation.drafters["lookup"]
    assert list(speculation.drafters) == ["lookup"]
    assert speculation.num_cycles - 3 <= own.num_cycles <= speculation.num_cycles, "a last token is nobody's draft"
    assert own.num_draft_tokens == speculation.num_draft_tokens > own.num_accepted_tokens
    assert own.num_accepted_tokens == speculation.num_accepted_tokens > 0
    assert speculation.to_dict()["drafters"] == {"lookup": vars(own)}
    assert run(num_draft_tokens=0, drafter="lookup").speculation.drafters == {}
    assert list(run().speculation.drafters) == ["expert"]


def test_a_models_own_corpus_is_the_default() -> None:
    proxy = model()
    rows = greedy_rows("llama", THREE_OWN, length=LENGTH)
    settings = {"max_new_tokens": LENGTH, "drafter": "lookup", "return_dict_in_generate": True}
    plain = proxy.generate(**THREE_OWN.kwargs(), **settings).speculation.num_accepted_tokens
    proxy.corpus = spoilt(THREE_OWN, rows)
    assert proxy.generate(**THREE_OWN.kwargs(), **settings).speculation.num_accepted_tokens > plain + 10
    other = proxy.generate(**THREE_OWN.kwargs(), corpus=LookupCorpus(), **settings)
    assert other.speculation.num_accepted_tokens == plain


@pytest.mark.parametrize("drafter", ["suffix", "", 3, "Lookup"])
def test_a_drafter_that_is_none(drafter: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"drafter={drafter!r} is not known; use one of expert, lookup"):
        run(drafter=drafter)


def test_a_corpus_that_is_none() -> None:
    with pytest.raises(ConfigurationError, match="corpus is a list; give a LookupCorpus"):
        run(drafter="lookup", corpus=[[1, 2, 3]])
