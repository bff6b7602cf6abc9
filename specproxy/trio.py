"""Base, expert and anti-expert together: what they share, whether they fit, and their runners for one decode."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specproxy.adapters import EVERY_TOKEN, LoraSwitch, is_adapted, without_adapter
from specproxy.attention import borrowed
from specproxy.auto import AUTO_DRAFTERS, AutoPolicy
from specproxy.config import check_alpha
from specproxy.costs import ForwardTime
from specproxy.errors import ConfigurationError
from specproxy.graphs import Branches, Graphs, make_graphs
from specproxy.nodes import Nodes
from specproxy.packed_runner import PackedRunner
from specproxy.ranks import Ranks
from specproxy.runner import Runner, check_supported, logits_width, position_limit
from specproxy.state import ANTI_EXPERT, ASSISTANT, BASE, EXPERT, Row
from specproxy.tree import TreeShape
from specproxy.vocab import check_drafts_vocabulary, share_vocabulary
from specproxy_kernels import LogitPair

__all__ = ["Trio", "TrioRunners"]


@dataclass(frozen=True)
class Pair:
    """Roles of one expert and its anti-expert, None where it has none, and the pair's strength."""

    expert: str
    anti_expert: str | None
    alpha: float

    def term(self, logits: Mapping[str, Tensor], strength: Tensor) -> LogitPair:
        """The pair's term of the logit arithmetic, from logits [B, W, .] per role and strengths [B, W]."""
        anti_expert = None if self.anti_expert is None else logits[self.anti_expert]
        return LogitPair(logits[self.expert], anti_expert, strength)


class TrioRunners:
    """The runners of one decode, whose rows stay in step.

    Args:
        models: per role, its model.
        pairs: roles of the pairs; the first one's expert drafts.
        max_rows: rows of every cache.
        capacity: positions to make room for at once.
        graphs: where given, device work is captured and replayed.
        overlaps: whether the small models' forwards over a window run beside the base's; on one CUDA device.
        adapters: of roles whose weights serve one with the adapter and one without, and whether the role is the former.
        assistant: a model that drafts and nothing else. Its runner stands apart: its rows are not in step.
        ranks: the processes that the base is sharded over; by default this one alone.
    """

    def __init__(
        self,
        models: dict[str, PreTrainedModel],
        pairs: list[Pair],
        max_rows: int,
        capacity: int,
        graphs: Graphs | None = None,
        overlaps: bool = False,
        adapters: Mapping[str, tuple[LoraSwitch, bool]] | None = None,
        assistant: PreTrainedModel | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        adapters = adapters or {}
        self.pairs = pairs
        self.overlaps = overlaps
        self.ranks = ranks or Ranks()
        self.max_rows = max_rows
        self.graphs = graphs
        self._pinned: Tensor | None = None
        self._nodes: dict[tuple[TreeShape, torch.device], Nodes] = {}  # captures refer to them: none is let go
        self.state_buffers: dict[str, Tensor] = {}  # of the decode state, which captures refer to as they do to caches
        self.by_role = {
            role: Runner(model, role, max_rows, graphs, *adapters.get(role, ())) for role, model in models.items()
        }
        self.packed: dict[str, PackedRunner] = {}  # by expert, where it is an adapter on its anti-expert
        for pair in pairs:
            is_shared = pair.expert in adapters and pair.anti_expert in adapters
            if pair.anti_expert is not None and is_shared and models[pair.anti_expert] is models[pair.expert]:
                untuned, tuned = self.by_role[pair.anti_expert], self.by_role[pair.expert]
                self.packed[pair.expert] = PackedRunner(untuned, tuned)
        self.base, self.expert = (self.by_role[role] for role in (BASE, EXPERT))
        self.assistant = None if assistant is None else Runner(assistant, ASSISTANT, max_rows, graphs)
        self.assistant_rows: list[Row] = []  # whose texts stand in its cache, by slot
        self.branches = Branches(self.base.device if overlaps and self.base.device.type == "cuda" else None)
        self.reserve(capacity)

    def reserve(self, capacity: int) -> None:
        """Make room for so many positions in every row."""
        for runner in self:
            runner.cache.reserve(capacity)

    def reserve_window(self, count: int, window: int) -> None:
        """Make room for one more window in the first `count` rows."""
        for runner in self:
            runner.cache.reserve(max(runner.cache.host_lengths[:count]) + window)

    def nodes(self, shape: TreeShape, device: torch.device) -> Nodes:
        """A tree's tensors on a device."""
        if (shape, device) not in self._nodes:
            self._nodes[shape, device] = Nodes(shape, device)
        return self._nodes[shape, device]

    def read(self, packed: Tensor) -> list[list[int]]:
        """A small int64 tensor [n, m] on the host: the one place where a cycle waits for the device."""
        if packed.device.type != "cuda":
            rows: list[list[int]] = packed.tolist()
            return rows
        if self._pinned is None or self._pinned.numel() < packed.numel():
            self._pinned = torch.empty(max(1024, 2 * packed.numel()), dtype=packed.dtype, pin_memory=True)
        host = self._pinned[: packed.numel()].view(packed.shape)
        host.copy_(packed, non_blocking=True)
        torch.cuda.current_stream(packed.device).synchronize()
        rows = host.tolist()
        return rows

    def restart(self, capacity: int) -> None:
        """Begin another decode: no rows, clocks at zero."""
        for runner in self:
            runner.cache.empty(0, self.max_rows)
            runner.timer.rewind((0.0, []))
        if self.assistant is not None:
            self.assistant_rows = []
            self.assistant.cache.empty(0, self.max_rows)
            self.assistant.timer.rewind((0.0, []))
        self.reserve(capacity)

    @property
    def capture_seconds(self) -> float:
        """Spent in capturing so far."""
        return 0.0 if self.graphs is None else self.graphs.seconds

    @property
    def generation(self) -> tuple[int, ...]:
        """Changes whenever a cache's memory moves."""
        return tuple(runner.cache.capacity for runner in self)

    @property
    def lengths(self) -> list[Tensor]:
        """Of the caches, [max_rows] each."""
        return [runner.cache.lengths for runner in self]

    def __iter__(self) -> Iterator[Runner]:
        return iter(self.by_role.values())

    @property
    def all_runners(self) -> list[Runner]:
        """Those of the trio, and the assistant's."""
        return [*self, *([] if self.assistant is None else [self.assistant])]

    def take_forwards(self) -> tuple[ForwardTime, ...]:
        """What the forwards since the last call took."""
        return tuple(forward for runner in self.all_runners for forward in runner.timer.take())


class Trio:
    """A base and one or several pairs of loaded models that share a vocabulary.

    Args:
        base, expert, anti_expert: Transformers causal language models; two roles may be one object. Without an
            anti-expert (None) the pair's term is alpha * s_expert.
        tokenizers: per role, a tokenizer or None.
        alpha: strength of the pair.
        further_pairs: (expert, anti_expert or None, alpha) of pairs beyond the first; their roles are expert_2,
            anti_expert_2, ...
        assistant: a further model that may draft; it is no part of the law.

    Raises:
        UnsupportedModelError: for an architecture that cannot run here.
        VocabularyError: where the vocabularies do not fit.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        expert: PreTrainedModel,
        anti_expert: PreTrainedModel | None,
        tokenizers: dict[str, Any],
        alpha: float = 1.0,
        further_pairs: Sequence[tuple[PreTrainedModel, PreTrainedModel | None, float]] = (),
        assistant: PreTrainedModel | None = None,
    ) -> None:
        self.given: dict[str, Any] = {BASE: base}  # as the caller has them, peft models among them
        self.pairs: list[Pair] = []
        for i, (pair_expert, pair_anti_expert, strength) in enumerate([(expert, anti_expert, alpha), *further_pairs]):
            suffix = f"_{i + 1}" if i else ""
            anti_role = None if pair_anti_expert is None else ANTI_EXPERT + suffix
            self.given[EXPERT + suffix] = pair_expert
            if anti_role is not None and pair_anti_expert is not None:
                self.given[anti_role] = pair_anti_expert
            self.pairs.append(Pair(EXPERT + suffix, anti_role, check_alpha(strength)))
        self.models: dict[str, PreTrainedModel] = {
            role: without_adapter(model, role) for role, model in self.given.items()
        }
        self.adapters = self._shared_adapters()
        for role, model in self.models.items():
            check_supported(model, role)
        self.widths = {role: logits_width(model) for role, model in self.models.items()}
        self.embedding_sizes = {
            role: int(model.get_input_embeddings().weight.shape[0]) for role, model in self.models.items()
        }
        own = {role: tokenizer for role, tokenizer in tokenizers.items() if role != ASSISTANT}
        self.vocabulary = share_vocabulary(self.widths, own)
        self.assistant = assistant
        if assistant is not None:
            self._check_assistant(assistant, tokenizers.get(ASSISTANT), own)
        self.ranks = Ranks.of(base)
        self.overlap = False  # whether captures run the small models beside the base: to be measured before it is on
        self._lock = Lock()
        self._policies: dict[tuple[tuple[str, ...], bool], AutoPolicy] = {}  # that no call has now, by `policy`'s words
        self._spare: tuple[list[int], TrioRunners] | None = None  # addresses of the weights it was made for
        self.position_limits = {role: position_limit(model) for role, model in self.models.items()}

    def _shared_adapters(self) -> dict[str, tuple[LoraSwitch, bool]]:
        """Per role of a model that serves with and without an adapter, the switch, and whether the role has it on."""
        for pair in self.pairs:
            expert = self.given[pair.expert]
            if pair.anti_expert is not None and is_adapted(expert) and expert is self.given[pair.anti_expert]:
                raise ConfigurationError(
                    f"{pair.expert} and {pair.anti_expert} are one peft model; give its get_base_model() as the "
                    f"{pair.anti_expert}."
                )
        adapters: dict[str, tuple[LoraSwitch, bool]] = {}
        for role, model in self.given.items():
            inner = self.models[role]
            users = [other for other, its_model in self.models.items() if its_model is inner]
            if is_adapted(model) and any(self.given[other] is inner for other in users):
                switch = LoraSwitch(model, role)
                adapters[role] = switch, True
                adapters |= {other: (switch, False) for other in users if self.given[other] is inner}
        return adapters

    @contextmanager
    def switched(self) -> Iterator[None]:
        """Let roles that share weights run with and without their adapter, each by its own `LoraSwitch`."""
        with ExitStack() as stack:
            for switch, is_tuned in self.adapters.values():
                if is_tuned:
                    stack.enter_context(switch.borrowed())
            yield

    @contextmanager
    def called(self, role: str) -> Iterator[PreTrainedModel]:
        """A role's model for calls of its own, its adapter on or off as belongs to the role."""
        if role not in self.adapters:
            yield self.models[role]
            return
        switch, is_tuned = self.adapters[role]
        with switch.borrowed(), switch.applied(EVERY_TOKEN if is_tuned else None):
            yield self.models[role]

    def _check_assistant(self, assistant: PreTrainedModel, tokenizer: Any, tokenizers: dict[str, Any]) -> None:
        """It has to read and write every shared id; what may be generated does not depend on it."""
        if is_adapted(assistant) or any(self.models[role] is assistant for role in self.adapters):
            raise ConfigurationError("the assistant shares its weights with an adapter; load it once more, merged.")
        check_supported(assistant, ASSISTANT)
        check_drafts_vocabulary(self.vocabulary, ASSISTANT, logits_width(assistant), tokenizer, tokenizers)

    @property
    def all_models(self) -> list[PreTrainedModel]:
        """Those of the logit arithmetic, and the assistant."""
        return [*self.models.values(), *([] if self.assistant is None else [self.assistant])]

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
    def policy(self, drafter: str | None, captured: bool) -> Iterator[AutoPolicy]:
        """The policy that learns, for one call: with what it knows from earlier ones, where no other call has it.

        Args:
            drafter: who drafts, by name; None leaves it to the policy.
            captured: whether cycles are captured, which changes what they cost.
        """
        drafters = AUTO_DRAFTERS if drafter is None else (drafter,)
        with self._lock:
            policy = self._policies.pop((drafters, captured), None) or AutoPolicy(drafters, captured=captured)
        policy.start()
        yield policy
        self._policies[drafters, captured] = policy

    @contextmanager
    def runners(self, max_rows: int, capacity: int, cuda_graphs: bool | None = None) -> Iterator[TrioRunners]:
        """Borrow the models for one decode; on leaving they are as they were.

        Runners with captures are kept for the next decode that they suit.

        Args:
            max_rows: rows of every cache, at least.
            capacity: positions of every row, to begin with.
            cuda_graphs: see `specproxy.graphs.make_graphs`.

        Raises:
            ConfigurationError: graphs are asked for and cannot be had.
        """
        weights = [weight for model in self.all_models for weight in model.parameters()]
        if not self.ranks.is_alone:
            if cuda_graphs:
                raise ConfigurationError("cuda_graphs=True: a base sharded over processes runs eagerly; leave it out.")
            cuda_graphs = False
        graphs = make_graphs({weight.device for weight in weights}, cuda_graphs)
        # A sharded or offloaded weight has no address; nor is it ever captured.
        addresses = [] if graphs is None else [weight.data_ptr() for weight in weights]
        with borrowed(self.all_models), self.switched():
            with self._lock:
                spare, self._spare = self._spare, None
            if (
                graphs is None
                or spare is None
                or spare[0] != addresses
                or spare[1].max_rows < max_rows
                or spare[1].overlaps != self.overlap
            ):
                spare = None  # freed before new caches are made
                overlaps = self.overlap and graphs is not None
                runners = TrioRunners(
                    self.models,
                    self.pairs,
                    max_rows,
                    capacity,
                    graphs,
                    overlaps,
                    self.adapters,
                    self.assistant,
                    self.ranks,
                )
            else:
                runners = spare[1]
                runners.restart(capacity)
            yield runners
            if graphs is not None:
                self._spare = addresses, runners
