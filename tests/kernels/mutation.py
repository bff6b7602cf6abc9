"""Runs the packages with one deliberate fault in their source, without touching a file.

`mutated` imports `specproxy_kernels` and `specproxy` afresh, with one substring of one module replaced in memory, and
puts the unmutated modules back on exit. The substring must occur exactly once: a refactor cannot disarm a mutant
unnoticed.
"""

from __future__ import annotations

import linecache
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from transformers import AttentionInterface

_PACKAGES = ("specproxy", "specproxy_kernels")


@dataclass(frozen=True)
class Mutant:
    """A named fault: in `module`, `old` (exactly one occurrence) becomes `new`."""

    name: str
    module: str
    old: str
    new: str

    def __str__(self) -> str:
        return self.name


class _Loader(SourceFileLoader):
    def __init__(self, mutant: Mutant, path: str) -> None:
        super().__init__(mutant.module, path)
        self.mutant = mutant

    def get_code(self, fullname: str) -> CodeType:
        source = Path(self.path).read_text(encoding="utf-8")
        found = source.count(self.mutant.old)
        assert found == 1, f"{self.mutant.name}: {self.mutant.old!r} occurs {found} times in {fullname}"
        # Triton reads the source of its functions again, by the name that the code object bears.
        name = f"<{fullname} with {self.mutant.name}>"
        faulty = source.replace(self.mutant.old, self.mutant.new)
        linecache.cache[name] = (len(faulty), None, faulty.splitlines(keepends=True), name)
        return compile(faulty, name, "exec")


class _Finder(MetaPathFinder):
    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant
        self.used = False

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if fullname != self.mutant.module:
            return None
        spec = PathFinder.find_spec(fullname, path)
        assert spec is not None and spec.origin is not None
        self.used = True
        return ModuleSpec(
            fullname, _Loader(self.mutant, spec.origin), origin=spec.origin, is_package=spec.submodule_search_locations
        )


def _take_out() -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name.partition(".")[0] in _PACKAGES]
    return {name: sys.modules.pop(name) for name in names}


@contextmanager
def mutated(mutant: Mutant | None) -> Iterator[None]:
    """Within the context, imports of the two packages give fresh copies that hold the fault; None: no fault."""
    kept = _take_out()
    registered = dict(AttentionInterface._global_mapping)
    finder = None if mutant is None else _Finder(mutant)
    if finder is not None:
        sys.meta_path.insert(0, finder)
    try:
        yield
        assert finder is None or finder.used, f"{mutant}: {finder.mutant.module} was never imported"
    finally:
        if finder is not None:
            sys.meta_path.remove(finder)
        _take_out()
        sys.modules.update(kept)
        AttentionInterface._global_mapping.clear()
        AttentionInterface._global_mapping.update(registered)
