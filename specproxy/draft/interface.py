"""What every drafter is."""

from __future__ import annotations

from typing import Protocol

from specproxy.policy import Plan
from specproxy.state import DecodeState, Draft
from specproxy.trio import TrioRunners
from specproxy_kernels import NoiseStream

__all__ = ["Drafter"]


class Drafter(Protocol):
    """Proposes tokens for the rows in flight. Stopping short may depend on laws, never on a token it would discard."""

    @property
    def name(self) -> str:
        """The name by which plans ask for it."""
        ...

    def propose(self, state: DecodeState, runners: TrioRunners, noise: NoiseStream, plan: Plan) -> Draft:
        """Propose the drafts of one cycle.

        Args:
            state: the rows in flight.
            runners: of the trio; caches of models that run are written, the lengths of the trio's stay.
            noise: of this cycle; draws take the token purpose at their position.
            plan: at most `num_drafts` drafts a row.

        Returns:
            The draft, with the expert's logits at the leading window positions where drafting made them.
        """
        ...
