"""What `generate` refuses, before any model runs: every message names the argument and what to use instead."""

from __future__ import annotations

import pytest
import tiny
import torch
from drop_in import ROWS, batch, model
from transformers import GenerationConfig, SynthIDTextWatermarkLogitsProcessor, TextStreamer

from specproxy import ConfigurationError, PromptError
from specproxy.options import _REFUSED

#: A value that asks for the refused feature, and words of the alternative that the message names.
REFUSED = {
    "num_beams": (4, "num_return_sequences"),
    "num_beam_groups": (2, "greedy decoding or sampling"),
    "diversity_penalty": (0.5, "greedy decoding or sampling"),
    "length_penalty": (2.0, "exponential_decay_length_penalty"),
    "early_stopping": (True, "stopping_criteria"),
    "constraints": ([object()], "prefix_allowed_tokens_fn"),
    "force_words_ids": ([[3]], "prefix_allowed_tokens_fn"),
    "penalty_alpha": (0.6, "repetition_penalty"),
    "dola_layers": ("low", "hidden states"),
    "guidance_scale": (1.5, "alpha"),
    "negative_prompt_ids": (torch.tensor([[3]]), "alpha"),
    "watermarking_config": ({"greenlist_ratio": 0.25}, "LogitsProcessor"),
    "encoder_repetition_penalty": (1.2, "repetition_penalty"),
    "encoder_no_repeat_ngram_size": (2, "no_repeat_ngram_size"),
    "token_healing": (True, "token boundary"),
    "assistant_model": (object(), "num_draft_tokens"),
    "prompt_lookup_num_tokens": (3, "num_draft_tokens"),
    "assistant_early_exit": (2, "num_draft_tokens"),
    "past_key_values": (object(), "whole prompt"),
    "inputs_embeds": (torch.zeros(1, 2, 4), "input_ids"),
    "use_cache": (False, "leave it out"),
    "cache_implementation": ("static", "leave it out"),
    "output_attentions": (True, "forward()"),
    "output_hidden_states": (True, "forward()"),
    "low_memory": (True, "leave it out"),
    "synced_gpus": (True, "leave it out"),
    "use_model_defaults": (True, "generation_config"),
}
HARMLESS = [(name, value) for name, (_, values) in _REFUSED.items() for value in values]


@pytest.fixture
def no_forward(monkeypatch):
    """Any forward of a model fails the test: refusals come before them."""

    def forward(*_args, **_kwargs):
        pytest.fail("a model ran before the arguments were checked")

    for each in tiny.shared_trio("llama").models:
        monkeypatch.setattr(each, "forward", forward)


def test_the_table_is_complete():
    assert set(REFUSED) == set(_REFUSED)


@pytest.mark.usefixtures("no_forward")
@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_features_name_their_alternative(name):
    value, alternative = REFUSED[name]
    with pytest.raises(ConfigurationError) as caught:
        model().generate(*batch(), **{name: value})
    assert str(caught.value).startswith(f"{name}=")
    assert alternative in str(caught.value)


@pytest.mark.parametrize(("name", "value"), HARMLESS)
def test_harmless_values_pass(name, value):
    ids = torch.tensor([ROWS[1]])
    plain = model().generate(ids, max_new_tokens=2)
    assert torch.equal(model().generate(ids, max_new_tokens=2, **{name: value}), plain)


@pytest.mark.usefixtures("no_forward")
@pytest.mark.parametrize(("name", "value"), [("num_beams", 3), ("guidance_scale", 2.0), ("penalty_alpha", 0.6)])
def test_a_configuration_cannot_ask_for_them_either(name, value):
    with pytest.raises(ConfigurationError, match=name):
        model().generate(*batch(), generation_config=GenerationConfig(**{name: value}))


@pytest.mark.usefixtures("no_forward")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temprature": 0.7}, r"temprature=0\.7 is not an argument of generate\(\); remove it"),
        ({"stop_strings": "w5"}, r"stop_strings=.* need a tokenizer; pass tokenizer="),
        ({"stop_strings": 3, "tokenizer": object()}, "stop_strings="),
        ({"stop_strings": [], "tokenizer": object()}, "stop_strings="),
        ({"stop_strings": ["a", ""], "tokenizer": object()}, "stop_strings="),
        ({"num_return_sequences": 2}, "num_return_sequences=2 greedy .*do_sample=True"),
        ({"num_return_sequences": 0, "do_sample": True}, "num_return_sequences=0"),
        ({"num_return_sequences": 1.5, "do_sample": True}, r"num_return_sequences=1\.5"),
        ({"max_length": 7}, "max_length=7 leaves no new token behind a prompt of 7 tokens; use max_new_tokens"),
        ({"max_length": 3}, "max_length=3"),
        ({"min_new_tokens": 6, "max_new_tokens": 5}, "min_new_tokens=6 exceeds max_new_tokens=5"),
        ({"min_new_tokens": 1.5}, "min_new_tokens"),
        ({"min_new_tokens": -1}, "min_new_tokens"),
        ({"min_length": "4"}, "min_length"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": True}, "max_new_tokens=True"),
        ({"max_time": 0}, "max_time=0"),
        ({"max_time": "soon"}, "max_time"),
        ({"generation_config": {}}, "generation_config is a dict"),
        ({"do_sample": 1}, "do_sample=1"),
        ({"output_scores": "no"}, "output_scores='no' must be True or False"),
        ({"output_logits": 1}, "output_logits=1 must be True or False"),
        ({"renormalize_logits": "yes", "output_scores": True}, "renormalize_logits='yes'"),
        ({"remove_invalid_values": 1}, "remove_invalid_values=1"),
        ({"eos_token_id": 3.5}, r"eos_token_id=3\.5"),
        ({"eos_token_id": "x"}, "eos_token_id"),
        ({"eos_token_id": [3, -1]}, "eos_token_id=-1"),
        ({"pad_token_id": [1]}, "pad_token_id"),
        ({"suppress_tokens": 5}, "suppress_tokens=5 must be a list of token ids"),
        ({"suppress_tokens": ["a"]}, "suppress_tokens"),
        ({"begin_suppress_tokens": 5}, "begin_suppress_tokens=5"),
        ({"bad_words_ids": "x"}, "bad_words_ids='x'"),
        ({"bad_words_ids": [3]}, "bad_words_ids"),
        ({"bad_words_ids": [[]]}, "bad_words_ids"),
        ({"sequence_bias": 3}, "sequence_bias=3"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size=-1"),
        ({"no_repeat_ngram_size": 2.5}, r"no_repeat_ngram_size=2\.5"),
        ({"exponential_decay_length_penalty": 3, "eos_token_id": 3}, "exponential_decay_length_penalty=3"),
        ({"forced_bos_token_id": "x"}, "forced_bos_token_id='x'"),
        ({"forced_eos_token_id": "x"}, "forced_eos_token_id='x'"),
        ({"typical_p": "x", "do_sample": True}, "typical_p='x'"),
        ({"typical_p": -0.1, "do_sample": True}, r"typical_p=-0\.1"),
        ({"top_h": 2.0, "do_sample": True}, r"top_h=2\.0"),
        ({"epsilon_cutoff": 2.0, "do_sample": True}, r"epsilon_cutoff=2\.0"),
        ({"eta_cutoff": -1.0, "do_sample": True}, r"eta_cutoff=-1\.0"),
        ({"prefix_allowed_tokens_fn": 3}, "prefix_allowed_tokens_fn=3"),
        ({"logits_processor": 3}, "logits_processor holds 3"),
        ({"logits_processor": [len, None]}, "logits_processor holds None"),
        ({"stopping_criteria": 3}, "stopping_criteria holds 3"),
        ({"streamer": 3}, "streamer=3"),
        ({"alpha": [1.0, 2.0]}, "alpha has 2 values for 3 rows"),
        ({"alpha": [[1.0, 2.0]] * 3}, "alpha has 2 values in a row for 1 pairs"),
        ({"alpha": [1.0, float("nan"), 1.0]}, "alpha=nan"),
        ({"seed": [1, 2], "do_sample": True}, "seed has 2 values for 3 rows"),
        ({"seed": 1, "generator": torch.Generator()}, "seed and generator"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_unusable_values_are_named(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        model().generate(*batch(), **arguments)


@pytest.mark.usefixtures("no_forward")
def test_stateful_processors_are_refused():
    class Mine(SynthIDTextWatermarkLogitsProcessor):
        """A subclass keeps the state of its parent."""

    for kind in (SynthIDTextWatermarkLogitsProcessor, Mine):
        processor = kind(
            ngram_len=5,
            keys=[1, 2, 3],
            sampling_table_size=16,
            sampling_table_seed=0,
            context_history_size=8,
            device="cpu",
        )
        with pytest.raises(ConfigurationError, match=f"logits_processor holds a {kind.__name__}.*pure"):
            model().generate(*batch(), logits_processor=[processor])


@pytest.mark.usefixtures("no_forward")
def test_transformers_streamers_take_one_sequence():
    streamer = TextStreamer(tiny.tiny_tokenizer())
    with pytest.raises(ConfigurationError, match=r"TextStreamer takes one sequence of 3; use a RowStreamer"):
        model().generate(*batch(), streamer=streamer)
    one = torch.tensor([ROWS[0]])
    with pytest.raises(ConfigurationError, match=r"TextStreamer takes one sequence of 2; use a RowStreamer"):
        model().generate(one, streamer=streamer, do_sample=True, num_return_sequences=2)


@pytest.mark.usefixtures("no_forward")
def test_errors_are_value_errors_as_in_transformers():
    with pytest.raises(ValueError, match="num_beams"):
        model().generate(*batch(), num_beams=2)
    with pytest.raises(PromptError, match="exceeds"):
        model().generate(*batch(), max_new_tokens=1000)
