"""Speed of a trio against everything it competes with, in one run on one machine.

Ways of decoding, repeat by repeat in alternating order after a warm-up each; ratios are medians of paired repeats:

    per_step           this runtime without drafts
    draft_G_RULE       this runtime, G drafts a cycle under an acceptance rule
    plain_loop         three models over Transformers' caches, as written by hand
    base_runtime, expert_runtime      one model alone over this runtime's cache, attention and sampling
    base_generate, expert_generate    one model alone by Transformers' generate
    base_assisted      Transformers' assisted decoding of the base, the expert drafting; one row

The embedded base is about as cheap as its pair, so that `--cost-ratio` or `--base-shape` grows it without changing its
function (`benchmarks/grow.py`). A table goes to standard error, one JSON line to standard output.

Example:
    python benchmarks/latency.py --demo arithmetic --cost-ratio 0.1 --num-draft-tokens 4 8 auto --threads 2
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only

import torch
from rich.console import Console

from benchmarks.command import run_command
from benchmarks.decoders import Options, make_decoders
from benchmarks.grow import cost_parameters
from benchmarks.measure import conditions
from benchmarks.runs import pad_batches, summarise, take_turns
from benchmarks.tables import plot, print_tables, require_matplotlib
from benchmarks.trios import add_trio_arguments, check_trio, load_trio, prompt_texts, quiet
from specproxy import ProxyTunedModel
from specproxy.config import SamplingParameters, SpeculationParameters

__all__ = ["main", "measured"]


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
    work = parser.add_argument_group("work")
    work.add_argument("--num-prompts", type=int, default=4, help="prompts of a repeat, at most")
    work.add_argument("--batch-sizes", type=int, nargs="+", default=[1])
    work.add_argument("--max-new-tokens", type=int, default=96)
    work.add_argument("--ignore-eos", action="store_true", help="always decode --max-new-tokens")
    work.add_argument("--do-sample", action="store_true")
    work.add_argument("--temperature", type=float, default=1.0)
    work.add_argument("--top-k", type=int, default=0)
    speculation = parser.add_argument_group("speculation")
    speculation.add_argument("--num-draft-tokens", nargs="+", default=["4"], metavar="N|auto")
    speculation.add_argument("--acceptance", nargs="+", default=["rejection"])
    run = parser.add_argument_group("run")
    run.add_argument("--repeats", type=int, default=5)
    run.add_argument("--threads", type=int, help="of torch; its own default otherwise")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--skip", nargs="+", default=[], metavar="NAME", help="ways of decoding to leave out, by prefix")
    run.add_argument("--plot", type=Path, help="write a chart of speeds to this PNG file (needs matplotlib)")
    return parser


def _check(options: argparse.Namespace) -> None:
    """Everything that can be known to fail before models are loaded."""
    check_trio(options)
    for name in ("max_new_tokens", "repeats", "num_prompts"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}={getattr(options, name)} must be at least 1.")
    if min(options.batch_sizes) < 1:
        raise ValueError(f"--batch-sizes={options.batch_sizes} must be at least 1.")
    options.num_draft_tokens = [int(n) if n.isdecimal() else n for n in options.num_draft_tokens]
    if 0 in options.num_draft_tokens:
        raise ValueError("--num-draft-tokens 0 is per_step, which always runs; leave it out.")
    for count in options.num_draft_tokens:
        for rule in options.acceptance:
            SpeculationParameters(count, rule)
    SamplingParameters(options.do_sample, options.temperature, options.top_k)
    if options.plot is not None:
        require_matplotlib()  # a missing one should be known before the work is done
    device = torch.device(options.device)
    torch.empty(0, device=device)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Load, grow, run, report.

    Returns:
        The record that is printed.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    console = Console(stderr=True)
    with quiet():
        model = load_trio(options)
        prompts = [model.tokenizer(text).input_ids for text in prompt_texts(options)]
        record: dict[str, Any] = {
            "models": {role: _described(getattr(model, role)) for role in ("base", "expert", "anti_expert")},
            "parameter_ratio": cost_parameters(model.expert) / cost_parameters(model.base),
            "alpha": model.alpha,
            "num_prompts": len(prompts),
            "batches": [_measure_batch(model, prompts, size, options, console) for size in options.batch_sizes],
        }
    record |= conditions(options, model.device)
    print_tables(console, record)
    if options.plot is not None:
        plot(record, options.plot)
    return record


def _described(model: Any) -> dict[str, Any]:
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    shape = {name: getattr(model.config, name, None) for name in (*names, "vocab_size")}
    return {"parameters": sum(p.numel() for p in model.parameters()), "read": cost_parameters(model), **shape}


def _measure_batch(
    model: ProxyTunedModel, prompts: list[list[int]], size: int, options: argparse.Namespace, console: Console
) -> dict[str, Any]:
    """All ways of decoding at one batch size."""
    eos = frozenset() if options.ignore_eos else model._trio.eos_token_ids()
    pad = model._trio.pad_token_id()
    shared = Options(
        options.max_new_tokens, options.do_sample, options.temperature, options.top_k, eos, 0 if pad is None else pad
    )
    decoders = make_decoders(model, shared, options.num_draft_tokens, options.acceptance, size)
    decoders = {
        name: decode
        for name, decode in decoders.items()
        if name == "per_step" or not name.startswith(tuple(options.skip) or ("\0",))
    }
    batches = pad_batches(prompts, size, shared.pad_token_id, model.device)
    models = {"base": model.base, "expert": model.expert, "anti_expert": model.anti_expert}
    title = f"batch size {size}"
    runs, profiles = take_turns(decoders, batches, models, options.seed, options.repeats, title, console)
    same = {} if options.do_sample else dict.fromkeys(decoders, "per_step")
    return {"batch_size": size, **summarise(runs, profiles, size, same)}


if __name__ == "__main__":
    sys.exit(main())
