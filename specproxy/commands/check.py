"""`specproxy check`: whether the models fit together, what they take and what to expect.

Reads configurations and tokenizers; weights only with --run. Knows nothing of how the facts come about.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from specproxy import demo
from specproxy.check import CheckReport, SelfTest, check_folders, self_test
from specproxy.commands.arguments import DeviceOptions, ModelOptions
from specproxy.commands.loading import load, quiet
from specproxy.errors import ConfigurationError
from specproxy.state import ASSISTANT

__all__ = ["check", "print_check"]

EXIT_MISFIT = 1
TEXT = "The quick brown fox"  # what the self-test continues where there is no example


def check(
    models: ModelOptions,
    where: DeviceOptions,
    run: Annotated[bool, typer.Option("--run", help="Load the models and compare with per-step decoding.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line.")] = False,
) -> None:
    """Tell whether the models fit together; exit code 1 where they do not. With --run an assistant drafts."""
    if not run and (where.dtype or where.device):
        raise ConfigurationError("--dtype and --device matter to loaded models only; add --run.")
    with quiet(to_stderr=True):
        report = check_folders(**models.names)
        result = _run(models, where) if run and not report.problems else None
    if as_json:
        outcome: dict[str, Any] = {"fits": not report.problems} | report.to_dict()
        if result is not None:
            outcome["self_test"] = result.to_dict()
        print(json.dumps(outcome))
    else:
        print_check(Console(highlight=False), report, result)
    if report.problems:
        raise typer.Exit(EXIT_MISFIT)


def _run(models: ModelOptions, where: DeviceOptions) -> SelfTest:
    model = load(models, where)
    if model.tokenizer is None:
        prompt = torch.arange(8)[None] % model.vocab_size
    else:
        text = TEXT if models.task is None else demo.example_prompts(models.task)[0]
        prompt = model.tokenizer(text, return_tensors="pt").input_ids
    return self_test(model, prompt.to(model.device), drafter=None if models.assistant is None else ASSISTANT)


def print_check(console: Console, report: CheckReport, result: SelfTest | None) -> None:
    """Print the verdict, then tables of facts, memory, expectations and, where it ran, the self-test.

    Args:
        console: where to.
        report: of `check_folders`.
        result: of `self_test`, or None.
    """
    console.print("The models do not fit together." if report.problems else "The models fit together.", style="bold")
    for problem in report.problems:
        console.print(f"problem: {problem}", style="red", markup=False, soft_wrap=True)
    for note in report.notes:
        console.print(f"note: {note}", style="yellow", markup=False, soft_wrap=True)
    if report.models:
        console.print(_facts(report))
        console.print(_memory(report))
    if report.shared_vocabulary is not None:
        console.print(f"shared vocabulary: {report.shared_vocabulary} ids")
    if report.cost_ratio is not None:
        console.print(f"cost ratio, expert to base by parameters: {report.cost_ratio:.3f}")
        console.print(_expectations(report))
    if result is not None:
        console.print(_self_test(result))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _facts(report: CheckReport) -> Table:
    table = _table("models", "role", "architecture", "parameters", "logits", "positions", "tokenizer")
    for role, facts in report.models.items():
        positions = "no limit" if facts.max_positions is None else str(facts.max_positions)
        has_tokenizer = "yes" if facts.has_tokenizer else "no"
        row = (role, facts.architecture, _count(facts.num_parameters), str(facts.vocab_width), positions, has_tokenizer)
        table.add_row(*row)
    return table


def _memory(report: CheckReport) -> Table:
    dtypes = list(next(iter(report.models.values())).weight_bytes)
    table = _table("memory", "role", *(f"weights, {dtype}" for dtype in dtypes), "cache a token, 2-byte")
    for role, facts in report.models.items():
        table.add_row(role, *(_size(facts.weight_bytes[d]) for d in dtypes), _size(facts.kv_bytes_per_token))
    totals = [sum(facts.weight_bytes[dtype] for facts in report.models.values()) for dtype in dtypes]
    cache = sum(facts.kv_bytes_per_token for facts in report.models.values())
    table.add_row("all", *map(_size, totals), _size(cache), style="bold")
    return table


def _expectations(report: CheckReport) -> Table:
    table = _table("expected speed by acceptance", "acceptance", "best drafts", "over per-step", "over the base alone")
    for line in report.expectations:
        table.add_row(
            f"{line['acceptance']:.0%}",
            str(line["num_draft_tokens"]),
            f"{line['over_per_step']:.2f} times",
            f"{line['over_base']:.2f} times",
        )
    return table


def _self_test(result: SelfTest) -> Table:
    table = _table("measured", "quantity", "value")
    table.add_row("same tokens as per-step, greedy", f"{result.tokens_equal} of {result.tokens_compared}")
    table.add_row("same tokens as per-step, coupled", f"{result.coupled_equal} of {result.coupled_compared}")
    table.add_row("lossless", "yes" if result.is_lossless else "no (a near-tie, or a fault: try --dtype float64)")
    table.add_row("acceptance rate", f"{result.acceptance_rate:.1%}")
    table.add_row("median ratio", f"{result.speedup_over_per_step:.2f} times per-step")
    return table


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def _size(number: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number} B"
