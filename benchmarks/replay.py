"""Decoding on a virtual clock: policies against recorded acceptance and a table of costs, without a model.

Where equality decides (greedy, `coupled`) the text is fixed, and so is, at every position of it, which candidate of the
expert is the target's token. What any window would give from there follows without running it. A replay repeats the
decode loop's contract with a policy (`specproxy.decode.step`) on such recordings: rows are admitted and leave, every
forward takes what the table says, and the outcome is a pure function of policy, recordings and costs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from specproxy.costs import ForwardTime
from specproxy.policy import CycleReport, FixedWindow, Outlook, Plan, WindowPolicy
from specproxy.tree import TYPICAL_RANK_ACCEPTANCE

__all__ = ["Costs", "Recording", "Replay", "best_fixed", "replay", "synthetic_recording"]


@dataclass(frozen=True)
class Recording:
    """One text.

    Args:
        ranks: for every token, how many of the expert's candidates at its place come before it; 0 is a draft that
            would be accepted.
        prompt, tokens: ids, where they are known.
        entropies: of the expert's law at every place, in nats; none where drafts are never stopped early.
        behind: for every place with a wrong draft, entropies of the expert's laws at the next ones, on its own path.
    """

    ranks: tuple[int, ...]
    prompt: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    entropies: tuple[float, ...] = ()
    behind: tuple[tuple[float, ...], ...] = ()

    def shortened(self, length: int) -> Recording:
        """The same without its last tokens."""
        return Recording(
            self.ranks[:length], self.prompt, self.tokens[:length], self.entropies[:length], self.behind[:length]
        )

    def entropy(self, start: int, count: int) -> float:
        """The entropy behind `count` drafts from a place on. Past what was recorded, the last one that was."""
        kept = self.run(start, count)
        last = min(start + kept, len(self.entropies) - 1)
        beyond = self.behind[last]
        if kept == count or not beyond:
            return self.entropies[last]
        return beyond[min(count - kept - 1, len(beyond) - 1)]

    def path(self, start: int, plan: Plan, most: int) -> tuple[int, ...]:
        """Ranks of the drafts that survive from a place on, at most `most` of them, in a plan's chain or tree."""
        if plan.tree is None:
            return (0,) * self.run(start, most)
        node, ranks = 0, []
        while len(ranks) < most:
            rank = self.ranks[start + len(ranks)]
            child = next((child for child in plan.tree.children(node) if plan.tree.ranks[child] == rank), None)
            if child is None:
                break
            node = child
            ranks.append(rank)
        return tuple(ranks)

    def run(self, start: int, most: int) -> int:
        """Drafts that survive from a place on, at most `most`."""
        count = 0
        while count < most and start + count < len(self.ranks) and self.ranks[start + count] == 0:
            count += 1
        return count


@dataclass(frozen=True)
class Costs:
    """Seconds of every forward, and of the loop itself.

    Args:
        forward: (role, rows, width) -> seconds.
        own: (rows, width) -> seconds of a cycle outside the forwards.
        listening: seconds that listening adds to a per-step cycle.
        bonus_always: whether the expert's step at the bonus position runs without being reached, as in a captured
            cycle.
    """

    forward: Callable[[str, int, int], float]
    own: Callable[[int, int], float]
    listening: float = 0.0
    bonus_always: bool = False

    @classmethod
    def memory_bound(cls, ratio: float, slope: float = 1 / 256, own: float = 0.03, bonus_always: bool = False) -> Costs:
        """A forward reads its weights once: every further token of rows x width adds a small share.

        Args:
            ratio: t_small / t_base; the base over one token takes 1.
            slope: share of a token.
            own: of the loop, and a tenth of it for every further position.
            bonus_always: as above.
        """

        def forward(role: str, rows: int, width: int) -> float:
            return (1.0 if role == "base" else ratio) * (1 + slope * (rows * width - 1))

        return cls(forward, lambda rows, width: own * (1 + 0.1 * (width - 1)), own * 0.1, bonus_always)


@dataclass
class Replay:
    """What a replay gave.

    Args:
        tokens: of all rows.
        seconds: on the virtual clock.
        plans: of every cycle, in order; of a draft that was stopped early, with the drafts that it got.
        places: at every cycle, how far each row in flight had come, by its number.
    """

    tokens: int = 0
    seconds: float = 0.0
    plans: list[Plan] = field(default_factory=list)
    places: list[dict[int, int]] = field(default_factory=list)
    reports: list[CycleReport] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    @property
    def per_step_share(self) -> float:
        """Share of cycles without drafts."""
        return sum(plan.num_drafts == 0 for plan in self.plans) / len(self.plans)


def replay(
    policy: WindowPolicy,
    texts: Sequence[Recording],
    batch: int,
    costs: Costs,
    noise: float = 0.0,
    seed: int = 0,
    equality: bool = False,
) -> Replay:
    """Decode every text once, `batch` rows at a time; a row that ends makes room for the next text.

    Args:
        policy: plans and is told.
        texts: in the order of their admission.
        batch: rows in flight at most.
        costs: of forwards.
        noise: standard deviation of a forward's time, relative; one in fifty then takes five times as long. What the
            policy is told is noisy; the clock of the result is not.
        seed: of that noise.
        equality: whether the policy may draft trees.
    """
    rng = random.Random(seed)
    result = Replay()
    waiting = list(enumerate(texts))[::-1]
    flight: dict[int, tuple[Recording, int]] = {}
    while waiting or flight:
        while waiting and len(flight) < batch:
            index, text = waiting.pop()
            flight[index] = (text, 0)
        remaining = {index: len(text.ranks) - place for index, (text, place) in flight.items()}
        useful = tuple(left - 1 for left in remaining.values())
        stops = all(text.entropies for text, _ in flight.values())
        plan = policy.plan(Outlook(tuple(flight), useful, max(useful), equality, stops))
        result.places.append({index: place for index, (_, place) in flight.items()})
        count, num_steps, seen = _drafted(plan, list(flight.values()))
        plan = plan if plan.stop is None else replace(plan, num_drafts=count)
        result.plans.append(plan)
        drafted = {index: min(count, left - 1) for index, left in remaining.items()}
        paths = {index: text.path(place, plan, drafted[index]) for index, (text, place) in flight.items()}
        accepted = {index: len(path) for index, path in paths.items()}
        reached = costs.bonus_always or any(accepted[index] == drafted[index] for index in flight)
        rows, width = len(flight), plan.window
        steps = [("expert", 1)] * num_steps
        if plan.tree is not None:
            levels = plan.tree.levels if costs.bonus_always else plan.tree.expanded
            steps = [("expert", len(level)) for level in levels if level]
            reached = reached and not costs.bonus_always
        work = steps + [("expert", 1)] * (reached and num_steps <= count)
        work += [("anti_expert", width), ("base", width)]
        exact = [ForwardTime(role, rows, size, costs.forward(role, rows, size)) for role, size in work]
        told = [forward._replace(seconds=forward.seconds * _spike(rng, noise)) for forward in exact]
        own = costs.own(rows, width) + plan.listens * costs.listening
        heard = tuple(text.run(place, 1) == 1 for text, place in flight.values()) if plan.listens else ()
        report = CycleReport(
            plan,
            tuple(flight),
            tuple(drafted.values()),
            tuple(accepted.values()),
            tuple(told),
            own + sum(forward.seconds for forward in told),
            ranks=() if plan.tree is None else tuple(paths.values()),
            heard=heard,
            entropies=tuple(own[: accepted[index] + 1] for own, index in zip(seen, flight, strict=True)),
        )
        policy.observe(report)
        result.reports.append(report)
        result.seconds += own + sum(forward.seconds for forward in exact)
        for index, (text, place) in list(flight.items()):
            taken = accepted[index] + 1
            result.tokens += taken
            if place + taken < len(text.ranks):
                flight[index] = (text, place + taken)
            else:
                del flight[index]
    return result


def _drafted(plan: Plan, rows: Sequence[tuple[Recording, int]]) -> tuple[int, int, list[tuple[float, ...]]]:
    """How a chain of the expert's goes: its drafts, its steps, and of each row the entropies that a stop has seen."""
    seen: list[tuple[float, ...]] = [() for _ in rows]
    if plan.stop is None:
        return plan.num_drafts, max(1, plan.num_drafts), seen
    for done in range(plan.num_drafts):
        seen = [(*own, text.entropy(place, done)) for own, (text, place) in zip(seen, rows, strict=True)]
        length = plan.stop.length(seen)
        if length <= done + 1:
            return length, done + 1, seen
    return plan.num_drafts, plan.num_drafts, seen


def _spike(rng: random.Random, noise: float) -> float:
    if not noise:
        return 1.0
    return 5.0 if rng.random() < 0.02 else max(0.5, rng.gauss(1, noise))


def best_fixed(texts: Sequence[Recording], batch: int, costs: Costs, counts: Sequence[int]) -> dict[int, float]:
    """Tokens per second of fixed windows, by number of drafts."""
    return {count: replay(FixedWindow(count), texts, batch, costs).rate for count in counts}


def synthetic_recording(levels: Sequence[tuple[float, int]], seed: int) -> Recording:
    """A text whose drafts survive independently; where the best guess fails, the others fare as they typically do.

    Args:
        levels: (acceptance, tokens), one stretch after another.
        seed: of the draws.
    """
    rng = random.Random(seed)
    others = [*TYPICAL_RANK_ACCEPTANCE[1:], 1 - sum(TYPICAL_RANK_ACCEPTANCE)]  # the last is no guess at all
    ranks = [
        0 if rng.random() < rate else rng.choices(range(1, len(others) + 1), others)[0]
        for rate, length in levels
        for _ in range(length)
    ]
    return Recording(tuple(rank if rank < len(others) else 10_000 for rank in ranks))
