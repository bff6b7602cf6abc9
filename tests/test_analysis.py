"""The analysis against computations by hand, and its page as a browser shows it."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import Browser

from specproxy import ProxyTunedModel, cli
from specproxy.analysis import EARLY, Analysis, CutOff, TextRecord, TokenRecord, analyse, repetition, token_kind
from specproxy.errors import ConfigurationError
from specproxy.text import split_tokens

PROMPTS = [
    "Question: Ben has 52 coins and loses 36. How many coins does Ben have?\nAnswer:",
    "Question: What is 12 + 9?\n",
]


@pytest.fixture(scope="module")
def model() -> ProxyTunedModel:
    return ProxyTunedModel.demo("arithmetic", dtype=torch.float64)


@pytest.fixture(scope="module")
def analysis(model: ProxyTunedModel) -> Analysis:
    return analyse(
        model,
        PROMPTS,
        lambda ids: split_tokens(model.tokenizer, ids),
        max_new_tokens=20,
        num_draft_tokens=3,
        cutoffs=[0, 6],
        cutoff_tokens=14,
    )


def test_repetition() -> None:
    assert repetition([1, 2, 3]) == 0.0
    assert repetition(list(range(9))) == 0.0
    assert repetition([7] * 13) == pytest.approx(0.9)
    assert repetition([1, 2] * 4, size=2) == pytest.approx(1 - 2 / 7)


@pytest.mark.parametrize(
    ("text", "kind"),
    [(" 12", "number"), ("a", "word"), ("x1", "number"), (" ).", "punctuation"), ("\n", "line"), (" ", "space"),
     ("", "other"), ("€", "other")],
)  # fmt: skip
def test_kinds(text: str, kind: str) -> None:
    assert token_kind(text) == kind


def test_tokens_are_those_of_generate_and_laws_those_of_forwards(model: ProxyTunedModel, analysis: Analysis) -> None:
    moved = torch.zeros(model.vocab_size, dtype=torch.float64)
    for prompt, text in zip(PROMPTS, analysis.texts, strict=True):
        ids = model.tokenizer(prompt, return_tensors="pt").input_ids
        out: Any = model.generate(ids, max_new_tokens=20, num_draft_tokens=3, return_dict_in_generate=True)
        new = [i for i in out.sequences[0, ids.shape[1] :].tolist() if i != model.tokenizer.eos_token_id]
        assert "".join(token.text for token in text.tokens) == model.tokenizer.decode(new)
        assert [token.source for token in text.tokens] == out.speculation.token_sources[0][: len(new)]
        whole = torch.cat([ids, torch.tensor([new])], dim=1)
        with torch.no_grad():
            base = model.base(whole).logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
            target = model.forward(whole).logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
        moved += (target.exp() - base.exp()).sum(0)
        for t, token in enumerate(text.tokens):
            assert token.kl == pytest.approx(float((target[t].exp() * (target[t] - base[t])).sum()), abs=1e-9)
            assert token.log_ratio == pytest.approx(float(target[t, new[t]] - base[t, new[t]]), abs=1e-9)
            best = int(base[t].argmax())
            assert token.departs == (best != new[t])
            assert token.base[0] == (
                model.tokenizer.decode([int(base[t].argmax())]),
                pytest.approx(base[t].exp().max()),
            )
            assert token.target[0] == (model.tokenizer.decode([new[t]]), pytest.approx(float(target[t].exp().max())))
            assert len(token.base) == len(token.target) == 5
    most = int(moved.argmax())
    assert analysis.promoted[0] == (model.tokenizer.decode([most]), pytest.approx(float(moved[most])))
    least = int(moved.argmin())
    assert analysis.demoted[0] == (model.tokenizer.decode([least]), pytest.approx(float(moved[least])))
    assert sum(analysis.drafted_per_position) > 0 and len(analysis.drafted_per_position) == 3


def test_cut_off_is_the_base_after_so_many_tokens(model: ProxyTunedModel, analysis: Analysis) -> None:
    never = analysis.cutoffs[-1]
    assert [cut.cutoff for cut in analysis.cutoffs] == [0, 6, None]
    for i, prompt in enumerate(PROMPTS):
        ids = model.tokenizer(prompt, return_tensors="pt").input_ids
        for cut in analysis.cutoffs[:2]:
            whole = ids
            if cut.cutoff:
                whole = model.generate(ids, max_new_tokens=cut.cutoff, num_draft_tokens=0)
            if whole[0, -1] != model.tokenizer.eos_token_id:
                rest = 14 - (cut.cutoff or 0)
                whole = model.generate(whole, max_new_tokens=rest, alpha=0.0, num_draft_tokens=0)
            row = whole[0, ids.shape[1] :].tolist()
            assert cut.lengths[i] == len(row)
            assert cut.repetition[i] == pytest.approx(repetition(row))
            assert cut.endless[i] == (model.tokenizer.eos_token_id not in row)
        assert never.lengths[i] <= 14


def test_summaries_and_findings() -> None:
    def token(departs: bool, kl: float, kind: str = "word") -> TokenRecord:
        return TokenRecord("a", "draft", kind, departs, kl, 0.0, [], [])

    texts = [TextRecord("", [token(True, 2.0 + i)] * EARLY + [token(False, 0.5, "number")] * (4 + i)) for i in range(4)]
    cuts = [
        CutOff(8, [0.5, 0.6, 0.7, 0.8], [9] * 4, [True] * 4),
        CutOff(None, [0.1, 0.1, 0.2, 0.2], [9] * 4, [False] * 4),
    ]
    analysis = Analysis(texts, [], [], [], [], cuts, {})
    rows = analysis.by_position()
    assert len(rows) == EARLY + 7 and rows[0]["departures"] == 1.0 and rows[-1] == {
        "position": EARLY + 6, "count": 1, "departures": 0.0, "kl": 0.5, "drafted": 1.0,
    }  # fmt: skip
    assert analysis.by_kind()["number"]["count"] == 4 * 4 + 6
    first, second = analysis.findings()
    assert "changed most: shown" in first and "without end: shown" in second
    assert "65.0" in second and "100 [100, 100] % of texts never end" in second
    unchanged = Analysis(
        texts[:1], [], [], [], [], [CutOff(8, [0.1], [9], [True]), CutOff(None, [0.1], [9], [True])], {}
    )
    assert "without end: not shown" in unchanged.findings()[1]
    still_ends = [CutOff(8, cuts[0].repetition, [9] * 4, [False] * 4), cuts[1]]
    assert "without end: in part" in Analysis(texts, [], [], [], [], still_ends, {}).findings()[1]
    flat = Analysis([TextRecord("", [token(True, 1.0)] * 9)], [], [], [], [], [], {})
    assert "changed most: not shown" in flat.findings()[0] and len(flat.findings()) == 1


def test_no_prompts(model: ProxyTunedModel) -> None:
    with pytest.raises(ConfigurationError, match="prompts is empty"):
        analyse(model, [], lambda ids: [])


def test_page_in_a_browser(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, page, out, plots = (tmp_path / name for name in ("p.jsonl", "page.html", "out.json", "plots"))
    texts = [*PROMPTS, "</script><b id='alien'>&amp; @@DATA@@ 12 + 9 ="]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    code = cli.main(
        ["analyze", f"--prompts={prompts}", "--max-new-tokens=16", "--cutoffs=4", "--cutoff-tokens=8", f"--html={page}",
         f"--output={out}", f"--plots={plots}"]
    )  # fmt: skip
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "Early positions are changed most" in printed.out and "promoted: " in printed.out
    record = json.loads(out.read_text())
    assert len(list(plots.glob("*.png"))) == 5
    tokens = [token for text in record["texts"] for token in text["tokens"]]
    with Browser() as browser:
        browser.open(page)
        assert browser.errors == []
        assert all(address.startswith(("file:", "data:")) for address in browser.requests)
        shown = browser.evaluate(
            "Array.from(document.querySelectorAll('#texts .token'), e => [e.textContent, e.className])"
        )
        assert [text for text, _ in shown] == [token["text"] for token in tokens]
        expected = [f"token {token['source']}{' departs' * token['departs']}" for token in tokens]
        assert [name for _, name in shown] == expected
        assert browser.evaluate("document.querySelectorAll('.prompt')[2].textContent") == texts[2]
        assert browser.evaluate("document.getElementById('alien')") is None
        sizes = browser.evaluate("Array.from(document.images, image => image.naturalWidth)")
        assert len(sizes) == 5 and min(sizes) > 300
        findings = browser.evaluate("Array.from(document.querySelectorAll('#findings li'), e => e.textContent)")
        assert findings == record["findings"] and len(findings) == 2

        shade = (
            "Array.from(document.querySelectorAll('#texts .token'), e => Number(e.style.getPropertyValue('--shade')))"
        )
        by_kl = browser.evaluate(shade)
        most = max(range(len(tokens)), key=lambda i: tokens[i]["kl"])
        assert by_kl[most] == max(by_kl) > min(by_kl)
        browser.evaluate("document.getElementById('measure').value = 'log_ratio'")
        browser.evaluate("document.getElementById('measure').dispatchEvent(new Event('change')) && null")
        by_ratio = browser.evaluate(shade)
        most = max(range(len(tokens)), key=lambda i: abs(tokens[i]["log_ratio"]))
        assert by_ratio[most] == max(by_ratio) and by_ratio != by_kl

        browser.evaluate("document.querySelector('#texts .token').focus()")
        tip = browser.evaluate("getComputedStyle(document.getElementById('tip')).display + tip.textContent")
        assert tip.startswith("block") and json.dumps(tokens[0]["target"][0][0]) in tip
        assert json.dumps(tokens[0]["base"][4][0], ensure_ascii=False) in tip
        browser.evaluate("document.querySelector('#texts .token').blur()")
        assert browser.evaluate("getComputedStyle(document.getElementById('tip')).display") == "none"
        assert browser.errors == []
    images = page.read_text().split("data:image/png;base64,")[1:]
    assert all(base64.b64decode(image.split('"')[0]).startswith(b"\x89PNG") for image in images)


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--cutoffs=4,x"], "numbers of tokens"), (["--base=a", "--expert=b", "--anti-expert=c"], "need --prompts"),
     (["--prompts=absent.jsonl"], "absent.jsonl")],
)  # fmt: skip
def test_unusable_options(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert cli.main(["analyze", *options]) == 2
    assert message in capsys.readouterr().err


def test_charts_without_matplotlib(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["analyze", f"--html={tmp_path / 'page.html'}"]) == 2
    assert "pip install 'specproxy[bench]'" in capsys.readouterr().err
