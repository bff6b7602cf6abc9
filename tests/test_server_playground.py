"""The page at `/` in a browser, over a real socket: what it shows is what the API answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from browser import Browser
from serving import MODEL, PROMPT, application, call, complete, expected_tokens, listening, text_of, wait_for

COUNT = 24
# What stands in one panel: texts, and the classes of tokens.
SHOWN = """(() => {
  const panel = document.getElementById("%s");
  const all = (selector) => Array.from(panel.querySelectorAll(selector));
  return {
    text: panel.querySelector(".text").textContent,
    blocks: all(".block").map((block) => [block.dataset.tally ?? null, block.querySelectorAll(".token").length]),
    kinds: all(".token").map((token) => token.classList[1]),
    titles: all(".token").map((token) => token.title),
    refused: all(".refused").map((mark) => mark.dataset.text),
    figures: Object.fromEntries(all(".figures > div").map((pair) => [pair.className, pair.lastChild.textContent])),
    state: panel.querySelector(".state").textContent,
    error: panel.querySelector(".error").textContent,
  };
})()"""
IDLE = "!document.getElementById('generate').disabled"


@pytest.fixture(scope="module")
def app() -> Iterator[Any]:
    with application() as app:
        yield app


@pytest.fixture(scope="module")
def address(app: Any) -> Iterator[str]:
    with listening(app) as address:
        yield address


@pytest.fixture(scope="module")
def page(address: str) -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.fixture(autouse=True)
def loaded(page: Browser, address: str) -> None:
    page.errors.clear(), page.requests.clear()
    page.open("about:blank")  # the same address again would be no load
    page.open(f"{address}/")
    page.wait_for("document.getElementById('model').value !== ''")


def fill(page: Browser, **values: Any) -> None:
    """Give fields of the form their values, as a reader would: with an event."""
    for name, value in values.items():
        page.evaluate(
            f"(() => {{ const field = document.getElementById({name.replace('_', '-')!r}); field.value = {value!r};"
            " field.dispatchEvent(new Event('input', {bubbles: true})); })()"
        )


def click(page: Browser, name: str) -> None:
    page.evaluate(f"document.getElementById({name!r}).click()")


def generate(page: Browser, **values: Any) -> tuple[Any, Any]:
    """Both panels after a generation of the given fields."""
    fill(page, **{"prompt": PROMPT, "max_tokens": COUNT, **values})
    click(page, "generate")
    page.wait_for(IDLE)
    return page.evaluate(SHOWN % "tuned"), page.evaluate(SHOWN % "base")


def test_it_shows_what_the_api_answers(app: Any, page: Browser, address: str) -> None:
    tuned, base = generate(page, drafts=4)
    assert tuned["text"] == text_of(expected_tokens(count=COUNT))
    assert base["text"] == text_of(expected_tokens(count=COUNT, alpha=0.0)) != tuned["text"]
    for shown, alpha in ((tuned, 1.0), (base, 0.0)):
        fields = {"max_tokens": COUNT, "num_draft_tokens": 4, "return_speculation": True, "alpha": alpha}
        chunks = complete(app, stream=True, **fields)
        told = [chunk["choices"][0]["speculation"] for chunk in chunks]
        cycles = [part["cycle"] for part in told if "cycle" in part]
        tallies = [(cycle["num_accepted_tokens"], cycle["num_draft_tokens"]) for cycle in cycles]
        assert [tally for tally, _ in shown["blocks"]] == [f"{a}/{d}" if d else None for a, d in tallies]
        sources = [source for part in told for source in part["token_sources"]]
        assert ["draft" if kind == "draft" else "target" for kind in shown["kinds"]] == sources
        assert Counter(shown["kinds"])["replaced"] == sum(a < d for a, d in tallies)
        assert shown["refused"] == [text for cycle in cycles for text in cycle["refused_texts"]]
        assert all("(expert)" in t for t, k in zip(shown["titles"], shown["kinds"], strict=True) if k == "draft")
        rate = told[-1]["acceptance_rate"]
        assert shown["figures"]["acceptance"] == f"{100 * rate:.1f} %"
        assert shown["figures"]["length"] == f"{told[-1]['mean_acceptance_length']:.2f}"
        assert shown["figures"]["tokens"] == str(COUNT) and float(shown["figures"]["speed"]) > 0
        assert shown["state"] == "ended: length" and not shown["error"]
    assert tuned["refused"] and {"draft", "replaced"} <= set(tuned["kinds"])
    assert page.errors == [] and all(url.startswith((address, "data:", "about:")) for url in page.requests)


def test_a_token_tree(page: Browser) -> None:
    """Its refused branch is struck through, and no token stands for a refused one where the path met a leaf."""
    with application(num_tree_tokens=12) as app, listening(app) as address:
        page.open(f"{address}/")
        page.wait_for("document.getElementById('model').value !== ''")
        tuned, _ = generate(page, drafts=4)
        chunks = complete(app, stream=True, max_tokens=COUNT, num_draft_tokens=4, return_speculation=True)
    cycles = [part["cycle"] for chunk in chunks if "cycle" in (part := chunk["choices"][0]["speculation"])]
    assert {cycle["drafter"] for cycle in cycles} == {"tree"}
    assert tuned["refused"] == [text for cycle in cycles for text in cycle["refused_texts"]] != []
    assert Counter(tuned["kinds"])["replaced"] == sum(bool(cycle["refused_texts"]) for cycle in cycles)
    assert tuned["text"] == text_of(expected_tokens(count=COUNT)) and page.errors == []


def test_per_step_and_another_strength(page: Browser) -> None:
    click(page, "beside")
    tuned, base = generate(page, drafts=0, alpha=0.5)
    assert tuned["text"] == text_of(expected_tokens(count=COUNT, alpha=0.5))
    assert set(tuned["kinds"]) == {"own"} and tuned["blocks"] == [[None, 1]] * COUNT and not tuned["refused"]
    assert tuned["figures"]["acceptance"] == "no drafts"
    assert base["text"] == "" and page.evaluate("document.getElementById('base').hidden")


def test_cancelling_stops_the_stream(app: Any, page: Browser) -> None:
    page.evaluate(
        "new MutationObserver(() => document.getElementById('cancel').click())"
        ".observe(document.querySelector('#tuned .text'), {childList: true})"
    )
    tuned, _ = generate(page, drafts=0, max_tokens=100)
    assert tuned["state"] == "cancelled" and not tuned["error"] and len(tuned["kinds"]) == 1
    wait_for(lambda: app.state.engine.stats().running == 0)
    # Chunks that have come already, in one piece, are not shown either.
    page.evaluate("""(() => {
      const cycle = {drafter: null, num_draft_tokens: 0, num_accepted_tokens: 0, refused_texts: []};
      const speculation = {token_texts: ["a"], token_sources: ["target"], cycle};
      const chunk = `data: ${JSON.stringify({choices: [{text: "a", finish_reason: null, speculation}]})}\\n\\n`;
      window.fetch = async () => new Response(chunk.repeat(5));
      panels.tuned.clear();  // now, so that the observer sees nothing but what comes
    })()""")
    together, _ = generate(page)
    assert (together["text"], together["state"]) == ("a", "cancelled")


def test_failures_and_hostile_text_are_text(page: Browser) -> None:
    tuned, base = generate(page, prompt="")
    for shown in (tuned, base):
        assert "the prompt is empty" in shown["error"] and shown["state"] == "failed" and shown["text"] == ""
    hostile = "<img src=x onerror=alert(1)>"
    page.evaluate(
        f"panels.tuned.takeCycle([{hostile!r}], ['draft'], {{drafter: {hostile!r}, num_draft_tokens: 1,"
        f" num_accepted_tokens: 1, refused_texts: []}})"
    )
    assert page.evaluate("document.querySelector('#tuned .text').textContent") == hostile
    assert page.evaluate("document.images.length") == 0


def test_the_policy_stops_other_scripts_and_hosts(app: Any, page: Browser) -> None:
    policy = call(app, "/").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = 1'}))"
    )
    assert page.evaluate("window.ran") is None
    assert page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'stopped')") == "stopped"
    for directive in ("script-src", "connect-src"):
        assert any(directive in error for error in page.errors), (directive, page.errors)


def test_every_field_has_a_name_and_the_page_fits(page: Browser) -> None:
    assert page.evaluate("Array.from(document.querySelectorAll('textarea, input, select')).every((f) => f.labels[0])")
    generate(page)
    for width in (1200, 400):
        page.resize(width, 900)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    # Out of range: the browser itself refuses.
    fill(page, max_tokens=10**6)
    assert not page.evaluate("document.getElementById('form').checkValidity()")


def test_a_key_is_asked_for_where_the_server_wants_one(page: Browser) -> None:
    with application({"api_key": "secret"}) as app, listening(app) as address:
        page.open(f"{address}/")
        page.wait_for("document.getElementById('page-error').textContent !== ''")
        assert "API key" in page.evaluate("document.getElementById('page-error').textContent")
        assert not page.evaluate("document.getElementById('key-field').hidden")
        tuned, _ = generate(page)
        assert "API key" in tuned["error"]
        fill(page, key="secret")
        page.evaluate("document.getElementById('key').dispatchEvent(new Event('change'))")
        page.wait_for(f"document.getElementById('model').value === {MODEL!r}")
        tuned, _ = generate(page)
        assert tuned["text"] == text_of(expected_tokens(count=COUNT)) and not tuned["error"]
