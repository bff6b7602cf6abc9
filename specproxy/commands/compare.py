"""`specproxy compare`: what the pair brings to the base, beside what it brings alone. Knows options, files, a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from specproxy.commands.arguments import BatchOptions, DeviceOptions, ModelOptions
from specproxy.commands.loading import load, quiet
from specproxy.comparison import EXPERT, PROXY_TUNED, compare
from specproxy.config import check_alpha
from specproxy.errors import ConfigurationError
from specproxy.plots import comparison_chart, require_matplotlib
from specproxy.problems import QUESTION, Problem, held_out, load_problems
from specproxy.scoring import Estimate

__all__ = ["compare_models"]

TASK_WITH_ANSWERS = "arithmetic"


def compare_models(
    models: ModelOptions,
    batches: BatchOptions,
    where: DeviceOptions,
    problems: Annotated[
        Path | None, typer.Option(help="JSON lines with question and answer; the demo's held-out ones by default.")
    ] = None,
    template: Annotated[str, typer.Option(help="What a question is put into at {question}.")] = QUESTION,
    split: Annotated[
        Literal["validation", "test"], typer.Option(help="Of the demo's held-out problems: choose alpha on validation.")
    ] = "test",
    tuned_base: Annotated[Path | None, typer.Option(help="The base tuned directly: a folder.")] = None,
    alphas: Annotated[str, typer.Option(help="Strengths of a sweep, with commas between them.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 160,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends an answer. [default: Question:]")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a chart of scores as PNG.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write scores and all answers as JSON.")] = None,
) -> None:
    """Score base, expert, anti-expert and the proxy-tuned model on the same problems."""
    strengths = _alphas(alphas)
    if plot is not None:
        require_matplotlib()
    if tuned_base is not None and not tuned_base.is_dir():
        raise ConfigurationError(f"--tuned-base={tuned_base} is no folder.")
    asked = _problems(models, problems, template, split)[: batches.limit]
    with quiet(to_stderr=True):
        model = load(models, where, batches)
        if model.tokenizer is None:
            raise ConfigurationError(f"no tokenizer was found beside --base={models.base}; text needs one.")
        tuned = None
        if tuned_base is not None:
            dtype = getattr(torch, where.dtype) if where.dtype else model.dtype
            tuned = AutoModelForCausalLM.from_pretrained(tuned_base, dtype=dtype).to(model.device).eval()
        comparison = compare(
            model,
            asked,
            tuned_base=tuned,
            alphas=strengths,
            max_new_tokens=max_new_tokens,
            stop=["Question:"] if stop is None else stop,
            batch_size=batches.batch_size,
            alpha=batches.alpha,
            **batches.drafting,
        )
    record = comparison.to_dict()
    if output is not None:
        texts = {name: answers.texts for name, answers in comparison.ways.items()}
        output.write_text(json.dumps(record | {"answers": texts}) + "\n", encoding="utf-8")
    if plot is not None:
        plot.write_bytes(comparison_chart(record))
    _print(Console(highlight=False, soft_wrap=True), record)


def _problems(models: ModelOptions, path: Path | None, template: str, split: str) -> list[Problem]:
    if path is not None:
        return load_problems(path, template, needs_answers=True)
    if models.task != TASK_WITH_ANSWERS:
        raise ConfigurationError("only the arithmetic demo has problems with answers here; give --problems FILE.")
    return held_out(TASK_WITH_ANSWERS, split)


def _alphas(text: str) -> list[float]:
    try:
        return [check_alpha(float(part)) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ConfigurationError(f"--alphas={text} must be numbers with commas between them.") from error


def _print(console: Console, record: dict[str, Any]) -> None:
    table = Table(title=f"{record['settings']['num_problems']} problems, percent right, 95 % intervals")
    table.add_column("way")
    for name in ("strict", "lenient", "tokens/s", "drafts accepted"):
        table.add_column(name, justify="right", no_wrap=True)
    rows = {name.replace("_", " "): row for name, row in record["ways"].items()}
    rows |= {f"alpha {alpha}": row for alpha, row in record["sweep"].items()}
    for name, row in rows.items():
        rate = row["acceptance_rate"]
        scores = (_shown(row[scoring]) for scoring in ("strict", "lenient"))
        table.add_row(name, *scores, f"{row['tokens_per_second']:.0f}", "-" if rate is None else f"{rate:.1%}")
    console.print(table, markup=False)
    for name, parts in record["proxy_tuned_over"].items():
        console.print(f"proxy-tuned over {name}: {_shown(parts['strict'])} points strict", markup=False)
    for name in (PROXY_TUNED, EXPERT) if "gap_closed" in record else ():
        share = _shown(record["gap_closed"][name]["strict"])
        console.print(f"gap to the tuned base closed by {name.replace('_', ' ')}: {share} % strict", markup=False)


def _shown(estimate: dict[str, float | None]) -> str:
    return Estimate(**estimate).format()
