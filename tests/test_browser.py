"""The built book in a browser: every page in the light, in the dark and on a phone."""

import re
import sys
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "book/_ext"))
import whole_book  # noqa: E402

BROWSER = whole_book.find_chromium()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(whole_book.BROWSERS)} is here"),
]
PAGES = sorted(path.stem for kind in ("*.ipynb", "*.md") for path in (ROOT / "book").glob(kind))
DESKTOP = {"viewport": {"width": 1280, "height": 900}}
MODES = {
    "light": {**DESKTOP, "color_scheme": "light", "reduced_motion": "reduce"},
    "dark": {**DESKTOP, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True},
}
# The structure of a page is the same in all modes: contrasts are checked in both colours, the rest
# where the page is wide and where it is narrow. Nothing is fetched: a file may not.
QUICK = {"resultTypes": ["violations"], "preload": False}
RULES = {
    "light": QUICK,
    "dark": {**QUICK, "runOnly": ["color-contrast"]},
    "phone": {**QUICK, "rules": {"color-contrast": {"enabled": False}}},
}
# What reaches out of the window, or out of a box that hides it, with no box around it that scrolls.
CUT = """() => {
  const root = document.documentElement, width = root.clientWidth, found = [];
  const parts = ".bd-article :is(mjx-math, mjx-mi, mjx-mo, mjx-mn, img, svg, table, pre, code)";
  for (const part of document.querySelectorAll(parts)) {
    const box = part.getBoundingClientRect();
    const hidden = ".toggle-hidden, mjx-assistive-mml, details:not([open])";
    if (!box.width || part.closest(hidden)) continue;
    let right = width, scrolls = false;
    for (let above = part.parentElement; above !== document.body; above = above.parentElement) {
      const style = getComputedStyle(above).overflowX;
      if (["auto", "scroll"].includes(style) && above.scrollWidth > above.clientWidth + 1) {
        scrolls = true;
        if (above.tabIndex !== 0) found.push(`no way by keyboard: ${above.outerHTML.slice(0, 80)}`);
        break;
      }
      if (style === "hidden" || style === "clip")
        right = Math.min(right, above.getBoundingClientRect().right);
    }
    if (!scrolls && (box.right > right + 2 || box.left < -2))
      found.push(part.outerHTML.slice(0, 120));
  }
  if (root.scrollWidth > width + 1) found.push("the page itself");
  return found;
}"""
# Short formulas that go on in the next line.
BROKEN = """() => [...document.querySelectorAll(".bd-article span.math")].filter((formula) => {
  const column = formula.closest("p, li, dd, figcaption, h1, h2, h3, h4");
  const lines = [...(formula.querySelector("mjx-math")?.getClientRects() ?? [])];
  const width = lines.reduce((sum, line) => sum + line.width, 0);
  return column && !formula.closest("table") && lines.length > 1
    && width < 0.5 * column.getBoundingClientRect().width;
}).map((formula) => formula.textContent)"""
# Code has few colours and many words: of each colour the first word stays, to be checked.
THIN_OUT = """() => {
  const seen = new Set();
  for (const word of document.querySelectorAll(".highlight span[class]")) {
    const kind = word.closest(".highlight").parentElement.className + word.className;
    if (seen.has(kind)) word.replaceWith(word.textContent);
    seen.add(kind);
  }
  document.body.normalize();
}"""
FIRST = ".bd-article h2"  # section
# What is folded: solutions, code and long outputs.
OPEN = """() => {
  document.querySelectorAll(".toggle-button[aria-expanded=false]").forEach((b) => b.click());
  document.querySelectorAll("details").forEach((d) => { d.open = true; });
}"""
DEAD = """() => [...document.querySelectorAll("a[href^='#']")].map((link) => link.hash.slice(1))
  .filter((name) => name && !document.getElementById(decodeURIComponent(name)))"""


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def contexts(browser):
    """A reader for each mode, opened when first needed."""
    opened = {}

    def get(mode):
        if mode not in opened:
            opened[mode] = browser.new_context(**MODES[mode])
        return opened[mode]

    yield get
    for context in opened.values():
        context.close()


def open_page(context, address):
    """Open a page and wait until its formulas stand; note what it asks for and complains of."""
    page = context.new_page()
    page.complaints, page.requests = [], []
    page.on("console", lambda m: page.complaints.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("request", lambda request: page.requests.append(request.url))
    page.goto(address)
    page.wait_for_selector("html[data-measured]", state="attached")
    return page


def state(figure):
    """What a figure shows: its drawing, and its words."""
    return figure.locator("svg").first.inner_html(), figure.locator("output").inner_text()


TIMED = """(input) => {
  const begun = performance.now();
  input.value = input.value === input.min ? input.max : input.min;
  input.dispatchEvent(new Event("input", {bubbles: true}));
  document.body.getBoundingClientRect();  // with the page laid out anew
  return performance.now() - begun;
}"""


def move_figures(page, touch):
    """Move each slider in each way that there is; each must change the drawing and the words."""
    for figure in page.locator(".mamba-slider").all():
        track = figure.locator("input")
        track.scroll_into_view_if_needed()
        box = track.bounding_box()
        assert box["height"] >= 24
        seen = [state(figure)]
        for share in (0.97, 0.03):
            at = box["x"] + share * box["width"], box["y"] + box["height"] / 2
            (page.touchscreen.tap if touch else page.mouse.click)(*at)
            seen.append(state(figure))
        if not touch:
            track.press("ArrowRight")
            seen.append(state(figure))
        for before, after in pairwise(seen):
            assert after[0] != before[0]
            assert after[1] != before[1]
        assert track.evaluate(TIMED) < 100  # milliseconds; some four
        if touch:
            smallest = figure.locator("text").evaluate_all(
                "all => Math.min(...all.filter((text) => text.getClientRects().length).map("
                "(text) => text.getScreenCTM().a * parseFloat(getComputedStyle(text).fontSize)))"
            )
            assert smallest >= 12


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("mode", MODES)
def test_page(site, contexts, mode, name):
    page = open_page(contexts(mode), (site / f"book/{name}.html").as_uri())
    assert page.evaluate("document.documentElement.dataset.theme") == (
        "dark" if mode == "dark" else "light"
    )
    assert page.evaluate(CUT) == []
    assert page.evaluate(DEAD) == []
    if mode == "phone":
        assert page.evaluate(BROKEN) == []
    if mode != "dark":
        closed = [f for f in (["summary"], [".toggle-button"]) if page.locator(f[0]).count()]
        if closed:  # what opens the rest; all else is looked at when everything is open
            found = Axe().run(page, context={"include": closed}, options=RULES[mode])
            assert not found.response["violations"], found.generate_report()
        move_figures(page, touch=mode == "phone")
        if page.locator(".chapter-card").count() and page.locator(FIRST).count():
            first = page.locator(FIRST).first
            place = first.evaluate("e => scrollY + e.getBoundingClientRect().top")
            assert place < page.viewport_size["height"]  # on the first screen
        page.evaluate(OPEN)
        page.wait_for_timeout(500)
        assert page.evaluate(CUT) == []
    page.evaluate(THIN_OUT)
    # formulas have the colour of their text; what they are made of is the same in all modes
    everything = None if mode == "phone" else {"exclude": ["mjx-container"]}
    found = Axe().run(page, context=everything, options=RULES[mode])
    assert not found.response["violations"], found.generate_report()
    assert page.complaints == []
    local = [urlsplit(address) for address in page.requests if not address.startswith("data:")]
    assert {address.scheme for address in local} == {"file"}
    if mode == "light":
        weight = sum({a.path: Path(unquote(a.path)).stat().st_size for a in local}.values())
        assert weight < (500e3 if name == "index" else 2.5e6)
        if name[0].isdigit() or name == "index":  # what is painted needs: two seconds of 1.6 Mbit
            needed = [Path(unquote(a.path)) for a in local if a.path.endswith((".html", ".css"))]
            assert sum(path.stat().st_size for path in set(needed)) < 400e3
        formulas = page.locator("mjx-container").count() > 0
        assert formulas == any("mathjax" in address.path for address in local)
    page.close()


SEARCHES = [
    ("Woodbury", "woodbury", "05_s4.html#"),
    ("rotations", "rotation", "10_1_selecting.html#"),
    ("zero-order hold", "zero-order hold", "02_discretisation.html#"),
]


@pytest.mark.parametrize(("words", "wanted", "where"), SEARCHES)
def test_search_shows_excerpts_and_leads_to_them_without_a_server(
    site, contexts, words, wanted, where
):
    page = contexts("light").new_page()
    page.goto(f"{(site / 'search.html').as_uri()}?q={words}")
    excerpts = page.locator("#search-results .context")
    excerpts.first.wait_for()
    page.wait_for_timeout(300)
    texts = excerpts.all_inner_texts()
    assert sum(wanted in text.lower() for text in texts) > len(texts) / 3
    assert not any(re.search(r"\\[(a-zA-Z]", text) for text in texts)
    found = Axe().run(page, options=QUICK)
    assert not found.response["violations"], found.generate_report()
    page.locator(f"#search-results a[href*='{where}']").first.click()
    page.wait_for_selector("html[data-measured]", state="attached")
    assert page.evaluate("scrollY") > 0
    page.close()


def test_paper_is_white(site, contexts):
    page = open_page(contexts("dark"), (site / "book/05_s4.html").as_uri())
    theme = "document.documentElement.dataset.theme"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(theme) == "light"
    page.emulate_media(media="print")
    formula = page.locator(".bd-article mjx-container").first
    assert formula.evaluate("e => getComputedStyle(e).color") == "rgb(27, 31, 36)"
    picture = page.locator(".cell_output img").first
    assert picture.evaluate("e => getComputedStyle(e).filter") == "none"
    assert not page.locator(".bd-sidebar-primary").is_visible()
    assert page.locator(".bd-article h1").is_visible()
    page.emulate_media(media="screen")
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(theme) == "dark"
    page.close()


@pytest.mark.parametrize("name", ["01_state_space_models", "08_parallel_scan"])
def test_without_javascript_figures_stand_still(site, browser, name):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((site / f"book/{name}.html").as_uri())
    for figure in page.locator(".mamba-slider").all():
        assert figure.locator("noscript svg").is_visible()
        assert not figure.locator("input").is_visible()
    context.close()


def test_buttons_of_the_header_show_where_the_keyboard_is(site, contexts):
    page = open_page(contexts("light"), (site / "book/05_s4.html").as_uri())
    for button in page.locator(".article-header-buttons .btn:visible").all():
        button.focus()
        page.keyboard.press("Shift")  # the keyboard is in use, so the focus is shown
        assert button.evaluate("e => getComputedStyle(e).outlineStyle") == "solid"
    page.close()


def test_solutions_open_and_are_named(site, contexts):
    page = open_page(contexts("light"), (site / "book/05_s4.html").as_uri())
    button = page.locator(".solution .toggle-button").first
    assert button.get_attribute("aria-label").startswith("Solution to")
    for opened in ("true", "false"):
        page.locator(".solution .admonition-title").first.click(position={"x": 90, "y": 16})
        assert button.get_attribute("aria-expanded") == opened
    button.click()
    assert button.get_attribute("aria-expanded") == "true"
    assert page.complaints == []
    page.close()


@pytest.mark.parametrize("mode", ["light", "phone"])
@pytest.mark.parametrize(
    "target", ["04_hippo.html#ex-condition", "02_discretisation.html#equation-eq-recurrence"]
)
def test_links_lead_to_what_they_name(site, contexts, mode, target):
    page = open_page(contexts(mode), f"{(site / 'book').as_uri()}/{target}")
    place = "document.getElementById(location.hash.slice(1)).getBoundingClientRect().top"
    assert 0 <= page.evaluate(place) < 200
    page.close()


def test_formulas_of_opened_solutions_fit_a_phone(site, contexts):
    page = open_page(contexts("phone"), (site / "book/04_hippo.html").as_uri())
    formulas = page.locator(".solution span.math")
    assert formulas.count() > 20
    assert not formulas.first.is_visible()
    for button in page.locator(".solution .toggle-button").all():
        button.click()
    assert formulas.first.is_visible()
    assert page.evaluate(CUT) == []
    assert page.evaluate(BROKEN) == []
    page.close()


def test_the_drawing_of_the_front_page_moves_until_told(site, contexts):
    where = "e => getComputedStyle(e).transform"
    for mode, moves in (("dark", True), ("light", False)):  # the latter asks for less motion
        page = open_page(contexts(mode), (site / "book/index.html").as_uri())
        token = page.locator("figure.stream .token").nth(6)
        places = []
        for hold in (False, True):
            if hold and moves:
                page.get_by_label("hold still").check()
                # a pause begins with the next picture, which may be late
                stands = "(a) => a.playState !== 'running' && !a.pending"
                page.wait_for_function(f"document.getAnimations().every({stands})")
            before = token.evaluate(where)
            page.wait_for_timeout(300)
            places.append(token.evaluate(where) != before)
        assert places == [moves, False]
        assert page.get_by_role("link", name="Start with chapter 1").is_visible()
        page.close()
