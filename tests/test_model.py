"""`ProxyTunedModel` itself: construction, loading, combined logits, vocabularies, streaming, statistics."""

from __future__ import annotations

import json
from typing import Any

import oracle
import pytest
import tiny
import torch
import transformers
from support import FILLER, PAD, Recorder, RolePrompts, greedy_rows, role_prompts

from specproxy import ConfigurationError, ProxyTunedModel, SpeculationStats, VocabularyError

THREE = role_prompts([6, 2, 9], seed=31)
ONE = role_prompts([5], seed=32)
RULES = ("rejection", "block", "coupled")


@pytest.fixture(scope="module")
def model() -> ProxyTunedModel:
    return ProxyTunedModel(*tiny.shared_trio("llama").models)


def test_attributes():
    trio = tiny.shared_trio("llama")
    tokenizer = tiny.tiny_tokenizer()
    model = ProxyTunedModel(*trio.models, tokenizer=tokenizer, alpha=0.25)
    assert (model.base, model.expert, model.anti_expert) == trio.models
    assert model.tokenizer is tokenizer
    assert model.alpha == 0.25 and model.vocab_size == 40
    assert model.dtype == torch.float64 and torch.device(model.device) == torch.device("cpu")
    assert ProxyTunedModel(*trio.models).tokenizer is None
    assert ProxyTunedModel(*trio.models).alpha == 1.0


def test_alpha_of_the_model_and_of_a_call():
    trio = tiny.shared_trio("llama")
    model = ProxyTunedModel(*trio.models, alpha=0.7)
    for alpha, used in ((None, 0.7), (1.5, 1.5), (0.0, 0.0), (-0.5, -0.5)):
        rows = greedy_rows("llama", THREE, alpha=used)
        assert model.generate(**THREE.kwargs(), max_new_tokens=10, alpha=alpha)[:, 9:].tolist() == [
            row[:10] for row in rows
        ]
    assert model.alpha == 0.7


# Combined logits


def expected_logits(models: Any, prompt: tuple[int, ...], alpha: float) -> torch.Tensor:
    """[S, V] of one unpadded row."""
    with torch.no_grad():
        parts = [model(input_ids=torch.tensor([prompt]), use_cache=False).logits for model in models]
    return oracle.combine(*parts, alpha)[0]


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2", "opt"])
def test_forward_combines_logits(kind):
    trio = tiny.shared_trio(kind)
    model = ProxyTunedModel(*trio.models, alpha=0.7)
    arguments = THREE.kwargs()
    logits = model.forward(arguments["input_ids"], arguments["attention_mask"]).logits
    assert logits.shape == (3, 9, 40) and logits.dtype == torch.float64
    for row, prompt in zip(logits, THREE.base, strict=True):
        torch.testing.assert_close(row[-len(prompt) :], expected_logits(trio.models, prompt, 0.7))


def test_forward_without_a_mask():
    trio = tiny.shared_trio("llama")
    logits = ProxyTunedModel(*trio.models).forward(torch.tensor(ONE.base)).logits
    torch.testing.assert_close(logits[0], expected_logits(trio.models, ONE.base[0], 1.0))


def test_half_precision_is_combined_in_float32():
    trio = tiny.make_trio("llama", dtype=torch.bfloat16)
    logits = ProxyTunedModel(*trio.models).forward(torch.tensor(ONE.base)).logits
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits[0], expected_logits(trio.models, ONE.base[0], 1.0), atol=0.15, rtol=0.02)


def test_padded_widths_give_the_smallest():
    trio = tiny.make_trio("llama", vocab_sizes=(48, 44, 40))
    model = ProxyTunedModel(*trio.models)
    assert model.vocab_size == 40
    logits = model.forward(torch.tensor(ONE.base)).logits
    assert logits.shape[-1] == 40
    torch.testing.assert_close(logits[0], expected_logits(trio.models, ONE.base[0], 1.0))


# Vocabularies


def _favour(model: Any, ids: list[int]) -> None:
    """Make a model want these ids above all others."""

    def lift(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[..., ids] = 200.0
        return output

    model.get_output_embeddings().register_forward_hook(lift)


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("vocab_sizes", [(48, 40, 40), (40, 48, 40), (40, 40, 48), (44, 48, 40), (48, 44, 41)], ids=str)
def test_padded_ids_change_nothing(vocab_sizes, do_sample):
    """The padding of every wider model shouts; the text is that of the shared ids alone."""
    trio = tiny.make_trio("llama", vocab_sizes=vocab_sizes)
    width = min(vocab_sizes)
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": do_sample, "seed": 3, "acceptance": "coupled"}
    model = ProxyTunedModel(*trio.models)
    if do_sample:
        rows = model.generate(**THREE.kwargs(), **settings)[:, 9:].tolist()
    else:
        rows = [oracle.plain_greedy(trio.models, prompt, max_new_tokens=12) for prompt in THREE.base]
    for member, size in zip(trio.models, vocab_sizes, strict=True):
        if size > width:
            _favour(member, list(range(width, size)))
    assert model.generate(**THREE.kwargs(), **settings)[:, 9:].tolist() == rows


@pytest.mark.parametrize("role", ["base", "expert"])
@pytest.mark.parametrize("acceptance", RULES)
def test_ids_without_a_token_are_never_generated(role, acceptance):
    """The tokenizer knows 0..35 but for 20: ids past its end and holes are masked in target and draft."""
    trio = tiny.make_trio("llama", vocab_sizes=(48, 40, 40))
    spurious = [20, 36, 37, 38, 39]
    tokenizer = tiny.tiny_tokenizer(36, missing=(20,))
    model = ProxyTunedModel(*trio.models, tokenizer=tokenizer)
    prompts = RolePrompts(((5, 9, 11), (30, 4, 8)))
    settings: dict[str, Any] = {"max_new_tokens": 30, "temperature": 2.0, "top_k": 0, "acceptance": acceptance}
    clean = model.generate(**prompts.kwargs(), do_sample=True, seed=2, **settings)[:, 3:].tolist()
    _favour(getattr(trio, role), spurious)
    for do_sample in (True, False):
        output = model.generate(**prompts.kwargs(), do_sample=do_sample, seed=2, **settings)[:, 3:].tolist()
        assert not set(spurious) & {token for row in output for token in row}
        if do_sample:
            assert output == clean, "forbidden ids took mass from the others"
    assert len({token for row in clean for token in row}) > 15


def test_greedy_text_over_the_shared_ids():
    trio = tiny.make_trio("llama")
    tokenizer = tiny.tiny_tokenizer(36, missing=(20,))
    prompts = RolePrompts(((5, 9, 11),))
    tokens: list[int] = []
    for _ in range(10):
        scores = expected_logits(trio.models, (*prompts.base[0], *tokens), 1.0)[-1]
        scores[[20, 36, 37, 38, 39]] = -torch.inf
        tokens.append(int(scores.argmax()))
    assert tokens != oracle.plain_greedy(trio.models, prompts.base[0], max_new_tokens=10), "nothing was masked"
    output = ProxyTunedModel(*trio.models, tokenizer=tokenizer).generate(**prompts.kwargs(), max_new_tokens=10)
    assert output[0, 3:].tolist() == tokens


def test_a_penalty_on_prompt_ids_past_the_shared_ones():
    """The base may read ids that the pair does not have: they cannot be generated, and nothing else is penalised."""
    trio = tiny.make_trio("llama", vocab_sizes=(48, 40, 40))
    prompt, own = [5, 45, 40, 47, 9], [5, 6, 9]
    expected = oracle.plain_greedy(
        trio.models, prompt, expert_prompt=own, anti_expert_prompt=own, max_new_tokens=12, repetition_penalty=1.5
    )
    output = ProxyTunedModel(*trio.models).generate(
        torch.tensor([prompt]),
        expert_input_ids=torch.tensor([own]),
        anti_expert_input_ids=torch.tensor([own]),
        max_new_tokens=12,
        repetition_penalty=1.5,
    )
    assert output[0, 5:].tolist() == expected


# Loading


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("trio")
    for role, member in zip(("base", "expert", "anti_expert"), tiny.shared_trio("llama").models, strict=True):
        member.save_pretrained(root / role)
        tiny.tiny_tokenizer().save_pretrained(root / role)
    return root


def load(folders: Any, **settings: Any) -> ProxyTunedModel:
    """The saved trio, without progress bars."""
    pair = {"expert": str(folders / "expert"), "anti_expert": str(folders / "anti_expert")}
    return ProxyTunedModel.from_pretrained(str(folders / "base"), **pair, progress=False, **settings)


def test_from_pretrained(folders):
    model = load(folders, dtype=torch.float64, alpha=0.7)
    assert model.alpha == 0.7 and model.dtype == torch.float64
    rows = greedy_rows("llama", THREE, alpha=0.7)
    assert model.generate(**THREE.kwargs(), max_new_tokens=10)[:, 9:].tolist() == [row[:10] for row in rows]
    assert model.tokenizer.convert_tokens_to_ids("w17") == 17
    assert not any(member.training for member in (model.base, model.expert, model.anti_expert))


def test_from_pretrained_takes_path_objects_and_a_tokenizer(folders):
    tokenizer = tiny.tiny_tokenizer()
    model = ProxyTunedModel.from_pretrained(
        folders / "base",
        expert=folders / "expert",
        anti_expert=folders / "anti_expert",
        tokenizer=tokenizer,
        progress=False,
    )
    assert model.tokenizer is tokenizer


def test_settings_per_model(folders):
    model = load(
        folders,
        dtype=torch.float32,
        base_kwargs={"dtype": torch.float64},
        expert_kwargs={"attn_implementation": "eager"},
    )
    assert [member.dtype for member in (model.base, model.expert, model.anti_expert)] == [
        torch.float64,
        torch.float32,
        torch.float32,
    ]
    assert model.expert.config._attn_implementation == "eager"
    assert model.anti_expert.config._attn_implementation == "sdpa"
    plain = load(folders, dtype=torch.float32)
    assert plain.base.dtype == torch.float32
    output = model.generate(**THREE.kwargs(), max_new_tokens=6)
    assert output[:, 9:].tolist() == [row[:6] for row in greedy_rows("llama", THREE)]


def test_an_assistant_from_a_folder(folders, tmp_path):
    tiny.shared_trio("gpt2").expert.save_pretrained(tmp_path)
    settings = {"assistant": tmp_path, "assistant_kwargs": {"dtype": torch.float32}, "dtype": torch.float64}
    model = load(folders, **settings)
    assert model.assistant.config.model_type == "gpt2" and load(folders).assistant is None
    assert [member.dtype for member in (model.expert, model.assistant)] == [torch.float64, torch.float32]
    output = model.generate(**THREE.kwargs(), max_new_tokens=10, drafter="assistant", return_dict_in_generate=True)
    assert output.sequences[:, 9:].tolist() == [row[:10] for row in greedy_rows("llama", THREE)]
    assert set(output.speculation.drafters) == {"assistant"}
    tiny.tiny_tokenizer(renamed={7: "seven"}).save_pretrained(tmp_path)
    with pytest.raises(VocabularyError, match="id 7 is 'w7' for the base and 'seven' for the assistant"):
        load(folders, **settings)


def test_arguments_of_a_model_that_is_not_named(folders):
    with pytest.raises(ConfigurationError, match="assistant_kwargs was given without assistant; name the assistant"):
        load(folders, assistant_kwargs={"dtype": torch.float64})


def test_padded_tokenizers_of_one_family(folders, tmp_path):
    """A smaller tokenizer that agrees on its own ids is no error: the shared ids are used."""
    tiny.shared_trio("llama").expert.save_pretrained(tmp_path)
    tiny.tiny_tokenizer(36).save_pretrained(tmp_path)
    model = ProxyTunedModel.from_pretrained(
        folders / "base", expert=tmp_path, anti_expert=folders / "anti_expert", progress=False
    )
    output = model.generate(**ONE.kwargs(), max_new_tokens=60, do_sample=True, temperature=3.0, top_k=0, seed=1)
    assert max(output[0, 5:].tolist()) == 35


# Streaming


@pytest.mark.parametrize("num_draft_tokens", [0, 1, 4])
@pytest.mark.parametrize("do_sample", [False, True])
def test_streaming(model, num_draft_tokens, do_sample):
    rows = greedy_rows("llama", ONE)
    recorder = Recorder()
    output = model.generate(
        **ONE.kwargs(),
        max_new_tokens=11,
        num_draft_tokens=num_draft_tokens,
        do_sample=do_sample,
        seed=3,
        eos_token_id=None if do_sample else rows[0][8],
        streamer=recorder,
    )
    assert recorder.chunks[0].flatten().tolist() == list(ONE.base[0])
    assert recorder.ids(start=1) == output[0, 5:].tolist()
    assert recorder.ends == 1
    assert len(recorder.chunks) > 2, "all tokens came at once"
    if not do_sample:
        assert recorder.ids(start=1) == oracle.cut(rows[0], 11, {rows[0][8]})


def test_streaming_a_left_padded_prompt(model):
    ids, mask = tiny.left_pad([list(ONE.base[0])], pad=FILLER, extra=3)
    recorder = Recorder()
    output = model.generate(ids, mask, max_new_tokens=6, streamer=recorder)
    assert recorder.chunks[0].flatten().tolist() == ids[0].tolist()
    assert recorder.ids(start=1) == output[0, 8:].tolist()


def test_streaming_text(model, capsys):
    tokenizer = tiny.tiny_tokenizer()
    streamer = transformers.TextStreamer(tokenizer, skip_prompt=True)
    output = model.generate(**ONE.kwargs(), max_new_tokens=6, streamer=streamer)
    assert capsys.readouterr().out.split() == tokenizer.convert_ids_to_tokens(output[0, 5:].tolist())


# Statistics


def check_statistics(statistics: SpeculationStats, new_tokens: list[list[int]], num_draft_tokens: int) -> None:
    """What must hold for every call; `new_tokens` without padding."""
    assert [len(sources) for sources in statistics.token_sources] == [len(row) for row in new_tokens]
    sources = [source for row in statistics.token_sources for source in row]
    assert set(sources) <= {"draft", "target"}
    assert statistics.num_new_tokens == len(sources) == sum(map(len, new_tokens))
    assert statistics.num_accepted_tokens == sources.count("draft")
    assert statistics.num_accepted_tokens <= statistics.num_draft_tokens
    assert sum(statistics.accepted_per_position) == statistics.num_accepted_tokens
    assert sum(statistics.drafted_per_position) == statistics.num_draft_tokens
    assert len(statistics.accepted_per_position) == len(statistics.drafted_per_position) <= num_draft_tokens
    pairs = zip(statistics.accepted_per_position, statistics.drafted_per_position, strict=True)
    assert all(accepted <= drafted for accepted, drafted in pairs)
    assert statistics.accepted_per_position == sorted(statistics.accepted_per_position, reverse=True)
    assert statistics.drafted_per_position == sorted(statistics.drafted_per_position, reverse=True)
    if statistics.num_draft_tokens:
        rate = statistics.num_accepted_tokens / statistics.num_draft_tokens
        assert statistics.acceptance_rate == pytest.approx(rate)
    else:
        assert statistics.acceptance_rate == 0.0
    assert statistics.kernels == "torch"
    assert {"total", "expert", "anti_expert", "base", "other"} <= set(statistics.seconds)
    parts = [statistics.seconds[name] for name in ("expert", "anti_expert", "base", "other")]
    assert min(parts) >= 0 and sum(parts) == pytest.approx(statistics.seconds["total"], rel=0.05)
    as_dict = json.loads(json.dumps(statistics.to_dict()))
    for name in (
        "num_cycles",
        "num_draft_tokens",
        "num_accepted_tokens",
        "num_new_tokens",
        "acceptance_rate",
        "mean_acceptance_length",
        "mean_acceptance_length_without_bonus",
        "accepted_per_position",
        "drafted_per_position",
        "token_sources",
        "seconds",
        "kernels",
    ):
        assert as_dict[name] == getattr(statistics, name), name


@pytest.mark.parametrize("num_draft_tokens", [1, 2, 5, 8])
@pytest.mark.parametrize("mode", ["greedy", *RULES])
def test_statistics(model, mode, num_draft_tokens):
    rows = greedy_rows("llama", THREE)
    eos = rows[1][5]
    sampling = {} if mode == "greedy" else {"do_sample": True, "acceptance": mode, "seed": 1, "alpha": 1.5}
    output = model.generate(
        **THREE.kwargs(),
        max_new_tokens=13,
        num_draft_tokens=num_draft_tokens,
        eos_token_id=eos,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        **sampling,
    )
    assert isinstance(output.speculation, SpeculationStats)
    new = [oracle.cut(row, 13, {eos}) for row in output.sequences[:, 9:].tolist()]
    check_statistics(output.speculation, new, num_draft_tokens)
    assert 0 < output.speculation.num_accepted_tokens < output.speculation.num_draft_tokens


def test_statistics_of_one_row(model):
    output = model.generate(**ONE.kwargs(), max_new_tokens=20, num_draft_tokens=3, return_dict_in_generate=True)
    statistics = output.speculation
    sources = statistics.token_sources[0]
    assert statistics.num_cycles == sources.count("target") + (sources[-1] == "draft")
    assert statistics.mean_acceptance_length == pytest.approx(20 / statistics.num_cycles)
    assert statistics.mean_acceptance_length_without_bonus == pytest.approx(
        statistics.num_accepted_tokens / statistics.num_cycles
    )
    # A draft that was kept is one that the expert alone would have written there.
    (row,) = greedy_rows("llama", ONE)
    with torch.no_grad():
        logits = tiny.shared_trio("llama").expert(torch.tensor([[*ONE.base[0], *row]])).logits[0]
    proposals = logits[4:-1].argmax(-1).tolist()
    assert all(p == t for p, t, source in zip(proposals, row, sources, strict=True) if source == "draft")


def test_per_step_decoding_drafts_nothing(model):
    output = model.generate(**THREE.kwargs(), max_new_tokens=9, num_draft_tokens=0, return_dict_in_generate=True)
    statistics = output.speculation
    check_statistics(statistics, output.sequences[:, 9:].tolist(), 0)
    assert statistics.num_draft_tokens == statistics.num_accepted_tokens == 0
    assert statistics.acceptance_rate == 0.0
    assert statistics.mean_acceptance_length == 1.0
    assert statistics.accepted_per_position == statistics.drafted_per_position == []
    assert {source for row in statistics.token_sources for source in row} == {"target"}


def test_statistics_of_equal_models():
    """Every window is kept whole: 4 drafts and a bonus a cycle, then 3 drafts up to the budget of 13."""
    trio = tiny.same_model_trio("llama")
    output = ProxyTunedModel(*trio.models).generate(
        **ONE.kwargs(), max_new_tokens=13, num_draft_tokens=4, return_dict_in_generate=True
    )
    sources = output.speculation.token_sources[0]
    assert sources[:10] == [*["draft"] * 4, "target"] * 2
    assert output.speculation.num_cycles == 3
    assert output.speculation.accepted_per_position == output.speculation.drafted_per_position
    assert output.speculation.drafted_per_position[:2] == [3, 3]
