"""Through Transformers' own doors: `base.generate(custom_generate=...)`, as a function and as a folder, and pipelines.

Each is held against `ProxyTunedModel.generate` with the same arguments, token for token.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import support
import tiny
import torch
import transformers
from tokenizers import Tokenizer, decoders, models
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList, TopKLogitsWarper

import specproxy
from specproxy import ConfigurationError, ProxyTunedModel, RowStreamer

FOLDER = str(Path(specproxy.__file__).parent / "integrations" / "hub")
PROMPTS = tiny.left_pad(tiny.prompts([6, 3, 5], seed=4))
LENGTH = 14
COUPLED = {"do_sample": True, "seed": 3, "acceptance": "coupled"}


class Push(transformers.LogitsProcessor):
    """Favours one token that depends on the last."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        pushed = scores.clone()
        pushed[:, int(input_ids[0, -1]) * 7 % tiny.VOCAB_SIZE] += 3.0
        return pushed


class EndsWithMultiple(transformers.StoppingCriteria):
    """Stops behind a token that the divisor divides."""

    def __init__(self, divisor: int) -> None:
        self.divisor = divisor

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids[:, -1] % self.divisor == 0


def only_near(row: int, prefix: torch.Tensor) -> list[int]:
    """Allows a few tokens, by row and last token."""
    return [(int(prefix[-1]) * 3 + row + step) % tiny.VOCAB_SIZE for step in range(6)]


@pytest.fixture(scope="module")
def trio() -> Iterator[tiny.Trio]:
    """Greedy rows of it never come near a tie, so equal laws give equal tokens."""
    yield tiny.shared_trio("llama")


@pytest.fixture(scope="module")
def proxy(trio: tiny.Trio) -> ProxyTunedModel:
    return ProxyTunedModel(*trio.models, tokenizer=tiny.tiny_tokenizer())


def method(trio: tiny.Trio, **arguments: Any) -> Any:
    return specproxy.custom_generate(trio.expert, trio.anti_expert, **{"tokenizer": tiny.tiny_tokenizer()} | arguments)


def through_base(trio: tiny.Trio, custom: Any, **arguments: Any) -> Any:
    ids, mask = PROMPTS
    if "max_length" not in arguments:
        arguments = {"max_new_tokens": LENGTH} | arguments
    return trio.base.generate(ids, attention_mask=mask, pad_token_id=0, custom_generate=custom, **arguments)


def direct(proxy: ProxyTunedModel, **arguments: Any) -> Any:
    if "max_length" not in arguments:
        arguments = {"max_new_tokens": LENGTH} | arguments
    return proxy.generate(*PROMPTS, pad_token_id=0, **arguments)


@functools.cache
def letters() -> transformers.PreTrainedTokenizerFast:
    """One letter for every id: its decoder joins them, which Transformers' stop strings count on."""
    alphabet = {chr(ord("A") + i): i for i in range(tiny.VOCAB_SIZE)}
    inner = Tokenizer(models.BPE(alphabet, []))
    inner.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner)


ENDS = [3, 5, 9, 11, 17, 21, 30]

CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "per-step": {"num_draft_tokens": 0},
    "sampled": COUPLED | {"temperature": 0.7, "top_k": 12},
    "filters": COUPLED | {"top_k": 0, "top_p": 0.8, "min_p": 0.02, "typical_p": 0.9},
    "seed per row": COUPLED | {"seed": [1, 2, 1]},
    "alpha": {"alpha": 0.3},
    "end ids": {"eos_token_id": ENDS},
    "at least, to an end": {"eos_token_id": ENDS, "min_new_tokens": 6},
    "min_length": {"eos_token_id": ENDS, "min_length": 10},
    "max_length": {"max_length": 11},
    "penalty and n-grams": {"no_repeat_ngram_size": 2, "repetition_penalty": 1.3},
    "bad words": {"bad_words_ids": [[4], [7, 8]], "suppress_tokens": [12, 13], "begin_suppress_tokens": [2]},
    "bias": {"sequence_bias": [[[5], 4.0], [[6, 7], -5.0]]},
    "forced end": {"forced_eos_token_id": 3},
    "long texts end": {"eos_token_id": 3, "exponential_decay_length_penalty": (3, 1.8)},
    "processor": {"logits_processor": LogitsProcessorList([Push()])},
    "processor, sampled": COUPLED | {"logits_processor": LogitsProcessorList([Push()]), "top_k": 9},
    "processor of a built-in type": COUPLED | {"logits_processor": LogitsProcessorList([TopKLogitsWarper(3)])},
    "beside the configured one": COUPLED | {"top_k": 7, "logits_processor": LogitsProcessorList([TopKLogitsWarper(3)])},
    "prefix function": {"prefix_allowed_tokens_fn": only_near},
    "prefix function, sampled": COUPLED | {"prefix_allowed_tokens_fn": only_near},
    "criteria": {"stopping_criteria": StoppingCriteriaList([EndsWithMultiple(5)])},
    "several sequences": COUPLED | {"num_return_sequences": 2},
    "several sequences with a processor": COUPLED
    | {"num_return_sequences": 2, "logits_processor": LogitsProcessorList([Push()])},
}


@pytest.mark.parametrize("name", CASES)
def test_function_equals_generate(trio: tiny.Trio, proxy: ProxyTunedModel, name: str) -> None:
    arguments = CASES[name]
    ours = direct(proxy, **arguments)
    theirs = through_base(trio, method(trio), **arguments)
    assert torch.equal(theirs, ours)
    if name not in ("greedy", "per-step"):
        assert not torch.equal(ours, direct(proxy))  # the arguments do something


@pytest.mark.parametrize(
    "name", ["greedy", "sampled", "end ids", "penalty and n-grams", "processor", "prefix function", "several sequences"]
)
def test_folder_equals_generate(trio: tiny.Trio, proxy: ProxyTunedModel, name: str) -> None:
    pair = {"expert": trio.expert, "anti_expert": trio.anti_expert, "trust_remote_code": True}
    theirs = through_base(trio, FOLDER, **pair, tokenizer=tiny.tiny_tokenizer(), **CASES[name])
    assert torch.equal(theirs, direct(proxy, **CASES[name]))


def test_speculation_of_the_function_is_its_own_default_and_each_call_s(trio: tiny.Trio) -> None:
    decode = method(trio, num_draft_tokens=2, acceptance="coupled", alpha=0.5)
    seen = []
    for arguments in ({}, {"num_draft_tokens": 5}):
        output = through_base(trio, decode, **arguments, return_dict_in_generate=True)
        seen.append(len(output.speculation.drafted_per_position))
        assert torch.equal(output.sequences, direct(ProxyTunedModel(*trio.models), alpha=0.5))
    assert seen == [2, 5]


def test_scores_and_logits_come_back(trio: tiny.Trio, proxy: ProxyTunedModel) -> None:
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "repetition_penalty": 1.4}
    theirs, ours = through_base(trio, method(trio), **asked), direct(proxy, **asked)
    assert torch.equal(theirs.sequences, ours.sequences)
    assert theirs.speculation.num_new_tokens == ours.speculation.num_new_tokens
    for name in ("scores", "logits"):
        assert len(theirs[name]) == LENGTH
        for one, other in zip(theirs[name], ours[name], strict=True):
            torch.testing.assert_close(one, other)


def test_generation_config_of_the_call(trio: tiny.Trio, proxy: ProxyTunedModel) -> None:
    config = GenerationConfig(max_new_tokens=9, do_sample=True, top_k=5, eos_token_id=ENDS, pad_token_id=0)
    ids, mask = PROMPTS
    settings = {"seed": 8, "acceptance": "coupled"}
    theirs = trio.base.generate(
        ids, attention_mask=mask, generation_config=config, custom_generate=method(trio), **settings
    )
    assert torch.equal(theirs, proxy.generate(ids, mask, generation_config=config, **settings))


def test_models_defaults_count_as_they_do_in_transformers(proxy: ProxyTunedModel) -> None:
    """The adapters are methods of the base, whose generation configuration keeps its meaning."""
    trio = tiny.make_trio("llama")
    trio.base.generation_config = GenerationConfig(eos_token_id=ENDS, repetition_penalty=1.5, pad_token_id=0)
    ours = direct(proxy, eos_token_id=ENDS, repetition_penalty=1.5)
    pair = {"expert": trio.expert, "anti_expert": trio.anti_expert, "trust_remote_code": True}
    assert torch.equal(through_base(trio, method(trio)), ours)
    assert torch.equal(through_base(trio, FOLDER, **pair), ours)
    assert not torch.equal(ours, direct(proxy))


def test_max_time_ends_early(trio: tiny.Trio) -> None:
    pair = {"expert": trio.expert, "anti_expert": trio.anti_expert, "trust_remote_code": True}
    for output in (through_base(trio, method(trio), max_time=1e-6), through_base(trio, FOLDER, **pair, max_time=1e-6)):
        assert output.shape[1] == PROMPTS[0].shape[1] + 1


def test_stop_strings_and_streaming_through_the_function(trio: tiny.Trio, proxy: ProxyTunedModel) -> None:
    ids = PROMPTS[0][:1]
    whole = proxy.generate(ids, max_new_tokens=LENGTH)[0, ids.shape[1] :].tolist()
    stop = letters().decode(whole[4:6])
    expected = proxy.generate(ids, max_new_tokens=LENGTH, stop_strings=stop, tokenizer=letters())[0].tolist()
    assert ids.shape[1] < len(expected) < ids.shape[1] + LENGTH
    recorder = support.Recorder()
    decode = method(trio, stop_strings=stop, streamer=recorder, tokenizer=letters())
    out = trio.base.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=LENGTH, custom_generate=decode)
    assert out[0].tolist() == expected == recorder.ids()
    assert recorder.ends == 1


def test_streaming_by_row_through_the_function(trio: tiny.Trio, proxy: ProxyTunedModel) -> None:
    rows: dict[int, list[int]] = {}
    streamer = RowStreamer(lambda row, ids: rows.setdefault(row, []).extend(ids))
    out = through_base(trio, method(trio, streamer=streamer))
    assert torch.equal(out, direct(proxy))
    assert [rows[row] for row in range(3)] == out[:, PROMPTS[0].shape[1] :].tolist()


def test_stop_strings_and_streaming_through_the_folder(trio: tiny.Trio, proxy: ProxyTunedModel) -> None:
    ids = PROMPTS[0][:1]
    whole = proxy.generate(ids, max_new_tokens=LENGTH)[0, ids.shape[1] :].tolist()
    stop = letters().decode(whole[4:6])
    recorder = support.Recorder()
    out = trio.base.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=LENGTH,
        custom_generate=FOLDER,
        trust_remote_code=True,
        expert=trio.expert,
        anti_expert=trio.anti_expert,
        tokenizer=letters(),
        streamer=recorder,
        stop_strings=[stop],
    )
    assert torch.equal(out, proxy.generate(ids, max_new_tokens=LENGTH, stop_strings=stop, tokenizer=letters()))
    assert recorder.ids() == out[0].tolist() and recorder.ends == 1


def test_an_assistant_drafts_through_both(trio: tiny.Trio, proxy: ProxyTunedModel) -> None:
    helper = tiny.shared_trio("gpt2").expert
    settings = {"drafter": "assistant", "return_dict_in_generate": True}
    pair = {"expert": trio.expert, "anti_expert": trio.anti_expert, "trust_remote_code": True}
    through_folder = through_base(trio, FOLDER, **pair, assistant=helper, **settings)
    for output in (through_base(trio, method(trio, assistant=helper), **settings), through_folder):
        assert torch.equal(output.sequences, direct(proxy))
        assert output.speculation.drafters["assistant"].num_draft_tokens > 0
    for custom, extra in ((method(trio), {}), (FOLDER, pair)):
        with pytest.raises(ConfigurationError, match="needs an assistant"):
            through_base(trio, custom, drafter="assistant", **extra)


def test_prompts_per_role(trio: tiny.Trio, proxy: ProxyTunedModel) -> None:
    own = tiny.left_pad(tiny.prompts([4, 7, 2], seed=9))
    roles = {"expert_input_ids": own[0], "expert_attention_mask": own[1]}
    assert torch.equal(through_base(trio, method(trio), **roles), direct(proxy, **roles))
    assert not torch.equal(direct(proxy, **roles), direct(proxy))


@pytest.mark.parametrize("arguments", [{"num_beams": 2}, {"penalty_alpha": 0.6, "top_k": 4}, {"dola_layers": "low"}])
def test_what_generate_refuses_the_adapters_refuse(trio: tiny.Trio, arguments: dict[str, Any]) -> None:
    pair = {"expert": trio.expert, "anti_expert": trio.anti_expert, "trust_remote_code": True}
    for custom, extra in ((method(trio), {}), (FOLDER, pair)):
        with pytest.raises(ConfigurationError, match=next(iter(arguments))):
            through_base(trio, custom, **arguments, **extra)


def test_a_cache_that_holds_tokens_is_refused(trio: tiny.Trio) -> None:
    cache = transformers.DynamicCache()
    trio.base(PROMPTS[0][:, :2], past_key_values=cache)
    with pytest.raises(ConfigurationError, match="past_key_values"):
        through_base(trio, method(trio), past_key_values=cache)


def test_base_generates_alone_as_before(trio: tiny.Trio) -> None:
    ids, mask = PROMPTS
    plain = {"attention_mask": mask, "pad_token_id": 0, "max_new_tokens": LENGTH, "do_sample": False}
    before = trio.base.generate(ids, **plain)
    through_base(trio, method(trio))
    assert torch.equal(trio.base.generate(ids, **plain), before)


# Pipelines.


@pytest.fixture
def pipe(proxy: ProxyTunedModel, caplog: pytest.LogCaptureFixture) -> Any:
    """A pipeline; Transformers remarks that it does not know the class, which must stay a remark."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        built = transformers.pipeline("text-generation", model=proxy, tokenizer=proxy.tokenizer, device="cpu")
    finally:
        logger.removeHandler(caplog.handler)
    assert [record.levelname for record in caplog.records if "not supported" not in record.getMessage()] == []
    return built


def text_of(proxy: ProxyTunedModel, prompt: str, **arguments: Any) -> str:
    """The prompt and, as in a pipeline, the new text right behind it."""
    encoded = proxy.tokenizer(prompt, return_tensors="pt")
    out = proxy.generate(encoded.input_ids, encoded.attention_mask, **arguments)
    new = proxy.tokenizer.decode(out[0, encoded.input_ids.shape[1] :], skip_special_tokens=True)
    return f"{prompt}{new}"


GREEDY = {"max_new_tokens": 8, "do_sample": False}  # a pipeline samples unless told otherwise


def test_pipeline_of_one_prompt(pipe: Any, proxy: ProxyTunedModel) -> None:
    assert pipe("w5 w9 w30", **GREEDY) == [{"generated_text": text_of(proxy, "w5 w9 w30", **GREEDY)}]


def test_pipeline_of_a_batch(pipe: Any, proxy: ProxyTunedModel) -> None:
    texts = ["w5 w9 w30", "w7", "w12 w3"]
    results = pipe(texts, batch_size=3, **GREEDY)
    assert results == [[{"generated_text": text_of(proxy, text, **GREEDY)}] for text in texts]


def test_pipeline_samples_with_a_seed(pipe: Any, proxy: ProxyTunedModel) -> None:
    sampled = COUPLED | {"max_new_tokens": 8, "temperature": 0.8, "top_k": 50}
    (result,) = pipe("w5 w9 w30", **sampled)
    assert result["generated_text"] == text_of(proxy, "w5 w9 w30", **sampled)
    (new,) = pipe("w5 w9 w30", return_full_text=False, **sampled)
    assert f"w5 w9 w30{new['generated_text']}" == result["generated_text"]
    assert len({row["generated_text"] for row in pipe("w5 w9", num_return_sequences=3, **sampled)}) == 3
