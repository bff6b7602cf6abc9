"""The cascade gives the expert's own drafts; an assistant's change no token; drafters may change between cycles."""

from __future__ import annotations

import functools
from typing import Any

import chi_square
import pytest
import tiny
import torch
from loop_law import LoopCase, models, smallest_p_value
from support import PAD, RolePrompts, greedy_rows, role_prompts

import specproxy.generate
from specproxy import ConfigurationError, LookupCorpus, PromptError, ProxyTunedModel, VocabularyError
from specproxy.draft import assistant as assistant_module
from specproxy.policy import Outlook, Plan
from specproxy.runner import Runner

THREE_OWN = role_prompts([3, 9, 1], [8, 2, 11], [4, 10, 1], seed=2)
LENGTH = 14
SAMPLED = {"do_sample": True, "seed": 5, "top_k": 12, "temperature": 1.1, "repetition_penalty": 1.1}


@functools.cache
def model(kind: str = "llama", assistant_kind: str = "gpt2") -> ProxyTunedModel:
    """A trio with an assistant of another architecture, which agrees with it now and then."""
    trio = tiny.shared_trio(kind)
    helper = trio.anti_expert if assistant_kind == kind else tiny.shared_trio(assistant_kind).expert
    return ProxyTunedModel(*trio.models, assistant=helper)


def run(proxy: ProxyTunedModel, prompts: RolePrompts = THREE_OWN, **settings: Any) -> Any:
    return proxy.generate(
        **prompts.kwargs(),
        **{"max_new_tokens": LENGTH, "num_draft_tokens": 4, "pad_token_id": PAD, **settings},
        return_dict_in_generate=True,
    )


def guesses(output: Any, prompts: RolePrompts = THREE_OWN) -> LookupCorpus:
    """A corpus of texts that were drafted, so that guesses are now right and now wrong."""
    corpus = LookupCorpus()
    width = max(map(len, prompts.base))
    for prompt, row in zip(prompts.base, output.sequences.tolist(), strict=True):
        corpus.add([*prompt, *row[width:]])
    return corpus


# The cascade


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("llama", {"acceptance": "rejection", **SAMPLED}),
        ("gpt2", {"acceptance": "block", **SAMPLED}),
        ("mistral", {"acceptance": "coupled", **SAMPLED}),
        ("llama", {"acceptance": "block", "no_repeat_ngram_size": 2, **SAMPLED}),
    ],
    ids=["greedy", "rejection", "block", "coupled", "processor"],
)
def test_the_cascade_is_the_expert(monkeypatch: pytest.MonkeyPatch, kind: str, settings: dict[str, Any]) -> None:
    """The same tokens from the same sources, and no more forwards of the expert."""
    calls = 0

    def counted(runner: Any, tokens: torch.Tensor, **arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += runner.role == "expert"
        return forward(runner, tokens, **arguments)

    forward = Runner.forward
    monkeypatch.setattr(Runner, "forward", counted)
    expert = run(model(kind), num_draft_tokens=5, **settings)
    by_expert, calls = calls, 0
    cascade = run(model(kind), num_draft_tokens=5, drafter="cascade", corpus=guesses(expert), **settings)
    assert cascade.sequences.tolist() == expert.sequences.tolist()
    assert cascade.speculation.token_sources == expert.speculation.token_sources
    assert cascade.speculation.num_draft_tokens == expert.speculation.num_draft_tokens
    assert calls <= by_expert


def test_right_guesses_leave_one_forward_to_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counted(runner: Any, tokens: torch.Tensor, **arguments: Any) -> torch.Tensor:
        calls.append(runner.role)
        return forward(runner, tokens, **arguments)

    forward = Runner.forward
    monkeypatch.setattr(Runner, "forward", counted)
    proxy, prompts = equal_models()
    corpus = guesses(run(proxy, prompts), prompts)
    calls.clear()
    assert run(proxy, prompts, drafter="cascade", corpus=corpus).speculation.acceptance_rate == 1.0
    # A step at the bonus position besides; the first cycle has a row of too short a text to match.
    assert calls.count("expert") <= 2 * calls.count("base") + 4 < 5 * calls.count("base")


# The assistant


@pytest.mark.parametrize("settings", [{}, {"acceptance": "coupled", **SAMPLED}], ids=["greedy", "coupled"])
@pytest.mark.parametrize(("kind", "assistant_kind"), [("llama", "llama"), ("gpt2", "gpt2"), ("llama", "mistral")])
def test_an_assistant_changes_no_token(kind: str, assistant_kind: str, settings: dict[str, Any]) -> None:
    proxy = model(kind, assistant_kind)
    per_step = run(proxy, num_draft_tokens=0, **settings)
    for count in (1, 5):
        output = run(proxy, num_draft_tokens=count, drafter="assistant", **settings)
        assert output.sequences.tolist() == per_step.sequences.tolist()
        assert output.speculation.num_draft_tokens > 0
        assert output.speculation.seconds["assistant"] > 0
        if kind == assistant_kind:
            assert output.speculation.num_accepted_tokens > 0


def equal_models(length: int = 9) -> tuple[ProxyTunedModel, RolePrompts]:
    trio = tiny.same_model_trio("gpt2")
    return ProxyTunedModel(*trio.models, assistant=trio.base), role_prompts([5, length, 2], seed=6)


def test_equal_models_keep_every_draft_of_the_assistant() -> None:
    """After full acceptance the last draft has not been read yet; rows end apart and move."""
    proxy, prompts = equal_models()
    eos = run(proxy, prompts).sequences[0, 12].item()
    for settings in ({}, SAMPLED | {"repetition_penalty": 1.0}):
        output = run(proxy, prompts, drafter="assistant", eos_token_id=eos, **settings)
        assert output.speculation.num_draft_tokens > 20
        assert output.speculation.acceptance_rate == 1.0


def test_an_assistant_one_position_late_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(state: Any, runners: Any) -> None:
        own(state, runners)
        runner = runners.assistant
        lengths = runner.cache.host_lengths[: len(state)]
        runner.cache.set_lengths(0, [max(0, length - (length > 9)) for length in lengths])
        runner.cache.host_lengths[: len(state)] = lengths

    own = assistant_module.find_rows
    monkeypatch.setattr(assistant_module, "find_rows", late)
    proxy, prompts = equal_models()
    assert run(proxy, prompts, drafter="assistant").speculation.acceptance_rate < 1.0


@pytest.mark.parametrize("settings", [{}, SAMPLED | {"repetition_penalty": 1.0}], ids=["greedy", "sampled"])
def test_drafters_in_turn(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    """The assistant comes back after cycles of others: what it has missed is read, what was refused is forgotten."""

    class Script:
        offers_wanted = 0
        names = ("assistant", "expert", "assistant", "lookup", "cascade", "expert", "assistant", "assistant")

        def __init__(self, *arguments: Any) -> None:
            self.cycle = 0

        def plan(self, outlook: Outlook) -> Plan:
            name = self.names[self.cycle % len(self.names)]
            self.cycle += 1
            return Plan(min(2 + self.cycle % 3, outlook.most), name)

        def observe(self, report: Any) -> None:
            pass

    monkeypatch.setattr(specproxy.generate, "FixedWindow", Script)
    proxy, prompts = equal_models()
    output = run(proxy, prompts, max_new_tokens=40, drafter="assistant", **settings)
    counts = output.speculation.drafters
    assert set(counts) == set(Script.names)
    assert counts["assistant"].num_draft_tokens == counts["assistant"].num_accepted_tokens > 20
    proxy = model("llama", "llama")
    coupled = settings | {"acceptance": "coupled"}
    output = run(proxy, max_new_tokens=30, drafter="assistant", **coupled)
    monkeypatch.undo()
    per_step = run(proxy, max_new_tokens=30, num_draft_tokens=0, **coupled)
    assert output.sequences.tolist() == per_step.sequences.tolist()


def test_a_long_delay_is_made_up_for_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assistant_module, "_LONGEST_WINDOW", 3)
    monkeypatch.setattr(assistant_module, "_PIECE", 4)
    proxy, prompts = equal_models(length=14)
    assert run(proxy, prompts, drafter="assistant").speculation.acceptance_rate == 1.0


@pytest.mark.parametrize("rule", ["rejection", "block"])
def test_tokens_follow_the_target(rule: str) -> None:
    """The assistant opposes the target: it is the expert of another trio."""
    case = LoopCase(rule, 3, {"temperature": 1.3, "top_p": 0.95}, drafting={"drafter": "assistant"})
    opposed = functools.partial(ProxyTunedModel, assistant=models(-0.5, 3)[1])
    assert smallest_p_value(opposed, case, 3_000, seed=5) > chi_square.LEVEL


@pytest.mark.parametrize("rule", ["greedy", "rejection", "block", "coupled"])
def test_an_assistant_without_a_law_drafts_nothing(rule: str) -> None:
    """NaN comes from the token in one row's prompt: that row goes per step, the others are drafted for."""
    trio = tiny.make_trio("llama")
    proxy = ProxyTunedModel(*trio.models, assistant=tiny.tiny_model("gpt2"))
    assert proxy.assistant is not None
    settings = {} if rule == "greedy" else {"acceptance": rule, "do_sample": True, "seed": [4, 5, 6]}
    prompts = RolePrompts(((3, 7, 39), (9, 4), (39, 8, 1)))

    def poison(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output.masked_fill((inputs[0] == 39)[..., None], torch.nan)

    settings |= {"suppress_tokens": [39]}
    per_step = run(proxy, prompts, num_draft_tokens=0, **settings)
    with_hook = proxy.assistant.get_input_embeddings().register_forward_hook(poison)
    for row in (0, 2):
        own = settings | ({"seed": settings["seed"][row : row + 1]} if "seed" in settings else {})
        alone = run(proxy, prompts.row(row), drafter="assistant", **own)
        assert alone.speculation.num_draft_tokens == 0
        assert alone.sequences[0, 3:].tolist() == per_step.sequences[row, 3:].tolist()
    together = run(proxy, prompts, drafter="assistant", **settings)
    with_hook.remove()
    assert together.sequences[::2].tolist() == per_step.sequences[::2].tolist()
    assert together.speculation.num_draft_tokens > 0


def test_an_assistant_is_no_part_of_the_model() -> None:
    trio = tiny.shared_trio("llama")
    proxy, plain = model("llama", "gpt2"), ProxyTunedModel(*trio.models)
    ids = torch.tensor(THREE_OWN.base[1])[None]
    assert torch.equal(proxy.forward(ids).logits, plain.forward(ids).logits)
    assert run(proxy).sequences[:, 9:].tolist() == [row[:LENGTH] for row in greedy_rows("llama", THREE_OWN)]


def test_assistants_that_cannot_be_used() -> None:
    trio = tiny.shared_trio("llama")
    with pytest.raises(ConfigurationError, match="needs an assistant; construct the model with assistant"):
        run(ProxyTunedModel(*trio.models), drafter="assistant")
    with pytest.raises(VocabularyError, match="the assistant has 30 ids, the trio shares 40"):
        ProxyTunedModel(*trio.models, assistant=tiny.tiny_model("llama", vocab_size=30))
    other = tiny.tiny_tokenizer(renamed={7: "other"})
    with pytest.raises(VocabularyError, match="id 7 is 'w7' for the base and 'other' for the assistant"):
        ProxyTunedModel(*trio.models, tiny.tiny_tokenizer(), assistant=trio.expert, assistant_tokenizer=other)
    short = ProxyTunedModel(*trio.models, assistant=tiny.tiny_model("gpt2", n_positions=16))
    with pytest.raises(PromptError, match="exceeds the assistant's 16 positions"):
        run(short, drafter="assistant")
    assert run(short).sequences.shape[0] == 3
