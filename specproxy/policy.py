"""Who drafts in the next cycle, and how many tokens: plans, what they are made from, and reports of what came of them.

A policy is a pure function of what it is told, so that it can be replayed. It may look at laws, costs and past
acceptance, never at a token it would then discard: that would bias `rejection` and `block`. `specproxy.auto` holds the
policy that learns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from specproxy.config import SpeculationParameters
from specproxy.costs import ForwardTime
from specproxy.early_stop import EarlyStop
from specproxy.tree import TYPICAL_RANK_ACCEPTANCE, TreeShape

__all__ = ["CycleReport", "FixedWindow", "Match", "Outlook", "Plan", "WindowPolicy", "fixed_tree"]


@dataclass(frozen=True)
class Plan:
    """What the next cycle does.

    Args:
        num_drafts: G, drafts of a row at most; 0 is a per-step cycle.
        drafter: who proposes them.
        tree: where equality decides, the tree that is drafted in place of a chain; its depth is `num_drafts`.
        listens: whether a per-step cycle tells if the expert's draft would have been accepted; no other plan may.
        expected: tokens of all rows and seconds of the cycle, as the policy predicts them; for statistics alone.
        stop: where the loop `stops`, decides during a chain of the expert's how many of `num_drafts` drafts it gets.
    """

    num_drafts: int
    drafter: str = "expert"
    tree: TreeShape | None = None
    listens: bool = False
    expected: tuple[float, float] | None = field(default=None, compare=False)
    stop: EarlyStop | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        assert self.tree is None or self.tree.depth == self.num_drafts, "a tree's depth is the number of drafts"
        assert not (self.listens and self.num_drafts), "a cycle with drafts hears of them anyway"

    @property
    def window(self) -> int:
        """W: positions that the base and the anti-expert score."""
        return self.num_drafts + 1 if self.tree is None else len(self.tree)


class Match(NamedTuple):
    """An offer and the text that came: the length of its match, how many tokens could be compared, how many agreed."""

    length: int
    tested: int
    agreed: int


@dataclass(frozen=True)
class Outlook:
    """What a plan is made for.

    Args:
        rows: in flight, by their `index`.
        useful: drafts of each that it can make use of, within its budget and its own limit; may be negative.
        most: drafts that there is room for.
        equality: whether equality decides about the drafts of every row, so that trees may be drafted.
        stops: whether the loop can stop a chain of the expert's early.
        offers: where the policy wants them, of each row the length of lookup's match in its committed text, and how
            many tokens follow it there.
    """

    rows: tuple[int, ...]
    useful: tuple[int, ...]
    most: int
    equality: bool = False
    stops: bool = False
    offers: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class CycleReport:
    """What a cycle cost and gave.

    Args:
        plan: as it was made; of a draft that could stop, with the number of drafts that it got.
        rows: the rows that took part, by their `index`.
        num_drafts: drafts of each that were verified.
        num_accepted: leading drafts of each that survived.
        forwards: time of every forward; none where they are not timed one by one.
        seconds: of the whole cycle.
        ranks: with a tree, the ranks of the accepted drafts of each row, by depth: a path in the plan's tree. Behind
            it the target's token was no guess of the node there, if that node has any and the row's budget left more.
        heard: where the plan listens, for each row whether the expert's draft would have been accepted.
        matched: where there were offers, how each fared against the text that came.
        entropies: where the plan stops, of each row the entropies of the laws that its drafts were drawn from, up to
            its first refused draft; behind drafts that all survived also that of a law whose draft was dropped. Laws
            behind a refused draft are no part of the text's past, and are not told.
    """

    plan: Plan
    rows: tuple[int, ...]
    num_drafts: tuple[int, ...]
    num_accepted: tuple[int, ...]
    forwards: tuple[ForwardTime, ...]
    seconds: float
    ranks: tuple[tuple[int, ...], ...] = ()
    heard: tuple[bool, ...] = ()
    matched: tuple[Match, ...] = ()
    entropies: tuple[tuple[float, ...], ...] = ()


class WindowPolicy(Protocol):
    """Makes a plan before a cycle and hears of it afterwards."""

    @property
    def offers_wanted(self) -> int:
        """Tokens of lookup's offers, per row, that plans are made from; 0 spares the search."""
        ...

    def plan(self, outlook: Outlook) -> Plan:
        """The next cycle, with at most `outlook.most` drafts a row."""
        ...

    def observe(self, report: CycleReport) -> None:
        """Take a finished cycle into account."""
        ...


class FixedWindow:
    """Always the same number of drafts, or the same tree.

    Args:
        count: drafts of a chain; 0 is per-step decoding.
        drafter: who proposes them.
        tree: drafted in place of the chain by the expert, wherever equality decides.
    """

    offers_wanted = 0

    def __init__(self, count: int, drafter: str = "expert", tree: TreeShape | None = None) -> None:
        self._count, self._drafter, self._tree = count, drafter, tree

    def plan(self, outlook: Outlook) -> Plan:
        """The fixed chain or tree, as far as there is room."""
        if self._tree is not None and outlook.equality and outlook.most:
            tree = self._tree.cut(outlook.most)
            return Plan(tree.depth, self._drafter, tree)
        return Plan(min(self._count, outlook.most), self._drafter)

    def observe(self, report: CycleReport) -> None:
        """Nothing to learn."""


def fixed_tree(speculation: SpeculationParameters, vocab_size: int) -> TreeShape | None:
    """The tree that a call asks for, laid out for a typical expert; None where it asks for chains.

    Args:
        speculation: of the call.
        vocab_size: V: a node has at most as many guesses.
    """
    if not speculation.num_tree_tokens:
        return None
    ranks = TYPICAL_RANK_ACCEPTANCE[:vocab_size]
    return TreeShape.best_tree(ranks, speculation.num_tree_tokens, int(speculation.num_draft_tokens))
