"""Greedy speculative decoding gives the tokens of plain proxy-tuning: whole tensors, every architecture."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import oracle
import pytest
import tiny
import torch
from support import PAD, RolePrompts, greedy_rows, role_prompts
from transformers import GenerationConfig

from specproxy import ProxyTunedModel

ONE = role_prompts([7], seed=1)
THREE_OWN = role_prompts([3, 9, 1], [8, 2, 11], [4, 10, 1], seed=2)
FIVE = role_prompts([14, 2, 6, 11, 5], seed=3)
FIVE_EXPERT = RolePrompts(FIVE.base, role_prompts([3, 12, 1, 9, 10], seed=4).base)
EIGHT = role_prompts([1, 9, 5, 14, 3, 8, 12, 2], seed=5)


@dataclass(frozen=True)
class Setting:
    """One row of the table: values that go together so that every pair of neighbours meets somewhere."""

    num_draft_tokens: int | str
    prompts: RolePrompts
    max_new_tokens: int
    alpha: float = 1.0
    repetition_penalty: float = 1.0
    eos: tuple[tuple[int, int], ...] = ()  # (row, index) of the oracle's tokens that end a text
    oracle_length: int = 16  # one for all settings that share prompts and law: the oracle's rows are memorised

    def __str__(self) -> str:
        return f"{self.num_draft_tokens}-drafts-{len(self.prompts.base)}-rows-{self.max_new_tokens}-tokens"


SETTINGS = (
    Setting(0, THREE_OWN, 9, alpha=0.7, repetition_penalty=1.3),
    Setting(1, EIGHT, 12, eos=((2, 4), (6, 1)), oracle_length=12),
    Setting(2, ONE, 13, alpha=1.5, repetition_penalty=1.3),
    Setting(3, FIVE_EXPERT, 8, alpha=0.0, oracle_length=8),
    Setting(4, EIGHT, 11, eos=((0, 6),), oracle_length=12),
    Setting(5, THREE_OWN, 16),
    Setting(6, FIVE, 7, alpha=1.5, repetition_penalty=1.2, oracle_length=18),
    Setting(7, THREE_OWN, 15, alpha=0.7, repetition_penalty=1.3, eos=((1, 7),)),
    Setting(8, FIVE_EXPERT, 18, repetition_penalty=1.2, oracle_length=18),
    Setting("auto", FIVE, 18, alpha=1.5, repetition_penalty=1.2, eos=((3, 12),), oracle_length=18),
    Setting(8, ONE, 2, alpha=1.5, repetition_penalty=1.3),
)


def check(kind: str, setting: Setting, pair_kind: str | None = None) -> Any:
    """Compare one call with the oracle; returns the statistics."""
    trio = tiny.shared_trio(kind, pair_kind)
    rows = greedy_rows(
        kind,
        setting.prompts,
        pair_kind=pair_kind,
        alpha=setting.alpha,
        repetition_penalty=setting.repetition_penalty,
        length=setting.oracle_length,
    )
    assert setting.max_new_tokens <= setting.oracle_length
    eos = sorted({rows[row][index] for row, index in setting.eos})
    arguments = setting.prompts.kwargs()
    expected = oracle.expected_output(
        arguments["input_ids"], [oracle.cut(row, setting.max_new_tokens, eos) for row in rows], PAD
    )
    output = ProxyTunedModel(*trio.models).generate(
        **arguments,
        max_new_tokens=setting.max_new_tokens,
        num_draft_tokens=setting.num_draft_tokens,
        alpha=setting.alpha,
        repetition_penalty=setting.repetition_penalty,
        eos_token_id=eos or None,
        pad_token_id=PAD,
        return_dict_in_generate=True,
    )
    assert output.sequences.dtype == torch.int64
    assert output.sequences.tolist() == expected.tolist()
    return output.speculation


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", tiny.SUPPORTED)
def test_greedy_equals_plain_loop(kind, setting):
    check(kind, setting)


@pytest.mark.parametrize("setting", [SETTINGS[1], SETTINGS[5], SETTINGS[8]], ids=str)
@pytest.mark.parametrize(
    ("kind", "pair_kind"), [("llama", "gpt2"), ("gemma3", "opt"), ("gpt2", "qwen3"), ("mixtral", "llama")]
)
def test_mixed_architectures(kind, pair_kind, setting):
    check(kind, setting, pair_kind)


@pytest.mark.parametrize("kind", tiny.SUPPORTED)
def test_the_trios_can_see_a_fault(kind):
    """Some drafts are kept and some refused, or the tests above would prove little."""
    speculation = check(kind, replace(SETTINGS[4], eos=()))
    assert 0.05 < speculation.acceptance_rate < 0.95
    assert 0 < speculation.num_accepted_tokens < speculation.num_draft_tokens
    rows = greedy_rows(kind, EIGHT, length=12)
    assert sum(len(set(row[:11])) for row in rows) > 4 * len(rows), "the texts hardly vary"


@pytest.mark.parametrize("num_draft_tokens", range(9))
@pytest.mark.parametrize("max_new_tokens", [1, 5, 10])
def test_budget_cuts_a_block(num_draft_tokens, max_new_tokens):
    check("llama", Setting(num_draft_tokens, THREE_OWN, max_new_tokens, alpha=0.7, repetition_penalty=1.3))


@pytest.mark.parametrize("index", range(9))
def test_end_of_text_at_every_place_of_a_block(index):
    check("qwen3", Setting(4, EIGHT, 16, eos=((5, index),)))


@pytest.mark.parametrize("batch", [1, 2, 4, 7, 8])
def test_rows_do_not_depend_on_their_batch(batch):
    kept = RolePrompts(EIGHT.base[8 - batch :])
    check("mistral", Setting(5, kept, 14, eos=((batch - 1, 5),)))


def test_without_padding_no_mask_is_needed():
    prompts = role_prompts([6, 6], seed=9)
    rows = greedy_rows("llama", prompts)
    model = ProxyTunedModel(*tiny.shared_trio("llama").models)
    ids = torch.tensor(prompts.base)
    output = model.generate(ids, max_new_tokens=10, num_draft_tokens=3)
    assert output.tolist() == oracle.expected_output(ids, [row[:10] for row in rows], PAD).tolist()


def test_masks_of_other_dtypes():
    prompts = role_prompts([6, 2], seed=9)
    arguments = prompts.kwargs()
    rows = [row[:8] for row in greedy_rows("llama", prompts)]
    model = ProxyTunedModel(*tiny.shared_trio("llama").models)
    for dtype in (torch.bool, torch.int32, torch.float32):
        output = model.generate(arguments["input_ids"], arguments["attention_mask"].to(dtype), max_new_tokens=8)
        assert output.tolist() == oracle.expected_output(arguments["input_ids"], rows, PAD).tolist()


def test_long_text_past_every_sliding_window():
    """Many cycles in a row: windows slide over text that was itself written and rolled back."""
    prompts = role_prompts([4, 13], [9, 2], seed=8)
    for kind in ("mistral", "gemma3"):
        rows = greedy_rows(kind, prompts, repetition_penalty=2.5, length=60)
        assert min(len(set(row)) for row in rows) > 15
        trio = tiny.shared_trio(kind)
        arguments = prompts.kwargs()
        output = ProxyTunedModel(*trio.models).generate(
            **arguments, max_new_tokens=60, num_draft_tokens=6, repetition_penalty=2.5
        )
        assert output.tolist() == oracle.expected_output(arguments["input_ids"], rows, PAD).tolist()


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "opt"])
def test_prompts_that_are_read_in_pieces(kind, monkeypatch):
    """Long prompts are prefilled piece by piece; here a piece is four tokens."""
    monkeypatch.setattr("specproxy.runner._MAX_PREFILL_TOKENS", 4)
    check(kind, SETTINGS[5])
    check(kind, SETTINGS[8])


@pytest.mark.slow
def test_a_text_that_outgrows_its_buffers():
    """Room for 1024 new tokens is made at once, the rest as it is needed; rows end far apart."""
    trio = tiny.make_trio("llama", overrides=({"max_position_embeddings": 2048},) * 3)
    prompts = role_prompts([4, 13, 1], seed=8)
    rows = [oracle.plain_greedy(trio.models, row, max_new_tokens=1300, repetition_penalty=1.1) for row in prompts.base]
    arguments = prompts.kwargs()
    output = ProxyTunedModel(*trio.models).generate(
        **arguments, max_new_tokens=1300, num_draft_tokens=8, repetition_penalty=1.1
    )
    assert output.tolist() == oracle.expected_output(arguments["input_ids"], rows, PAD).tolist()


@pytest.mark.parametrize("num_draft_tokens", [1, 4, 7, "auto"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
def test_equal_models_keep_every_draft(kind, num_draft_tokens):
    trio = tiny.same_model_trio(kind)
    prompts = role_prompts([5, 9, 2], seed=6)
    arguments = prompts.kwargs()
    settings = GenerationConfig(do_sample=False, max_new_tokens=13, pad_token_id=PAD)
    plain = trio.base.generate(**arguments, generation_config=settings)
    output = ProxyTunedModel(*trio.models, alpha=0.7).generate(
        **arguments, max_new_tokens=13, num_draft_tokens=num_draft_tokens, return_dict_in_generate=True
    )
    assert output.sequences.tolist() == plain.tolist()
    assert output.speculation.num_draft_tokens > 0
    assert output.speculation.acceptance_rate == 1.0


@pytest.mark.parametrize("alpha", [0.0, 1.0, 1.5])
def test_equal_pair_gives_the_base_alone(alpha):
    """Without a difference in the pair, every strength gives the base's own greedy text, penalties included."""
    trio = tiny.make_trio("llama", seed=3)
    prompts = role_prompts([5, 9, 2], seed=6)
    arguments = prompts.kwargs()
    eos = int(trio.base.generate(**arguments, max_new_tokens=6, do_sample=False, pad_token_id=PAD)[1, -1])
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=13, repetition_penalty=1.2, eos_token_id=eos, pad_token_id=PAD
    )
    plain = trio.base.generate(**arguments, generation_config=settings)
    output = ProxyTunedModel(trio.base, trio.anti_expert, trio.anti_expert).generate(
        **arguments,
        max_new_tokens=13,
        alpha=alpha,
        repetition_penalty=1.2,
        eos_token_id=eos,
        pad_token_id=PAD,
        return_dict_in_generate=True,
    )
    assert output.sequences.tolist() == plain.tolist()
    assert output.speculation.acceptance_rate < 1.0


def _with_eos(base: Any, expert: Any, anti_expert: Any) -> tuple[ProxyTunedModel, RolePrompts, list[list[int]]]:
    trio = tiny.make_trio("llama")
    for model, eos in zip(trio.models, (base, expert, anti_expert), strict=True):
        model.generation_config.eos_token_id = eos
    return ProxyTunedModel(*trio.models), FIVE, greedy_rows("llama", FIVE)


def test_end_of_text_ids_of_base_and_expert_are_united():
    rows = greedy_rows("llama", FIVE)
    of_base, of_expert, of_anti_expert = rows[0][3], rows[1][5], rows[2][2]
    unseen = next(token for token in range(2, 40) if all(token not in row for row in rows))
    assert of_anti_expert not in (of_base, of_expert)
    model, prompts, rows = _with_eos([of_base, unseen], of_expert, of_anti_expert)
    arguments = prompts.kwargs()
    output = model.generate(**arguments, max_new_tokens=14, pad_token_id=PAD)
    cut = [oracle.cut(row, 14, {of_base, of_expert}) for row in rows]
    assert cut != [oracle.cut(row, 14, {of_base}) for row in rows]
    assert cut != [oracle.cut(row, 14, {of_base, of_expert, of_anti_expert}) for row in rows]
    assert output.tolist() == oracle.expected_output(arguments["input_ids"], cut, PAD).tolist()


def test_given_end_of_text_ids_replace_those_of_the_models():
    rows = greedy_rows("llama", FIVE)
    model, prompts, rows = _with_eos(rows[0][1], rows[1][1], None)
    arguments = prompts.kwargs()
    for eos in (rows[2][5], [rows[2][5], rows[3][7]]):
        stop = {eos} if isinstance(eos, int) else set(eos)
        cut = [oracle.cut(row, 14, stop) for row in rows]
        output = model.generate(**arguments, max_new_tokens=14, eos_token_id=eos, pad_token_id=PAD)
        assert output.tolist() == oracle.expected_output(arguments["input_ids"], cut, PAD).tolist()


def test_an_empty_list_of_end_of_text_ids_ends_nothing():
    rows = greedy_rows("llama", FIVE)
    model, prompts, rows = _with_eos([rows[0][1], rows[1][2]], None, None)
    output = model.generate(**prompts.kwargs(), max_new_tokens=10, eos_token_id=[])
    assert output[:, 14:].tolist() == [row[:10] for row in rows]


def test_padding_follows_transformers():
    """The base's own padding id first, then its first end-of-text id, as in Transformers' `generate`."""
    rows = greedy_rows("llama", FIVE)
    eos = rows[0][2]
    for pad in (27, None):
        model, prompts, rows = _with_eos([eos], None, None)
        model.base.generation_config.pad_token_id = pad
        arguments = prompts.kwargs()
        cut = [oracle.cut(row, 14, {eos}) for row in rows]
        assert len({len(row) for row in cut}) > 1
        output = model.generate(**arguments, max_new_tokens=14)
        expected = oracle.expected_output(arguments["input_ids"], cut, eos if pad is None else pad)
        assert output.tolist() == expected.tolist()


def test_output_ends_with_the_longest_row():
    """Where every row ends before the budget, the tensor is as wide as the longest row needs."""
    rows = greedy_rows("llama", THREE_OWN)
    eos = sorted({row[3] for row in rows})
    cut = [oracle.cut(row, 20, eos) for row in rows]
    model = ProxyTunedModel(*tiny.shared_trio("llama").models)
    arguments = THREE_OWN.kwargs()
    output = model.generate(**arguments, max_new_tokens=20, num_draft_tokens=7, eos_token_id=eos, pad_token_id=PAD)
    assert output.shape[1] - arguments["input_ids"].shape[1] == max(map(len, cut)) <= 4
    assert output.tolist() == oracle.expected_output(arguments["input_ids"], cut, PAD).tolist()
