"""Base, expert and anti-expert together: what they share, whether they fit, and their runners for one decode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from specproxy.attention import borrowed
from specproxy.config import check_alpha
from specproxy.costs import ForwardTime
from specproxy.runner import Runner, check_supported, logits_width, position_limit
from specproxy.state import ANTI_EXPERT, BASE, EXPERT
from specproxy.vocab import share_vocabulary

__all__ = ["Trio", "TrioRunners"]


@dataclass(frozen=True)
class Pair:
    """Roles of one expert and its anti-expert, and the pair's strength."""

    expert: str
    anti_expert: str
    alpha: float


class TrioRunners:
    """The runners of one decode, whose rows stay in step.

    Args:
        models: per role, its model.
        pairs: roles of the pairs; the first one's expert drafts.
        max_rows: rows of every cache.
        capacity: positions to make room for at once.
    """

    def __init__(self, models: dict[str, PreTrainedModel], pairs: list[Pair], max_rows: int, capacity: int) -> None:
        self.pairs = pairs
        self.by_role = {role: Runner(model, role, max_rows) for role, model in models.items()}
        self.base, self.expert, self.anti_expert = (self.by_role[role] for role in (BASE, EXPERT, ANTI_EXPERT))
        for runner in self:
            runner.cache.reserve(capacity)

    def __iter__(self) -> Iterator[Runner]:
        return iter(self.by_role.values())

    def take_forwards(self) -> tuple[ForwardTime, ...]:
        """What the forwards since the last call took."""
        return tuple(forward for runner in self for forward in runner.timer.take())

    def room(self, count: int) -> int:
        """Positions that every active row of every role may still take, after its committed ones."""
        rooms = [
            runner.max_positions - max(runner.cache.host_lengths[:count])
            for runner in self
            if runner.max_positions is not None
        ]
        return min(rooms, default=2**31)


class Trio:
    """A base and one or several pairs of loaded models that share a vocabulary.

    Args:
        base, expert, anti_expert: Transformers causal language models; two roles may be one object.
        tokenizers: per role, a tokenizer or None.
        alpha: strength of the pair.
        further_pairs: (expert, anti_expert, alpha) of pairs beyond the first; their roles are expert_2, anti_expert_2,
            ...

    Raises:
        UnsupportedModelError: for an architecture that cannot run here.
        VocabularyError: where the vocabularies do not fit.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        expert: PreTrainedModel,
        anti_expert: PreTrainedModel,
        tokenizers: dict[str, Any],
        alpha: float = 1.0,
        further_pairs: Sequence[tuple[PreTrainedModel, PreTrainedModel, float]] = (),
    ) -> None:
        self.models = {BASE: base, EXPERT: expert, ANTI_EXPERT: anti_expert}
        self.pairs = [Pair(EXPERT, ANTI_EXPERT, check_alpha(alpha))]
        for i, (further_expert, further_anti_expert, further_alpha) in enumerate(further_pairs, start=2):
            pair = Pair(f"{EXPERT}_{i}", f"{ANTI_EXPERT}_{i}", check_alpha(further_alpha))
            self.models |= {pair.expert: further_expert, pair.anti_expert: further_anti_expert}
            self.pairs.append(pair)
        for role, model in self.models.items():
            check_supported(model, role)
        self.widths = {role: logits_width(model) for role, model in self.models.items()}
        self.embedding_sizes = {
            role: int(model.get_input_embeddings().weight.shape[0]) for role, model in self.models.items()
        }
        self.vocabulary = share_vocabulary(self.widths, tokenizers)
        self.position_limits = {role: position_limit(model) for role, model in self.models.items()}

    @property
    def device(self) -> torch.device:
        """Where the base's logits, and all that is drawn from them, live."""
        head = self.models[BASE].get_output_embeddings()
        device: torch.device = head.weight.device if head is not None else self.models[BASE].device
        return device

    def eos_token_ids(self) -> frozenset[int]:
        """Union of the end-of-sequence ids in the generation configurations of base and expert."""
        ids: set[int] = set()
        for role in (BASE, EXPERT):
            eos = getattr(self.models[role].generation_config, "eos_token_id", None)
            ids.update([eos] if isinstance(eos, int) else eos or [])
        return frozenset(ids)

    def pad_token_id(self) -> int | None:
        """The pad id of the base's generation configuration, else the expert's, else None."""
        for role in (BASE, EXPERT):
            pad = getattr(self.models[role].generation_config, "pad_token_id", None)
            if pad is not None:
                return int(pad)
        return None

    @contextmanager
    def runners(self, max_rows: int, capacity: int) -> Iterator[TrioRunners]:
        """Borrow the models for one decode; on leaving they are as they were."""
        with borrowed(self.models.values()):
            yield TrioRunners(self.models, self.pairs, max_rows, capacity)
