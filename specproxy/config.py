"""Parameters of sampling and of speculation, checked once where they enter. Knows nothing of models or tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

from specproxy.errors import ConfigurationError
from specproxy.tree import MAX_TREE_TOKENS
from specproxy_kernels import RULES

__all__ = [
    "DRAFTER_NAMES",
    "MAX_DRAFT_TOKENS",
    "SamplingParameters",
    "SpeculationParameters",
    "check_alpha",
    "check_integer",
    "check_number",
]

MAX_DRAFT_TOKENS = 63  # a window fits one 64-bit word
DRAFTER_NAMES = ("expert", "lookup", "cascade", "assistant")


def check_number(name: str, value: Any) -> float:
    """A finite float from a real number; bool is refused.

    Raises:
        ConfigurationError: naming `name`.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ConfigurationError(f"{name}={value!r} must be a finite number.")
    return float(value)


def check_integer(name: str, value: Any, minimum: int, remedy: str) -> int:
    """An int of at least `minimum`; bool is refused.

    Raises:
        ConfigurationError: naming `name`, ending with `remedy`.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise ConfigurationError(f"{name}={value!r} must be an integer of at least {minimum}: {remedy}.")
    return int(value)


def check_alpha(value: Any) -> float:
    """The proxy strength: any finite number.

    Raises:
        ConfigurationError: where it is not finite.
    """
    return check_number("alpha", value)


@dataclass(frozen=True)
class SamplingParameters:
    """How one row turns its combined logits into a law, in Hugging Face's order and with its defaults.

    Args:
        do_sample: draw from the law; False is greedy decoding, which ignores temperature and filters.
        temperature: > 0.
        top_k: keep the k most likely tokens, ties included; 0 or None keeps all.
        top_p: in (0, 1]; keep the smallest set of that mass, ties included; 1 or None keeps all.
        min_p: in [0, 1]; keep tokens of at least min_p times the largest probability; None keeps all.
        repetition_penalty: > 0; divides positive and multiplies negative logits of tokens already in prompt or output.
        presence_penalty: taken off the logits of tokens already in the output.
        frequency_penalty: taken off once for every time a token stands in the output.

    Raises:
        ConfigurationError: for a value outside its range.
    """

    do_sample: bool = False
    temperature: float | None = 1.0
    top_k: int | None = 50
    top_p: float | None = 1.0
    min_p: float | None = None
    repetition_penalty: float | None = 1.0
    presence_penalty: float | None = None
    frequency_penalty: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.do_sample, bool):
            raise ConfigurationError(f"do_sample={self.do_sample!r} must be True or False.")
        if self.do_sample and self.temperature is not None and check_number("temperature", self.temperature) <= 0:
            raise ConfigurationError(
                f"temperature={self.temperature!r} must be above 0 when sampling; do_sample=False is greedy."
            )
        if self.top_k is not None:
            check_integer("top_k", self.top_k, 0, "0 keeps every token")
        if self.top_p is not None and not 0 < check_number("top_p", self.top_p) <= 1:
            raise ConfigurationError(f"top_p={self.top_p!r} must be in (0, 1]; 1 keeps every token.")
        if self.min_p is not None and not 0 <= check_number("min_p", self.min_p) <= 1:
            raise ConfigurationError(f"min_p={self.min_p!r} must be in [0, 1]; 0 or None keeps every token.")
        penalty = self.repetition_penalty
        if penalty is not None and check_number("repetition_penalty", penalty) <= 0:
            raise ConfigurationError(f"repetition_penalty={penalty!r} must be above 0; 1 changes nothing.")
        for name in ("presence_penalty", "frequency_penalty"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name))

    @property
    def counts_output(self) -> bool:
        """Whether the law depends on how often the output holds a token."""
        return bool(self.presence_penalty) or bool(self.frequency_penalty)


@dataclass(frozen=True)
class SpeculationParameters:
    """How windows are drafted and verified.

    Args:
        num_draft_tokens: drafts per cycle; 0 is exact per-step decoding, "auto" follows acceptance and measured cost.
        acceptance: "rejection", "block" or "coupled"; greedy rows use equality under each of them.
        cuda_graphs: capture the device's work and replay it; None does so where every model is on one CUDA device.
            Caches and captures are then kept for the next call, and freed by a call without.
        num_tree_tokens: drafted nodes per cycle of a token tree, at most 63, with `num_draft_tokens` as its depth; 0
            drafts chains.
        drafter: who proposes, one of `DRAFTER_NAMES`; None is the expert, or under "auto" whoever serves best.

    Raises:
        ConfigurationError: for a value outside its range.
    """

    num_draft_tokens: int | Literal["auto"] = 4
    acceptance: str = "rejection"
    cuda_graphs: bool | None = None
    num_tree_tokens: int = 0
    drafter: str | None = None

    def __post_init__(self) -> None:
        if self.drafter is not None and self.drafter not in DRAFTER_NAMES:
            raise ConfigurationError(f"drafter={self.drafter!r} is not known; use one of {', '.join(DRAFTER_NAMES)}.")
        if self.cuda_graphs is not None and not isinstance(self.cuda_graphs, bool):
            raise ConfigurationError(f"cuda_graphs={self.cuda_graphs!r} must be True, False or None.")
        if self.num_draft_tokens != "auto":
            remedy = 'use 0 for per-step decoding, a positive number, or "auto"'
            count = check_integer("num_draft_tokens", self.num_draft_tokens, 0, remedy)
            if count > MAX_DRAFT_TOKENS:
                raise ConfigurationError(f"num_draft_tokens={count} must be at most {MAX_DRAFT_TOKENS}.")
        if self.acceptance not in RULES:
            raise ConfigurationError(f"acceptance={self.acceptance!r} is not a rule; use one of {', '.join(RULES)}.")
        nodes = check_integer("num_tree_tokens", self.num_tree_tokens, 0, "0 drafts chains")
        if nodes > MAX_TREE_TOKENS:
            raise ConfigurationError(f"num_tree_tokens={nodes} must be at most {MAX_TREE_TOKENS}.")
        if nodes and self.num_draft_tokens in (0, "auto"):
            raise ConfigurationError(
                f"num_tree_tokens={nodes} needs num_draft_tokens as the tree's depth, not {self.num_draft_tokens!r}; "
                "give a number of at least 1."
            )
        if nodes and self.drafter not in (None, "expert"):
            raise ConfigurationError(
                f"num_tree_tokens={nodes} with drafter={self.drafter!r}: trees are the expert's; leave one of them out."
            )

    def check_rule(self, do_sample: bool) -> None:
        """Hold a tree against the way that tokens are drawn.

        Raises:
            ConfigurationError: drafts are not compared with the target's own tokens.
        """
        if self.num_tree_tokens and do_sample and self.acceptance != "coupled":
            raise ConfigurationError(
                f"num_tree_tokens={self.num_tree_tokens} needs drafts that are compared for equality, which acceptance="
                f'{self.acceptance!r} does not do when sampling; use acceptance="coupled", or greedy decoding.'
            )
