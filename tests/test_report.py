"""The project's report: its page from recorded runs, the figures of several seeds, and what it measures by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.page import draw, headline, page
from benchmarks.report import CLOSING, OPENING, write_headline, write_report
from specproxy import ProxyTunedModel
from specproxy.problems import held_out
from training import seeds
from training.evaluate import answers
from training.laws import Law
from training.seeds import choose_alpha, summarised

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def record() -> dict[str, Any]:
    """Of `python benchmarks/report.py --quick`, on a busy machine."""
    done: dict[str, Any] = json.loads((ROOT / "tests/records/quick_report.json").read_text())
    return done


def tuning(*solved: tuple[int, int, int], base: int = 0, problems: int = 100) -> dict[str, Any]:
    """A record of `training.seeds` in which expert, proxy-tuned law and tuned base solve the first so many problems."""

    def bits(count: int) -> dict[str, str]:
        text = "1" * count + "0" * (problems - count)
        return {"strict": text, "lenient": text}

    rows = {
        str(seed): {"alpha": 1.5, "validation": {"1.5": 0.4}, **dict(zip(seeds.TUNED, map(bits, counts), strict=True))}
        for seed, counts in enumerate(solved)
    }
    made: dict[str, Any] = {"num_test": problems, "num_validation": 20, "recipe": "As told.", "seeds": rows}
    made["base"] = bits(base)
    made["summary"] = summarised(made)
    return made


def test_figures_of_seeds() -> None:
    summary = tuning((10, 40, 60), (14, 50, 60), base=10)["summary"]["strict"]
    assert summary["base"]["value"] == 0.1
    assert summary["seeds"]["1"]["over_expert"]["value"] == pytest.approx(0.36)
    assert summary["seeds"]["1"]["gap_closed"]["value"] == pytest.approx(0.8)
    pooled = summary["pooled"]
    assert pooled["proxy-tuned"]["value"] == pytest.approx(0.45)
    assert pooled["gap_closed"]["value"] == pytest.approx(0.7)
    assert pooled["gap_closed"]["low"] < 0.6 < 0.8 < pooled["gap_closed"]["high"]
    assert pooled["gap_closed_by_expert"]["value"] == pytest.approx(0.04)


def test_alpha_is_the_best_on_validation_and_the_least_of_equals(monkeypatch: pytest.MonkeyPatch) -> None:
    right = {1.0: "1000", 1.25: "1100", 1.5: "0110", 1.75: "1000", 2.0: "0000", 2.5: "0000"}
    models: Any = "base", "expert", "anti-expert"
    monkeypatch.setattr(Law, "proxy", staticmethod(lambda base, expert, anti_expert, alpha: alpha))
    monkeypatch.setattr(seeds, "solve", lambda law, tokenizer, problems: {"strict": right[law]})
    alpha, solved = choose_alpha(*models, None, [])  # type: ignore[arg-type]
    assert alpha == 1.25 and solved["1.5"] == 0.5


def test_a_record_is_continued(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Laws are stood in for by names; every one is asked once, whatever number of calls it takes."""
    asked = []

    def solve(law: str, tokenizer: None, problems: list[Any]) -> dict[str, str]:
        asked.append(law)
        right = {"base": "0000", "expert": "1000", "proxy-tuned": "1110", "tuned-base": "1111"}[law]
        return {"strict": right, "lenient": right}

    monkeypatch.setattr(seeds, "solve", solve)
    monkeypatch.setattr(seeds, "load_tokenizer", lambda folder: None)
    monkeypatch.setattr(seeds, "load_models", lambda folder: {"base": "base", "anti-expert": ""})
    monkeypatch.setattr(
        seeds,
        "load_checkpoint",
        lambda path, shape: {"expert-7.pt": "expert", "tuned-base-7.pt": "tuned-base"}[path.name],
    )
    monkeypatch.setattr(seeds, "choose_alpha", lambda *models: (2.0, {"2.0": 0.5}))
    monkeypatch.setattr(Law, "of", staticmethod(lambda model: model))
    monkeypatch.setattr(Law, "proxy", staticmethod(lambda *models: "proxy-tuned"))
    path = tmp_path / "trio.json"

    def call(*more: str) -> dict[str, Any]:
        given = ["seeds", "--seeds", "7", "--problems", "4", "--validation", "2", "--out", str(path), *more]
        monkeypatch.setattr("sys.argv", given)
        seeds.main()
        done: dict[str, Any] = json.loads(path.read_text())
        return done

    partial = call("--laws", "expert", "proxy-tuned")["summary"]["strict"]["pooled"]
    assert partial["over_expert"]["value"] == 0.5 and not {"tuned-base", "gap_closed"} & set(partial)
    done = call()
    assert asked == ["base", "expert", "proxy-tuned", "tuned-base"]
    assert done["seeds"]["7"]["alpha"] == 2.0
    assert done["summary"]["strict"]["pooled"]["gap_closed"]["value"] == 0.75
    with pytest.raises(ValueError, match="other numbers of problems"):
        call("--problems", "3")


def test_the_page_tells_what_was_recorded(record: dict[str, Any]) -> None:
    text = page(record, tuning((10, 40, 60), (14, 50, 60)), {})
    ways = record["steps"]["speed arithmetic, as shipped"]["result"]["batches"][0]["decoders"]
    for name, row in ways.items():
        assert f"| `{name}` | {row['tokens_per_second']:.1f} | {row['over']['per_step']:.2f} |" in text
    assert "| proxy-tuned | 100.0 [51.0, 100.0] | 100.0 [51.0, 100.0] | 1.5 |" in text
    assert "| seed 1 | 1.5 | 14.0 [" in text
    assert "| proxy-tuned, strict | 30% | 45.0 [" in text and text.count("| yes |") >= 3
    assert "Alpha is each seed's best on 20 validation problems." in text
    assert "Python, base grown" in text and "passed" in text


def test_a_bar_that_is_missed_is_told_by_how_much() -> None:
    text = page({"steps": {}}, tuning((30, 40, 80)), {})
    assert "| over the expert alone | 20% | 10.0 [" in text
    assert "| no, by 10.0% |" in text and "| no, by 20.0% |" in text  # of the gap a half is closed
    assert text.count("| yes |") == 1


def test_seeds_whose_base_is_not_tuned_yet_are_left_out_where_it_counts() -> None:
    made = tuning((10, 40, 50), (20, 60, 50))
    del made["seeds"]["1"]["tuned-base"]
    made["summary"] = summarised(made)
    pooled = made["summary"]["strict"]["pooled"]
    assert (pooled["proxy-tuned"]["value"], pooled["proxy-tuned"]["seeds"]) == (0.5, 2)
    assert pooled["gap_closed"]["value"] == pytest.approx(0.8) and pooled["gap_closed"]["seeds"] == 1
    text = page({"steps": {}}, made, {})
    assert "| share of the gap to direct tuning closed | 70% | 80.0 [" in text and "] (1 seed) | yes |" in text


def test_the_page_of_nothing_says_so(record: dict[str, Any]) -> None:
    assert "Nothing was measured yet." in page({"steps": {}, "missing": ["speed x"]}, None, {})
    assert "- speed x: not measured" in page({"steps": {}, "missing": ["speed x"]}, None, {})
    record["steps"]["speed arithmetic, as shipped"] |= {
        "status": "error",
        "result": {},
        "faults": ["a/path", "ValueError: no"],
    }
    text = page(record, None, {})
    assert "- speed arithmetic, as shipped: ValueError: no" in text and "a/path" not in text


def test_headline_figures_are_those_of_the_grown_base(record: dict[str, Any]) -> None:
    record["steps"]["speed arithmetic, base grown"] = record["steps"].pop("speed arithmetic, as shipped")
    batch = record["steps"]["speed arithmetic, base grown"]["result"]["batches"][0]
    batch["decoders"]["draft_4_rejection"]["over"]["per_step"] = 3.21
    lines = headline(record, tuning((10, 40, 60)))
    assert len(lines) == 4
    assert "proxy-tuned 40.0 % (" in lines[0] and "closes 66.7 % (" in lines[0]
    assert "arithmetic" in lines[2] and "`draft_4_rejection` runs 3.21 times as fast" in lines[2]
    assert lines[3].startswith("- **Speed**, Python, the hard case")


@pytest.mark.parametrize(
    ("solved", "brings"), [((10, 40, 60), "right answers besides"), ((10, 6, 60), "no right answers")]
)
def test_headline_says_what_the_pair_brings(solved: tuple[int, int, int], brings: str) -> None:
    assert headline({"steps": {}}, tuning(solved))[1].endswith(f"{brings}.")


def test_charts_are_drawn_and_shown(record: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made = tuning((10, 40, 60), (14, 50, 60))
    write_report(tmp_path, record, made)
    charts = draw(tmp_path, record, made)
    assert len(charts) == 3
    text = (tmp_path / "REPORT.md").read_text()
    for name in charts.values():
        assert f"]({name})" in text
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_headline_goes_between_its_comments(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"above\n{OPENING}\nold\n{CLOSING}\nbelow\n")
    made = tuning((10, 40, 60))
    write_headline(readme, {"steps": {}}, made)
    once = readme.read_text()
    assert once == "\n".join(["above", OPENING, *headline({"steps": {}}, made), CLOSING, "below"]) + "\n"
    write_headline(readme, {"steps": {}}, made)
    assert readme.read_text() == once
    readme.write_text("no comments")
    with pytest.raises(ValueError, match="lacks the lines"):
        write_headline(readme, {"steps": {}}, made)


def test_readme_holds_the_headline_of_the_report() -> None:
    readme = (ROOT / "README.md").read_text()
    block = readme.partition(f"{OPENING}\n")[2].partition(f"\n{CLOSING}")[0]
    assert block and f"## In short\n\n{block}\n\n## " in (ROOT / "benchmarks/REPORT.md").read_text()


def test_the_runtime_answers_as_the_law_says() -> None:
    """With drafts, in a ragged batch, against the plain second statement of the law."""
    model = ProxyTunedModel.demo("arithmetic")
    prompts = [problem.prompt for problem in held_out("arithmetic", "test", 3)]
    texts, more = report.by_the_runtime(model, "proxy-tuned", prompts)
    law = Law.proxy(model.base, model.expert, model.anti_expert, model.alpha)
    assert texts == answers(law, model.tokenizer, prompts)
    assert more["alpha"] == model.alpha and 0.5 < more["acceptance_rate"] <= 1


def test_quick_figures_need_a_folder_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--quick"]) == 2
    assert capsys.readouterr().err.startswith("error: --quick yields figures without meaning")
