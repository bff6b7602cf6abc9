"""`specproxy generate`: options in, one call of `ProxyTunedModel.generate`, its text out.

Knows nothing of how tokens come about.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers import TextStreamer

from specproxy import demo
from specproxy.commands.arguments import DecodingOptions, DeviceOptions, ModelOptions
from specproxy.commands.loading import load, quiet
from specproxy.commands.report import Comparison, print_report
from specproxy.errors import ConfigurationError, PromptError
from specproxy.model import ProxyTunedModel
from specproxy.stats import SpeculationStats
from specproxy.text import split_tokens

__all__ = ["generate"]

REPEATS = 5  # interleaved pairs behind the speed that --stats prints
TIME_LIMIT = 30.0  # seconds after which no further pair begins


def generate(
    models: ModelOptions,
    decoding: DecodingOptions,
    where: DeviceOptions,
    prompt: Annotated[
        str | None, typer.Argument(help="Text to continue; - reads standard input; without it, an example of the demo.")
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read the prompt from a UTF-8 file.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text as it comes.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Show who proposed each token, acceptance and speed.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line: text and speculation.")] = False,
) -> None:
    """Continue a prompt with a proxy-tuned model."""
    if as_json and stream:
        raise ConfigurationError("--json and --stream exclude each other: a JSON line is whole or not at all.")
    options = decoding.arguments()
    text = _prompt(prompt, prompt_file, models.task)
    if prompt is None and prompt_file is None and not stats:
        print(f"prompt: {text}", file=sys.stderr)

    with quiet(to_stderr=not stream):
        model = load(models, where, decoding)
        if model.tokenizer is None:
            raise ConfigurationError(f"no tokenizer was found beside --base={models.base}; text needs one.")
        input_ids = model.tokenizer(text, return_tensors="pt").input_ids.to(model.device)  # [1, S]
        streamer = TextStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
        tokens, speculation = _generate(model, input_ids, options | {"streamer": streamer})
        pieces = split_tokens(model.tokenizer, tokens)
        comparison = _compare(model, input_ids, options) if stats else None

    if as_json:
        print(json.dumps({"text": "".join(pieces), "speculation": speculation.to_dict()}))
    elif not stats and not stream:
        print("".join(pieces))
    if stats:
        print_report(Console(stderr=as_json, highlight=False), text, pieces, speculation, comparison)
        if "seed" in options:
            print(f"seed: {options['seed']}", file=sys.stderr)


def _prompt(prompt: str | None, prompt_file: Path | None, example_of: str | None) -> str:
    """The text to continue. One newline at the end of a file or of standard input is dropped."""
    if prompt is not None and prompt_file is not None:
        raise ConfigurationError("PROMPT and --prompt-file exclude each other: give one prompt.")
    try:
        if prompt_file is not None:
            text = prompt_file.read_text(encoding="utf-8").removesuffix("\n")
        elif prompt == "-":
            text = sys.stdin.read().removesuffix("\n")
        elif prompt is not None:
            text = prompt
        elif example_of is not None:
            text = demo.example_prompts(example_of)[0]
        else:
            raise PromptError("models of your own need a prompt: give PROMPT, - or --prompt-file.")
    except UnicodeDecodeError as error:
        raise PromptError(f"the prompt is not UTF-8 text: {error}.") from error
    if not text:
        raise PromptError("the prompt is empty: give at least one character.")
    return text


def _generate(
    model: ProxyTunedModel, input_ids: torch.Tensor, options: dict[str, Any]
) -> tuple[list[int], SpeculationStats]:
    """The new token ids of the only row, and what speculation did."""
    out: Any = model.generate(input_ids, torch.ones_like(input_ids), **options, return_dict_in_generate=True)
    return out.sequences[0, input_ids.shape[1] :].tolist(), out.speculation


def _compare(model: ProxyTunedModel, input_ids: torch.Tensor, options: dict[str, Any]) -> Comparison | None:
    """Time the call against per-step decoding: a warm-up each, then interleaved pairs in alternating order."""
    if options["num_draft_tokens"] == 0:
        return None
    per_step = {name: value for name, value in options.items() if name not in ("num_tree_tokens", "drafter")}
    settings = {"speculative": options, "per_step": per_step | {"num_draft_tokens": 0}}
    rates: dict[str, list[float]] = {name: [] for name in settings}
    tokens: dict[str, list[int]] = {}
    began = time.perf_counter()
    for repeat in range(-1, REPEATS):  # -1 is the warm-up
        if repeat > 0 and time.perf_counter() - began > TIME_LIMIT:
            break
        for name in sorted(settings, reverse=repeat % 2 == 0):
            _synchronize(model.device)
            start = time.perf_counter()
            tokens[name], _ = _generate(model, input_ids, settings[name])
            _synchronize(model.device)
            seconds = time.perf_counter() - start
            if repeat >= 0:
                rates[name].append(len(tokens[name]) / seconds)
    comparable = not options["do_sample"] or options["acceptance"] == "coupled"
    return Comparison(**rates, same_tokens=tokens["speculative"] == tokens["per_step"] if comparable else None)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
