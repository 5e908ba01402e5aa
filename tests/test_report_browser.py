"""The live page and the report in a real browser (Debian's chromium, driven by Playwright)."""

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import TrainerCallback

from hf_diffusionblocks.report import write_report
from hf_diffusionblocks.training import run_status
from needed import needed
from report_runs import NASTY, make_run, row, serving, write_status
from runs import make_trainer
from tiny_masked import blocked_mlm
from tiny_text import TokenRows

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
PHONE, DESKTOP = {"width": 360, "height": 740}, {"width": 1280, "height": 800}


@pytest.fixture(scope="module")
def browser():
    sync_api = needed("playwright.sync_api")
    if not Path(CHROMIUM).exists():
        pytest.skip("there is no browser: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser) -> Iterator:
    """A function that opens a page; at the end, no page may have said anything on its console or asked elsewhere."""
    contexts, said, asked = [], [], []

    def open_it(url: str, size: dict = DESKTOP, scheme: str = "light"):
        contexts.append(browser.new_context(viewport=size, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.set_default_timeout(8000)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(f"dialog {dialog.message}"))
        page.on("request", lambda request: asked.append((url, request.url)))
        page.goto(url)
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert [text for text in said if "ERR_CONNECTION_REFUSED" not in text] == []
    assert [asked_for for url, asked_for in asked if not asked_for.startswith((url, "data:"))] == []


def until(page, expression: str) -> None:
    """Wait for a condition in the page; Playwright's own way needs ``eval``, which the page's policy forbids."""
    end = time.monotonic() + 8
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"{expression} did not come true: {page.inner_text('main')}"
        page.wait_for_timeout(50)


def text(page, selector: str) -> str:
    return page.locator(selector).inner_text()


def width(page) -> int:
    return page.evaluate("Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)")


def test_the_page_follows_a_run_from_before_its_beginning_to_after_its_end(open_page, tmp_path, monkeypatch):
    monkeypatch.setattr(run_status, "_SECONDS_BETWEEN", 0.0)
    run = tmp_path / "run"
    with serving(run) as server:
        page = open_page(server.url)
        assert text(page, "#announcement") == "waiting for the run to begin" and not page.is_visible("#losses")
        seen = []

        class Look(TrainerCallback):
            """While the run goes on: the page comes to show what the log has, without being loaded again."""

            def on_log(self, args, state, control, **kwargs):
                if state.global_step in (3, 9):
                    until(
                        page, f"document.getElementById('progress').textContent.includes('{state.global_step} of 15')"
                    )
                    seen.append((text(page, "#announcement"), text(page, ".place >> nth=0"), page.title()))

        page.evaluate("window.loaded = 'once'")
        make_trainer(run, callbacks=[Look()], max_steps=5, logging_steps=3).train()
        assert [words for words, *_ in seen] == ["training, past 20 %", "training, past 60 %"]
        assert [title for *_, title in seen] == ["20 % - run", "60 % - run"]
        assert "block 0" in seen[0][1] and "block 2" in seen[0][1] and ", training" in seen[0][1]
        until(page, "document.getElementById('announcement').textContent === 'finished'")
        assert page.locator("#losses svg.wide polyline").count() == 3
        assert page.locator("#blocks tbody tr").count() == 3 and page.evaluate("window.loaded") == "once"
    page.evaluate("void refresh()")  # the watch command has ended, the page is still open
    until(page, "document.getElementById('announcement').textContent.includes('has ended')")
    assert page.locator("#blocks tbody tr").count() == 3


def test_the_share_of_each_block_in_the_likelihood_comes_when_it_is_measured(open_page, tmp_path, monkeypatch):
    monkeypatch.setattr(run_status, "_SECONDS_BETWEEN", 0.0)
    run = tmp_path / "run"
    with serving(run) as server:
        page = open_page(server.url)
        seen = []

        class Look(TrainerCallback):
            def on_log(self, args, state, control, **kwargs):
                if state.global_step == 3:
                    until(page, "document.getElementById('shares').textContent.includes('Not yet measured')")
                    seen.append(text(page, "#shares h2"))

        data = {"dataset": TokenRows(), "eval_dataset": TokenRows(6, seed=1)}
        settings = {"max_steps": 2, "logging_steps": 3, "train_shared": "all"}
        make_trainer(run, blocked_mlm(), callbacks=[Look()], **data, **settings).train()
        assert seen == ["Share of the likelihood by block"]
        until(page, "document.querySelectorAll('#shares tbody tr').length === 3")
        assert "nats per token, after iteration 6" in text(page, "#shares caption")
        live = text(page, "#shares table")
        assert page.get_by_role("columnheader", name="Share").count() == 1
    parts = [float(share) for share in re.findall(r"(\S+) %", live)]
    assert len(parts) == 3 and abs(sum(parts) - 100) < 0.2
    page = open_page(write_report(run).as_uri(), PHONE)
    assert text(page, "#shares table") == live and width(page) == PHONE["width"]


def test_nothing_a_run_holds_runs_or_widens_the_page(open_page, tmp_path):
    run = make_run(tmp_path / "run", NASTY, NASTY)
    write_status(run, device="w" * 200)
    with serving(run) as server:
        page = open_page(server.url, PHONE)
        until(page, "typeof shown === 'object' && 'usage' in shown")  # the script has filled it anew
        assert width(page) == PHONE["width"] and text(page, "h1").startswith("<script>")
        assert page.locator("summary").count() >= 1
        page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        assert width(page) == PHONE["width"]
        assert page.locator("svg.narrow").is_visible() and not page.locator("svg.wide").is_visible()
        assert page.evaluate("[...document.images].every((i) => i.getBoundingClientRect().right <= innerWidth)")
    page = open_page(write_report(run).as_uri(), PHONE)
    assert width(page) == PHONE["width"] and page.locator("section:visible").count() == 9
    assert page.evaluate("[...document.images].every((i) => i.complete && i.naturalWidth > 0)")


def test_the_whole_table_of_blocks_is_in_sight_on_a_phone(open_page, tmp_path):
    """With figures as wide as they come: nothing lies beside the screen, no word is broken, the caption wraps."""
    run = make_run(tmp_path / "run")
    wide = {"layers": [100, 101], "range": [0.002345, 1234.5], "updates": 123_456, "of": 1_000_000, "place": "device"}
    write_status(run, blocks=[wide | {"block": b} for b in range(12)])
    (run / "updates.jsonl").write_text("".join(row(b, 1, 1.234e-05) for b in range(12)))
    with serving(run) as server:
        for url in (server.url, write_report(run).as_uri()):
            page = open_page(url, PHONE)
            assert page.evaluate("(e => e.scrollWidth <= e.clientWidth)(document.querySelector('.scroll'))")
            inside = "[...document.querySelectorAll('.scroll :is(caption, th, td)')].map(e => %s)"
            rights = page.evaluate(inside % "e.getBoundingClientRect().right")
            assert len(rights) == 1 + 5 * 13 and max(rights) <= PHONE["width"]
            words = page.evaluate(inside % "[e.innerText, e.scrollWidth <= e.clientWidth]")
            assert all(fits for _, fits in words) and words[10][0] == "1.234e-05", words


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_light_and_dark(open_page, tmp_path, size):
    url = write_report(make_run(tmp_path / "run")).as_uri()
    grounds = []
    for scheme in ("light", "dark"):
        page = open_page(url, size, scheme)
        style = "getComputedStyle(document.querySelector('{}')).{}.match(/\\d+/g).map(Number)"
        ground = page.evaluate(style.format("section", "backgroundColor"))
        inks = [page.evaluate(style.format(s, "color")) for s in ("h1", "caption", "td", "figcaption", "summary")]
        grounds.append(sum(ground))
        assert all(abs(sum(ink) - sum(ground)) > 300 for ink in inks)
    assert grounds[0] == 3 * 255 and grounds[1] < 150


def test_the_page_is_used_with_the_keyboard(open_page, tmp_path):
    run = make_run(tmp_path / "run")
    write_report(run)
    with serving(run) as server:
        page = open_page(server.url)
        until(page, "typeof shown === 'object' && 'usage' in shown")
        focused = (
            "(() => { const e = document.activeElement; return e.className || e.getAttribute('href') || e.tagName; })()"
        )
        page.keyboard.press("Tab")
        assert page.evaluate(focused) == "skip" and page.locator(".skip").bounding_box()["x"] >= 0
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "main"
        stops = []
        for _ in range(6):
            page.keyboard.press("Tab")
            stops.append(page.evaluate(focused))
            outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert outline == "solid", stops
        assert stops[:4] == ["report.html", "scroll", "text", "SUMMARY"] and "PRE" in stops
        page.locator("summary").first.focus()
        page.keyboard.press("Enter")
        assert page.locator("details").first.evaluate("d => d.open")
        with open(run / "updates.jsonl", "a") as file:
            file.write(row(5, 1, 1.0))
        until(page, "document.getElementById('blocks').textContent.includes('5')")
        assert page.evaluate(focused) == "SUMMARY"  # what was added elsewhere takes the focus from nobody
        assert page.locator("details").first.evaluate("d => d.open")


def test_what_a_screen_reader_is_told(open_page, tmp_path):
    run = make_run(tmp_path / "run")
    write_status(run, state="finished")
    with serving(run) as server:
        page = open_page(server.url)
        until(page, "typeof shown === 'object' && 'usage' in shown")
        for role in ("banner", "main", "contentinfo", "status"):
            assert page.get_by_role(role).count() == 1, role
        assert page.get_by_role("heading", level=1).count() == 1
        names = page.get_by_role("heading", level=2).all_inner_texts()
        assert names[:4] == ["Progress", "Loss per block", "Blocks", "Share of the likelihood by block"]
        for name in names:
            assert page.get_by_role("region", name=name, exact=True).count() == 1, name
        assert page.get_by_role("progressbar", name="done").get_attribute("value") == "0.4000"
        assert page.get_by_role("img", name="Loss of 2 blocks over updates").count() == 1  # the other one is hidden
        assert page.get_by_role("columnheader", name="Mean loss").count() == 1
        assert page.get_by_role("img").all() and page.locator("img:not([alt])").count() == 0
