"""`specproxy analyze`: where the pair changes the text, as JSON, charts and a page. Knows options and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from specproxy.analysis import analyse
from specproxy.analysis_page import analysis_page
from specproxy.commands.arguments import BatchOptions, DeviceOptions, ModelOptions
from specproxy.commands.loading import load, quiet
from specproxy.config import check_integer
from specproxy.errors import ConfigurationError
from specproxy.plots import analysis_charts, require_matplotlib
from specproxy.problems import QUESTION, held_out, load_problems
from specproxy.text import split_tokens

__all__ = ["analyze"]

DEFAULT_TEXTS = 40
DEFAULT_CUTOFFS = "0,4,16,48"


def analyze(
    models: ModelOptions,
    batches: BatchOptions,
    where: DeviceOptions,
    prompts: Annotated[
        Path | None, typer.Option(help="JSON lines with prompt, question or Question; held-out ones by default.")
    ] = None,
    template: Annotated[str, typer.Option(help="What a question is put into at {question}.")] = QUESTION,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a text.")] = 96,
    cutoffs: Annotated[
        str, typer.Option(help="Drop the correction after so many tokens, with commas; empty for no ablation.")
    ] = DEFAULT_CUTOFFS,
    cutoff_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a text of the ablation.")] = 192,
    html: Annotated[Path | None, typer.Option(help="Write a self-contained page, every token in it.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Write the charts as PNG files into this folder.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write everything as JSON.")] = None,
) -> None:
    """Show where a pair changes the base's text, and what happens when it stops."""
    drops = _cutoffs(cutoffs)
    if html is not None or plots is not None:
        require_matplotlib()
    count = batches.limit or DEFAULT_TEXTS
    if prompts is not None:
        texts = [problem.prompt for problem in load_problems(prompts, template)][:count]
    elif models.task is not None:
        texts = [problem.prompt for problem in held_out(models.task)][:count]
    else:
        raise ConfigurationError("models of your own need --prompts FILE.")
    with quiet(to_stderr=True):
        model = load(models, where, batches)
        if model.tokenizer is None:
            raise ConfigurationError(f"no tokenizer was found beside --base={models.base}; text needs one.")
        analysis = analyse(
            model,
            texts,
            lambda ids: split_tokens(model.tokenizer, ids),
            max_new_tokens=max_new_tokens,
            batch_size=batches.batch_size,
            alpha=batches.alpha,
            cutoffs=drops,
            cutoff_tokens=cutoff_tokens,
            **batches.drafting,
        )
    record = analysis.to_dict()
    if output is not None:
        output.write_text(json.dumps(record) + "\n", encoding="utf-8")
    if plots is not None:
        plots.mkdir(parents=True, exist_ok=True)
        for title, png in analysis_charts(record).items():
            (plots / f"{title.lower().replace(' ', '-')}.png").write_bytes(png)
    if html is not None:
        html.write_text(analysis_page(record), encoding="utf-8")
    _print(Console(highlight=False, soft_wrap=True), record)


def _cutoffs(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise ConfigurationError(f"--cutoffs={text} must be numbers of tokens with commas between them.")
    return [check_integer("--cutoffs", int(part), 0, "give numbers of tokens") for part in parts]


def _print(console: Console, record: dict[str, Any]) -> None:
    for line in record["findings"]:
        console.print(line)
    for kind, part in record["by_kind"].items():
        console.print(
            f"{kind}: {part['count']} tokens, {part['departures']:.1%} depart, KL {part['kl']:.3f}, "
            f"{part['drafted']:.1%} from drafts"
        )
    for name in ("promoted", "demoted"):
        console.print(f"{name}: {', '.join(f'{text!r} {by:+.1f}' for text, by in record[name])}", markup=False)
