"""`specproxy vllm-config`: writes the folder that `vllm serve` takes and prints the command.

Reads configurations and tokenizers, no weights, and needs no vLLM. Knows nothing of the folder's content.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from specproxy import demo
from specproxy.commands.arguments import ModelOptions
from specproxy.commands.loading import quiet
from specproxy.config import check_alpha
from specproxy.errors import ConfigurationError
from specproxy.integrations.vllm.composite import inspect_roles, speculative_config, write_composite
from specproxy.theory import best_num_draft_tokens, speedup_over_base, speedup_over_per_step

__all__ = ["vllm_config"]

ACCEPTANCE = 0.8  # where nothing was measured


def vllm_config(
    models: ModelOptions,
    out: Annotated[Path, typer.Option(help="Folder to write: configuration, tokenizer and links, no weights.")],
    alpha: Annotated[float | None, typer.Option(help="Strength of the steering; 1, or the demo's own.")] = None,
    num_speculative_tokens: Annotated[
        str, typer.Option(metavar="N|auto", help="Drafts a cycle; auto computes them, 0 speculates not at all.")
    ] = "auto",
    acceptance: Annotated[
        float | None, typer.Option(help="Acceptance rate that auto expects, 0 to 1. [default: 0.8]")
    ] = None,
    cost_ratio: Annotated[
        float | None, typer.Option(help="Time of the expert over that of the base, for auto; by parameters by default.")
    ] = None,
) -> None:
    """Make vLLM serve three models as one proxy-tuned model."""
    if models.assistant is not None:
        raise ConfigurationError(f"--assistant={models.assistant}: in vLLM the expert drafts; leave it out.")
    count = _count(num_speculative_tokens, acceptance, cost_ratio)
    if alpha is None:
        alpha = 1.0 if models.task is None else demo.alpha(models.task)
    check_alpha(alpha)
    names = dict(models.names)
    tokenizer = names.pop("tokenizer", None)
    with quiet(to_stderr=True):
        report = inspect_roles(names, tokenizer)
        composite = write_composite(out, names, report, alpha)
    print(f"wrote {out}: alpha {alpha:g}, {composite.vocabulary.size} shared ids", file=sys.stderr)
    if count is None:
        rate, ratio = ACCEPTANCE if acceptance is None else acceptance, cost_ratio or report.cost_ratio
        count = best_num_draft_tokens(rate, ratio)
        print(
            f"{count} drafts a cycle, for acceptance {rate:g} and cost ratio {ratio:.3g}: expected "
            f"{speedup_over_per_step(rate, ratio, count):.2f} times per-step, "
            f"{speedup_over_base(rate, ratio, count):.2f} times the base alone",
            file=sys.stderr,
        )
    command = ["vllm", "serve", str(out)]
    if count:
        command += ["--speculative-config", json.dumps(speculative_config(composite, count))]
    print(shlex.join(command))


def _count(text: str, acceptance: float | None, cost_ratio: float | None) -> int | None:
    """The number of drafts asked for; None where it is to be computed."""
    if acceptance is not None and not 0 <= acceptance <= 1:
        raise ConfigurationError(f"--acceptance={acceptance} is no rate; use a number from 0 to 1.")
    if cost_ratio is not None and not 0 < cost_ratio < float("inf"):
        raise ConfigurationError(f"--cost-ratio={cost_ratio} is no ratio of times; use a number above 0.")
    if text == "auto":
        return None
    if acceptance is not None or cost_ratio is not None:
        raise ConfigurationError(
            "--acceptance and --cost-ratio serve --num-speculative-tokens=auto only; leave them out."
        )
    if not text.isdecimal():
        raise ConfigurationError(f"--num-speculative-tokens={text} is no number; use 0, a positive integer or auto.")
    return int(text)
