"""An analysis as one HTML file that asks nothing of any host. Knows the record, nothing of models.

The page's frame, style and script stand in `pages/analysis.html`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from specproxy.plots import analysis_charts

__all__ = ["analysis_page"]

_FRAME = Path(__file__).parent / "pages" / "analysis.html"
_OF_TOKEN = ("kind", "source", "kl", "log_ratio", "base", "target")


def analysis_page(record: Mapping[str, Any]) -> str:
    """The page.

    Args:
        record: `Analysis.to_dict()`.
    """
    data = [[{name: token[name] for name in _OF_TOKEN} for token in text["tokens"]] for text in record["texts"]]
    parts = {
        "SUMMARY": _summary(record),
        "FIGURES": "".join(map(_figure, *zip(*analysis_charts(record).items(), strict=True))),
        "TABLES": _kinds(record["by_kind"])
        + _moved("promoted most", record["promoted"])
        + _moved("demoted most", record["demoted"]),
        "TEXTS": "".join(_text(number, text) for number, text in enumerate(record["texts"])),
        # The only thing that could end a script's element early is its end tag.
        "DATA": json.dumps(data).replace("<", "\\u003c"),
    }
    page = _FRAME.read_text(encoding="utf-8")
    pieces = page.split("@@")  # frame and names in turn; what is put in is never searched
    return "".join(parts[piece] if i % 2 else piece for i, piece in enumerate(pieces))


def _summary(record: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in record["settings"].items())
    findings = "".join(f"<li>{escape(line)}</li>" for line in record["findings"])
    return f"<p>Greedy texts: {escape(settings)}.</p><ul id='findings'>{findings}</ul>"


def _figure(title: str, png: bytes) -> str:
    source = base64.b64encode(png).decode("ascii")
    name = escape(title)
    return f'<figure><figcaption>{name}</figcaption><img alt="{name}" src="data:image/png;base64,{source}"></figure>'


def _kinds(kinds: Mapping[str, Mapping[str, Any]]) -> str:
    rows = "".join(
        f"<tr><td>{escape(kind)}</td><td>{part['count']}</td><td>{part['departures']:.1%}</td>"
        f"<td>{part['kl']:.3f}</td><td>{part['drafted']:.1%}</td></tr>"
        for kind, part in kinds.items()
    )
    head = "".join(f"<th>{name}</th>" for name in ("kind", "tokens", "depart", "KL", "from drafts"))
    return f"<table><tr>{head}</tr>{rows}</table>"


def _moved(title: str, tokens: Sequence[Sequence[Any]]) -> str:
    rows = "".join(f"<tr><td><code>{escape(repr(text))}</code></td><td>{by:+.2f}</td></tr>" for text, by in tokens)
    return f"<table><tr><th>{title}</th><th>probability, summed</th></tr>{rows}</table>"


def _text(number: int, text: Mapping[str, Any]) -> str:
    spans = "".join(
        f'<span class="token {token["source"]}{" departs" if token["departs"] else ""}" tabindex="0" '
        f'data-text="{number}" data-token="{i}">{escape(token["text"])}</span>'
        for i, token in enumerate(text["tokens"])
    )
    return f'<div class="text"><span class="prompt">{escape(text["prompt"])}</span>{spans}</div>'
