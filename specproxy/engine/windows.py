"""Windows for rows that each have a limit of their own. Knows plans and counts; nothing of requests or models."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from specproxy.policy import CycleReport, Outlook, Plan, WindowPolicy
from specproxy.state import DecodeState

__all__ = ["RowWindows"]


class RowWindows:
    """A policy that plans no wider window than some row in flight takes part in, and counts what was chosen.

    Args:
        policy: chooses.
        counts: takes the cycles by their number of drafts.
        state: the rows in flight.
    """

    def __init__(self, policy: WindowPolicy, counts: Counter[int], state: DecodeState) -> None:
        self._policy, self._counts, self._state = policy, counts, state

    @property
    def offers_wanted(self) -> int:
        """See `WindowPolicy`."""
        return self._policy.offers_wanted

    def plan(self, outlook: Outlook) -> Plan:
        """See `WindowPolicy`."""
        most = min(outlook.most, max(row.max_draft_tokens for row in self._state.rows))
        return self._policy.plan(replace(outlook, most=most))

    def observe(self, report: CycleReport) -> None:
        """See `WindowPolicy`."""
        self._counts[report.plan.num_drafts] += 1
        self._policy.observe(report)
