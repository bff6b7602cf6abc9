"""Speed of the engine under load: per-step beside speculation beside `auto`, in one run on one machine.

Closed loop: so many clients, each sending its next request when the last has ended. Open loop: requests come at random
(Poisson arrivals, the same for every setting), whether or not the engine keeps up. Settings take turns at each load,
repeat by repeat forwards and backwards, each run with an engine of its own and a warm-up; ratios are medians over pairs
of runs in one repeat.

A table goes to standard error, one JSON line to standard output.

Example:
    python benchmarks/serving.py --cost-ratio 0.1 --num-draft-tokens 4 8 auto --concurrency 1 2 4 8 16 32 --threads 2
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.calibrate import step_seconds
from benchmarks.command import run_command
from benchmarks.measure import conditions, paired_ratio
from benchmarks.tables import require_matplotlib
from benchmarks.trios import add_trio_arguments, check_trio, load_trio, prompt_texts, quiet
from specproxy import Engine, ProxyTunedModel
from specproxy.config import SpeculationParameters
from specproxy.engine import RequestOutput

__all__ = ["Load", "Run", "arrivals", "main", "percentiles", "run_load", "summarise"]

PER_STEP = "per_step"


@dataclass(frozen=True)
class Load:
    """How requests come: from so many clients in turn, or at so many a second on average."""

    clients: int | None = None
    rate: float | None = None

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.clients} clients" if self.clients is not None else f"{self.rate:g} requests/s"


@dataclass
class Run:
    """What one run gave: requests as they ended, seconds from the first arrival to the last end, counts."""

    outputs: list[RequestOutput]
    seconds: float
    statistics: dict[str, Any]

    @property
    def tokens_per_second(self) -> float:
        """Of all requests together."""
        return sum(len(output.tokens) for output in self.outputs) / self.seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print.

    Returns:
        The exit code: 0, or 2 after an error, which stands on standard error in one line.
    """
    return run_command(measured, arguments)


def measured(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """What the command prints: measured as its arguments say.

    Raises:
        ValueError: for arguments that do not fit together.
        SpecProxyError: from the models.
    """
    options = _parser().parse_args(arguments)
    _check(options)
    return measure(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_trio_arguments(parser)
    load = parser.add_argument_group("load")
    load.add_argument("--concurrency", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32], help="clients")
    load.add_argument("--rates", type=float, nargs="*", default=[], help="Poisson arrivals, requests a second")
    load.add_argument("--num-requests", type=int, default=32, help="of a run, at least; four for every client")
    load.add_argument("--max-new-tokens", type=int, default=64)
    load.add_argument("--ignore-eos", action="store_true", help="always decode --max-new-tokens")
    load.add_argument("--do-sample", action="store_true")
    load.add_argument("--num-prompts", type=int, default=32, help="distinct prompts, at most")
    engine = parser.add_argument_group("engine")
    engine.add_argument("--num-draft-tokens", nargs="+", default=["4", "auto"], metavar="N|auto")
    engine.add_argument("--acceptance", default="rejection")
    engine.add_argument("--max-batch-size", type=int, default=32)
    engine.add_argument("--prefill-chunk", type=int, default=256)
    engine.add_argument("--prefix-cache", type=int, default=0, help="positions; prompts repeat: 0 is fair")
    run = parser.add_argument_group("run")
    run.add_argument("--repeats", type=int, default=3)
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--threads", type=int, help="of torch; its own default otherwise")
    run.add_argument("--goal-ttft-ms", type=float, default=1000.0, help="what a good request keeps to, for goodput")
    run.add_argument("--goal-tpot-ms", type=float, default=100.0)
    run.add_argument("--plot", type=Path, help="write a chart of throughputs to this PNG file (needs matplotlib)")
    return parser


def _check(options: argparse.Namespace) -> None:
    check_trio(options)
    options.num_draft_tokens = [int(n) if n.isdecimal() else n for n in options.num_draft_tokens]
    for count in options.num_draft_tokens:
        SpeculationParameters(count, options.acceptance)
    if 0 in options.num_draft_tokens:
        raise ValueError("--num-draft-tokens 0 is per_step, which always runs; leave it out.")
    for name in ("num_requests", "num_prompts", "max_new_tokens", "repeats"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}={getattr(options, name)} must be at least 1.")
    if min(options.concurrency, default=1) < 1 or min(options.rates, default=1.0) <= 0:
        raise ValueError("--concurrency takes numbers of at least 1, --rates numbers above 0.")
    if not options.concurrency and not options.rates:
        raise ValueError("--concurrency and --rates are both empty; give some load.")
    if options.plot is not None:
        require_matplotlib()


def arrivals(count: int, rate: float, seed: int) -> list[float]:
    """Seconds at which `count` requests of a Poisson process come, the first at 0."""
    chance = random.Random(seed)
    times = [0.0]
    while len(times) < count:
        times.append(times[-1] + chance.expovariate(rate))
    return times


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, median, 90th and 99th percentile (linear between neighbours); None without values."""
    if not values:
        return None
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    return {"mean": statistics.fmean(ordered), "median": at(0.5), "p90": at(0.9), "p99": at(0.99)}


async def _send(engine: Engine, prompt: list[int], arguments: dict[str, Any]) -> RequestOutput:
    handle = engine.submit(prompt, **arguments)
    async for _ in handle:
        pass
    return await handle.wait()


async def run_load(engine: Engine, load: Load, requests: list[tuple[list[int], dict[str, Any]]], seed: int) -> Run:
    """Send requests to an engine.

    Args:
        engine: with room in its queue for all of them.
        load: how they come.
        requests: prompt and arguments of each.
        seed: of the arrivals.

    Returns:
        What came, in the order of `requests`.
    """
    outputs: dict[int, RequestOutput] = {}
    left = list(enumerate(requests))[::-1]
    began = perf_counter()

    async def client() -> None:
        while left:
            number, (prompt, arguments) = left.pop()
            outputs[number] = await _send(engine, prompt, arguments)

    async def comer(number: int, at: float) -> None:
        await asyncio.sleep(max(0.0, began + at - perf_counter()))
        outputs[number] = await _send(engine, *requests[number])

    if load.clients is not None:
        await asyncio.gather(*(client() for _ in range(load.clients)))
    else:
        assert load.rate is not None
        await asyncio.gather(*map(comer, range(len(requests)), arrivals(len(requests), load.rate, seed)))
    seconds = perf_counter() - began
    stats = engine.stats()
    return Run(
        [outputs[number] for number in range(len(requests))],
        seconds,
        {"speculation": stats.speculation, "windows": stats.windows, "cycles": stats.cycles},
    )


def summarise(runs: list[Run], goal_ttft_ms: float, goal_tpot_ms: float) -> dict[str, Any]:
    """Figures of the repeats of one setting under one load.

    Args:
        runs: a repeat each.
        goal_ttft_ms, goal_tpot_ms: what a request has to keep to, both, to count as good.

    Returns:
        Throughputs (medians over repeats), latencies over all requests, acceptance and windows.

    Raises:
        ValueError: where a request has failed.
    """
    outputs = [output for run in runs for output in run.outputs]
    failed = [output for output in outputs if output.finish_reason not in ("stop", "length")]
    if failed:
        raise ValueError(f"{len(failed)} requests have not ended well, one with: {failed[0].error}")
    first, each, whole, good = [], [], [], []
    for output in outputs:
        ttft, total = output.timings.first_token_seconds, output.timings.total_seconds
        assert ttft is not None and total is not None
        first.append(1e3 * ttft)
        whole.append(1e3 * total)
        further = len(output.tokens) - 1
        pace = 1e3 * (total - ttft) / further if further else None
        each += [] if pace is None else [pace]
        good.append(first[-1] <= goal_ttft_ms and (pace is None or pace <= goal_tpot_ms))
    drafted = sum(run.statistics["speculation"].num_draft_tokens for run in runs)
    accepted = sum(run.statistics["speculation"].num_accepted_tokens for run in runs)
    cycles = sum(run.statistics["speculation"].num_cycles for run in runs)
    tokens = sum(run.statistics["speculation"].num_new_tokens for run in runs)
    windows: dict[str, int] = {}
    for run in runs:
        for window, count in run.statistics["windows"].items():
            windows[str(window)] = windows.get(str(window), 0) + count
    return {
        "requests": len(outputs),
        "new_tokens": sum(len(output.tokens) for output in outputs),
        "tokens_per_second": statistics.median(run.tokens_per_second for run in runs),
        "requests_per_second": statistics.median(len(run.outputs) / run.seconds for run in runs),
        "goodput": statistics.median(len(run.outputs) / run.seconds for run in runs) * sum(good) / len(good),
        "good_share": sum(good) / len(good),
        "ttft_ms": percentiles(first),
        "tpot_ms": percentiles(each),
        "e2e_ms": percentiles(whole),
        "acceptance": {
            "rate": accepted / drafted if drafted else None,
            "mean_length": tokens / cycles if cycles else None,
            "mean_length_without_bonus": accepted / cycles if cycles else None,
        },
        "windows": dict(sorted(windows.items(), key=lambda item: int(item[0]))),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Load, grow, run, report.

    Returns:
        The record that is printed.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    console = Console(stderr=True)
    loads = [Load(clients=count) for count in options.concurrency] + [Load(rate=rate) for rate in options.rates]
    settings: dict[str, int | str] = {PER_STEP: 0} | {f"draft_{n}": n for n in options.num_draft_tokens}
    with quiet():
        model = load_trio(options)
        prompts = [model.tokenizer(text).input_ids for text in prompt_texts(options)]
        expert, base = step_seconds([model.expert, model.base])
        record: dict[str, Any] = {"cost_ratio": expert / base, "alpha": model.alpha, "num_prompts": len(prompts)}
        with Progress(console=console, transient=True) as progress:
            bar = progress.add_task("load", total=len(loads) * len(settings) * options.repeats)
            record["loads"] = [
                _measure_load(model, prompts, load, settings, options, lambda: progress.advance(bar)) for load in loads
            ]
    record |= conditions(options, model.device)
    _print_table(console, record)
    if options.plot is not None:
        _plot(record, options.plot)
    return record


def _measure_load(
    model: ProxyTunedModel,
    prompts: list[list[int]],
    load: Load,
    settings: dict[str, int | str],
    options: argparse.Namespace,
    advance: Any,
) -> dict[str, Any]:
    """All settings under one load."""
    count = max(options.num_requests, 4 * (load.clients or 0))
    arguments = {
        "max_new_tokens": options.max_new_tokens,
        "do_sample": options.do_sample,
        "top_k": 0,
        "ignore_eos": options.ignore_eos,
    }
    runs: dict[str, list[Run]] = {name: [] for name in settings}
    for repeat in range(options.repeats):
        requests = [
            (prompts[i % len(prompts)], {**arguments, "seed": options.seed + repeat * count + i}) for i in range(count)
        ]
        for name in list(settings) if repeat % 2 == 0 else reversed(settings):
            with Engine(
                model,
                max_batch_size=options.max_batch_size,
                max_queue=max(count, 1),
                num_draft_tokens=settings[name],  # type: ignore[arg-type]
                acceptance=options.acceptance,
                prefill_chunk=options.prefill_chunk,
                prefix_cache=options.prefix_cache,
            ) as engine:
                run = asyncio.run(_warm_and_run(engine, load, requests, options.seed + repeat))
            runs[name].append(run)
            advance()
    rows = {name: summarise(own, options.goal_ttft_ms, options.goal_tpot_ms) for name, own in runs.items()}
    speeds = {name: [run.tokens_per_second for run in own] for name, own in runs.items()}
    texts = {name: [[output.tokens for output in run.outputs] for run in own] for name, own in runs.items()}
    for name, row in rows.items():
        row["over_per_step"] = paired_ratio(speeds[name], speeds[PER_STEP])
        if not options.do_sample or options.acceptance == "coupled":
            pairs = [
                (mine, reference)
                for a, b in zip(texts[name], texts[PER_STEP], strict=True)
                for mine, reference in zip(a, b, strict=True)
            ]
            row["same_texts_as_per_step"] = sum(mine == reference for mine, reference in pairs) / len(pairs)
    return {"load": load.name, "clients": load.clients, "rate": load.rate, "settings": rows}


async def _warm_and_run(engine: Engine, load: Load, requests: list[Any], seed: int) -> Run:
    """A few requests that are not counted, then those that are."""
    warm = await run_load(engine, Load(clients=4), requests[:4], seed)
    run = await run_load(engine, load, requests, seed)
    before = warm.statistics["speculation"]
    counts = run.statistics["speculation"]
    for name in ("num_cycles", "num_draft_tokens", "num_accepted_tokens", "num_new_tokens"):
        setattr(counts, name, getattr(counts, name) - getattr(before, name))
    for window, count in warm.statistics["windows"].items():
        run.statistics["windows"][window] -= count
    run.statistics["windows"] = {window: count for window, count in run.statistics["windows"].items() if count}
    return run


def _print_table(console: Console, record: dict[str, Any]) -> None:
    if not console.is_terminal:
        console = Console(stderr=True, width=150)
    table = Table(title=f"the engine under load, c = {record['cost_ratio']:.3f}")
    table.add_column("load", no_wrap=True)
    table.add_column("setting", no_wrap=True)
    speeds, latencies = ["tokens/s", "over per-step", "goodput"], ["TTFT ms", "p99", "TPOT ms", "p99", "E2E ms", "p99"]
    for name in [*speeds, *latencies, "accepted", "a cycle", "drafts: cycles"]:
        table.add_column(name, justify="right")
    for load in record["loads"]:
        for i, (name, row) in enumerate(load["settings"].items()):
            acceptance = row["acceptance"]
            spread = [row[kind] for kind in ("ttft_ms", "tpot_ms", "e2e_ms")]
            table.add_row(
                load["load"] if i == 0 else "",
                name,
                f"{row['tokens_per_second']:.1f}",
                f"{row['over_per_step']:.2f}",
                f"{row['goodput']:.2f}",
                *(f"{one[key]:.0f}" if one else "-" for one in spread for key in ("median", "p99")),
                "-" if acceptance["rate"] is None else f"{acceptance['rate']:.2f}",
                "-" if acceptance["mean_length"] is None else f"{acceptance['mean_length']:.2f}",
                " ".join(f"{window}:{count}" for window, count in row["windows"].items()),
            )
        table.add_section()
    console.print(table)


def _plot(record: dict[str, Any], path: Path) -> None:
    """Tokens a second over the number of clients, a line per setting; loads by rate are left out."""
    require_matplotlib()
    from matplotlib import pyplot

    loads = [load for load in record["loads"] if load["clients"] is not None]
    figure, panel = pyplot.subplots(figsize=(7, 4.5))
    for name in loads[0]["settings"] if loads else ():
        speeds = [load["settings"][name]["tokens_per_second"] for load in loads]
        panel.plot([load["clients"] for load in loads], speeds, marker="o", label=name)
    panel.set_xscale("log", base=2)
    panel.set_xlabel("clients")
    panel.set_ylabel("tokens/s")
    panel.set_title(f"the engine under load, c = {record['cost_ratio']:.3f}")
    panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
