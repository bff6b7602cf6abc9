"""Drafters: what proposes the tokens of a window. Each fills a `specproxy.state.Draft`, and keeps nothing for itself:
what a drafter remembers of a row belongs to the row.
"""

from collections.abc import Mapping

from specproxy.draft.assistant import AssistantDrafter
from specproxy.draft.cascade import CascadeDrafter
from specproxy.draft.expert import ExpertDrafter
from specproxy.draft.interface import Drafter
from specproxy.draft.lookup import LookupDrafter
from specproxy.draft.tree import TreeDrafter
from specproxy.policy import Plan

__all__ = ["DRAFTERS", "Drafter", "ExpertDrafter", "LookupDrafter", "TreeDrafter", "drafter_of"]

_CHAINS: tuple[Drafter, ...] = (ExpertDrafter(), LookupDrafter(), CascadeDrafter(), AssistantDrafter())

#: Every drafter of chains, by the name that a plan gives.
DRAFTERS: Mapping[str, Drafter] = {drafter.name: drafter for drafter in _CHAINS}

_TREE_DRAFTER = TreeDrafter()


def drafter_of(plan: Plan) -> Drafter:
    """Who drafts in a cycle."""
    return DRAFTERS[plan.drafter] if plan.tree is None else _TREE_DRAFTER
