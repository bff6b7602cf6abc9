"""The playground: one page that tries the server it comes from, and may ask nothing of any other host.

The page stands in `pages/playground.html`. Its style and script are allowed by their digests, so that no text that a
model writes, and nothing else, could ever run as a script. Knows no route and nothing of generation.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from importlib.resources import files

from starlette.responses import HTMLResponse

__all__ = ["playground_response"]


def playground_response() -> HTMLResponse:
    """The page with the policy that holds it to its own server (https://www.w3.org/TR/CSP3/)."""
    page, policy = _page()
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return HTMLResponse(page, headers=headers)


@functools.cache
def _page() -> tuple[str, str]:
    """The page and its policy."""
    page = (files("specproxy") / "pages" / "playground.html").read_text(encoding="utf-8")
    policy = "; ".join(
        (
            "default-src 'none'",
            f"style-src {_digests(page, 'style')}",
            f"script-src {_digests(page, 'script')}",
            "connect-src 'self'",
            "img-src data:",  # the empty icon, without which a browser asks for one
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )
    return page, policy


def _digests(page: str, element: str) -> str:
    contents = re.findall(rf"<{element}>(.*?)</{element}>", page, flags=re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in contents]
    return " ".join(f"'sha256-{digest}'" for digest in digests)
