"""Options of replicas, as a command line and as Python gives them; checked without Ray."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from specproxy import ConfigurationError
from specproxy.integrations import ray_serve
from specproxy.integrations.ray_serve.options import ReplicaOptions, parse_replica_options


def test_texts_of_a_command_line_become_what_python_gives() -> None:
    texts = {"demo": "python", "num_replicas": "2", "num_cpus": "0.5", "num_draft_tokens": "auto", "max_tokens": "64"}
    values = {"demo": "python", "num_replicas": 2, "num_cpus": 0.5, "num_draft_tokens": "auto", "max_tokens": 64}
    assert parse_replica_options(texts) == parse_replica_options(values) == ReplicaOptions(**values)


def test_defaults_are_one_replica_of_the_embedded_trio() -> None:
    options = parse_replica_options({})
    assert options.settings.model_names == ("specproxy-arithmetic",)
    assert options.deployment == {
        "num_replicas": 1,
        "max_ongoing_requests": 16,
        "max_queued_requests": -1,
        "ray_actor_options": {"num_cpus": 1.0, "num_gpus": 0.0},
        "health_check_period_s": 10.0,
        "graceful_shutdown_timeout_s": 60.0,
    }


def test_auto_follows_the_load_between_bounds() -> None:
    options = parse_replica_options({"num_replicas": "auto", "min_replicas": "2", "max_batch_size": "3"})
    assert options.deployment["num_replicas"] == "auto"
    wanted = {"min_replicas": 2, "max_replicas": 4, "target_ongoing_requests": 3}
    assert options.deployment["autoscaling_config"] == wanted


def test_models_of_ones_own_give_the_name_and_a_device_the_gpu() -> None:
    options = parse_replica_options({"base": "models/large/", "expert": "tuned", "device": "cuda"})
    assert options.settings.model_names == ("large",)
    assert options.deployment["ray_actor_options"]["num_gpus"] == 1


def test_drafters_reach_the_engine() -> None:
    options = parse_replica_options({"num_tree_tokens": "8", "num_draft_tokens": "3"})
    assert options.engine["num_tree_tokens"] == 8 and options.engine["drafter"] is None
    assert parse_replica_options({"drafter": "assistant", "assistant": "m"}).engine["drafter"] == "assistant"


def test_the_key_is_not_shown() -> None:
    assert "secret" not in repr(parse_replica_options({"api_key": "secret"}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replicas": "2"}, "replicas: no such option; there are .*num_replicas"),
        ({"num_replicas": "two"}, "num_replicas='two' must be an integer"),
        ({"num_replicas": 0}, "num_replicas=0 must be an integer of at least 1"),
        ({"num_replicas": True}, "num_replicas=True must be an integer"),
        ({"num_replicas": "2", "max_replicas": "4"}, "num_replicas=2 leaves max_replicas without effect"),
        ({"num_replicas": "auto", "min_replicas": "3", "max_replicas": "2"}, "max_replicas=2 must be .* at least 3"),
        ({"num_replicas": "auto", "target_ongoing_requests": "0"}, "target_ongoing_requests=0.0 must be above 0"),
        ({"max_ongoing_requests": "0"}, "max_ongoing_requests=0 must be"),
        ({"num_cpus": "many"}, "num_cpus='many' is no number"),
        ({"num_cpus": "nan"}, "num_cpus=nan must be a finite number"),
        ({"num_cpus": -1}, "num_cpus=-1 must not be negative"),
        ({"drain_timeout": "0"}, "drain_timeout=0.0 must be above 0"),
        ({"demo": "music"}, "demo='music' is not an embedded task"),
        ({"demo": 3}, "demo=3 must be a text"),
        ({"demo": "python", "base": "b", "expert": "e"}, "demo='python' and base, expert exclude each other"),
        ({"expert": "e"}, "base and expert go together; missing: base"),
        ({"dtype": "int8"}, "dtype='int8' is not usable"),
        ({"device": "cuda:0", "num_gpus": "0"}, "device='cuda:0' needs num_gpus above 0"),
        ({"num_draft_tokens": "-1"}, "num_draft_tokens=-1"),
        ({"drafter": "nobody"}, "drafter='nobody' is not known"),
        ({"drafter": "assistant"}, 'give assistant and drafter="assistant" together'),
        ({"assistant": "m", "drafter": "lookup"}, 'give assistant and drafter="assistant" together'),
        ({"num_tree_tokens": "64"}, "num_tree_tokens=64 must be at most 63"),
        ({"num_tree_tokens": "4", "drafter": "lookup"}, "trees are the expert's"),
        ({"tokenizer": "t"}, "tokenizer='t' serves models of your own"),
        ({"acceptance": "always"}, "acceptance='always' is not a rule"),
        ({"max_batch_size": "0"}, "max_batch_size=0 must be"),
        ({"max_model_len": "1"}, "max_model_len=1 must be"),
        ({"max_body_bytes": "0"}, "max_body_bytes=0 must be"),
        ({"request_timeout": "-1"}, "request_timeout=-1.0 must be above 0"),
        ({"api_key": ""}, "api_key is empty"),
    ],
)
def test_unusable_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        parse_replica_options(options)


def test_a_missing_ray_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else found(name))
    with pytest.raises(ConfigurationError, match=r"needs ray: pip install 'specproxy\[ray\]'"):
        ray_serve.build_app({})
