"""Every argument of Transformers' `generate`: speculation equals per-step decoding, which equals Transformers' own.

Greedy and `coupled` speculation must give per-step decoding's tokens and scores on ragged, left-padded batches; at
alpha = 0 per-step decoding must give the tokens, scores and logits of `base.generate`. Filters that draw are compared
through the scores. Under `rejection` and `block` the joint law is compared with an enumeration.
"""

from __future__ import annotations

import functools
import itertools
import time

import chi_square
import drop_in
import loop_law
import numpy as np
import pytest
import tiny
import torch
from drop_in import ENDS, GREEDY, PAD, ROWS, SAMPLED, Push, arguments, batch, model, new_tokens
from loop_law import LoopCase
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MaxTimeCriteria,
    RepetitionPenaltyLogitsProcessor,
    TypicalLogitsWarper,
)
from transformers.generation import StoppingCriteriaList

from specproxy import ConfigurationError, LogitsError, ProxyTunedModel

RECORDED = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
SAMPLING = {"do_sample": True, "temperature": 1.5, "top_k": 0, "acceptance": "coupled", "seed": 6}


def ends_of(case):
    ends = case.get("eos_token_id", [])
    return {ends} if isinstance(ends, int) else set(ends)


@functools.cache
def plain(**sampling):
    return model().generate(*batch(), **arguments({}, num_draft_tokens=0, **sampling))


@functools.cache
def per_step(name):
    """Recorded greedy output of one case."""
    return model().generate(*batch(), **arguments(GREEDY[name], num_draft_tokens=0, **RECORDED))


def counts(name, output):
    sequences = new_tokens(output.sequences)
    if name == "stopping_criteria":
        return drop_in.counts_of(sequences, {1, *range(0, tiny.VOCAB_SIZE, 5)})
    return drop_in.counts_of(sequences, ends_of(GREEDY[name]))


@pytest.mark.parametrize("name", GREEDY)
def test_per_step_equals_transformers(name):
    case = arguments(GREEDY[name], **RECORDED)
    ids, mask = batch()
    base = tiny.shared_trio("llama").base
    with drop_in.silent():
        theirs = base.generate(ids, attention_mask=mask, do_sample=False, **case)
    ours = model(0.0).generate(ids, mask, num_draft_tokens=0, **case)
    assert torch.equal(ours.sequences, theirs.sequences)
    lengths = counts(name, ours)
    assert drop_in.largest_gap(ours.scores, theirs.scores, lengths) < 1e-5
    assert drop_in.largest_gap(ours.logits, theirs.logits, lengths) < 1e-5


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_speculation_equals_per_step(name):
    expected = per_step(name)
    for count in (1, 4):
        output = model().generate(*batch(filler=39), **arguments(GREEDY[name], num_draft_tokens=count, **RECORDED))
        assert new_tokens(output.sequences) == new_tokens(expected.sequences), count
        assert drop_in.largest_gap(output.scores, expected.scores, counts(name, expected)) < 1e-5
        assert drop_in.largest_gap(output.logits, expected.logits, counts(name, expected)) < 1e-5
    assert output.speculation.num_draft_tokens > 0


@pytest.mark.parametrize("name", GREEDY)
def test_every_case_changes_the_plain_tokens(name):
    assert not torch.equal(per_step(name).sequences, plain())


@pytest.mark.parametrize("name", GREEDY)
def test_coupled_speculation_equals_per_step(name):
    settings = arguments(GREEDY[name], **SAMPLING)
    expected = model().generate(*batch(), num_draft_tokens=0, **settings)
    for count in (2, 5):
        assert torch.equal(model().generate(*batch(), num_draft_tokens=count, **settings), expected), count
    if name not in ("min_both", "renormalize_logits"):  # of other laws than the plain draw's
        assert not torch.equal(expected, plain(**SAMPLING))


def test_no_bigram_comes_twice():
    case = GREEDY["no_repeat_ngram_size"]
    texts = [
        prompt + row for prompt, row in zip(ROWS, new_tokens(per_step("no_repeat_ngram_size").sequences), strict=True)
    ]
    for text, prompt in zip(texts, ROWS, strict=True):
        before = list(itertools.pairwise(prompt))
        for t, pair in enumerate(itertools.pairwise(text)):
            assert t < len(before) or pair not in list(itertools.pairwise(text))[:t]
    free = model().generate(*batch(), **arguments({**case, "no_repeat_ngram_size": None}))
    assert [prompt + row for prompt, row in zip(ROWS, new_tokens(free), strict=True)] != texts


def test_drafts_are_accepted_under_python_processors():
    output = model().generate(*batch(), **arguments(GREEDY["penalty_and_python"], num_draft_tokens=4, **RECORDED))
    assert output.speculation.num_accepted_tokens > 0
    assert output.speculation.num_draft_tokens > output.speculation.num_accepted_tokens


@pytest.mark.parametrize("name", SAMPLED)
def test_scores_of_draws_are_transformers_chain_over_the_logits(name):
    case = SAMPLED[name]
    settings = {**RECORDED, "do_sample": True, "seed": 4, "acceptance": "coupled"}
    per_step = model().generate(*batch(), **arguments(case, num_draft_tokens=0, **settings))
    chain = drop_in.own_chain(case, prompt_length=7)
    filtered = 0
    for row, prompt in enumerate(ROWS):
        tokens = new_tokens(per_step.sequences)[row]
        for t, (logits, scores) in enumerate(zip(per_step.logits, per_step.scores, strict=True)):
            prefix = torch.tensor([prompt + tokens[:t]])
            expected = chain(prefix, logits[row : row + 1].double())[0].float()
            assert torch.equal(scores[row].isinf(), expected.isinf())
            filtered += int(expected.isinf().sum())
            finite = ~expected.isinf()
            torch.testing.assert_close(scores[row][finite], expected[finite], rtol=1e-5, atol=1e-5)
            assert not expected[tokens[t]].isinf(), "a filtered token was drawn"
    assert filtered > 0
    for count in (1, 4, "auto"):
        output = model().generate(*batch(filler=39), **arguments(case, num_draft_tokens=count, **settings))
        assert new_tokens(output.sequences) == new_tokens(per_step.sequences), count
        assert drop_in.largest_gap(output.scores, per_step.scores, [12, 12, 12]) < 1e-5
        assert drop_in.largest_gap(output.logits, per_step.logits, [12, 12, 12]) < 1e-5


@pytest.mark.parametrize("rule", ["rejection", "block"])
@pytest.mark.parametrize("name", ["typical_p", "fused", "custom_processor"])
def test_recorded_scores_do_not_depend_on_the_rule(rule, name):
    settings = {**RECORDED, "do_sample": True, "seed": 4, "acceptance": rule}
    output = model().generate(*batch(), **arguments(SAMPLED[name], num_draft_tokens=3, **settings))
    chain = drop_in.own_chain(SAMPLED[name], prompt_length=7)
    for row, prompt in enumerate(ROWS):
        tokens = new_tokens(output.sequences)[row]
        logits = model().forward(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 :]
        for t in range(len(tokens)):
            torch.testing.assert_close(output.logits[t][row], logits[t].float(), rtol=1e-5, atol=1e-5)
            expected = chain(torch.tensor([prompt + tokens[:t]]), logits[t : t + 1])[0].float()
            torch.testing.assert_close(output.scores[t][row], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 4])
def test_custom_processors_see_unpadded_prefixes_and_change_tokens(count):
    push = Push()
    ids, mask = batch(filler=39, extra=3)
    output = model().generate(ids, mask, **arguments({"logits_processor": [push]}, num_draft_tokens=count))
    rows = new_tokens(output, ids.shape[1])
    models = tiny.shared_trio("llama").models
    for prompt, tokens in zip(ROWS, rows, strict=True):
        assert tokens == drop_in.plain_loop(models, prompt, 12, Push())
        assert {tuple(prompt + tokens[:t]) for t in range(12)} <= set(push.seen)
    starts = [tuple(prompt) for prompt in ROWS]
    assert all(any(seen[: len(start)] == start for start in starts) for seen in push.seen)
    assert rows != new_tokens(plain())
    if count == 0:
        assert len(push.seen) == 3 * 12


@pytest.mark.parametrize("rule", ["rejection", "block", "coupled"])
def test_processors_never_see_what_no_text_can_hold(rule):
    """Neither a prefix behind an end token nor one that has used up its budget: a grammar need not know them."""

    def grammar(row, prefix):
        new = prefix[len(ROWS[row]) :].tolist()
        assert not set(new[:]).intersection(ENDS), "asked for a token behind an end token"
        assert len(new) < 9, "asked for a token beyond the budget"
        shown.append(len(new))
        return [8, 10, 11, *ENDS]

    shown = []
    settings = {"do_sample": True, "seed": 1, "top_k": 0, "temperature": 3.0, "max_new_tokens": 9}
    case = {"prefix_allowed_tokens_fn": grammar, "eos_token_id": ENDS, "acceptance": rule}
    output = model().generate(*batch(), **arguments(case, num_draft_tokens=6, **settings))
    assert max(shown) > 0
    assert set(itertools.chain(*new_tokens(output))) <= {8, 10, 11, PAD, *ENDS}


def test_a_custom_processor_takes_the_place_of_one_of_its_type():
    ids, mask = batch()
    custom = RepetitionPenaltyLogitsProcessor(1.6, prompt_ignore_length=(mask != 0).int().argmax(dim=1)[1:2])
    row = {"input_ids": ids[1:2], "attention_mask": mask[1:2]}
    both = arguments({"repetition_penalty": 1.1, "logits_processor": LogitsProcessorList([custom])})
    with drop_in.silent():
        theirs = tiny.shared_trio("llama").base.generate(**row, do_sample=False, **both)
    plain_custom = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.6)])
    ours = model(0.0).generate(**row, **{**both, "logits_processor": plain_custom})
    assert torch.equal(ours, theirs)
    stronger = model(0.0).generate(**row, **arguments({"repetition_penalty": 1.6 * 1.1}))
    assert not torch.equal(ours, stronger), "both penalties would look the same here"


@pytest.mark.parametrize("count", [0, 3])
def test_forced_first_token_behind_a_prompt_of_one(count):
    """The forced token comes first, and what may not begin a text may not follow it."""
    prompt = torch.tensor([[5]])
    for case in ({"forced_bos_token_id": 8}, {"forced_bos_token_id": 8, "begin_suppress_tokens": list(range(2, 38))}):
        theirs = tiny.shared_trio("llama").base.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **arguments(case)
        )
        ours = model(0.0).generate(prompt, num_draft_tokens=count, **arguments(case))
        assert torch.equal(ours, theirs) and ours[0, 1] == 8
    assert ours[0, 2] not in range(2, 38)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_invalid_logits_of_the_base_are_repaired_as_in_transformers(bad):
    def spoil(_module, _arguments, output):
        output.logits = output.logits.clone()
        output.logits[..., 3::11] = bad
        return output

    base = tiny.shared_trio("llama").base
    repaired = arguments({"remove_invalid_values": True})
    hook = base.register_forward_hook(spoil)
    try:
        ids, mask = batch()
        theirs = base.generate(ids, attention_mask=mask, do_sample=False, **repaired)
        for count in (0, 3):
            assert torch.equal(model(0.0).generate(ids, mask, num_draft_tokens=count, **repaired), theirs)
        if bad != -torch.inf:
            with pytest.raises(LogitsError) as caught:
                model(0.0).generate(ids, mask, **arguments({}, **RECORDED))
            assert caught.value.rows == [0, 1, 2] and caught.value.partial.scores == ()
    finally:
        hook.remove()


@pytest.mark.parametrize("count", [0, 4])
def test_filters_in_python_see_shared_ids_alone(count):
    """Ids that the tokenizer does not know take no mass before a filter, whichever way the filter is computed."""
    known = tiny.tiny_tokenizer(missing=tuple(range(10, 40, 2)))
    narrow = ProxyTunedModel(*tiny.shared_trio("llama").models, tokenizer=known)
    missing = torch.tensor(range(10, 40, 2))
    case = {"typical_p": 0.7, "temperature": 1.5}
    settings = {**RECORDED, "do_sample": True, "seed": 4, "acceptance": "coupled"}
    output = narrow.generate(*batch(), **arguments(case, num_draft_tokens=count, **settings))
    chain = drop_in.own_chain(case, 7)
    differs = False
    for row, prompt in enumerate(ROWS):
        tokens = new_tokens(output.sequences)[row]
        for t in range(12):
            logits = narrow.forward(torch.tensor([prompt + tokens[:t]])).logits[:, -1]
            assert logits[0, missing].isneginf().all()
            prefix = torch.tensor([prompt + tokens[:t]])
            expected = chain(prefix, logits)[0].float()
            torch.testing.assert_close(output.scores[t][row], expected, rtol=1e-5, atol=1e-5)
            unmasked = (
                chain(prefix, model().forward(prefix).logits[:, -1])[0].float().index_fill(0, missing, -torch.inf)
            )
            differs |= not torch.equal(expected.isinf(), unmasked.isinf())
    assert differs, "the missing ids take too little mass to tell"


def test_several_processors_run_in_order():
    def half(_ids, scores):
        return scores / 2

    def shift(_ids, scores):
        shifted = scores.clone()
        shifted[:, 5] += 9
        return shifted

    settings = arguments({"logits_processor": [half, shift]}, **RECORDED)
    output = model().generate(*batch(), num_draft_tokens=2, **settings)
    for logits, scores in zip(output.logits, output.scores, strict=True):
        torch.testing.assert_close(scores, shift(None, half(None, logits)))


def test_stopping_criteria_see_unpadded_texts_token_by_token():
    seen = []

    def criterion(input_ids, _scores):
        seen.append(tuple(input_ids[0].tolist()))
        return torch.zeros(1, dtype=torch.bool)

    criteria = StoppingCriteriaList([criterion])
    rows = new_tokens(model().generate(*batch(), **arguments({"stopping_criteria": criteria}, num_draft_tokens=5)))
    texts = [tuple(prompt + row[: t + 1]) for prompt, row in zip(ROWS, rows, strict=True) for t in range(12)]
    assert sorted(seen) == sorted(texts), "each token asks once, with its own text"
    assert rows == new_tokens(plain())


@pytest.mark.parametrize("count", [0, 4])
def test_max_time_ends_every_row(count):
    def slow(_ids, scores):
        time.sleep(0.03)
        return scores

    case = {"max_time": 0.2, "logits_processor": [slow], "max_new_tokens": 100}
    began = time.perf_counter()
    output = model().generate(*batch(), **arguments(case, num_draft_tokens=count))
    # One cycle at most runs over: 3 rows of 9 positions at 0.03 s, and a slow machine's forwards.
    assert time.perf_counter() - began < 10
    assert 1 <= output.shape[1] - 7 < 100
    by_hand = {**case, "max_time": None, "stopping_criteria": [MaxTimeCriteria(0.2)]}
    assert 1 <= model().generate(*batch(), **arguments(by_hand, num_draft_tokens=count)).shape[1] - 7 < 100


def test_generation_config_supplies_what_the_call_leaves_open():
    config = GenerationConfig(max_new_tokens=6, repetition_penalty=1.6, eos_token_id=ENDS, pad_token_id=PAD)
    explicit = {"max_new_tokens": 6, "repetition_penalty": 1.6, "eos_token_id": ENDS, "pad_token_id": PAD}
    before = config.to_dict()
    assert torch.equal(model().generate(*batch(), generation_config=config), model().generate(*batch(), **explicit))
    overridden = model().generate(*batch(), generation_config=config, repetition_penalty=1.0, eos_token_id=[])
    assert torch.equal(overridden, plain()[:, : 7 + 6])
    longer = model().generate(*batch(), generation_config=config, max_new_tokens=12, eos_token_id=[])
    assert longer.shape[1] == 7 + 12
    assert config.to_dict() == before, "the caller's configuration was changed"


def test_generation_config_shapes_the_law_and_the_output():
    sampled = {"do_sample": True, "typical_p": 0.6, "temperature": 1.4, "top_k": 11, "num_return_sequences": 2}
    config = GenerationConfig(**sampled, **RECORDED, max_new_tokens=8, suppress_tokens=[3, 4], pad_token_id=PAD)
    from_config = model().generate(*batch(), generation_config=config, seed=3)
    explicit = model().generate(*batch(), **sampled, **RECORDED, max_new_tokens=8, suppress_tokens=[3, 4], seed=3)
    assert torch.equal(from_config.sequences, explicit.sequences)
    assert len(from_config.scores) == 8 and from_config.scores[0].shape == (6, tiny.VOCAB_SIZE)


def test_models_own_sampling_defaults_are_not_used():
    base, expert, anti_expert = tiny.shared_trio("llama").models
    kept = base.generation_config
    base.generation_config = GenerationConfig(do_sample=True, temperature=9.0, repetition_penalty=3.0, max_new_tokens=2)
    try:
        assert torch.equal(
            ProxyTunedModel(base, expert, anti_expert).generate(*batch(), max_new_tokens=12, pad_token_id=PAD), plain()
        )
    finally:
        base.generation_config = kept


def test_max_length_counts_the_padded_prompt():
    short = model().generate(*batch(), max_length=11, pad_token_id=PAD)
    assert torch.equal(short, plain()[:, :11])
    beaten = model().generate(*batch(), max_length=11, max_new_tokens=12, pad_token_id=PAD)
    assert torch.equal(beaten, plain())
    with pytest.raises(ConfigurationError, match=r"max_length=7 .*max_new_tokens"):
        model().generate(*batch(), max_length=7)


@pytest.mark.parametrize("ids", [torch.tensor([10, 20]), (10, 20)])
def test_id_lists_may_be_tensors_or_tuples(ids):
    expected = model().generate(*batch(), **arguments({"suppress_tokens": [10, 20], "eos_token_id": [10, 20]}))
    assert torch.equal(model().generate(*batch(), **arguments({"suppress_tokens": ids, "eos_token_id": ids})), expected)


# The joint law of drawn tokens. Python processors cost tens of microseconds a call, which bounds the sizes.

SAMPLES = 2_000


def favour(input_ids, scores):
    """Raises the id behind the last one by an amount that depends on the length, so that a slip would show."""
    raised = scores.clone()
    raised[:, (int(input_ids[0, -1]) + 1) % 5] += 0.5 + 0.5 * (input_ids.shape[1] % 2)
    return raised


def python_law(case, prompt, chain):
    """Exact joint law [5] * length after one prompt, from plain forwards and processors alone."""
    trio = loop_law.models(case.correlation, case.seed)
    law = np.ones(())
    for depth in range(case.length):
        step = np.empty((5,) * (depth + 1))
        for prefix in itertools.product(range(5), repeat=depth):
            ids = torch.tensor([[*prompt, *prefix]])
            with torch.no_grad():
                base, expert, anti = (m(input_ids=ids, use_cache=False).logits[:, -1, :5].double() for m in trio)
            scores = base + expert - anti
            for processor in chain:
                scores = processor(ids, scores)
            step[prefix] = scores.softmax(-1)[0].numpy()
        law = law[..., None] * step
    return law


LAWS = {
    "typical_p": ({"typical_p": 0.8}, [TypicalLogitsWarper(0.8)]),
    "processor": ({"logits_processor": [favour]}, [favour]),
}


def test_power_of_the_law_tests():
    assert chi_square.power(SAMPLES, 25, 0.14) > 0.999


@pytest.mark.parametrize("rule", ["rejection", "block"])
@pytest.mark.parametrize("name", LAWS)
def test_draws_under_python_laws_follow_the_target(name, rule):
    settings, chain = LAWS[name]
    case = LoopCase(rule, 2, settings, length=2, extra=1)
    drawn = loop_law.sample(ProxyTunedModel, case, SAMPLES, seed=8)
    for prompt, tokens in zip(loop_law.PROMPTS, drawn, strict=True):
        law = python_law(case, prompt, chain)
        assert chi_square.p_value(tokens, law) > chi_square.LEVEL
        # The same draws are not of the law without the processor.
        assert chi_square.p_value(tokens, python_law(case, prompt, [])) < chi_square.LEVEL
