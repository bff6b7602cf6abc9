"""Base, expert and anti-expert together: what they share, whether they fit, and their runners for one decode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from specproxy.attention import borrowed
from specproxy.runner import Runner, check_supported, logits_width, position_limit
from specproxy.state import ANTI_EXPERT, BASE, EXPERT, ROLES
from specproxy.vocab import share_vocabulary

__all__ = ["Trio", "TrioRunners"]


class TrioRunners:
    """The three runners of one decode, whose rows stay in step.

    Args:
        models: per role, its model.
        max_rows: rows of every cache.
        capacity: positions to make room for at once.
    """

    def __init__(self, models: dict[str, PreTrainedModel], max_rows: int, capacity: int) -> None:
        self.base = Runner(models[BASE], BASE, max_rows)
        self.expert = Runner(models[EXPERT], EXPERT, max_rows)
        self.anti_expert = Runner(models[ANTI_EXPERT], ANTI_EXPERT, max_rows)
        for runner in self:
            runner.cache.reserve(capacity)

    def __iter__(self) -> Iterator[Runner]:
        return iter((self.base, self.expert, self.anti_expert))

    def room(self, count: int) -> int:
        """Positions that every active row of every role may still take, after its committed ones."""
        rooms = [
            limit - max(runner.cache.host_lengths[:count])
            for runner in self
            if (limit := position_limit(runner.model)) is not None
        ]
        return min(rooms, default=2**31)


class Trio:
    """Three loaded models that share a vocabulary.

    Args:
        base, expert, anti_expert: Transformers causal language models; two roles may be one object.
        tokenizers: per role, a tokenizer or None.

    Raises:
        UnsupportedModelError: for an architecture that cannot run here.
        VocabularyError: where the vocabularies do not fit.
    """

    def __init__(
        self, base: PreTrainedModel, expert: PreTrainedModel, anti_expert: PreTrainedModel, tokenizers: dict[str, Any]
    ) -> None:
        self.models = {BASE: base, EXPERT: expert, ANTI_EXPERT: anti_expert}
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
        with borrowed(self.models[role] for role in ROLES):
            yield TrioRunners(self.models, max_rows, capacity)
