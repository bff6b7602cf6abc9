"""The browser of the tests sees what a page shows, and what goes wrong on it."""

from __future__ import annotations

from pathlib import Path

from browser import Browser


def test_page_is_seen_and_its_faults_are_noted(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        "<!doctype html><link rel='icon' href='data:,'><p id='word'>before</p>"
        "<script>document.getElementById('word').textContent = 'after';"
        "document.body.dataset.dark = matchMedia('(prefers-color-scheme: dark)').matches</script>"
    )
    with Browser(dark=True) as browser:
        browser.open(page)
        assert browser.evaluate("document.getElementById('word').textContent") == "after"
        assert browser.evaluate("document.body.dataset.dark") == "true"
        assert browser.errors == []
        assert browser.requests[-1] == page.as_uri() or browser.requests[-1] == "data:,"
        browser.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")

        page.write_text("<!doctype html><script>console.error('said', 1); throw Error('thrown')</script>")
        browser.open(page)
        browser.wait_for("true")
        assert "said 1" in browser.errors
        assert any("thrown" in error for error in browser.errors)

        page.write_text("<!doctype html><img src='http://127.0.0.1:9/absent.png'>")
        browser.open(page)
        assert "http://127.0.0.1:9/absent.png" in browser.requests
        assert any("ERR_" in error for error in browser.errors)
