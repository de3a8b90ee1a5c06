"""The Python documentation's HTML pages as plain text blocks, and what they say of each object."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lxml import html
from lxml.html import HtmlElement

CHAPTERS = (
    "c-api",
    "extending",
    "faq",
    "howto",
    "library",
    "reference",
    "tutorial",
    "using",
    "whatsnew",
)
SKIPPED_PAGES = frozenset({"index", "changelog"})
SKIPPED_KINDS = frozenset({"cmdoption", "footnote"})
TYPOGRAPHY = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"'})
HEADINGS = {f"h{level}": "#" * level for level in range(1, 7)}
UNREAD = "|".join(
    (
        ".//a[@class='headerlink']",
        ".//script",
        ".//style",
        ".//span[@class='linenos']",
        ".//*[contains(@class, 'toctree-wrapper')]",
        ".//*[contains(@class, 'contents')]",
        ".//*[contains(@class, 'audit-hook')]",
    )
)


@dataclass(frozen=True)
class Described:
    """One documented object: `kind` as Sphinx has it ("function", ...), `summary` a paragraph."""

    name: str
    kind: str
    summary: str


@dataclass(frozen=True)
class Page:
    """`unit` is what is held out as a whole: a top-level module, or a page outside the library."""

    unit: str
    blocks: tuple[str, ...]
    objects: tuple[Described, ...]


def read_pages(root: Path) -> Iterator[Page]:
    """Every page below the documentation's `html` directory, in a fixed order."""
    yield _read_page(root / "glossary.html", "glossary")
    for chapter in CHAPTERS:
        for path in sorted((root / chapter).glob("*.html")):
            if path.stem not in SKIPPED_PAGES:
                yield _read_page(path, chapter)


def _read_page(path: Path, chapter: str) -> Page:
    body = _body(path)
    unit = f"{chapter}/{path.stem}"
    if chapter == "library":
        unit = re.split(r"[.\-]", path.stem)[0]
    blocks = tuple(block for block in _blocks(body) if block)
    return Page(unit, blocks, tuple(_objects(body)))


def _body(path: Path) -> HtmlElement:
    tree = html.parse(str(path), parser=html.HTMLParser(encoding="utf-8")).getroot()
    body: HtmlElement = tree.xpath("//div[@role='main']")[0]
    for element in body.xpath(UNREAD):
        element.drop_tree()
    return body


def _inline(element: HtmlElement) -> str:
    return " ".join(str(element.text_content()).translate(TYPOGRAPHY).split())


def _blocks(element: HtmlElement) -> Iterator[str]:
    """Leaf blocks in reading order; prose is unwrapped, code keeps its lines."""
    tag = element.tag
    if tag in HEADINGS:
        yield f"{HEADINGS[tag]} {_inline(element)}"
    elif tag in {"p", "dt"}:
        yield _inline(element)
    elif tag == "pre":
        yield "```\n" + str(element.text_content()).strip("\n") + "\n```"
    elif tag == "table":
        yield "\n".join(_row(row) for row in element.iter("tr"))
    elif tag == "li":
        yield from _prefixed("- ", element)
    elif "admonition" in element.get("class", "").split():
        yield from _admonition(element)
    else:
        yield from _children(element)


def _children(element: HtmlElement) -> Iterator[str]:
    for child in element:
        if isinstance(child.tag, str):
            yield from _blocks(child)


def _row(row: HtmlElement) -> str:
    return " | ".join(_inline(cell) for cell in row.iter("th", "td"))


def _prefixed(prefix: str, element: HtmlElement) -> Iterator[str]:
    for position, block in enumerate(_children(element)):
        yield block if position else prefix + block


def _admonition(element: HtmlElement) -> Iterator[str]:
    """A title, such as "Note", and the paragraph under it become "Note: ..."."""
    title, *rest = list(_children(element))
    if rest:
        rest[0] = f"{title}: {rest[0]}"
    yield from rest


def _objects(body: HtmlElement) -> Iterator[Described]:
    for entry in body.xpath(".//dl[dt[contains(@class, 'sig-object') and @id]]"):
        kind = entry.get("class", "").split()[-1]
        paragraphs = entry.xpath("./dd/p[1]")
        if not paragraphs or kind in SKIPPED_KINDS:
            continue
        for signature in entry.xpath("./dt[@id]"):
            yield Described(_object_name(signature.get("id")), kind, _inline(paragraphs[0]))
    for term in body.xpath(".//dl[contains(@class, 'glossary')]/dt"):
        paragraphs = term.xpath("./following-sibling::dd[1]/p[1]")
        if paragraphs:
            yield Described(_inline(term), "term", _inline(paragraphs[0]))


def _object_name(anchor: str) -> str:
    """The C domain's anchors look like `c.PyList_New`."""
    return anchor.removeprefix("c.")
