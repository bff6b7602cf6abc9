"""The shape of the project: who imports whom, what is public, what the documents repeat. Each check is seen to fail."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Rows of modules, lowest first. A module imports from rows below its own only.
LAYERS = [
    {"specproxy_kernels.noise", "specproxy_kernels.laws"},
    {"specproxy_kernels.reference"},
    {"specproxy_kernels.fused"},
    {"specproxy_kernels.fused.laws", "specproxy_kernels.fused.noise"},
    {"specproxy_kernels.fused.rows"},
    {"specproxy_kernels.fused.filters"},
    {"specproxy_kernels.fused.arguments"},
    {"specproxy_kernels.fused.draft", "specproxy_kernels.fused.verify", "specproxy_kernels.fused.attention"},
    {"specproxy_kernels.dispatch"},
    {"specproxy_kernels.attention"},
    {"specproxy_kernels"},
    {
        "specproxy.errors",
        "specproxy.version",
        "specproxy.streaming",
        "specproxy.text",
        "specproxy.theory",
        "specproxy.costs",
        "specproxy.early_stop",
        "specproxy.draft.entropy",
        "specproxy.tree",
        "specproxy.grammar",
    },
    {
        "specproxy.timing",
        "specproxy.scoring",
        "specproxy.problems",
        "specproxy.nodes",
        "specproxy.suffix",
        "specproxy.forecast",
    },
    {
        "specproxy.graphs",
        "specproxy.config",
        "specproxy.cache",
        "specproxy.vocab",
        "specproxy.stats",
        "specproxy.ranks",
    },
    {"specproxy.packed", "specproxy.adapters", "specproxy.structured"},
    {
        "specproxy.attention",
        "specproxy.warp",
        "specproxy.policy",
        "specproxy.processors",
        "specproxy.schedule",
    },
    {"specproxy.row"},
    {"specproxy.state", "specproxy.options", "specproxy.cycle_times"},
    {"specproxy.runner", "specproxy.auto"},
    {"specproxy.packed_runner"},
    {"specproxy.trio"},
    {"specproxy.batches", "specproxy.pretrained"},
    {
        "specproxy.draft.expert",
        "specproxy.draft.interface",
        "specproxy.draft.lookup",
        "specproxy.draft.tree",
        "specproxy.verify",
    },
    {"specproxy.draft.assistant", "specproxy.draft.cascade"},
    {"specproxy.draft", "specproxy.walk"},
    {"specproxy.accept"},
    {"specproxy.decode", "specproxy.rows"},
    {"specproxy.generate", "specproxy.demo"},
    {"specproxy.chat"},
    {"specproxy.model"},
    {"specproxy.engine.handle", "specproxy.engine.prefixes", "specproxy.engine.status"},
    {"specproxy.engine.logprobs"},
    {"specproxy.engine.requests"},
    {"specproxy.engine.queue", "specproxy.engine.windows", "specproxy.engine.prompts"},
    {"specproxy.engine.scheduler"},
    {"specproxy.engine.engine"},
    {"specproxy.engine"},
    {"specproxy.plots"},
    {"specproxy.analysis", "specproxy.analysis_page", "specproxy.comparison"},
    {"specproxy.integrations", "specproxy.check"},
    {"specproxy.integrations.transformers", "specproxy.integrations.vllm.composite"},
    {"specproxy.integrations.vllm.roles"},
    {"specproxy.integrations.vllm.model", "specproxy.integrations.vllm"},
    {"specproxy.integrations.lm_eval.model", "specproxy.integrations.lm_eval.data"},
    {"specproxy.integrations.lm_eval.run", "specproxy.tasks.utils"},
    {"specproxy.integrations.lm_eval"},
    {"specproxy"},
    {"specproxy.server.wire", "specproxy.server.settings", "specproxy.server.logs", "specproxy.server.metrics"},
    {
        "specproxy.server.errors",
        "specproxy.server.logprobs",
        "specproxy.server.playground",
        "specproxy.server.streams",
    },
    {"specproxy.server.grammars"},
    {"specproxy.server.service", "specproxy.server.gate"},
    {"specproxy.server.follow"},
    {"specproxy.server.answers"},
    {"specproxy.server.routes"},
    {"specproxy.server.app", "specproxy.server.run"},
    {"specproxy.server"},
    {"specproxy.integrations.ray_serve.options"},
    {"specproxy.integrations.ray_serve.replica"},
    {"specproxy.integrations.ray_serve"},
    # The function that Transformers loads from its folder: outside the package's own imports.
    {"specproxy.integrations.hub.custom_generate.generate", "specproxy.commands"},
    {"specproxy.commands.arguments", "specproxy.commands.report"},
    {"specproxy.commands.loading"},
    {
        "specproxy.commands.generate",
        "specproxy.commands.chat",
        "specproxy.commands.check",
        "specproxy.commands.eval",
        "specproxy.commands.analyze",
        "specproxy.commands.compare",
        "specproxy.commands.vllm_config",
    },
    {"specproxy.commands.serve"},
    {"specproxy.cli"},
    {"specproxy.__main__"},
]
EXTRAS = {
    "peft",
    *("lm_eval", "datasets", "yaml", "matplotlib"),  # lm_eval brings two of them
    *(
        "fastapi",
        "starlette",
        "pydantic",
        "uvicorn",
        "openai",
        "prometheus_client",
        "llguidance",
    ),  # fastapi brings two of them
}
ENGINES = {"vllm", "ray"}  # in environments of their own
# What each package may import beside the standard library and itself.
OUTSIDE = {
    "specproxy_kernels": {"torch", "triton"},
    "specproxy": {
        "specproxy_kernels",
        "torch",
        "transformers",
        "numpy",
        "safetensors",
        "jinja2",
        "typer",
        "rich",
        *ENGINES,
        *EXTRAS,
    },
}
PUBLIC = {
    "AlphaSchedule",
    "ConfigurationError",
    "Engine",
    "EngineClosed",
    "EngineFull",
    "GraphCaptureError",
    "LogitsError",
    "LookupCorpus",
    "PromptError",
    "ProxyTunedModel",
    "RowStreamer",
    "SpecProxyError",
    "SpeculationStats",
    "UnsupportedModelError",
    "VocabularyError",
    "__version__",
    "custom_generate",
}
FORBIDDEN = {
    "a path of one machine": r"(?<![\w.$}])/(?:root|work|opt|tmp|mnt|home/\w+|Users/\w+)/\w",
    "the host of a package registry": r"\b(?:pypi\.org|pythonhosted\.org|registry\.\w+\.\w+)",
    "work left open": r"\b(?:TO" r"DO|FIX" r"ME|X" r"XX)\b",
    "a merge conflict": r"^(?:<{7}|>{7}) ",
}


# The checks: each returns what is wrong, a line per finding.


def module_sources() -> dict[str, str]:
    """Source by module name, for both packages."""
    sources = {}
    for package, folder in (
        ("specproxy", ROOT / "specproxy"),
        ("specproxy_kernels", ROOT / "kernels/specproxy_kernels"),
    ):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *(part for part in parts if part != "__init__")))
            sources[name] = path.read_text(encoding="utf-8")
    return sources


def imported_modules(module: str, source: str, modules: Iterable[str]) -> set[str]:
    """Every module that `source` names in an import, wherever it stands; relative ones resolved.

    `from package import name` counts as the module `package.name` where there is one, as `package` otherwise.
    """
    modules = set(modules)
    is_package = any(name.startswith(f"{module}.") for name in modules)
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: None if is_package and node.level == 1 else -node.level + is_package]
                base = ".".join([*parents, *([base] if base else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.add(full if full in modules else base)
    return found


def import_faults(sources: dict[str, str], layers: list[set[str]], outside: dict[str, set[str]]) -> list[str]:
    """Imports that run sideways, upward or outside, modules without a row, rows with a module that is not there."""
    row = {name: number for number, names in enumerate(layers) for name in names}
    faults = [f"{name} has no row" for name in sources if name not in row]
    faults += [f"{name} has a row and no file" for name in row if name not in sources]
    for module, source in sources.items():
        own = module.partition(".")[0]
        for target in sorted(imported_modules(module, source, row)):
            package = target.partition(".")[0]
            if package != own and package not in outside[own] | sys.stdlib_module_names:
                faults.append(f"{module} imports {target}, which is outside")
            elif target in row and row[target] >= row.get(module, 0):
                faults.append(f"{module} imports {target}, which is not below it")
            elif package == own and target not in row:
                faults.append(f"{module} imports {target}, which has no row")
    return faults


def public_faults(module: ModuleType) -> list[str]:
    """Names listed and absent, public and unlisted, or without a docstring of their own."""
    listed = list(module.__all__)
    faults = [f"{name} is listed twice" for name in set(listed) if listed.count(name) > 1]
    for name in listed:
        value = getattr(module, name, None)
        if value is None:
            faults.append(f"{name} is listed and cannot be imported")
        elif (inspect.isclass(value) or inspect.isroutine(value)) and not (value.__doc__ or "").strip():
            faults.append(f"{name} has no docstring")
    present = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not inspect.ismodule(value) and name != "annotations"
    }
    return faults + [f"{name} is public and not listed" for name in sorted(present - set(listed))]


def docstring_faults(module: str, source: str) -> list[str]:
    """The module itself, and its public functions, classes and their public methods, without a docstring."""
    tree = ast.parse(source)
    faults = [] if ast.get_docstring(tree) else [f"{module} has no docstring"]

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith(
                "_"
            ):
                if not ast.get_docstring(node):
                    faults.append(f"{prefix}{node.name} has no docstring")
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{prefix}{node.name}.")

    visit(tree.body, f"{module}.")
    return faults


def command_faults(readme: str, ci: str) -> list[str]:
    """README's command for the tests stands in .ci/run word for word, and so does what its other command runs."""
    commands = re.findall(r"^python3\.11 -m venv .*$", readme, flags=re.MULTILINE)
    tests = [command for command in commands if command.endswith("/pytest")]
    others = [command for command in commands if command not in tests]
    lines = [line.removesuffix(" || exit") for line in ci.splitlines()]
    faults = []
    if len(tests) != 1 or len(others) != 1:
        faults.append(f"README.md holds {len(tests)} test commands and {len(others)} others; one of each is meant")
    faults += [f".ci/run does not run: {command}" for command in tests if command not in lines]
    faults += [f".ci/run does not run: {run}" for run in (c.split(" && ")[-1] for c in others) if run not in lines]
    return faults


def table_faults(layout: str, sources: Iterable[str]) -> list[str]:
    """Modules that the page on the layout does not name."""
    files = {name.split(".")[1] for name in sources if name.startswith("specproxy.") and not name.endswith("__")}
    return [
        f"development.md does not name {name}"
        for name in sorted(files)
        if not re.search(rf"`[\w/]*{name}(\.py|/)`", layout)
    ]


def word_faults(name: str, text: str) -> list[str]:
    """Lines of a file that hold something forbidden."""
    return [
        f"{name}:{number}: {what}"
        for number, line in enumerate(text.splitlines(), start=1)
        for what, pattern in FORBIDDEN.items()
        if re.search(pattern, line)
    ]


def tracked_files() -> list[Path]:
    """Text files under version control, or of a source archive; model files are data."""
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode == 0:
        paths = [ROOT / line for line in listing.stdout.splitlines()]
    else:
        folders = (ROOT / name for name in ("specproxy", "kernels", "tests", "benchmarks", "training"))
        paths = [*ROOT.glob("*.*"), *(path for folder in folders for path in folder.rglob("*.*"))]
    texts = {".py", ".md", ".toml", ".txt", ".in", ".cfg", ".yml", ".sh", ""}
    return [path for path in paths if path.suffix in texts and path.is_file()]


# The project passes.


def test_imports_run_downward_only() -> None:
    assert import_faults(module_sources(), LAYERS, OUTSIDE) == []


@pytest.mark.parametrize("name", ["specproxy", "specproxy_kernels"])
def test_public_names_are_exact(name: str) -> None:
    assert public_faults(importlib.import_module(name)) == []


def test_public_names_are_those_promised() -> None:
    import specproxy

    assert set(specproxy.__all__) == PUBLIC
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    assert [name for name in PUBLIC if name not in text] == []


def test_everything_public_has_a_docstring() -> None:
    assert [fault for name, source in module_sources().items() for fault in docstring_faults(name, source)] == []


def test_no_module_named_kernels() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "kernels.py").exists()
    spec = importlib.util.find_spec("kernels")
    # The folder may be seen as a namespace portion where the root is on the path, which any real package overrides.
    assert spec is None or spec.origin is None or not Path(spec.origin).is_relative_to(ROOT)


def test_documents_and_ci_agree() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert command_faults(readme, (ROOT / ".ci" / "run").read_text(encoding="utf-8")) == []
    layout = (ROOT / "docs" / "development.md").read_text(encoding="utf-8")
    assert table_faults(layout, module_sources()) == []


def test_constraints_pin_every_requirement() -> None:
    required = re.findall(
        r'^\s+"([a-z][a-z\d-]*)(?:[>=<][>=<,\d.]+)?",', (ROOT / "setup.py").read_text(encoding="utf-8"), re.MULTILINE
    )
    pinned = re.findall(r"^([\w.-]+)==[\w.]+$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"torch", "transformers", "typer"} <= set(required)
    assert set(required) - {name.lower() for name in pinned} == set()
    assert "triton" in pinned  # its requirement carries a marker, which the pattern above leaves out


def test_ci_script_is_sound() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(script)], check=True)
    for command in re.findall(r"^python3\.11 .*$", script.read_text(encoding="utf-8"), flags=re.MULTILINE):
        assert shlex.split(command)[-2:] == ["||", "exit"]  # `set -e` does not see a failure inside a && list


def test_no_forbidden_words() -> None:
    faults = []
    for path in tracked_files():
        faults += word_faults(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))
    assert faults == []


# The checks fail where they should.


def small_project(**changes: str) -> list[str]:
    sources = {"low": "import torch", "low.a": "", "high": "", "high.b": "import low", "high.c": ""}
    sources |= {name.replace("__", "."): source for name, source in changes.items()}
    layers = [{"low.a"}, {"low"}, {"high.b", "high.c"}, {"high"}]
    return import_faults(sources, layers, {"low": {"torch"}, "high": {"low", "torch"}})


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"high__b": "from low.a import x"}, None),
        ({"high": "from . import b"}, None),
        ({"high": "from .b import x"}, None),
        ({"low__a": "import low"}, "low.a imports low, which is not below it"),
        ({"high__b": "from high import c"}, "high.b imports high.c, which is not below it"),
        ({"high__b": "from . import c"}, "high.b imports high.c, which is not below it"),
        ({"high__b": "from .c import x"}, "high.b imports high.c, which is not below it"),
        ({"high__b": "from high import x"}, "high.b imports high, which is not below it"),
        ({"high__b": "def f():\n    import high.c"}, "high.b imports high.c, which is not below it"),
        ({"low": "import high.b"}, "low imports high.b, which is outside"),
        ({"low": "import numpy"}, "low imports numpy, which is outside"),
        ({"high__b": "from transformers.utils import x"}, "high.b imports transformers.utils, which is outside"),
        ({"high__b": "import high.d"}, "high.b imports high.d, which has no row"),
        ({"high__d": ""}, "high.d has no row"),
    ],
)
def test_import_check_fails_where_it_should(changes: dict[str, str], fault: str | None) -> None:
    faults = small_project(**changes)
    assert fault in faults if fault else faults == []


def test_import_check_misses_no_file() -> None:
    assert import_faults({}, [{"gone"}], {}) == ["gone has a row and no file"]


def test_public_check_fails_where_it_should() -> None:
    module = ModuleType("example")
    exec(
        textwrap.dedent(
            """
            import os
            __all__ = ["good", "bare", "absent", "good"]
            def good(): "Documented."
            def bare(): ...
            def unlisted(): "Documented."
            def _private(): ...
            """
        ),
        vars(module),
    )
    assert public_faults(module) == [
        "good is listed twice",
        "bare has no docstring",
        "absent is listed and cannot be imported",
        "unlisted is public and not listed",
    ]


def test_docstring_check_fails_where_it_should() -> None:
    source = "def f(): ...\ndef _g(): ...\nclass A:\n    'Text.'\n    def method(self): ...\n    def _own(self): ...\n"
    assert docstring_faults("m", source) == [
        "m has no docstring",
        "m.f has no docstring",
        "m.A.method has no docstring",
    ]


def test_command_check_fails_where_it_should() -> None:
    run, test = "python3.11 -m venv .venv && .venv/bin/tool go", "python3.11 -m venv .venv && .venv/bin/pytest"
    assert command_faults(f"{run}\n{test}\n", f"{test} || exit\n.venv/bin/tool go\n") == []
    assert command_faults(f"{run}\n{test}\n", f"{test} -q\n.venv/bin/tool go\n") == [f".ci/run does not run: {test}"]
    assert command_faults(f"{run}\n{test}\n", f"{test}\n") == [".ci/run does not run: .venv/bin/tool go"]
    assert command_faults(run, ".venv/bin/tool go")[0].startswith("README.md holds 0 test commands")
    assert table_faults("`specproxy/a.py`", ["specproxy", "specproxy.a", "specproxy.b"]) == [
        "development.md does not name b"
    ]


@pytest.mark.parametrize(
    "line",
    ["see " + "/ro" + "ot/x", "'/ho" + "me/someone/x'", "at py" + "pi.org", "# TO" + "DO later", "<" * 7 + " HEAD"],
)
def test_word_check_fails_where_it_should(line: str) -> None:
    assert len(word_faults("file", f"fine\n{line}\n")) == 1


@pytest.mark.parametrize(
    "line", ["a/wo" + "rk/b", "$TMP/t" + "mp/x", "the wo" + "rk is done", "/dev/null", "arXiv 2401.08565"]
)
def test_word_check_lets_the_rest_pass(line: str) -> None:
    assert word_faults("file", line) == []
