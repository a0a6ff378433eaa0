"""What pages need not load is left out.

The theme and the extensions bring about 500 kB of styles, most of them for things that no page here
has, and 1.9 MB of icons, of which a page shows a dozen. Here the rules that can apply are collected
in one style sheet (`icons.css` draws the icons), scripts and pictures wait until the page is shown,
and MathJax is on pages with mathematics only.
"""

import re
import shutil
from pathlib import Path

import tinycss2

# The theme's own sheets, which its template names; those of the extensions come after them.
THEME_STYLES = (
    "basic.css",
    "styles/bootstrap.css",
    "styles/pydata-sphinx-theme.css",
)
# What scripts set on a page later. Of Bootstrap's script, which knows far more parts than a page
# here has, only tooltips and menus are used.
SET_LATER = {"active", "fade", "show", "tooltip", "tooltip-arrow", "tooltip-inner"}


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
            # a script of its own: all pages share the one that is given
            waiting = {**script.attributes, "defer": "defer", "fetchpriority": "low"}
            script = type(script)(script.filename, priority=script.priority, **waiting)
        kept.setdefault((name, body), script)
    context["script_files"] = list(kept.values())
    # pictures come after the words; book.js asks for all of them once the page is shown, for paper
    context["body"] = context.get("body", "").replace("<img ", '<img loading="lazy" ')
    names = [str(style.filename).removeprefix("_static/") for style in context["css_files"]]
    app.site_styles = [
        *THEME_STYLES,
        *(n for n in names if not re.search("thebe|design", n)),
    ]
    context["css_files"] = []


def write_site_style(app, exception) -> None:
    """Write the one style sheet of the site, and take away what no page loads."""
    if exception or app.builder.format != "html" or not hasattr(app, "site_styles"):
        return
    static = Path(app.outdir) / "_static"
    styles = [(static / name).read_text("utf-8") for name in dict.fromkeys(app.site_styles)]
    pages = " ".join(path.read_text("utf-8") for path in Path(app.outdir).rglob("*.html"))
    variables = set(re.findall(r"var\(\s*(--[\w-]+)", pages + " ".join(styles)))
    words = words_of_site(pages, [*static.glob("*.js"), static / "scripts/pydata-sphinx-theme.js"])
    parts = []
    for style in styles:
        rules = tinycss2.parse_stylesheet(style, skip_comments=True, skip_whitespace=True)
        parts.append(used_rules([r for r in rules if not is_charset(r)], words, variables))
    (static / "site.css").write_text("\n".join(parts), "utf-8")
    shutil.rmtree(static / "vendor", ignore_errors=True)
    for unused in (
        *static.rglob("*.map"),
        *static.glob("*thebe*"),
        *static.glob("*design*"),
    ):
        unused.unlink()


def words_of_site(pages: str, scripts: list[Path]) -> set[str]:
    """Return the classes and ids of all pages, and all words of the scripts."""
    text = [path.read_text("utf-8") for path in scripts if path.name != "search_texts.js"]
    text += re.findall(r"<script[^>]*>.*?</script>", pages, re.DOTALL)
    text += re.findall(r'\s(?:class|id)="([^"]*)"', pages)
    # the page that whole_book.py prints is made of the others
    return SET_LATER.union(["whole-book", "section"], re.findall(r"[\w-]+", " ".join(text)))


def used_rules(rules: list, words: set[str], variables: set[str]) -> str:
    """Return those rules of a style sheet, as text, that can apply to a page with these words.

    Args:
        rules: the rules, parsed.
        words: the classes and ids of the site.
        variables: the names of the custom properties that are read anywhere.
    """
    kept = []
    for rule in rules:
        if rule.type == "qualified-rule":
            selectors = split_selectors(tinycss2.serialize(rule.prelude))
            used = ",".join(selector for selector in selectors if can_match(selector, words))
            if used and (text := used_declarations(rule.content, variables)):
                kept.append(f"{used}{{{text}}}")
        elif rule.type == "at-rule" and rule.lower_at_keyword in (
            "media",
            "supports",
        ):
            inner = tinycss2.parse_rule_list(rule.content, skip_comments=True, skip_whitespace=True)
            if text := used_rules(inner, words, variables):
                condition = tinycss2.serialize(rule.prelude).strip()
                kept.append(f"@{rule.at_keyword} {condition}{{{text}}}")
        elif rule.type == "at-rule":
            kept.append(rule.serialize())
        else:
            raise ValueError(f"a rule that is no rule: {rule.serialize()[:80]}")
    return "\n".join(kept)


def used_declarations(content: list, variables: set[str]) -> str:
    """Return the declarations of a rule, without custom properties that nobody reads."""
    found = tinycss2.parse_declaration_list(content, skip_comments=True, skip_whitespace=True)
    return ";".join(
        f"{each.name}:{tinycss2.serialize(each.value).strip()}{'!important' * each.important}"
        for each in found
        if each.type == "declaration" and (each.name[:2] != "--" or each.name in variables)
    )


def split_selectors(prelude: str) -> list[str]:
    """Split a list of selectors at its commas, but for those inside of brackets."""
    return [part.strip() for part in re.split(r",(?![^()]*\))", prelude)]


def can_match(selector: str, words: set[str]) -> bool:
    """Whether all classes and ids of a selector, but for those in brackets, are known words."""
    asked = re.sub(r":(not|is|where|has)\([^()]*\)|\[[^]]*\]", "", selector)
    names = re.findall(r"[.#]((?:[\w-]|\\.)+)", asked)
    return all(re.sub(r"\\(.)", r"\1", name) in words for name in names)


def is_charset(rule) -> bool:
    """Whether a rule names the sheet's encoding, which must stand first or not at all."""
    return rule.type == "at-rule" and rule.lower_at_keyword == "charset"


def setup(app) -> dict:
    """Register with Sphinx."""
    app.connect("html-page-context", trim_head, priority=900)
    # after the theme, which writes its colours of code when the build has finished
    app.connect("build-finished", write_site_style, priority=900)
    return {
        "version": "1",
        "parallel_read_safe": True,
        "parallel_write_safe": True,
    }
