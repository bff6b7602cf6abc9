"""Drafters: what proposes the tokens of a window. Each fills a `specproxy.state.Draft`, and keeps nothing for itself:
what a drafter remembers of a row belongs to the row.
"""

from collections.abc import Mapping

from specproxy.draft.expert import ExpertDrafter
from specproxy.draft.interface import Drafter

__all__ = ["DRAFTERS", "Drafter"]

#: Every drafter, by the name that a plan gives.
DRAFTERS: Mapping[str, Drafter] = {drafter.name: drafter for drafter in (ExpertDrafter(),)}
