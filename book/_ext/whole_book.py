"""Write the built book into one PDF, with headless Chromium, and link it from the front page.

python book/_ext/whole_book.py _build/html
"""

import html
import re
import shutil
import sys
from pathlib import Path

import yaml
from bs4 import BeautifulSoup

NAME = "mamba-step-by-step.pdf"
BROWSERS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)
FOOTER = '<p style="font: 8px sans-serif; margin: auto"><span class="pageNumber"></span></p>'
# each line of the contents leads to a page, and says which
NUMBER_CONTENTS = """numbers => {
  for (const number of document.querySelectorAll(".whole-book > nav span"))
    number.textContent = numbers[number.parentElement.hash.slice(1)].toString();
}"""
MARGIN = {"top": "18mm", "bottom": "18mm", "left": "17mm", "right": "17mm"}


def find_chromium() -> str | None:
    """Return the path of a browser that is Chromium or made of it, or None."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def pages_in_order(toc: dict) -> list[tuple[str | None, str]]:
    """Return all pages as the table of contents orders them, each with the part that it opens."""
    pages = [(None, toc["root"])]
    for part in toc["parts"]:
        names = []
        for chapter in part["chapters"]:
            names += [
                chapter["file"],
                *(page["file"] for page in chapter.get("sections", [])),
            ]
        pages += [(part["caption"] if i == 0 else None, name) for i, name in enumerate(names)]
    return pages


def article(path: Path, base: str) -> BeautifulSoup:
    """Return the text of a page, its anchors named after the page and its links led to them."""
    soup = BeautifulSoup(path.read_text("utf-8"), "html.parser")
    text = soup.find("article", class_="bd-article")
    for anchor in text.find_all(id=True):
        anchor["id"] = f"{path.stem}--{anchor['id']}"
    for link in text.find_all("a", href=True):
        page, _, anchor = link["href"].partition("#")
        if page == "" or re.fullmatch(r"\w+\.html", page):
            link["href"] = f"#{Path(page).stem or path.stem}--{anchor}"
        elif "://" not in page:
            link["href"] = f"{base}book/{page}"
    for picture in text.find_all("img", loading=True):
        del picture["loading"]
    text.name = "section"
    text["id"] = f"{path.stem}--"
    return text


def whole_book(site: Path, root: Path) -> str:
    """Return all pages as one, with a list of contents in front."""
    config = yaml.safe_load((root / "_config.yml").read_text("utf-8"))
    toc = yaml.safe_load((root / "_toc.yml").read_text("utf-8"))
    contents, texts = [], []
    for part, name in pages_in_order(toc):
        text = article(site / f"{name}.html", config["html"]["baseurl"])
        if part:
            contents.append(f"<h2>{html.escape(part)}</h2>")
        if name != toc["root"]:
            title = re.sub(r"#$", "", text.find("h1").get_text()).strip()
            level = "section" if re.match(r"\d+\.\d", title) else "chapter"
            contents.append(
                f'<p class="{level}"><a href="#{text["id"]}">{html.escape(title)}'
                "<span></span></a></p>"
            )
        texts.append(str(text))
    # the head of a page with mathematics, and of its scripts those that typeset and measure
    head = BeautifulSoup((site / "book/notation.html").read_text("utf-8"), "html.parser").head
    for script in head.find_all("script"):
        if not re.search("MathJax|mathjax|book.js", script.get("src", "") + script.text):
            script.decompose()
    head.title.string = config["title"]
    return (
        f'<!DOCTYPE html><html lang="en" data-theme="light">{head}<body class="whole-book">'
        f"{texts[0]}<nav><h1>Contents</h1>{''.join(contents)}</nav>{''.join(texts[1:])}</body></html>"
    )


def link_from_front_page(site: Path) -> None:
    """Name the PDF on the front page, once."""
    front = site / "book/index.html"
    soup = BeautifulSoup(front.read_text("utf-8"), "html.parser")
    if soup.find(id="whole-book") is None:
        size = (site / NAME).stat().st_size / 1e6
        line = (
            f'<p id="whole-book">To print or to take along: <a href="../{NAME}">the whole book as '
        )
        line += f"one PDF</a> ({size:.0f} MB).</p>"
        page = front.read_text("utf-8")
        before = page.index('<section id="the-map">')
        front.write_text(page[:before] + line + page[before:], "utf-8")


def print_out(page, pdf: Path) -> None:
    """Print a page of the browser."""
    page.pdf(path=pdf, format="A4", margin=MARGIN, outline=True, tagged=True,
             print_background=True, display_header_footer=True, header_template="<p></p>",
             footer_template=FOOTER)  # fmt: skip


def page_numbers(pdf: Path) -> dict[str, int]:
    """Return on which page of a PDF each place begins that something leads to."""
    from pypdf import PdfReader

    reader = PdfReader(pdf)
    places = reader.named_destinations
    return {
        name.removeprefix("/"): reader.get_destination_page_number(place) + 1
        for name, place in places.items()
    }


def main(site: Path, root: Path = Path(__file__).parents[2]) -> None:
    """Write the PDF into the site that was built from the files under root."""
    from playwright.sync_api import sync_playwright

    browser_path = find_chromium()
    if browser_path is None:
        sys.exit(f"The PDF needs one of {', '.join(BROWSERS)}, and none was found.")
    page_path = site / "book/whole_book.html"
    page_path.write_text(whole_book(site, root), "utf-8")
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=browser_path, args=["--no-sandbox"]
            )
            page = browser.new_page(viewport={"width": 800, "height": 1100})
            page.set_default_timeout(300_000)
            page.goto(page_path.resolve().as_uri())
            page.wait_for_selector("html[data-measured]", state="attached")
            print_out(page, site / NAME)
            page.evaluate(NUMBER_CONTENTS, page_numbers(site / NAME))  # which printing decides
            print_out(page, site / NAME)
            browser.close()
    finally:
        page_path.unlink()
    link_from_front_page(site)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
