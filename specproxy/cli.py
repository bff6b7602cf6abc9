"""The command line: finds the command, and turns its errors into one line.

The result goes to standard output, everything else to standard error. Knows nothing of models.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import torch
import typer
from typer.exceptions import TyperException

from specproxy.commands.analyze import analyze
from specproxy.commands.arguments import grouped
from specproxy.commands.chat import chat
from specproxy.commands.check import check
from specproxy.commands.compare import compare_models
from specproxy.commands.eval import evaluate
from specproxy.commands.generate import generate
from specproxy.commands.serve import serve
from specproxy.commands.vllm_config import vllm_config
from specproxy.errors import SpecProxyError
from specproxy.version import __version__

__all__ = ["app", "main"]

EXIT_ERROR = 2

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
for _command in (generate, chat, check, serve, vllm_config, analyze):
    app.command()(grouped(_command))
app.command("compare")(grouped(compare_models))
app.command("eval")(grouped(evaluate))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the program's name; None takes the process's own.

    Returns:
        The exit code: 0; 1 where `check` finds that the models do not fit; 2 after an error, which stands on standard
        error in one line.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a narrow locale must not cost the result
    if int(os.environ.get("RANK", "0")):
        # One of several processes that share a base: the first speaks for all.
        sys.stdout, sys.stderr = (open(os.devnull, "w", encoding="utf-8") for _ in range(2))  # noqa: SIM115
    try:
        code = app(args=arguments, prog_name="specproxy", standalone_mode=False)
    except (SpecProxyError, TyperException, OSError) as error:
        message = error.format_message() if isinstance(error, TyperException) else str(error)
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        return EXIT_ERROR
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
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


if __name__ == "__main__":
    sys.exit(main())
