"""Timed runs of ways of decoding, in turns, and what many of them say. Knows no models and no command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from benchmarks.decoders import Decode
from benchmarks.measure import Forward, ForwardClock, Stopwatch, paired_ratio, peak_memory, synchroniser
from benchmarks.theory import Costs, acceptance_probability, speed_up
from specproxy import SpeculationStats
from specproxy.theory import speedup_over_base, speedup_over_per_step

__all__ = ["Run", "pad_batches", "run_once", "summarise", "take_turns"]

ROLES = ("expert", "anti_expert", "base")
#: What speeds are set against, where it ran.
REFERENCES = ("per_step", "plain_loop", "base_runtime", "base_generate")


@dataclass
class Run:
    """One pass over all prompts.

    Args:
        seconds: of all calls.
        first_token_seconds: per call, from its start to its first token.
        further_token_seconds: per call, time after the first token over the further tokens of its longest row.
        tokens: new tokens of every row.
        forwards: every forward of a model.
        speculation: per call, where there was any.
        memory: peak in MiB.
    """

    seconds: float = 0.0
    first_token_seconds: list[float] = field(default_factory=list)
    further_token_seconds: list[float] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    forwards: list[Forward] = field(default_factory=list)
    speculation: list[SpeculationStats] = field(default_factory=list)
    memory: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows over the time of all calls."""
        return sum(map(len, self.tokens)) / self.seconds


def run_once(
    decode: Decode,
    batches: list[tuple[Tensor, Tensor]],
    seed: int,
    clock: ForwardClock,
    synchronise: Callable[[], None],
) -> Run:
    """Decode every batch once.

    Args:
        decode: the way of decoding.
        batches: input ids and attention masks, [B, S].
        seed: of the first batch; the others follow.
        clock: entered, with the models that decode.
        synchronise: waits for the device.
    """
    run = Run()
    with peak_memory(batches[0][0].device) as peak:
        for i, (input_ids, attention_mask) in enumerate(batches):
            clock.reset()
            synchronise()
            watch = Stopwatch()
            decoded = decode(input_ids, attention_mask, seed + i, watch)
            synchronise()
            seconds = Stopwatch().began - watch.began
            # Without a streamer the first token is there when the last prefill is.
            first = (max(clock.first_ends.values()) if watch.first is None else watch.first) - watch.began
            longest = max(map(len, decoded.tokens))
            run.seconds += seconds
            run.first_token_seconds.append(first)
            if longest > 1:
                run.further_token_seconds.append((seconds - first) / (longest - 1))
            run.tokens += decoded.tokens
            run.forwards += clock.forwards
            if decoded.speculation is not None:
                run.speculation.append(decoded.speculation)
        run.memory = peak()
    return run


def pad_batches(prompts: list[list[int]], size: int, pad: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Left-padded (input_ids, attention_mask) of `size` rows each; prompts repeat to fill the last one."""
    missing = -len(prompts) % size
    prompts = prompts + [prompts[i % len(prompts)] for i in range(missing)]
    batches = []
    for start in range(0, len(prompts), size):
        rows = prompts[start : start + size]
        width = max(map(len, rows))
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        batches.append((ids, mask))
    return batches


def take_turns(
    decoders: dict[str, Decode],
    batches: list[tuple[Tensor, Tensor]],
    models: dict[str, Any],
    seed: int,
    repeats: int,
    title: str,
    console: Console,
) -> tuple[dict[str, list[Run]], dict[str, list[Run]]]:
    """Run all ways of decoding repeat by repeat, forwards and backwards, after a first batch that is not counted.

    Args:
        decoders: ways of decoding, by name.
        batches: input ids and attention masks, [B, S]; a repeat decodes all of them.
        models: by role, those whose forwards are clocked.
        seed: of the first batch of the first repeat.
        repeats: of every way.
        title: for the eyes, on the console.

    Returns:
        Per name the timed repeats, and the runs whose forwards were clocked faithfully: on a device that runs behind
        the host, one more repeat that waits after every forward, whose own time is not to be reported.
    """
    device = batches[0][0].device
    synchronise, is_async = synchroniser(device), device.type != "cpu"
    runs: dict[str, list[Run]] = {name: [] for name in decoders}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress, ForwardClock(models) as clock:
        bar = progress.add_task(title, total=(repeats + 1 + is_async) * len(decoders))

        def once(name: str, seed: int, count: int | None = None) -> Run:
            progress.update(bar, description=f"{title}: {name}")
            run = run_once(decoders[name], batches[:count], seed, clock, synchronise)
            progress.advance(bar)
            return run

        for name in decoders:
            once(name, seed, count=1)
        for repeat in range(repeats):
            for name in list(decoders) if repeat % 2 == 0 else reversed(decoders):
                runs[name].append(once(name, seed + repeat))
        profiles = runs
        if is_async:
            clock.synchronise = synchronise
            profiles = {name: [once(name, seed)] for name in decoders}
    return runs, profiles


def summarise(
    runs: dict[str, list[Run]], profiles: dict[str, list[Run]], batch_size: int, same: Mapping[str, str]
) -> dict[str, Any]:
    """Figures of every way of decoding, paired ratios, and the theory's share.

    Args:
        runs: per name, the timed repeats, in the order of their pairing; `per_step` among them.
        profiles: per name, the runs whose forwards were clocked faithfully.
        batch_size: rows of a call.
        same: names of those that must have given the tokens of another one, with its name.

    Returns:
        JSON-ready: `cost_ratio`, `decoders`, `theory`.
    """
    steps = [forward for run in profiles["per_step"] for forward in run.forwards if not forward.prefill]
    token_seconds = {role: _median(f.seconds for f in steps if f.role == role) for role in ROLES}
    base, expert = token_seconds["base"], token_seconds["expert"]
    cost_ratio = expert / base if base and expert else None
    speeds = {name: [run.tokens_per_second for run in own] for name, own in runs.items()}
    decoders: dict[str, Any] = {}
    for name, own in runs.items():
        decoders[name] = {
            "tokens_per_second": median(speeds[name]),
            "ttft_ms": 1e3 * median(mean(run.first_token_seconds) for run in own),
            "tpot_ms": _milliseconds(_median(mean(r.further_token_seconds) for r in own if r.further_token_seconds)),
            "new_tokens": sum(map(len, own[0].tokens)),
            "peak_memory_mib": max(run.memory for run in own),
            "cycle_ms": _cycle(profiles[name]),
            "forward_share": median(sum(f.seconds for f in run.forwards) / run.seconds for run in profiles[name]),
            "acceptance": _acceptance(own),
            "over": {other: paired_ratio(speeds[name], speeds[other]) for other in REFERENCES if other in runs},
        }
        if name in same and own[0].speculation and name != same[name]:
            pairs = zip(own, runs[same[name]], strict=True)
            decoders[name]["same_tokens_as_per_step"] = all(a.tokens == b.tokens for a, b in pairs)
    theory = {
        name: _theory(decoders[name], profiles[name], token_seconds, cost_ratio, batch_size)
        for name in runs
        if name.startswith("draft_") and cost_ratio is not None and decoders[name]["acceptance"]["a"] is not None
    }
    return {"cost_ratio": cost_ratio, "token_ms": _in_ms(token_seconds), "decoders": decoders, "theory": theory}


def _median(values: Any) -> float | None:
    values = list(values)
    return median(values) if values else None


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def _in_ms(seconds: dict[str, float | None]) -> dict[str, float | None]:
    return {role: _milliseconds(value) for role, value in seconds.items()}


def _cycle(runs: list[Run]) -> dict[str, float]:
    """Medians over runs of a mean cycle, in ms; a cycle ends with a forward of the base (or of the only model)."""
    splits = []
    for run in runs:
        present = [role for role in ("base", "expert") if any(forward.role == role for forward in run.forwards)]
        cycles = max(1, sum(forward.role == present[0] and not forward.prefill for forward in run.forwards))
        spent = {
            role: sum(forward.seconds for forward in run.forwards if forward.role == role and not forward.prefill)
            for role in ROLES
        }
        prefill = sum(forward.seconds for forward in run.forwards if forward.prefill)
        other = run.seconds - prefill - sum(spent.values())
        split = {"draft": spent["expert"], "anti_expert": spent["anti_expert"], "base": spent["base"], "other": other}
        splits.append({name: 1e3 * seconds / cycles for name, seconds in split.items()})
    return {name: median(split[name] for split in splits) for name in splits[0]}


def _acceptance(runs: list[Run]) -> dict[str, Any] | None:
    """Over all repeats: a, the rate, and lengths with and without the bonus; None without statistics."""
    calls = [stats for run in runs for stats in run.speculation]
    if not calls:
        return None
    total = SpeculationStats(
        num_cycles=sum(stats.num_cycles for stats in calls),
        num_draft_tokens=sum(stats.num_draft_tokens for stats in calls),
        num_accepted_tokens=sum(stats.num_accepted_tokens for stats in calls),
        num_new_tokens=sum(stats.num_new_tokens for stats in calls),
        accepted_per_position=_added([stats.accepted_per_position for stats in calls]),
        drafted_per_position=_added([stats.drafted_per_position for stats in calls]),
    )
    return {
        "a": acceptance_probability(total.accepted_per_position, total.drafted_per_position),
        "rate": total.acceptance_rate,
        "mean_length": total.mean_acceptance_length,
        "mean_length_without_bonus": total.mean_acceptance_length_without_bonus,
        "mean_drafts": total.num_draft_tokens / total.num_cycles if total.num_cycles else 0.0,
        "accepted_per_position": total.accepted_per_position,
        "drafted_per_position": total.drafted_per_position,
    }


def _added(lists: list[list[int]]) -> list[int]:
    """Sums by position of lists of different length."""
    length = max(map(len, lists))
    return [sum(values[i] for values in lists if i < len(values)) for i in range(length)]


def _theory(
    decoder: dict[str, Any],
    runs: list[Run],
    token_seconds: dict[str, float | None],
    cost_ratio: float,
    batch_size: int,
) -> dict[str, Any]:
    """What `specproxy.theory` predicts at the measured a and c, the share reached, and the same at measured windows."""
    a, drafts = decoder["acceptance"]["a"], _window(runs) - 1
    predicted = speedup_over_per_step(a, cost_ratio, drafts), speedup_over_base(a, cost_ratio, drafts)
    base = token_seconds["base"]
    windows = {role: mean(f.seconds for f in _windows(runs, role)) / base for role in ("base", "anti_expert")}
    costs = Costs(cost_ratio, windows["base"], windows["anti_expert"], batch_size)
    measured_costs = speed_up(a, drafts, costs)
    over = [decoder["over"].get(name) for name in ("per_step", "base_runtime")]
    result: dict[str, Any] = {"a": a, "c": cost_ratio, "num_drafts": drafts, "window_cost": windows}
    for i, name in enumerate(("over_per_step", "over_base")):
        measured = over[i]
        result[name] = {
            "measured": measured,
            "predicted": predicted[i],
            "share": None if measured is None else measured / predicted[i],
            "predicted_at_measured_windows": measured_costs[i],
            "share_at_measured_windows": None if measured is None else measured / measured_costs[i],
        }
    return result


def _windows(runs: list[Run], role: str) -> list[Forward]:
    return [forward for run in runs for forward in run.forwards if forward.role == role and not forward.prefill]


def _window(runs: list[Run]) -> float:
    """Mean width of a window; the integer where all but the last ones of a row are as wide."""
    widths = [forward.width for forward in _windows(runs, "base")]
    common = max(set(widths), key=widths.count)
    return common if widths.count(common) > len(widths) / 2 else mean(widths)
