"""Time of the fused operations against their floors, the eager torch references and what `torch.compile` makes of them.

Parts:

    verify      logit arithmetic, acceptance and the next token of a window, per rule and variant
    draft       one drafted token of every row
    noise       the same draws without logits: what the random numbers cost by themselves
    attention   a window over a key-value buffer, beside SDPA with a mask

Ways, each over inputs that rotate past the cache: the kernels, the torch reference called eagerly, what `torch.compile`
makes of it, and for attention SDPA with a mask, its grouped heads left to it (`sdpa_grouped`) or expanded before
(`sdpa_expanded`). `..._graph` is the replay of a CUDA graph: device time; the others are timed as a program calls them,
which includes waiting for the host. The floor is the bytes that must move over the bandwidth of a copy measured in the
same run. What fails is reported under `errors` in its row. Without a GPU the reference alone is timed, by the wall
clock.

A table goes to standard error, one JSON line to standard output.

Example:
    python benchmarks/kernels.py --parts verify draft --shapes 151936x8x5 --plot floors.png
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import specproxy_kernels
from benchmarks.device_time import copy_bandwidth, machine, num_input_sets, short_error, time_calls, time_graph
from benchmarks.floors import Bar, attention_bytes, draft_bytes, floor_us, verify_bytes
from benchmarks.kernel_cases import (
    AttentionCase,
    AttentionProblem,
    Case,
    Problem,
    build,
    build_attention,
    draw,
    draw_all,
    run_attention,
    verify,
)
from benchmarks.tables import require_matplotlib
from specproxy_kernels import reference
from specproxy_kernels.attention import ragged_attention_reference

__all__ = [
    "HEADS",
    "RULE_NAMES",
    "SHAPES",
    "VARIANTS",
    "Context",
    "Setting",
    "bars",
    "main",
    "make_context",
    "measure_row",
    "plot",
    "print_rows",
    "rows",
    "with_noise",
]

SHAPES = ((32_000, 1, 5), (32_000, 8, 5), (32_000, 64, 9), (151_936, 1, 5), (151_936, 8, 5), (151_936, 64, 9))
RULE_NAMES = ("rejection", "block", "coupled", "greedy")
# Filters of every row: those Qwen2.5 and many servers come with, and the nucleus alone, which no list bounds.
VARIANTS = ("plain", "top_k_top_p", "top_p", "penalty")
HEADS = {"qwen2.5-7b": (28, 4, 128), "llama-8b": (32, 8, 128)}
LENGTHS, ATTENTION_BATCHES, ATTENTION_WINDOW = (512, 4096, 16384), (1, 8, 64), 5
WAYS = ("kernels", "torch_eager", "torch_compile", "sdpa_grouped", "sdpa_expanded")
PARTS = ("verify", "draft", "noise", "attention")


@dataclass(frozen=True)
class Setting:
    """What a row of the record times.

    Args:
        part: one of `PARTS`.
        rule: one of `RULE_NAMES`; of `verify` alone.
        variant: one of `VARIANTS`; of `verify` and `draft`.
        shape: V, B, W; or for attention L, B, T.
        heads: a name in `HEADS`; of attention alone.
        dtype: of logits, or of keys and values.
        flat: laws spread over the whole vocabulary in place of peaked ones, the worst case of a nucleus.
    """

    part: str
    shape: tuple[int, int, int]
    rule: str = "rejection"
    variant: str = "plain"
    heads: str = ""
    dtype: str = "bfloat16"
    flat: bool = False

    def __str__(self) -> str:
        what = {"verify": f"{self.rule} {self.variant}", "draft": self.variant, "noise": "", "attention": self.heads}
        size = "{} x B{} x W{}".format(*self.shape)
        return " ".join(f"{self.part} {what[self.part]} {size}{' flat' if self.flat else ''}".split())


@dataclass
class Context:
    """What all rows of a run share.

    Args:
        bandwidth: bytes a second of a copy on the device.
        compile: time `torch.compile` of the references too.
        kernels_alone: time nothing beside the kernels.
        max_sets: of rotating inputs.
        repeats: measurements of a figure; by default as many as fit a fraction of a second.
    """

    device: torch.device
    bandwidth: float
    compile: bool = True
    repeats: int | None = None
    kernels_alone: bool = False
    max_sets: int = 128

    def num_sets(self, set_bytes: int) -> int:
        """Sets of inputs of so many bytes to rotate through."""
        return min(self.max_sets, num_input_sets(set_bytes, self.device))


# The problems.


def peaked_logits(tensor: Tensor, common: Tensor, generator: torch.Generator) -> None:
    """Fill logits [B, W, V] in place: two parts common to all models in three, a law as of language.

    Args:
        common: [B, W, V], -2 log(1 + rank): the head of 64 ids holds 99 % of the mass.
    """
    noise = torch.randn(tensor.shape, generator=generator, device=tensor.device)
    tensor.copy_(noise.mul_(0.5).add_(common))


def verify_problem(setting: Setting, device: torch.device, salt: int) -> Problem:
    """The tensors of a row of `verify` or `draft`."""
    vocab, batch, window = setting.shape
    greedy = setting.rule == "greedy"
    case = Case(
        rule="rejection" if greedy else setting.rule,
        rows="greedy" if greedy else "sampling",
        filters="none" if setting.variant == "penalty" else setting.variant.replace("plain", "none"),
        penalty="repetition" if setting.variant == "penalty" else "none",
        dtype=setting.dtype,
        vocab_size=vocab,
        batch=batch,
        window=window,
    )
    problem = build(case, device, salt)
    if not setting.flat:
        generator = torch.Generator(device).manual_seed(salt)
        rank = torch.rand(batch, window, vocab, generator=generator, device=device).mul_(vocab)
        common = rank.log1p_().mul_(-2)
        for tensor in (problem.base, *problem.pairs[0][:2]):
            assert tensor is not None
            peaked_logits(tensor, common, generator)

    def full(value: float, given: Tensor | None) -> Tensor | None:
        return None if given is None else torch.full_like(given, value)

    own = problem.parameters
    problem.parameters = replace(
        own,
        temperature=torch.full_like(own.temperature, 0.0 if greedy else 0.8),
        top_k=full(50, own.top_k),
        top_p=full(0.9, own.top_p),
        repetition_penalty=full(1.1, own.repetition_penalty),
        max_top_k=50 if own.top_k is not None else 0,
    )
    return problem


@dataclass
class Drafted:
    """A problem with its drafts and their law, as verification finds them."""

    problem: Problem
    drafts: Tensor
    law: Any

    def verified(self, ops: Any) -> Any:
        """`verify_window` by a module's operations."""
        return verify(ops, self.problem, self.drafts, self.law, self.problem.noise())

    def drawn(self, ops: Any) -> Any:
        """One `sample_drafts` by a module's operations."""
        return draw(ops, self.problem, self.drafts[:, :0], self.problem.noise())


# The rows.


Calls = list[Callable[[], Any]]


def _timed(way: str, time: Callable[[], Any], row: dict[str, Any]) -> None:
    """Note a timing, or the error that stood in its way."""
    try:
        row["times"][way] = time().asdict()
    except Exception as error:  # whatever a compiler or an allocator raises: the record must say so and go on
        row["times"][way] = None
        row["errors"][way] = short_error(error)


def _compiled(function: Callable[..., Any], inputs: Sequence[Any], row: dict[str, Any]) -> Calls:
    """Calls of `torch.compile`d code; whole where that works, else with breaks between its graphs, which is noted."""
    torch._dynamo.reset()
    try:
        whole = torch.compile(function, fullgraph=True, dynamic=False)
        whole(inputs[0])
        row["compiled"] = "whole"
        return [partial(whole, item) for item in inputs]
    except Exception as error:  # a failure is reported; the reduced form is then tried
        row["errors"]["torch_compile_whole"] = short_error(error)
    torch._dynamo.reset()
    parts = torch.compile(function, dynamic=False)
    parts(inputs[0])
    row["compiled"] = "in parts"
    return [partial(parts, item) for item in inputs]


def _time_all(
    row: dict[str, Any],
    context: Context,
    inputs: Sequence[Any],
    by_kernels: Callable[[Any], Any],
    by_torch: Callable[[Any], Any],
    further: dict[str, Callable[[Any], Any]] | None = None,
) -> None:
    """The ways of a row, the kernels first, so that they are not measured on a memory the others have filled."""
    device, repeats = context.device, context.repeats

    def both(way: str, calls: Calls) -> None:
        _timed(f"{way}_graph", lambda: time_graph(calls, device, repeats), row)
        _timed(way, lambda: time_calls(calls, device, repeats), row)
        torch.cuda.empty_cache()  # what one way has taken is not lacking to the next

    if device.type != "cuda":
        _timed("torch_eager", lambda: time_calls([partial(by_torch, item) for item in inputs], device, repeats), row)
        return
    both("kernels", [partial(by_kernels, item) for item in inputs])
    if context.kernels_alone:
        return
    both("torch_eager", [partial(by_torch, item) for item in inputs])
    for way, function in (further or {}).items():
        both(way, [partial(function, item) for item in inputs])
    if context.compile:
        try:
            calls = _compiled(by_torch, inputs, row)
        except Exception as error:  # as in _timed
            row["times"]["torch_compile"] = None
            row["errors"]["torch_compile"] = short_error(error)
        else:
            both("torch_compile", calls)
        torch._dynamo.reset()


def measure_row(setting: Setting, context: Context) -> dict[str, Any]:
    """Time one setting.

    Returns:
        The setting's fields, `sets` (of rotating inputs), `floor_us`, `floor_bytes`, `times` in microseconds by way,
        `errors` by way, `over_floor` and `faster_than` of the kernels' replay.
    """
    row: dict[str, Any] = {
        "name": str(setting),
        **{field: getattr(setting, field) for field in ("part", "rule", "variant", "heads", "dtype", "flat")},
        "shape": list(setting.shape),
        "times": {},
        "errors": {},
    }
    {"verify": _verify_row, "draft": _draft_row, "noise": _noise_row, "attention": _attention_row}[setting.part](
        setting, context, row
    )
    return _compared(row)


def _floor(row: dict[str, Any], num_bytes: int, context: Context) -> None:
    row["floor_bytes"] = num_bytes
    row["floor_us"] = round(floor_us(num_bytes, context.bandwidth), 3)


def _compared(row: dict[str, Any]) -> dict[str, Any]:
    """Add what follows from a row's times."""
    own = row["times"].get("kernels_graph")
    row["over_floor"] = None
    row["faster_than"] = {}
    if own is not None:
        if row.get("floor_us"):
            row["over_floor"] = round(own["median_us"] / row["floor_us"], 3)
        others = {way: time for way, time in row["times"].items() if not way.startswith("kernels") and time}
        row["faster_than"] = {way: round(time["median_us"] / own["median_us"], 2) for way, time in others.items()}
    return row


def _element_bytes(setting: Setting) -> int:
    return torch.empty(0, dtype=getattr(torch, setting.dtype)).element_size()


def _verify_row(setting: Setting, context: Context, row: dict[str, Any]) -> None:
    vocab, batch, window = setting.shape
    size = _element_bytes(setting)
    _floor(
        row,
        verify_bytes(
            "rejection" if setting.rule == "greedy" else setting.rule,
            batch,
            window,
            vocab,
            size,
            greedy=setting.rule == "greedy",
            penalty=setting.variant == "penalty",
        ),
        context,
    )
    row["sets"] = context.num_sets(3 * batch * window * vocab * size)
    problems = [verify_problem(setting, context.device, salt) for salt in range(row["sets"])]
    inputs = [Drafted(p, *draw_all(reference, p, None, p.noise())) for p in problems]
    _time_all(
        row,
        context,
        inputs,
        lambda item: item.verified(specproxy_kernels),
        lambda item: item.verified(reference),
    )


def _draft_row(setting: Setting, context: Context, row: dict[str, Any]) -> None:
    vocab, batch, _ = setting.shape
    size = _element_bytes(setting)
    _floor(row, draft_bytes(batch, vocab, size, penalty=setting.variant == "penalty"), context)
    row["sets"] = context.num_sets(batch * vocab * size)
    narrow = replace(setting, shape=(vocab, batch, 2))
    problems = [verify_problem(narrow, context.device, salt) for salt in range(row["sets"])]
    for problem in problems:
        problem.draft_logits = problem.draft_logits[:, :1].contiguous()  # a drafter's step, with rows side by side
    empty = torch.empty(batch, 0, dtype=torch.long, device=context.device)
    inputs = [Drafted(problem, empty, None) for problem in problems]
    _time_all(row, context, inputs, lambda item: item.drawn(specproxy_kernels), lambda item: item.drawn(reference))


def _noise_row(setting: Setting, context: Context, row: dict[str, Any]) -> None:
    """Gumbel noise of B * W rows and its largest value, without a logit: the arithmetic floor of `coupled`."""
    vocab, batch, window = setting.shape
    row["floor_bytes"], row["floor_us"], row["sets"] = 0, None, 2
    streams = [
        (
            specproxy_kernels.row_keys([salt] * batch, range(batch)).to(context.device),
            torch.zeros(batch, dtype=torch.long, device=context.device),
        )
        for salt in range(row["sets"])
    ]

    def by_torch(item: tuple[Tensor, Tensor]) -> Tensor:
        return reference.NoiseStream(*item).tokens(window, vocab).amax(-1)

    def by_kernels(item: tuple[Tensor, Tensor]) -> Tensor:
        from benchmarks.noise_floor import largest_noise  # imports triton

        return largest_noise(*item, window, vocab)

    _time_all(row, context, streams, by_kernels, by_torch)


def _attention_row(setting: Setting, context: Context, row: dict[str, Any]) -> None:
    length, batch, window = setting.shape
    heads, kv_heads, head_size = HEADS[setting.heads]
    num_bytes = attention_bytes(batch, window, length, heads, kv_heads, head_size, _element_bytes(setting))
    _floor(row, num_bytes, context)
    row["sets"] = context.num_sets(num_bytes)
    case = AttentionCase(
        heads, kv_heads, head_size, batch, window, length, dtype=setting.dtype, buffer="tight", layout="transposed"
    )
    inputs = [build_attention(case, context.device, salt, full=True) for salt in range(row["sets"])]

    def masked(problem: AttentionProblem, expand: bool) -> Tensor:
        mask = sdpa_mask(problem)
        key, value = problem.keys, problem.values
        if expand:
            groups = heads // kv_heads
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        return scaled_dot_product_attention(
            problem.query, key, value, attn_mask=mask, scale=problem.scaling, enable_gqa=not expand
        )

    _time_all(
        row,
        context,
        inputs,
        lambda item: run_attention(specproxy_kernels.ragged_attention, item),
        lambda item: run_attention(ragged_attention_reference, item),
        {"sdpa_grouped": lambda item: masked(item, False), "sdpa_expanded": lambda item: masked(item, True)},
    )


def sdpa_mask(problem: AttentionProblem) -> Tensor:
    """Boolean [B, 1, T, S]: what Transformers hands to SDPA for such a window."""
    last = problem.lengths[:, None] + torch.arange(problem.case.window, device=problem.lengths.device)
    return (torch.arange(problem.keys.shape[2], device=last.device) <= last[..., None])[:, None]


# Bars.


def bars(row: dict[str, Any]) -> Iterator[Bar]:
    """The bounds that hold for a row.

    Unfiltered rejection keeps at most twice its floor where that is about 15 us, one and a half times where it is
    above 40 us, 15 us at one row and a window of 5; it is at least 5 times as fast as the eager reference and twice as
    fast as the compiled one, replay against replay where they can be captured. Attention keeps one and a half times its
    floor from 8 rows and 4096 keys on.
    """
    size, batch, window = row["shape"]
    time = row["times"].get("kernels_graph")
    if row["part"] == "verify" and (row["rule"], row["variant"], row["flat"]) == ("rejection", "plain", False):
        floor = row["floor_us"]
        if floor > 40:
            yield Bar(f"{row['name']}: time over floor", row["over_floor"], 1.5)
        elif floor > 12:
            yield Bar(f"{row['name']}: time over floor", row["over_floor"], 2.0)
        if batch == 1 and window == 5:
            yield Bar(f"{row['name']}: microseconds", time and time["median_us"], 15.0)
        for way, times in (("torch_eager", 5.0), ("torch_compile", 2.0)):
            graph = row["faster_than"].get(f"{way}_graph")
            if way in row["times"]:
                named = way if graph is None else f"{way}_graph"
                yield Bar(f"{row['name']}: faster than {named}", row["faster_than"].get(named), times, True)
    if row["part"] == "attention" and batch >= 8 and size >= 4096:
        yield Bar(f"{row['name']}: time over floor", row["over_floor"], 1.5)


# The command.


def rows(options: argparse.Namespace) -> Iterator[Setting]:
    """The settings that were asked for."""
    for part in options.parts:
        if part == "attention":
            for heads in options.heads:
                for shape in options.attention_shapes:
                    yield Setting(part, shape, heads=heads, dtype=options.dtype)
            continue
        for shape in options.shapes:
            if part == "noise":
                yield Setting(part, shape, rule="coupled", dtype=options.dtype)
                continue
            for variant in options.variants:
                for rule in options.rules if part == "verify" else ("rejection",):
                    if rule == "greedy" and variant in ("top_k_top_p", "top_p"):
                        continue  # filters leave a greedy row alone
                    yield Setting(part, shape, rule, variant, dtype=options.dtype, flat=options.flat)


def shape(text: str) -> tuple[int, int, int]:
    """Three positive sizes from `151936x8x5`."""
    sizes = tuple(int(part) for part in text.split("x") if part.isdecimal())
    if len(sizes) != 3 or min(sizes) < 1 or text.count("x") != 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not three sizes like 151936x8x5")
    return sizes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--shapes", nargs="+", type=shape, metavar="VxBxW", help="of logits")
    parser.add_argument("--attention-shapes", nargs="+", type=shape, metavar="LxBxT", help="of keys and windows")
    parser.add_argument("--rules", nargs="+", default=list(RULE_NAMES), choices=RULE_NAMES)
    parser.add_argument("--variants", nargs="+", default=["plain", "top_k_top_p", "penalty"], choices=VARIANTS)
    parser.add_argument("--heads", nargs="+", default=list(HEADS), choices=list(HEADS))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--flat", action="store_true", help="laws spread over the whole vocabulary")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--repeats", type=int, help="measurements of a figure")
    parser.add_argument("--plot", type=Path, help="write a chart of time over floor to this PNG file")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print.

    Returns:
        The exit code: 0, or 2 after an error, which stands on standard error in one line.
    """
    options = _parser().parse_args(arguments)
    on_gpu = options.device.startswith("cuda")
    # Without a GPU small shapes show that everything runs; the large ones would say nothing about the kernels.
    options.shapes = options.shapes or (SHAPES if on_gpu else ((32_000, 1, 5),))
    lengths, batches = (LENGTHS, ATTENTION_BATCHES) if on_gpu else ((512,), (1,))
    options.attention_shapes = options.attention_shapes or [
        (length, batch, ATTENTION_WINDOW) for length in lengths for batch in batches
    ]
    try:
        if options.plot is not None:
            require_matplotlib()
        if options.repeats is not None and options.repeats < 2:
            raise ValueError(f"--repeats={options.repeats} must be at least 2.")
        device = torch.device(options.device)
        torch.empty(0, device=device)
        print(json.dumps(measure(options, device)))
    except (ValueError, RuntimeError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def make_context(device: torch.device, compile: bool = True, repeats: int | None = None) -> Context:
    """A context with the bandwidth measured; small buffers on a CPU."""
    bandwidth = copy_bandwidth(device) if device.type == "cuda" else copy_bandwidth(device, 2**26, 5)
    return Context(device, bandwidth, compile, repeats)


def measure(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """All rows.

    Returns:
        The record that is printed.
    """
    console = Console(stderr=True)
    context = make_context(device, options.compile, options.repeats)
    if device.type != "cuda":
        console.print("No GPU: the torch reference alone, by the wall clock; nothing here speaks of the kernels.")
    measured = []
    for setting in rows(options):
        measured.append(measure_row(setting, context))
        console.print(_line(measured[-1]), markup=False)
    with_noise(measured)
    record = {
        "machine": machine(device),
        "clock": "device events" if device.type == "cuda" else "wall clock, torch reference alone",
        "bandwidth_tb_per_s": round(context.bandwidth / 1e12, 3),
        "rows": measured,
    }
    print_rows(console, record)
    if options.plot is not None:
        plot(record, options.plot)
    return record


# Tables and a chart.


def _line(row: dict[str, Any]) -> str:
    times = ", ".join(f"{way} {time['median_us']:.1f}" for way, time in row["times"].items() if time)
    return f"{row['name']}: {times or 'nothing measured'} us" + (
        f"; failed: {', '.join(row['errors'])}" * bool(row["errors"])
    )


def _cell(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def with_noise(rows: Sequence[dict[str, Any]]) -> None:
    """Add to rows of `coupled` what their random numbers cost by themselves, from the row of `noise` of that shape.

    `over_arithmetic` is their time over the larger of both floors.
    """
    noise = {
        tuple(row["shape"]): row["times"]["kernels_graph"]["median_us"]
        for row in rows
        if row["part"] == "noise" and row["times"].get("kernels_graph")
    }
    for row in rows:
        own, alone = row["times"].get("kernels_graph"), noise.get(tuple(row["shape"]))
        if row["part"] == "verify" and row["rule"] == "coupled" and own and alone:
            row["noise_us"] = alone
            row["over_arithmetic"] = round(own["median_us"] / max(alone, row["floor_us"]), 3)


def print_rows(console: Console, record: dict[str, Any]) -> None:
    """One table of all rows, with what failed below it."""
    if not console.is_terminal:
        console = Console(stderr=True, width=150)
    machine_name, bandwidth = record["machine"]["device"], record["bandwidth_tb_per_s"]
    table = Table(title=f"{machine_name}, copy {bandwidth} TB/s, medians in microseconds ({record['clock']})")
    ways = [way for name in WAYS for way in (f"{name}_graph", name)]
    ways = [way for way in ways if any(way in row["times"] for row in record["rows"])]
    for column in ("setting", "floor", *ways, "over floor", "over noise"):
        table.add_column(column.replace("_", " "), justify="left" if column == "setting" else "right")
    for row in record["rows"]:
        cells = [_cell((row["times"].get(way) or {}).get("median_us")) for way in ways]
        over = _cell(row["over_floor"], 2), _cell(row.get("over_arithmetic"), 2)
        table.add_row(row["name"], _cell(row.get("floor_us")), *cells, *over)
    console.print(table)
    for row in record["rows"]:
        for way, error in row["errors"].items():
            console.print(f"{row['name']}, {way}: {error}", markup=False)


def plot(record: dict[str, Any], path: Path) -> None:
    """Write a chart of each row's time over its floor, by way.

    Raises:
        ImportError: without matplotlib.
    """
    require_matplotlib()
    from matplotlib import pyplot

    shown = [row for row in record["rows"] if row.get("floor_us") and any(row["times"].values())]
    figure, panel = pyplot.subplots(figsize=(9, 1.5 + 0.3 * len(shown)))
    ways = sorted({way for row in shown for way, time in row["times"].items() if time})
    for way in ways:
        points = [
            (row["times"][way]["median_us"] / row["floor_us"], i)
            for i, row in enumerate(shown)
            if row["times"].get(way)
        ]
        panel.plot([x for x, _ in points], [y for _, y in points], "o", label=way.replace("_", " "))
    panel.axvline(1, color="black", linewidth=1)
    panel.set_xscale("log")
    panel.set_yticks(range(len(shown)), [row["name"] for row in shown])
    panel.invert_yaxis()
    panel.set_xlabel("time over the floor of bytes")
    panel.grid(axis="x", alpha=0.3)
    panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
