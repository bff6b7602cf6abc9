"""Growth by the clock: a base whose forward costs a wanted multiple of a small model's on this machine.

Parameters say little about tiny models, whose time goes into calls rather than into memory traffic.
"""

from __future__ import annotations

from statistics import median
from time import perf_counter
from typing import Any

import torch

from benchmarks.grow import cost_parameters, grow, shape_for_cost_ratio
from benchmarks.measure import synchroniser
from specproxy.attention import borrowed
from specproxy.runner import Runner

__all__ = ["grow_to_time_ratio", "step_seconds"]

_CONTEXT = 64  # cached tokens behind which a step is timed


@torch.inference_mode()
def step_seconds(models: list[Any], repeats: int = 15) -> list[float]:
    """Median seconds of one decoding step of each model, one row; the models take turns."""
    runners = [Runner(model, "base", 1) for model in models]
    seconds: list[list[float]] = [[] for _ in models]
    with borrowed(models):
        for runner in runners:
            runner.cache.reserve(_CONTEXT + 1)
            runner.prefill(0, [list(range(1, _CONTEXT + 1))])
        for repeat in range(repeats + 3):
            for runner, own in zip(runners, seconds, strict=True):
                synchronise = synchroniser(runner.device)
                token = torch.ones(1, 1, dtype=torch.long, device=runner.device)
                synchronise()
                start = perf_counter()
                runner.forward(token)  # nothing is committed: every step stands at one place
                synchronise()
                if repeat >= 3:
                    own.append(perf_counter() - start)
    return [median(own) for own in seconds]


def grow_to_time_ratio(
    base: Any, small: Any, ratio: float, *, depth_only: bool = False, seed: int = 0, tolerance: float = 0.05
) -> Any:
    """`base` grown until a step of `small` takes about `ratio` of a step of the result.

    Where the base costs more already it is returned as it is.

    Args:
        base, small: models on one device, with vocabularies of more than 64 ids.
        ratio: wanted t_small / t_base.
        depth_only: add layers alone; otherwise the base keeps its own proportions.
        seed: of the new weights.
        tolerance: relative error that ends the search; after 6 trials the nearest is taken.
    """
    small_seconds, base_seconds = step_seconds([small, base])
    measured = small_seconds / base_seconds
    best, best_error = base, abs(measured / ratio - 1)
    parameters = float(cost_parameters(base))
    for _ in range(6):
        parameters = max(parameters * measured / ratio, cost_parameters(base))
        if best_error <= tolerance or parameters == cost_parameters(base):
            break
        grown = grow(base, shape_for_cost_ratio(base, parameters, depth_only), seed=seed)
        small_seconds, base_seconds = step_seconds([small, grown])
        measured = small_seconds / base_seconds
        if abs(measured / ratio - 1) < best_error:
            best, best_error = grown, abs(measured / ratio - 1)
    return best
