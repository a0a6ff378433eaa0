"""What pages need not load is left out.

The theme and the extensions bring about 500 kB of styles, most of them for things that no page here
has, and 1.9 MB of icons, of which a page shows a dozen. Here the rules that can apply are collected
in one style sheet (`book.css` draws the icons), scripts wait until the page is shown, and MathJax is
on pages with mathematics only.
"""

import re
import shutil
from pathlib import Path

import tinycss2

# The theme's own sheets, which its template names; those of the extensions come after them.
THEME_STYLES = ("basic.css", "styles/bootstrap.css", "styles/pydata-sphinx-theme.css")
# What of Bootstrap's script is never called here, so that its words keep no rule.
UNUSED = re.compile(
    r"\.(accordion|alert|badge|btn-close|carousel|modal|offcanvas|toast|popover|placeholder|progress"
    r"|spinner|form-(check|floating|range|select)|input-group|list-group|pagination|card|sd)\b"
)


def trim_head(app, pagename, templatename, context, doctree) -> None:
    """Keep each script of a page once, none that it does not use, and let all of them wait.

    Sphinx puts the scripts of some extensions on a page twice, and Thebe's settings name an outside
    host. The search page keeps the order of its scripts, which its own ones rely on.
    """
    kept = {}
    mathematics = 'class="math' in context.get("body", "")
    for script in context.get("script_files", []):
        body = script.attributes.get("body") or ""
        name = str(script.filename or "")
        # the page's name serves a menu of versions, which this book has not
        if re.search("thebe|THEBE|design-tabs|OPTIONS.pagename", name + body):
            continue
        if re.search("mathjax|MathJax", name + body) and not mathematics:
            continue
        if name and pagename != "search":
            script.attributes["defer"] = "defer"
        kept.setdefault((name, body), script)
    context["script_files"] = list(kept.values())
    names = [str(style.filename) for style in context.get("css_files", [])]
    app.site_styles = [*THEME_STYLES, *(n.removeprefix("_static/") for n in names)]
    context["css_files"] = []


def used_rules(rules: list, words: set[str]) -> str:
    """Return those rules of a style sheet, as text, that can apply to a page with these words."""
    kept = []
    for rule in rules:
        if rule.type == "qualified-rule":
            selectors = split_selectors(tinycss2.serialize(rule.prelude))
            used = [selector for selector in selectors if can_match(selector, words)]
            if used:
                kept.append(f"{','.join(used)}{{{tinycss2.serialize(rule.content).strip()}}}")
        elif rule.type == "at-rule" and rule.lower_at_keyword in ("media", "supports"):
            inner = tinycss2.parse_rule_list(rule.content, skip_comments=True, skip_whitespace=True)
            if text := used_rules(inner, words):
                head = tinycss2.serialize(rule.prelude).strip()
                kept.append(f"@{rule.at_keyword} {head}{{{text}}}")
        elif rule.type == "at-rule":
            kept.append(rule.serialize())
        else:
            raise ValueError(f"a rule that is no rule: {rule.serialize()[:80]}")
    return "\n".join(kept)


def split_selectors(prelude: str) -> list[str]:
    """Split a list of selectors at its commas, but for those inside of brackets."""
    return [part.strip() for part in re.split(r",(?![^()]*\))", prelude)]


def can_match(selector: str, words: set[str]) -> bool:
    """Whether all classes and ids of a selector, but for negated ones, are words of the site."""
    asked = re.sub(r":(not|is|where)\([^()]*\)|\[[^]]*\]", "", selector)
    names = re.findall(r"[.#]((?:[\w-]|\\.)+)", asked)
    return all(re.sub(r"\\(.)", r"\1", name) in words for name in names) and not (
        UNUSED.search(asked)
    )


def write_site_style(app, exception) -> None:
    """Write the one style sheet of the site, and take away what no page loads."""
    if exception or app.builder.format != "html" or not hasattr(app, "site_styles"):
        return
    static = Path(app.outdir) / "_static"
    sources = [*Path(app.outdir).rglob("*.html"), *static.rglob("*.js")]
    vendor = static / "vendor"
    text = " ".join(path.read_text("utf-8") for path in sources if vendor not in path.parents)
    words = set(re.findall(r"[\w-]+", text))
    parts = []
    for name in dict.fromkeys(app.site_styles):
        style = (static / name).read_text("utf-8")
        rules = tinycss2.parse_stylesheet(style, skip_comments=True, skip_whitespace=True)
        parts.append(used_rules([rule for rule in rules if not is_charset(rule)], words))
    (static / "site.css").write_text("\n".join(parts), "utf-8")
    shutil.rmtree(vendor, ignore_errors=True)
    for unused in (*static.rglob("*.map"), *static.glob("*thebe*"), *static.glob("*design*")):
        unused.unlink()


def is_charset(rule) -> bool:
    """Whether a rule names the sheet's encoding, which must stand first or not at all."""
    return rule.type == "at-rule" and rule.lower_at_keyword == "charset"


def setup(app) -> dict:
    """Register with Sphinx."""
    app.connect("html-page-context", trim_head, priority=900)
    # after the theme, which writes its colours of code when the build has finished
    app.connect("build-finished", write_site_style, priority=900)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
