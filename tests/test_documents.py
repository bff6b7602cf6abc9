"""What README.md and the pages under docs/ show: the examples run, and nothing that they ought to name is missing."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from specproxy import cli, options
from specproxy.model import ProxyTunedModel

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", *(f"docs/{name}.md" for name in ("generate", "drafting", "engine")))
"""Pages whose examples run here, on a tiny random trio; those of other pages run beside what they show."""
TEXT = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_runs(tiny_demo: Any, demo_folder: Path, capsys: pytest.CaptureFixture[str], number: int) -> None:
    example = EXAMPLES[number]
    for placeholder, name in (("large-base", "base"), ("small-tuned", "expert-python"), ("small-base", "anti-expert")):
        example = example.replace(f"path/or/name/of-{placeholder}", str(demo_folder / name))
    scope: dict[str, Any] = {}
    exec(example, scope)
    lines = capsys.readouterr().out.splitlines()
    if number == 0:
        rate, length = map(float, lines[-1].split())
        assert lines[0].startswith("Question:") and 0 <= rate <= 1 <= length <= 5
    elif "of-large-base" in EXAMPLES[number]:
        assert scope["model"].dtype == torch.bfloat16
    elif "reply" in scope:
        assert lines[-1].split()[0] == "4" and len(scope["reply"].messages) == 4
    elif "contrast" in scope:
        assert len(lines) >= 3 and scope["early"].shape == scope["away"].shape == (1, scope["ids"].shape[1] + 24)
    elif "tuned" in scope:
        assert scope["model"].expert is scope["tuned"] and len(lines) >= 1
    elif "both" in scope:
        assert len(scope["both"].generate(scope["ids"], max_new_tokens=2)) == 2
    elif "streamer" in scope:
        assert {"0 is complete", "1 is complete"} <= set(lines)
    elif "pipe" in scope:
        assert lines[-1].count("generated_text") == 2
    elif "engine" in scope:
        assert lines[-1].split()[0] in ("stop", "length")
        for prompt, handle in zip(scope["prompts"], (scope["first"], scope["second"]), strict=True):
            ids = scope["model"].tokenizer(prompt, return_tensors="pt").input_ids
            alone = scope["model"].generate(ids, max_new_tokens=32)[0, ids.shape[1] :].tolist()
            assert handle.result().tokens == alone
    elif "LookupCorpus" in example:
        accepted, same = lines[-1].split()
        assert int(accepted) > 20 and same == "True"
    elif "speculation.windows" in example:
        assert len(lines) == 1 and sum(scope["out"].speculation.windows["expert"].values()) >= 1
    elif "num_tree_tokens" in example:
        assert lines[0] == "True"
        chain, tree = map(float, lines[1].split())
        assert 1 <= chain < tree <= 5
    elif "cuda_graphs" in example:
        captured = scope["model"].generate(scope["ids"], max_new_tokens=32, num_draft_tokens=4)
        assert torch.equal(scope["output"], captured)
    else:
        trio, out = scope["trio"], scope["out"]
        arguments = {"seed": 1, "do_sample": True, "acceptance": "coupled"} if "method" in scope else {}
        arguments = arguments or {"stop_strings": ["\n\n"]}
        assert torch.equal(out, trio.generate(**scope["inputs"], max_new_tokens=48, **arguments))


def test_the_pages_have_every_kind_of_example() -> None:
    assert len(EXAMPLES) == 15
    kinds = (
        "from_pretrained",
        "chat(",
        "further_pairs",
        "AlphaSchedule",
        "num_tree_tokens",
        "corpus.add(",
        "get_peft_model",
        "RowStreamer",
        "Engine(",
        "custom_generate(",
        "pipeline(",
        "speculation.windows",
        "cuda_graphs",
    )
    for name in kinds:
        assert sum(name in example for example in EXAMPLES) == 1, name


@pytest.mark.parametrize("command", ["generate", "chat", "check"])
def test_options_of_the_commands_exist(capsys: pytest.CaptureFixture[str], command: str) -> None:
    lines = re.findall(rf"specproxy {command} .*", TEXT)
    cli.main([command, "--help"])
    out = capsys.readouterr().out
    assert len(lines) >= 1
    assert {option for line in lines for option in re.findall(r"--[a-z-]+", line)} <= set(re.findall(r"--[a-z-]+", out))


def test_the_pages_name_every_argument() -> None:
    """What is taken and what is refused, from the code that decides it."""
    names = {*options._FROM_CONFIG, *options._CALLABLES, *options._REFUSED} - {"low_memory", "synced_gpus"}
    names |= set(inspect.signature(ProxyTunedModel.generate).parameters) - {"self", "transformers_arguments"}
    assert [name for name in sorted(names - {"use_model_defaults"}) if not re.search(rf"`{name}[`=]", TEXT)] == []


def test_links_between_pages_lead_somewhere() -> None:
    """Files and headings, by the rule that GitHub makes anchors by."""

    def anchors(page: Path) -> set[str]:
        headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

    pages = [
        ROOT / "README.md",
        *(ROOT / "docs").glob("*.md"),
        *ROOT.glob("*/README.md"),
        ROOT / "benchmarks" / "REPORT.md",
    ]
    broken = []
    for page in pages:
        for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            if not file.exists() or (anchor and anchor not in anchors(file)):
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []
