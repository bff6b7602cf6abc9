"""Drafters: what proposes the tokens of a window. Each fills a `specproxy.state.Draft`."""

from specproxy.draft.expert import draft_with_expert

__all__ = ["draft_with_expert"]
