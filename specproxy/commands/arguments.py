"""Options that several commands share: defined once, checked together, and turned into arguments of `generate`.

A group is a dataclass whose fields are Typer options; `grouped` gives a command the options of every group it asks for.
"""

from __future__ import annotations

import inspect
import os
import secrets
import typing
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from specproxy import demo
from specproxy.config import DRAFTER_NAMES, check_alpha, check_integer
from specproxy.errors import ConfigurationError
from specproxy.options import parse_options
from specproxy.schedule import AlphaSchedule

__all__ = [
    "ROLES",
    "BatchOptions",
    "DecodingOptions",
    "DeviceOptions",
    "DraftingOptions",
    "ModelOptions",
    "grouped",
]

DEFAULT_TASK = "arithmetic"
ROLES = ("base", "expert", "anti_expert")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True)
class ModelOptions:
    """Which models: names of the user's own, or the embedded trio."""

    demo_task: Annotated[
        str | None, typer.Option("--demo", help="Task of the embedded trio: arithmetic (the default) or python.")
    ] = None
    base: Annotated[str | None, typer.Option(help="Large untuned model: a folder or a hub name.")] = None
    expert: Annotated[str | None, typer.Option(help="Small tuned model.")] = None
    anti_expert: Annotated[
        str | None, typer.Option(help="The small model untuned; without it the expert alone steers.")
    ] = None
    assistant: Annotated[
        str | None, typer.Option(help="A further model of the same vocabulary, for --drafter assistant.")
    ] = None
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer of the base: a folder or a hub name. [default: beside --base]")
    ] = None

    def __post_init__(self) -> None:
        given = [role for role in ROLES if getattr(self, role) is not None]
        missing = [role for role in ROLES if role not in (*given, "anti_expert")]
        names = ", ".join(map(_flag, ROLES))
        if given and self.demo_task is not None:
            raise ConfigurationError(f"--demo and {names} exclude each other: name one trio.")
        if self.demo_task is not None and self.demo_task not in demo.tasks():
            raise ConfigurationError(f"--demo={self.demo_task} is not a task; use one of {', '.join(demo.tasks())}.")
        if given and missing:
            absent = ", ".join(map(_flag, missing))
            raise ConfigurationError(
                f"--base and --expert, with or without --anti-expert, go together; missing: {absent}."
            )
        if self.tokenizer is not None and not given:
            raise ConfigurationError(
                f"--tokenizer={self.tokenizer} serves models of your own; the embedded trio has its own. Leave it out."
            )

    @property
    def task(self) -> str | None:
        """Task of the embedded trio; None for models of the user's own."""
        return (self.demo_task or DEFAULT_TASK) if self.base is None else None

    @property
    def names(self) -> dict[str, Any]:
        """Folder or hub name per role, the assistant among them, and of the tokenizer where it lies elsewhere."""
        own = {name: getattr(self, name) for name in (*ROLES, "assistant", "tokenizer")}
        named = {name: value for name, value in own.items() if value is not None}
        return named if self.task is None else demo.folders(self.task) | named


@dataclass(frozen=True)
class DeviceOptions:
    """Where and in what precision the models run."""

    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "float64"] | None, typer.Option(help="Of all three models.")
    ] = None
    device: Annotated[str | None, typer.Option(help="Of all three models, such as cpu or cuda:0.")] = None
    tensor_parallel_size: Annotated[
        int | None, typer.Option(help="Processes that share the base; under torchrun all of them by default.")
    ] = None

    def __post_init__(self) -> None:
        if self.tensor_parallel_size is not None:
            check_integer("--tensor-parallel-size", self.tensor_parallel_size, 1, "give a number of processes")
        if self.num_shards not in (1, self.num_processes):
            raise ConfigurationError(
                f"--tensor-parallel-size={self.num_shards} with {self.num_processes} processes: start as many, by "
                f"`torchrun --nproc-per-node {self.num_shards} -m specproxy ...`."
            )
        if self.num_shards > 1 and self.device is not None:
            raise ConfigurationError(f"--device={self.device}: every process takes its own device; leave it out.")

    @property
    def num_processes(self) -> int:
        """As torchrun tells it."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def num_shards(self) -> int:
        """Processes that the base is sharded over."""
        return self.num_processes if self.tensor_parallel_size is None else self.tensor_parallel_size


@dataclass(frozen=True)
class DraftingOptions:
    """Who drafts, how much, and what becomes of it."""

    num_draft_tokens: Annotated[str, typer.Option(metavar="N|auto", help="Drafts a cycle; 0 is per-step decoding.")] = (
        "4"
    )
    num_tree_tokens: Annotated[
        int, typer.Option(help="Nodes of a token tree drafted in place of a chain, greedy or coupled; 0: a chain.")
    ] = 0
    drafter: Annotated[str | None, typer.Option(help=f"Who drafts: {', '.join(DRAFTER_NAMES)}. [default: expert]")] = (
        None
    )
    acceptance: Annotated[str, typer.Option(help="rejection, block or coupled.")] = "rejection"
    corpus: Annotated[
        list[Path] | None, typer.Option(help="UTF-8 text that lookup may copy from; may be repeated.")
    ] = None

    @property
    def drafts(self) -> int | str:
        """`num_draft_tokens` of generate: a number where the text is one; else "auto", or what the check refuses."""
        try:
            return int(self.num_draft_tokens)
        except ValueError:
            return self.num_draft_tokens

    @property
    def drafting(self) -> dict[str, Any]:
        """Keyword arguments of `generate` and `Engine`; what was not given is left to their own defaults."""
        arguments: dict[str, Any] = {"num_draft_tokens": self.drafts, "acceptance": self.acceptance}
        if self.num_tree_tokens:
            arguments["num_tree_tokens"] = self.num_tree_tokens
        if self.drafter is not None:
            arguments["drafter"] = self.drafter
        return arguments


@dataclass(frozen=True)
class DecodingOptions(DraftingOptions):
    """How tokens are drawn: what `generate` takes besides prompts."""

    alpha: Annotated[float | None, typer.Option(help="Strength of the steering; the model's own by default.")] = None
    alpha_cutoff: Annotated[int | None, typer.Option(help="New tokens after which the steering stops.")] = None
    alpha_half_life: Annotated[
        float | None, typer.Option(help="New tokens in which the strength halves, towards --alpha-floor.")
    ] = None
    alpha_floor: Annotated[float, typer.Option(help="Share of the strength, 0 to 1, that a decay leaves.")] = 0.0
    max_new_tokens: Annotated[int, typer.Option(help="Most new tokens.")] = 128
    min_new_tokens: Annotated[int | None, typer.Option(help="Fewest new tokens.")] = None
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the output; may be repeated.")] = None
    do_sample: Annotated[
        bool | None, typer.Option("--do-sample/--greedy", help="Greedy by default; a temperature implies sampling.")
    ] = None
    temperature: Annotated[float | None, typer.Option(help="Above 0; 0 means greedy.")] = None
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest tokens; 0 keeps all. [default: 50]")] = None
    top_p: Annotated[float | None, typer.Option(help="Keep the smallest set of this mass.")] = None
    min_p: Annotated[float | None, typer.Option(help="Keep tokens this likely relative to the likeliest.")] = None
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 discourages repetition.")] = None
    no_repeat_ngram_size: Annotated[int | None, typer.Option(help="No n-gram of this size comes twice.")] = None
    seed: Annotated[int | None, typer.Option(help="Of the sampling; drawn afresh by default.")] = None

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `generate`; what was not given is left to its own defaults.

        Checked here by the rules that generate applies, so that a mistake costs no loading of models.

        Raises:
            ConfigurationError: for an unusable value, or one without effect.
        """
        sampled = bool(self.temperature) if self.do_sample is None else self.do_sample
        filters = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]
        if self.do_sample is None and self.temperature is None and filters:
            names = ", ".join(map(_flag, filters))
            raise ConfigurationError(f"{names} changes nothing in greedy decoding; add --do-sample or --temperature.")
        given = {
            "max_new_tokens": self.max_new_tokens,
            "min_new_tokens": self.min_new_tokens,
            "stop_strings": self.stop or None,
            "do_sample": sampled,
            "temperature": self.temperature,
            **{name: getattr(self, name) for name in filters},
            "repetition_penalty": self.repetition_penalty,
            "no_repeat_ngram_size": self.no_repeat_ngram_size,
        }
        given = {name: value for name, value in given.items() if value is not None}
        parse_options(given, None, default_tokenizer=object(), **self.drafting)
        speculation = self.drafting
        if self.alpha is not None:
            speculation["alpha"] = check_alpha(self.alpha)
        schedule = AlphaSchedule(self.alpha_cutoff, self.alpha_half_life, self.alpha_floor)
        if not schedule.is_constant:
            speculation["alpha_schedule"] = schedule
        if sampled:
            speculation["seed"] = secrets.randbits(32) if self.seed is None else self.seed
        return given | speculation


@dataclass(frozen=True)
class BatchOptions(DraftingOptions):
    """How many texts are decoded one after another: what evaluations share."""

    alpha: Annotated[float | None, typer.Option(help="Strength of the steering; the model's own by default.")] = None
    batch_size: Annotated[int, typer.Option(help="Rows of a batch.")] = 8
    limit: Annotated[int | None, typer.Option(help="Most texts; of each task in eval.")] = None
    seed: Annotated[int, typer.Option(help="Of sampling, few-shot examples and bootstraps.")] = 0

    def __post_init__(self) -> None:
        check_integer("--batch-size", self.batch_size, 1, "give a number of rows")
        if self.limit is not None:
            check_integer("--limit", self.limit, 1, "give a number of texts")
        if self.alpha is not None:
            check_alpha(self.alpha)
        parse_options({}, None, default_tokenizer=None, **self.drafting)

    @property
    def speculation(self) -> dict[str, Any]:
        """Keyword arguments of `generate` for speculation and strength."""
        own = {} if self.alpha is None else {"alpha": self.alpha}
        return self.drafting | own


def grouped(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command whose parameters of a group's type are replaced by the group's options.

    Args:
        command: a function with a parameter annotated with a dataclass for every group it takes.
    """
    hints = typing.get_type_hints(command, include_extras=True)
    parameters = []
    groups = {name: hint for name, hint in hints.items() if is_dataclass(hint) and isinstance(hint, type)}
    for name, parameter in inspect.signature(command).parameters.items():
        if name not in groups:
            parameters.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        of_group = typing.get_type_hints(groups[name], include_extras=True)
        parameters += [
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=of_group[field.name]
            )
            for field in fields(groups[name])
        ]

    def expanded(**values: Any) -> Any:
        built = {
            name: group(**{field.name: values.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        return command(**built, **values)

    expanded.__doc__, expanded.__name__ = command.__doc__, command.__name__
    expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    expanded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return expanded
