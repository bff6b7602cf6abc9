"""The trio of a benchmark: its arguments on a command line, loaded, and grown. Knows no ways of measuring."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.calibrate import grow_to_time_ratio
from benchmarks.grow import SHAPES, grow, grow_to_cost_ratio, parse_shape
from benchmarks.prompts import QUESTION, demo_prompts, load_prompts
from specproxy import ProxyTunedModel

__all__ = ["add_trio_arguments", "check_trio", "load_trio", "prompt_texts", "quiet"]


def add_trio_arguments(parser: argparse.ArgumentParser) -> None:
    """Which trio, how it is grown, and which prompts it reads."""
    trio = parser.add_argument_group("trio")
    trio.add_argument("--demo", choices=["arithmetic", "python"], help="the embedded trio (arithmetic by default)")
    trio.add_argument("--base", help="folder or hub name; with --expert and --anti-expert")
    trio.add_argument("--expert")
    trio.add_argument("--anti-expert")
    trio.add_argument("--tokenizer", help="by default that beside the base")
    trio.add_argument("--alpha", type=float, help="proxy strength; the demo's own, or 1")
    trio.add_argument("--device", default="cpu")
    trio.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16", "float64"])
    growth = parser.add_argument_group("growth")
    growth.add_argument("--cost-ratio", type=float, help="grow the base to this cost of a small forward over its own")
    growth.add_argument("--cost-by", default="time", choices=["time", "parameters"], help="what --cost-ratio means")
    growth.add_argument(
        "--grow-by",
        default="proportions",
        choices=["proportions", "depth"],
        help="what --cost-ratio enlarges: width and depth together, or layers alone",
    )
    growth.add_argument("--base-shape", help=f"{', '.join(SHAPES)}, or layers=24,hidden=1024,...")
    growth.add_argument("--pair-shape", help="grow expert and anti-expert as well, before the base")
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument("--prompts", type=Path, help="JSON lines with prompt, question or Question")
    prompts.add_argument("--template", default=QUESTION, help="what a question is put into at {question}")


def check_trio(options: argparse.Namespace) -> None:
    """What can be known to fail before models are loaded.

    Raises:
        ValueError: naming the argument.
    """
    own = [options.base, options.expert, options.anti_expert]
    if any(own) and (options.demo or not all(own)):
        raise ValueError("give --base, --expert and --anti-expert together, or --demo.")
    if all(own) and options.prompts is None:
        raise ValueError("models of your own need --prompts FILE.jsonl.")
    if options.cost_ratio is not None and options.base_shape is not None:
        raise ValueError("--cost-ratio and --base-shape exclude each other.")
    if options.cost_ratio is not None and not 0 < options.cost_ratio < 1:
        raise ValueError(f"--cost-ratio={options.cost_ratio} must lie between 0 and 1.")
    for shape in (options.base_shape, options.pair_shape):
        if shape is not None:
            parse_shape(shape)


@contextlib.contextmanager
def quiet() -> Any:
    """Keep standard output for the record, and Transformers from reporting on the way."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def load_trio(options: argparse.Namespace) -> ProxyTunedModel:
    """The trio that the arguments name, grown as they ask.

    Raises:
        ValueError: where there is no tokenizer.
    """
    return _grown(_loaded(options), options)


def _loaded(options: argparse.Namespace) -> ProxyTunedModel:
    dtype = getattr(torch, options.dtype)
    if options.base is None:
        return ProxyTunedModel.demo(options.demo or "arithmetic", device=options.device, dtype=dtype)
    model = ProxyTunedModel.from_pretrained(
        options.base,
        expert=options.expert,
        anti_expert=options.anti_expert,
        tokenizer=options.tokenizer,
        dtype=dtype,
        device_map=options.device,
        progress=False,
    )
    if model.tokenizer is None:
        raise ValueError(f"there is no tokenizer beside {options.base}; name one with --tokenizer.")
    return model


def _grown(model: ProxyTunedModel, options: argparse.Namespace) -> ProxyTunedModel:
    base, expert, anti_expert = model.base, model.expert, model.anti_expert
    depth_only = options.grow_by == "depth"
    if options.pair_shape is not None:
        expert, anti_expert = (grow(small, options.pair_shape) for small in (expert, anti_expert))
    if options.base_shape is not None:
        base = grow(base, options.base_shape)
    elif options.cost_ratio is not None and options.cost_by == "time":
        base = grow_to_time_ratio(base, expert, options.cost_ratio, depth_only=depth_only)
    elif options.cost_ratio is not None:
        base = grow_to_cost_ratio(base, expert, options.cost_ratio, depth_only=depth_only)
    alpha = model.alpha if options.alpha is None else options.alpha
    return ProxyTunedModel(base, expert, anti_expert, model.tokenizer, alpha)


def prompt_texts(options: argparse.Namespace) -> list[str]:
    """The prompts of ``--prompts``, or of the embedded task: ``--num-prompts`` at most."""
    if options.prompts is not None:
        return load_prompts(options.prompts, options.template)[: options.num_prompts]
    return demo_prompts(options.demo or "arithmetic", options.num_prompts)
