"""Exact law of one cycle, with the runtime's own functions as black boxes.

`compare` enumerates every draft. The coins are integrated exactly: the threshold of each coin is found by bisection
on the acceptance itself, then the runtime is run on one representative of each of the 2^G cells. The draw of a token
is a Gumbel race over unknown scores; those too are recovered by bisection, on injected noise, so that any change of
the code that changes the law shows, wherever it stands. The emitted tokens are completed per step by the target law
to W tokens.

Everything is float64 on random laws that depend on the whole context.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy_reference import combine, warp
from torch import Tensor

from specproxy_kernels import pack_allowed_tokens

_LARGEST_GAP = 4096.0  # beyond it a logit counts as -inf
_COIN_BELOW, _COIN_ABOVE = -1.0, 2.0  # coins that accept and refuse whatever the threshold


@dataclass(frozen=True)
class Scenario:
    """A rule, a window and a sampling setting over random laws.

    Args:
        settings: keyword arguments of `numpy_reference.warp` other than `seen` and `allowed`.
        seen: tokens of the prompt.
        allowed: per window position, the allowed tokens; None for all.
        certain: drafts are one-hot.
        num_drafts: drafts of every row where fewer than `window` - 1.
    """

    rule: str
    vocab_size: int
    window: int
    settings: dict[str, float] = field(default_factory=dict)
    seen: tuple[int, ...] = ()
    allowed: tuple[tuple[int, ...], ...] | None = None
    certain: bool = False
    num_drafts: int | None = None
    alpha: float = 1.0
    scale: float = 1.5
    seed: int = 0

    def __str__(self) -> str:
        parts = [f"{self.rule}-V{self.vocab_size}-W{self.window}"]
        parts += [f"{name}={value:g}" for name, value in self.settings.items()]
        if self.allowed is not None:
            parts.append("allowed")
        if self.certain:
            parts.append("certain")
        if self.num_drafts is not None:
            parts.append(f"drafts={self.num_drafts}")
        return "-".join(parts)


class Tables:
    """Raw logits of the three models after every prefix: entry d has shape [V] * d + [V]."""

    def __init__(self, scenario: Scenario) -> None:
        rng = np.random.default_rng(scenario.seed)
        vocab, window = scenario.vocab_size, scenario.window
        shapes = [(vocab,) * (d + 1) for d in range(window)]
        target = [rng.normal(size=shape) * scenario.scale for shape in shapes]
        # The expert opposes the target in part, so that many drafts are refused.
        self.expert = [rng.normal(size=t.shape) * scenario.scale - 0.5 * t for t in target]
        self.anti_expert = [rng.normal(size=shape) for shape in shapes]
        self.base = [
            t - scenario.alpha * (e - a) for t, e, a in zip(target, self.expert, self.anti_expert, strict=True)
        ]

    def target(self, scenario: Scenario) -> list[np.ndarray]:
        """The target's conditional laws, by the NumPy reference."""
        laws = []
        for depth in range(scenario.window):
            law = np.empty(self.base[depth].shape)
            allowed = None
            if scenario.allowed is not None:
                allowed = np.isin(np.arange(scenario.vocab_size), scenario.allowed[depth])
            for prefix in itertools.product(range(scenario.vocab_size), repeat=depth):
                pair = (self.expert[depth][prefix], self.anti_expert[depth][prefix], scenario.alpha)
                scores, bad = combine(self.base[depth][prefix], [pair], scenario.vocab_size)
                assert not bad
                seen = {*scenario.seen, *prefix} if "repetition_penalty" in scenario.settings else ()
                settings: dict[str, Any] = dict(scenario.settings)
                law[prefix] = warp(scores, **settings, seen=seen, allowed=allowed).prob
            laws.append(law)
        return laws


def make_parameters(
    ops: ModuleType,
    batch: int,
    vocab_size: int,
    settings: dict[str, float],
    seen: Sequence[int] = (),
    allowed: Sequence[Sequence[int]] | None = None,
) -> Any:
    """`WarpParameters` of equal rows."""

    def full(name: str, dtype: torch.dtype) -> Tensor | None:
        return torch.full((batch,), settings[name], dtype=dtype) if name in settings else None

    temperature = settings.get("temperature", 1.0)
    mask = None
    if allowed is not None:
        mask = torch.zeros(1, len(allowed), vocab_size, dtype=torch.bool)
        for position, tokens in enumerate(allowed):
            mask[0, position, list(tokens)] = True
        mask = pack_allowed_tokens(mask)
    seen_mask = None
    if "repetition_penalty" in settings:
        seen_mask = torch.zeros(batch, vocab_size, dtype=torch.bool)
        seen_mask[:, list(seen)] = True
    return ops.WarpParameters(
        temperature=torch.full((batch,), temperature, dtype=torch.float64),
        top_k=full("top_k", torch.long),
        top_p=full("top_p", torch.float64),
        min_p=full("min_p", torch.float64),
        repetition_penalty=full("repetition_penalty", torch.float64),
        seen=seen_mask,
        allowed=mask,
        max_top_k=int(settings.get("top_k", 0)),
        any_greedy=temperature == 0,
        any_sampling=temperature > 0,
    )


@dataclass(frozen=True)
class InjectedNoise:
    """Stands in for `NoiseStream` with given values."""

    coin: Tensor
    gumbel: Tensor

    def coins(self, count: int) -> Tensor:
        return self.coin[:, :count]

    def next_token(self, num_accepted: Tensor, rule: str, window: int, vocab_size: int) -> Tensor:
        return self.gumbel

    def tokens(self, count: int, vocab_size: int) -> Tensor:
        raise AssertionError("only `coupled` reads the noise of the drafts")


@dataclass
class InjectedTokens:
    """Stands in for `NoiseStream` where drafts are drawn: the same noise [B, V] at every position."""

    gumbel: Tensor

    def tokens(self, count: int, vocab_size: int) -> Tensor:
        return self.gumbel[:, None].expand(-1, count, -1)


def race_law(draw: Callable[[Tensor, Tensor], Tensor], rows: int, vocab_size: int) -> np.ndarray:
    """Law [rows, V] of argmax(scores + Gumbel), from `draw(row indices, noise [., V]) -> tokens` alone.

    With every noise but two at -inf, token v beats the winner of the noiseless race once its noise reaches the gap
    between their scores.
    """
    every = torch.arange(rows)
    winner = draw(every, torch.zeros(rows, vocab_size, dtype=torch.float64))
    row = every.repeat_interleave(vocab_size)
    token = torch.arange(vocab_size).repeat(rows)
    best = winner[row]

    def wins(gap: Tensor) -> Tensor:
        noise = torch.full((len(row), vocab_size), -torch.inf, dtype=torch.float64)
        noise.scatter_(1, best[:, None], 0.0)
        noise.scatter_(1, token[:, None], gap[:, None])
        return draw(row, noise) == token

    low = torch.zeros(len(row), dtype=torch.float64)
    high = torch.full_like(low, _LARGEST_GAP)
    alive = wins(high)
    for _ in range(60):
        middle = (low + high) / 2
        won = wins(middle)
        low, high = torch.where(won, low, middle), torch.where(won, middle, high)
    weight = torch.where(alive, (-high).exp(), 0.0).masked_fill(token == best, 1.0).view(rows, vocab_size)
    return (weight / weight.sum(-1, keepdim=True)).numpy()


class Cycle:
    """The inputs of one cycle for every possible draft [N = V^G, G].

    Args:
        ops: the runtime's functions.
        scenario: what is compared.
        length: where given, the number of drafts that are verified of a path, in place of the scenario's.
    """

    def __init__(
        self, ops: ModuleType, scenario: Scenario, length: Callable[[tuple[int, ...]], int] | None = None
    ) -> None:
        self.ops, self.scenario = ops, scenario
        self.tables = Tables(scenario)
        self.vocab_size, self.count = scenario.vocab_size, scenario.window - 1
        paths = list(itertools.product(range(self.vocab_size), repeat=self.count))
        self.drafts = torch.tensor(paths, dtype=torch.long)
        used = self.count if scenario.num_drafts is None else scenario.num_drafts
        self.num_drafts = torch.tensor([used if length is None else length(path) for path in paths])
        self.base = self._along_paths(self.tables.base)
        self.expert = self._along_paths(self.tables.expert)
        self.anti_expert = self._along_paths(self.tables.anti_expert)
        self.draft_law = None
        self.draft_prob = np.ones(len(paths))
        if not scenario.certain and self.count > 0:
            self._draw_drafts()

    def _along_paths(self, table: list[np.ndarray]) -> Tensor:
        rows = [[table[d][tuple(path[:d])] for d in range(self.count + 1)] for path in self.drafts.tolist()]
        return torch.tensor(np.array(rows))

    def parameters(self, batch: int) -> Any:
        scenario = self.scenario
        return make_parameters(self.ops, batch, self.vocab_size, scenario.settings, scenario.seen, scenario.allowed)

    def _draw_drafts(self) -> None:
        """Scores every path under the law that `sample_drafts` draws from, and keeps its descriptors."""
        laws = []
        for i in range(self.count):

            def draw(row: Tensor, noise: Tensor, i: int = i) -> tuple[Tensor, Any]:
                return self.ops.sample_drafts(
                    self.expert[row, i : i + 1],
                    self.parameters(len(row)),
                    self.drafts[row, :i],
                    InjectedTokens(noise),
                    self.vocab_size,
                )

            # The law depends on the first i drafts: one path of each prefix is enough.
            first = torch.arange(0, len(self.drafts), self.vocab_size ** (self.count - i))

            def tokens(row: Tensor, noise: Tensor, first: Tensor = first, draw: Any = draw) -> Tensor:
                return draw(first[row], noise)[0][:, 0]

            law = race_law(tokens, len(first), self.vocab_size)
            group = np.arange(len(self.drafts)) // self.vocab_size ** (self.count - i)
            self.draft_prob *= law[group, self.drafts[:, i].numpy()]
            every = torch.arange(len(self.drafts))
            laws.append(draw(every, torch.zeros(len(every), self.vocab_size, dtype=torch.float64))[1])
        tau = None if laws[0].tau is None else torch.cat([law.tau for law in laws], 1)
        self.draft_law = self.ops.DraftLaw(
            torch.cat([law.logits for law in laws], 1), tau, torch.cat([law.lse for law in laws], 1)
        )

    def inputs(self, row: Tensor) -> dict[str, Any]:
        """Arguments of `accept_window` and `emit_next_token` for some paths, the noise left out."""
        law = self.draft_law
        if law is not None:
            law = self.ops.DraftLaw(law.logits[row], None if law.tau is None else law.tau[row], law.lse[row])
        alpha = torch.full((len(row), self.count + 1), self.scenario.alpha, dtype=torch.float64)
        return {
            "rule": self.scenario.rule,
            "base": self.base[row],
            "pairs": [self.ops.LogitPair(self.expert[row], self.anti_expert[row], alpha)],
            "drafts": self.drafts[row],
            "draft_law": law,
            "parameters": self.parameters(len(row)),
            "vocab_size": self.vocab_size,
        }

    def accept(self, row: Tensor, coins: Tensor) -> Any:
        noise = InjectedNoise(coins, torch.zeros(0))
        return self.ops.accept_window(**self.inputs(row), num_drafts=self.num_drafts[row], noise=noise)

    def thresholds(self) -> Tensor:
        """Measure [N, G] of the coins that keep the first i + 1 drafts, all else favouring exactly that."""
        paths, count = self.drafts.shape
        row = torch.arange(paths).repeat_interleave(count)
        column = torch.arange(count).repeat(paths)
        order = torch.arange(count)

        def kept(coin: Tensor) -> Tensor:
            coins = torch.where(order < column[:, None], _COIN_BELOW, _COIN_ABOVE).double()
            coins.scatter_(1, column[:, None], coin[:, None])
            return self.accept(row, coins).num_accepted > column

        low, high = torch.zeros(len(row), dtype=torch.float64), torch.ones(len(row), dtype=torch.float64)
        never = ~kept(low)
        always = kept(high - 2.0**-53)
        for _ in range(60):
            middle = (low + high) / 2
            below = kept(middle)
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return torch.where(never, 0.0, torch.where(always, 1.0, high)).view(paths, count)

    def outcomes(self) -> tuple[np.ndarray, np.ndarray]:
        """Probability [N, G + 1] of each number of kept drafts, and the law [N, G + 1, V] of the token that follows."""
        paths, count = self.drafts.shape
        threshold = self.thresholds()
        kept_mass = torch.zeros(paths, count + 1, dtype=torch.float64)
        example = torch.full((paths, count + 1, count), torch.nan, dtype=torch.float64)
        fields = torch.full((paths, count + 1), torch.nan, dtype=torch.float64)
        every = torch.arange(paths)
        for pattern in itertools.product((True, False), repeat=count):
            below = torch.tensor(pattern, dtype=torch.bool)
            coins = torch.where(below, threshold / 2, (threshold + 1) / 2)
            mass = torch.where(below, threshold, 1 - threshold).prod(-1)
            possible = mass > 0
            if not possible.any():
                continue
            acceptance = self.accept(every, coins)
            number = acceptance.num_accepted[possible]
            row = every[possible]
            kept_mass[row, number] += mass[possible]
            known = fields[row, number]
            weight = acceptance.log_weight[possible].double()
            assert bool((known.isnan() | (known == weight)).all()), "the residual depends on more than what was kept"
            fields[row, number] = weight
            example[row, number] = coins[possible]
        law = np.zeros((paths, count + 1, self.vocab_size))
        row, number = torch.nonzero(kept_mass, as_tuple=True)
        coins = example[row, number]
        acceptance = self.accept(row, coins)
        assert torch.equal(acceptance.num_accepted, number)

        def draw(index: Tensor, noise: Tensor) -> Tensor:
            part = type(acceptance)(*(values[index] for values in acceptance))
            return self.ops.emit_next_token(
                **self.inputs(row[index]), acceptance=part, noise=InjectedNoise(torch.zeros(0), noise)
            )[0]

        law[row, number] = race_law(draw, len(row), self.vocab_size)
        return kept_mass.numpy(), law


@dataclass(frozen=True)
class Comparison:
    """The largest total variation to the target, and the expected number of tokens of a cycle."""

    total_variation: float
    expected_tokens: float


def compare(ops: ModuleType, scenario: Scenario, length: Callable[[tuple[int, ...]], int] | None = None) -> Comparison:
    """Joint law of W tokens, of which a cycle gives the first ones, against the target's.

    Certain drafts must give the target's law each; drawn ones give it together. `length` as in `Cycle`.
    """
    cycle = Cycle(ops, scenario, length)
    kept, next_law = cycle.outcomes()
    conditional = cycle.tables.target(scenario)
    window, vocab = scenario.window, scenario.vocab_size
    target = np.ones(())
    for law in conditional:
        target = target[..., None] * law
    drafts = cycle.drafts.numpy()
    groups = np.arange(len(drafts)) if scenario.certain else np.zeros(len(drafts), dtype=int)
    emitted = np.zeros((groups.max() + 1, *(vocab,) * window))
    for number in range(window):
        part = np.zeros((groups.max() + 1, *(vocab,) * (number + 1)))
        weight = (cycle.draft_prob * kept[:, number])[:, None] * next_law[:, number]
        np.add.at(part, (groups, *(drafts[:, i] for i in range(number))), weight)
        for law in conditional[number + 1 :]:
            part = part[..., None] * law
        emitted += part
    distance = np.abs(emitted - target).reshape(len(emitted), -1).sum(-1).max() / 2
    tokens = (cycle.draft_prob[:, None] * kept * (np.arange(window) + 1)).sum()
    return Comparison(float(distance), float(tokens))
