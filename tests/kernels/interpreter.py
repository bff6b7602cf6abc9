"""Makes Triton's interpreter several times faster for deeply nested device functions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest


@contextmanager
def quick_interpreter() -> Iterator[None]:
    """Within the context, `triton.language` is patched once per launch and source file, not at every device function.

    The interpreter patches the language's modules before a kernel and before each call of a device function, though
    they share those modules; the repetition takes most of its time.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    patched: set[int] = set()

    class Scope:
        def __init__(self, scope: Any) -> None:
            self.scope = scope

        def restore(self) -> None:
            patched.clear()
            self.scope.restore()

    def patch_once(fn: Any) -> Scope | None:
        modules = {id(value) for value in fn.__globals__.values() if isinstance(value, ModuleType)}
        if modules <= patched:
            return None
        patched.update(modules)
        return Scope(patch(fn))

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
        yield
