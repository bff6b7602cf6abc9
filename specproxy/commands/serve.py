"""`specproxy serve`: an HTTP server in OpenAI's protocol. Knows options; the server stands in `specproxy.server`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Annotated

import typer

from specproxy.commands.arguments import DeviceOptions, DraftingOptions, ModelOptions
from specproxy.commands.chat import Template
from specproxy.commands.loading import load, quiet
from specproxy.config import SpeculationParameters
from specproxy.engine import Engine
from specproxy.errors import ConfigurationError

__all__ = ["serve"]

_NEEDED = ("fastapi", "uvicorn", "openai", "prometheus_client")


def serve(
    models: ModelOptions,
    where: DeviceOptions,
    drafting: DraftingOptions,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="What requests call the model; may be repeated. By default its own name.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="SPECPROXY_API_KEY", help="Bearer token that requests must carry.")
    ] = None,
    max_batch_size: Annotated[int, typer.Option(help="Requests that decode together.")] = 8,
    max_model_len: Annotated[
        int | None, typer.Option(help="Positions of a request; by default what the models were built for.")
    ] = None,
    max_queue: Annotated[int, typer.Option(help="Requests that may wait; further ones get 429.")] = 256,
    prefill_chunk: Annotated[int, typer.Option(help="Prompt tokens read between two cycles.")] = 256,
    prefix_cache: Annotated[int, typer.Option(help="Positions kept of earlier prompts; 0 keeps none.")] = 4096,
    max_tokens: Annotated[int | None, typer.Option(help="Most new tokens of one answer.")] = None,
    max_choices: Annotated[int, typer.Option(help="Most answers to one prompt, n.")] = 16,
    max_prompts: Annotated[int, typer.Option(help="Most prompts of one request.")] = 128,
    max_body_bytes: Annotated[int, typer.Option(help="Largest body of a request.")] = 4 * 2**20,
    request_timeout: Annotated[float | None, typer.Option(help="Seconds after which a request ends.")] = None,
    drain_timeout: Annotated[float, typer.Option(help="Seconds that requests have left after SIGTERM.")] = 60.0,
    base_template: Template = None,
    expert_template: Template = None,
    anti_expert_template: Template = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Serve a proxy-tuned model in OpenAI's protocol."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigurationError(f"serve needs {', '.join(missing)}: pip install 'specproxy[serve]'.")
    from specproxy.server import ServerSettings, create_app
    from specproxy.server.logs import configure
    from specproxy.server.run import serve as run

    if log_level not in ("debug", "info", "warning", "error"):
        raise ConfigurationError(f"--log-level={log_level} is no level; use debug, info, warning or error.")
    if not 0 <= port < 2**16:
        raise ConfigurationError(f"--port={port} is no port; use 0 to 65535.")
    if not drain_timeout > 0:
        raise ConfigurationError(f"--drain-timeout={drain_timeout} must be above 0 seconds.")
    settings = ServerSettings(
        model_names=tuple(served_model_name or [_own_name(models)]),
        api_key=api_key,
        max_body_bytes=max_body_bytes,
        max_prompts=max_prompts,
        max_choices=max_choices,
        max_tokens=max_tokens,
        request_timeout=request_timeout,
        base_template=base_template,
        expert_template=expert_template,
        anti_expert_template=anti_expert_template,
    )
    SpeculationParameters(**drafting.drafting)  # what is refused, is refused before models are loaded
    configure(log_level)
    with quiet(to_stderr=True):
        engine = Engine(
            load(models, where, drafting),
            max_batch_size=max_batch_size,
            max_model_len=max_model_len,
            max_queue=max_queue,
            **drafting.drafting,
            prefill_chunk=prefill_chunk,
            prefix_cache=prefix_cache,
        )
        app = create_app(engine, settings)
    print(f"serving {settings.model_names[0]} on http://{host}:{port}", file=sys.stderr)
    run(app, engine, host=host, port=port, drain_timeout=drain_timeout, log_level=log_level)


def _own_name(models: ModelOptions) -> str:
    """What the model is called where nobody says otherwise."""
    return f"specproxy-{models.task}" if models.task is not None else Path(str(models.base)).name
