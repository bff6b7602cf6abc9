"""What an operator decides about replicas: models, engine, server, and how many of them. Knows nothing of Ray.

Everything is checked before a replica starts: there, an error would only show in a log, once for every attempt.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from specproxy import demo as embedded
from specproxy.config import SpeculationParameters, check_integer, check_number
from specproxy.errors import ConfigurationError
from specproxy.server.settings import ServerSettings

__all__ = ["ReplicaOptions", "parse_replica_options"]

_AUTO = "auto"
_NUMBERS: tuple[Any, ...] = (int, float)
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_DRAFTING = ("num_draft_tokens", "num_tree_tokens", "drafter", "acceptance")
_ENGINE = (*_DRAFTING, "max_batch_size", "max_model_len", "max_queue", "prefill_chunk")
_SETTINGS = ("api_key", "max_tokens", "max_choices", "max_prompts", "max_body_bytes", "request_timeout")
_TEMPLATES = ("base_template", "expert_template", "anti_expert_template")


@dataclass(frozen=True)
class ReplicaOptions:
    """Options of a deployment. Those that `specproxy serve` has too mean the same.

    Args:
        demo: task of the embedded trio; "arithmetic" where no models are named.
        base, expert, anti_expert, assistant, tokenizer: folders or hub names, as every replica's machine sees them.
        dtype, device: of all models; a CUDA device asks Ray for a GPU.
        served_model_name: what requests call the model.
        num_draft_tokens, num_tree_tokens, drafter, acceptance, max_batch_size, max_model_len, max_queue, prefill_chunk,
            prefix_cache: of every replica's engine.
        api_key, max_tokens, max_choices, max_prompts, max_body_bytes, request_timeout: of every replica's server.
        base_template, expert_template, anti_expert_template: how each role reads a conversation.
        num_replicas: how many, or "auto" to follow the load.
        min_replicas, max_replicas: under "auto"; 1 and 4 by default.
        target_ongoing_requests: under "auto", requests that a replica is to have; by default `max_batch_size`.
        max_ongoing_requests: most requests that Ray gives a replica at a time; by default twice `max_batch_size`, so
            that the next prompts are there when rows become free, and the others go wherever there is room first.
        max_queued_requests: most requests that wait outside the replicas, further ones get 503; -1 for no limit.
        num_cpus, num_gpus: what a replica takes of its machine; threads of torch follow `num_cpus`.
        health_check_period: seconds between two looks at a replica's engine.
        drain_timeout: seconds that requests under way have when a replica is stopped.

    Raises:
        ConfigurationError: for an unusable value.
    """

    demo: str | None = None
    base: str | None = None
    expert: str | None = None
    anti_expert: str | None = None
    assistant: str | None = None
    tokenizer: str | None = None
    dtype: str | None = None
    device: str | None = None
    served_model_name: str | None = None
    num_draft_tokens: int | str = 4
    num_tree_tokens: int = 0
    drafter: str | None = None
    acceptance: str = "rejection"
    max_batch_size: int = 8
    max_model_len: int | None = None
    max_queue: int = 256
    prefill_chunk: int = 256
    prefix_cache: int = 4096
    api_key: str | None = field(default=None, repr=False)
    max_tokens: int | None = None
    max_choices: int = 16
    max_prompts: int = 128
    max_body_bytes: int = 4 * 2**20
    request_timeout: float | None = None
    base_template: str | None = None
    expert_template: str | None = None
    anti_expert_template: str | None = None
    num_replicas: int | str = 1
    min_replicas: int | None = None
    max_replicas: int | None = None
    target_ongoing_requests: float | None = None
    max_ongoing_requests: int | None = None
    max_queued_requests: int = -1
    num_cpus: float = 1.0
    num_gpus: float | None = None
    health_check_period: float = 10.0
    drain_timeout: float = 60.0

    def __post_init__(self) -> None:
        self._check_models()
        SpeculationParameters(**{name: getattr(self, name) for name in _DRAFTING})
        for name in ("max_batch_size", "max_queue", "prefill_chunk"):
            check_integer(name, getattr(self, name), 1, "an engine needs room")
        check_integer("prefix_cache", self.prefix_cache, 0, "0 keeps nothing")
        if self.max_model_len is not None:
            check_integer("max_model_len", self.max_model_len, 2, "a prompt token and a new one have to fit")
        _ = self.settings
        self._check_replicas()
        if self.max_ongoing_requests is not None:
            check_integer("max_ongoing_requests", self.max_ongoing_requests, 1, "a replica has to get requests")
        check_integer("max_queued_requests", self.max_queued_requests, -1, "-1 sets no limit")
        for name in ("num_cpus", "num_gpus"):
            if getattr(self, name) is not None and check_number(name, getattr(self, name)) < 0:
                raise ConfigurationError(f"{name}={getattr(self, name)!r} must not be negative.")
        for name in ("health_check_period", "drain_timeout"):
            if check_number(name, getattr(self, name)) <= 0:
                raise ConfigurationError(f"{name}={getattr(self, name)!r} must be above 0 seconds.")

    def _check_models(self) -> None:
        named = [role for role in ("base", "expert", "anti_expert") if getattr(self, role) is not None]
        missing = [role for role in ("base", "expert") if role not in named]
        if named and self.demo is not None:
            raise ConfigurationError(f"demo={self.demo!r} and {', '.join(named)} exclude each other: name one trio.")
        if named and missing:
            raise ConfigurationError(f"base and expert go together; missing: {', '.join(missing)}.")
        if self.tokenizer is not None and not named:
            raise ConfigurationError(f"tokenizer={self.tokenizer!r} serves models of your own; leave it out.")
        if (self.drafter == "assistant") != (self.assistant is not None):
            raise ConfigurationError(
                f"assistant={self.assistant!r} and drafter={self.drafter!r}: an assistant is named and drafts, or "
                'neither; give assistant and drafter="assistant" together.'
            )
        if self.demo is not None:
            embedded.folders(self.demo)  # refuses a task that does not exist
        if self.dtype is not None and self.dtype not in _DTYPES:
            raise ConfigurationError(f"dtype={self.dtype!r} is not usable; use one of {', '.join(_DTYPES)}.")
        if self.on_gpu and self.num_gpus == 0:
            raise ConfigurationError(f"device={self.device!r} needs num_gpus above 0: Ray hides every GPU otherwise.")

    def _check_replicas(self) -> None:
        bounds = ("min_replicas", "max_replicas", "target_ongoing_requests")
        if self.num_replicas != _AUTO:
            check_integer("num_replicas", self.num_replicas, 1, 'give a number, or "auto" to follow the load')
            idle = [name for name in bounds if getattr(self, name) is not None]
            if idle:
                raise ConfigurationError(
                    f"num_replicas={self.num_replicas} leaves {', '.join(idle)} without effect; use num_replicas=auto."
                )
            return
        low = check_integer("min_replicas", self.autoscaling["min_replicas"], 0, "0 lets all of them go when idle")
        check_integer("max_replicas", self.autoscaling["max_replicas"], max(low, 1), "not below min_replicas")
        if check_number("target_ongoing_requests", self.autoscaling["target_ongoing_requests"]) <= 0:
            raise ConfigurationError(f"target_ongoing_requests={self.target_ongoing_requests!r} must be above 0.")

    # What the parts of a replica take.

    @property
    def on_gpu(self) -> bool:
        """Whether the models go to a CUDA device."""
        return self.device is not None and self.device.startswith("cuda")

    @property
    def engine(self) -> dict[str, Any]:
        """Arguments of `Engine` beside the model."""
        return {name: getattr(self, name) for name in (*_ENGINE, "prefix_cache")}

    @property
    def settings(self) -> ServerSettings:
        """Of the server; what it refuses is refused here."""
        own_name = (
            f"specproxy-{self.demo or 'arithmetic'}" if self.base is None else self.base.rstrip("/").split("/")[-1]
        )
        names = (self.served_model_name or own_name,)
        return ServerSettings(names, **{name: getattr(self, name) for name in (*_SETTINGS, *_TEMPLATES)})

    @property
    def autoscaling(self) -> dict[str, Any]:
        """Ray's `autoscaling_config`, under "auto"."""
        low = 1 if self.min_replicas is None else self.min_replicas
        target = self.max_batch_size if self.target_ongoing_requests is None else self.target_ongoing_requests
        high = max(low, 4) if self.max_replicas is None else self.max_replicas
        return {"min_replicas": low, "max_replicas": high, "target_ongoing_requests": target}

    @property
    def deployment(self) -> dict[str, Any]:
        """Arguments of Ray's `deployment`."""
        num_gpus = float(self.on_gpu) if self.num_gpus is None else self.num_gpus
        scale: dict[str, Any] = {"num_replicas": self.num_replicas}
        if self.num_replicas == _AUTO:
            scale["autoscaling_config"] = self.autoscaling
        return scale | {
            "max_ongoing_requests": self.max_ongoing_requests or 2 * self.max_batch_size,
            "max_queued_requests": self.max_queued_requests,
            "ray_actor_options": {"num_cpus": self.num_cpus, "num_gpus": num_gpus},
            "health_check_period_s": self.health_check_period,
            "graceful_shutdown_timeout_s": self.drain_timeout,
        }


def parse_replica_options(options: Mapping[str, Any]) -> ReplicaOptions:
    """Options by name; texts become numbers where numbers are meant.

    Raises:
        ConfigurationError: an option that is not known or not usable.
    """
    known = {option.name for option in fields(ReplicaOptions)}
    unknown = [str(name) for name in options if name not in known]
    if unknown:
        raise ConfigurationError(f"{', '.join(unknown)}: no such option; there are {', '.join(sorted(known))}.")
    hints = typing.get_type_hints(ReplicaOptions)
    return ReplicaOptions(**{name: _value(name, value, hints[name]) for name, value in options.items()})


def _value(name: str, value: Any, hint: Any) -> Any:
    """A text as the type that its field has; anything else is left to the field's own check, unless a text is meant."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and types.NoneType in kinds:
        return None
    if not isinstance(value, str):
        if int not in kinds and float not in kinds:
            raise ConfigurationError(f"{name}={value!r} must be a text.")
        return value
    for kind in _NUMBERS:
        if kind in kinds:
            try:
                return kind(value)
            except ValueError:
                if str not in kinds:
                    raise ConfigurationError(f"{name}={value!r} is no number.") from None
    return value
