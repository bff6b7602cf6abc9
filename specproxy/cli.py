"""The command line: options in, one call of `ProxyTunedModel.generate`, its text out.

The result goes to standard output, everything else to standard error. Knows nothing of how tokens come about.
"""

from __future__ import annotations

import contextlib
import io
import json
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from transformers import TextStreamer
from transformers.utils import logging as transformers_logging
from typer.exceptions import TyperException

from specproxy import demo
from specproxy.cli_report import Comparison, print_report, split_tokens
from specproxy.config import SamplingParameters, SpeculationParameters, check_integer
from specproxy.errors import ConfigurationError, PromptError, SpecProxyError
from specproxy.model import ProxyTunedModel
from specproxy.stats import SpeculationStats
from specproxy.version import __version__

__all__ = ["app", "main"]

DEFAULT_TASK = "arithmetic"
REPEATS = 5  # interleaved pairs behind the speed that --stats prints
TIME_LIMIT = 30.0  # seconds after which no further pair begins
EXIT_ERROR = 2

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the program's name; None takes the process's own.

    Returns:
        The exit code: 0, or 2 after an error, which stands on standard error in one line.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a narrow locale must not cost the result
    try:
        code = app(args=arguments, prog_name="specproxy", standalone_mode=False)
    except (SpecProxyError, TyperException, OSError) as error:
        message = error.format_message() if isinstance(error, TyperException) else str(error)
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        return EXIT_ERROR
    return code if isinstance(code, int) else 0


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    """Exact, speculative decoding for proxy-tuned language models."""
    if version:
        print(f"specproxy {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="Text to continue; - reads standard input; without it, an example of the demo.")
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read the prompt from a UTF-8 file.")] = None,
    demo_task: Annotated[
        str | None, typer.Option("--demo", help="Task of the embedded trio: arithmetic (the default) or python.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Large untuned model: a folder or a hub name.")] = None,
    expert: Annotated[str | None, typer.Option(help="Small tuned model.")] = None,
    anti_expert: Annotated[str | None, typer.Option(help="The small model untuned.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Strength of the steering; the model's own by default.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most new tokens.")] = 128,
    num_draft_tokens: Annotated[
        str, typer.Option(metavar="N|auto", help="Drafts a cycle; 0 is per-step decoding.")
    ] = "4",
    acceptance: Annotated[str, typer.Option(help="rejection, block or coupled.")] = "rejection",
    do_sample: Annotated[
        bool | None, typer.Option("--do-sample/--greedy", help="Greedy by default; a temperature implies sampling.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Above 0; 0 means greedy.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest tokens; 0 keeps all. [default: 50]")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the smallest set of this mass.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Keep tokens this likely relative to the likeliest.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 discourages repetition.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the sampling; drawn afresh by default.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text as it comes.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Show who proposed each token, acceptance and speed.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line: text and speculation.")] = False,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "float64"] | None, typer.Option(help="Of all three models.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Of all three models, such as cpu or cuda:0.")] = None,
) -> None:
    """Continue a prompt with a proxy-tuned model."""
    if as_json and stream:
        raise ConfigurationError("--json and --stream exclude each other: a JSON line is whole or not at all.")
    models = _models(demo_task, base, expert, anti_expert)
    sampling = _sampling(do_sample, temperature, top_k, top_p, min_p, repetition_penalty)
    options: dict[str, Any] = sampling | {
        "max_new_tokens": max_new_tokens,
        "num_draft_tokens": _num_draft_tokens(num_draft_tokens),
        "acceptance": acceptance,
        "alpha": alpha,
    }
    if sampling["do_sample"]:
        options["seed"] = secrets.randbits(32) if seed is None else seed
    # Checked before models are loaded, by the same rules that generate applies.
    SamplingParameters(**sampling)
    SpeculationParameters(options["num_draft_tokens"], acceptance)
    check_integer("max_new_tokens", max_new_tokens, 1, "give the most tokens to add")
    task = (demo_task or DEFAULT_TASK) if models is None else None
    text = _prompt(prompt, prompt_file, task)
    if prompt is None and prompt_file is None and not stats:
        print(f"prompt: {text}", file=sys.stderr)

    with _quiet(to_stderr=not stream):
        model = _load(models, demo_task or DEFAULT_TASK, dtype, device)
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


def _models(
    demo_task: str | None, base: str | None, expert: str | None, anti_expert: str | None
) -> dict[str, Any] | None:
    """The names of three models of the user's own, or None for the embedded trio."""
    given = {"base": base, "expert": expert, "anti_expert": anti_expert}
    names = {role: name for role, name in given.items() if name is not None}
    if names and demo_task is not None:
        raise ConfigurationError("--demo and --base, --expert, --anti-expert exclude each other: name one trio.")
    if demo_task is not None and demo_task not in demo.tasks():
        raise ConfigurationError(f"--demo={demo_task} is not a task; use one of {', '.join(demo.tasks())}.")
    if names and len(names) < len(given):
        missing = ", ".join(f"--{role.replace('_', '-')}" for role in given if role not in names)
        raise ConfigurationError(f"--base, --expert and --anti-expert go together; missing: {missing}.")
    return names or None


def _sampling(do_sample: bool | None, temperature: float | None, *filters: float | None) -> dict[str, Any]:
    """Keyword arguments of the sampling chain; what was not given is left to generate's own defaults."""
    sampled = bool(temperature) if do_sample is None else do_sample
    top_k, top_p, min_p, repetition_penalty = filters
    chosen = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    if do_sample is None and temperature is None and any(value is not None for value in chosen.values()):
        names = ", ".join(f"--{name.replace('_', '-')}" for name, value in chosen.items() if value is not None)
        raise ConfigurationError(f"{names} changes nothing in greedy decoding; add --do-sample or --temperature.")
    given = {"temperature": temperature, **chosen, "repetition_penalty": repetition_penalty}
    return {"do_sample": sampled} | {name: value for name, value in given.items() if value is not None}


def _num_draft_tokens(value: str) -> int | str:
    """An integer where it is one; anything else is judged by SpeculationParameters."""
    try:
        return int(value)
    except ValueError:
        return value


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


def _load(models: dict[str, Any] | None, task: str, dtype: str | None, device: str | None) -> ProxyTunedModel:
    torch_dtype = getattr(torch, dtype) if dtype else None
    try:
        if device is not None:
            torch.empty(0, device=device)  # fails here rather than half way through loading
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(f"--device={device} cannot be used: {str(error).splitlines()[0]}") from error
    if models is None:
        return ProxyTunedModel.demo(task, device=device, dtype=torch_dtype)
    try:
        return ProxyTunedModel.from_pretrained(
            **models, dtype=torch_dtype, device_map=device, progress=sys.stderr.isatty()
        )
    except SpecProxyError:
        raise
    except ValueError as error:
        raise ConfigurationError(f"the models could not be loaded: {error}") from error


@contextlib.contextmanager
def _quiet(to_stderr: bool) -> Iterator[None]:
    """Silence what Transformers reports on the way; with `to_stderr`, keep standard output free of anybody's prints."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(sys.stderr) if to_stderr else contextlib.nullcontext():
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


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
    settings = {"speculative": options, "per_step": options | {"num_draft_tokens": 0}}
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
