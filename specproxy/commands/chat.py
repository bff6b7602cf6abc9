"""`specproxy chat`: a conversation in the terminal, or through a pipe with one question a line.

Answers go to standard output; on a pipe the questions are repeated on standard error. Knows nothing of templates but
their names.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from transformers import TextStreamer

from specproxy.chat import check_messages, render_prompt
from specproxy.commands.arguments import DecodingOptions, DeviceOptions, ModelOptions
from specproxy.commands.loading import load, quiet
from specproxy.errors import ConfigurationError, PromptError, SpecProxyError
from specproxy.model import ProxyTunedModel

__all__ = ["chat"]

_PROMPT = "> "

Template = Annotated[str | None, typer.Option(metavar="chat|raw|JINJA", help="How this role reads the conversation.")]


def chat(
    models: ModelOptions,
    decoding: DecodingOptions,
    where: DeviceOptions,
    system: Annotated[str | None, typer.Option(help="A system message ahead of the conversation.")] = None,
    base_template: Template = None,
    expert_template: Template = None,
    anti_expert_template: Template = None,
) -> None:
    """Talk with a proxy-tuned model. /reset forgets the conversation; /quit or the end of input leaves."""
    arguments = decoding.arguments()
    with quiet(to_stderr=True):
        model = load(models, where, decoding)
    arguments |= {
        "base_template": base_template,
        "expert_template": expert_template,
        "anti_expert_template": anti_expert_template,
    }
    opening = [] if system is None else [{"role": "system", "content": system}]
    _check_templates(model, arguments, opening)
    streamer = TextStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
    interactive = sys.stdin.isatty()
    messages = list(opening)
    for line in _lines(interactive):
        if line == "/quit":
            break
        if line == "/reset":
            messages = list(opening)
            print("(the conversation starts anew)", file=sys.stderr)
            continue
        if line.startswith("/"):
            _complain(PromptError(f"{line.split()[0]} is no command; use /reset or /quit."), interactive)
            continue
        question = {"role": "user", "content": line}
        try:
            with quiet(to_stderr=False):
                reply = model.chat([*messages, question], streamer=streamer, **arguments)
        except SpecProxyError as error:
            _complain(error, interactive)
        except KeyboardInterrupt:
            if not interactive:
                raise
            print("\n(interrupted; the question is forgotten)", file=sys.stderr)
        else:
            messages = reply.messages


def _lines(interactive: bool) -> Iterator[str]:
    """What the user says, stripped, empty lines left out."""
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() a history)
    while True:
        try:
            line = input(_PROMPT) if interactive else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        except UnicodeDecodeError as error:
            raise PromptError(f"standard input is not UTF-8 text: {error}.") from error
        if not interactive and not line:
            return
        line = line.strip()
        if line:
            if not interactive:
                print(f"{_PROMPT}{line}", file=sys.stderr, flush=True)
            yield line


def _complain(error: SpecProxyError, interactive: bool) -> None:
    """At a terminal the conversation goes on after an error; a pipe's ends with it."""
    if not interactive:
        raise error
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)


def _check_templates(model: ProxyTunedModel, arguments: dict[str, Any], opening: list[dict[str, str]]) -> None:
    """Render a first turn, so that a template's fault shows before anything is typed."""
    if model.tokenizer is None:
        raise ConfigurationError("no tokenizer was found beside the base; chat needs one.")
    messages = check_messages([*opening, {"role": "user", "content": "Hello"}])
    for role in ("base", "expert", "anti_expert"):
        if role == "anti_expert" and model.anti_expert is None:
            if arguments["anti_expert_template"] is not None:
                raise ConfigurationError("--anti-expert-template needs an --anti-expert; name one, or leave it out.")
            continue
        tokenizer = model.expert_tokenizer if role == "expert" else model.tokenizer
        render_prompt(messages, arguments[f"{role}_template"], tokenizer, f"{role}_template")
