"""Citations told apart: works of the same names and year are 2022a and 2022b in text and list.

The list of the literature is headed by what the text says, "Gu et al., 2022a", not by numbers.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from string import ascii_lowercase

from pybtex.database import Entry
from pybtex.plugin import register_plugin
from pybtex.style.formatting import plain
from pybtex.style.labels import BaseLabelStyle


def names(entry: Entry) -> str:
    """Return the authors as a citation names them."""
    last = [" ".join(map(str, person.rich_last_names)) for person in entry.persons["author"]]
    return f"{last[0]} et al." if len(last) > 2 else " and ".join(last)


def plain_year(entry: Entry) -> str:
    """Return the year without the letter that it may have been given."""
    return re.match(r"\d+", entry.fields["year"])[0]


def tell_apart(entries: Iterable[Entry]) -> None:
    """Add a letter to the year where names and year are those of another work, too."""

    def cited(entry):
        return names(entry), plain_year(entry)

    for (_, year), group in groupby(sorted(entries, key=lambda e: (*cited(e), e.key)), key=cited):
        group = list(group)
        letters = ascii_lowercase if len(group) > 1 else [""]
        for entry, letter in zip(group, letters, strict=False):
            entry.fields["year"] = year + letter


class Labels(BaseLabelStyle):
    """Labels in the words of the citations."""

    def format_labels(self, sorted_entries: list[Entry]) -> Iterator[str]:
        """Yield the label of each entry."""
        for entry in sorted_entries:
            yield f"{names(entry)}, {entry.fields['year']}"


class Style(plain.Style):
    """The plain style, with such labels."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **{**options, "label_style": Labels})


def prepare(app) -> None:
    """Give all entries their letters before anything is formatted."""
    tell_apart(app.env.get_domain("cite").bibdata.data.entries.values())


def setup(app) -> dict:
    """Register with Sphinx and with pybtex."""
    register_plugin("pybtex.style.formatting", "names_and_year", Style)
    app.connect("builder-inited", prepare, priority=900)  # once the entries have been read
    return {
        "version": "1",
        "parallel_read_safe": True,
        "parallel_write_safe": True,
    }
