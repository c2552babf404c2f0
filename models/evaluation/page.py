"""The parts of an HTML page in one file: elements, tables that sort, embedded pictures. It loads nothing, and its
Content-Security-Policy forbids it to: style and script are known by their hash.

Text is escaped where it enters an element, because it holds the names of other people's files.
"""

import base64
import hashlib
import io
from collections.abc import Iterable, Iterator
from html import escape

from PIL import Image

STYLE = """
:root { color-scheme: light; --line: #d5d9de; --quiet: #5b6470; --link: #005a9c; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 0 1rem 3rem; max-width: 78rem; background: #fff; color: #1b1f24;
  font: 16px/1.45 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; }
h2 { margin-top: 2.5rem; border-bottom: 2px solid var(--line); }
h3 { margin: 1.8rem 0 .4rem; }
h1, h3, dd, figcaption, caption { overflow-wrap: anywhere; }
a { color: var(--link); }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; padding: .6rem 0; position: sticky; top: 0; z-index: 2;
  background: #fff; border-bottom: 1px solid var(--line); }
section, article { scroll-margin-top: 3rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: 0; }
dt { color: var(--quiet); } dd { margin: 0; }
.warning { padding: .4rem .8rem; border-left: 4px solid #d55e00; background: #fdf1e8; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; padding: 0; list-style: none; }
.swatch { display: inline-block; width: .9em; height: .9em; margin-right: .4em; vertical-align: -.1em;
  print-color-adjust: exact; }
.scroll { overflow-x: auto; } .scroll + .scroll { margin-top: 1.5rem; }
.scroll:focus-visible { outline: 2px solid var(--link); }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { position: sticky; left: 0; max-width: calc(100vw - 2rem); padding: .5rem 0; color: var(--quiet);
  text-align: left; }
th, td { padding: .25rem .5rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
thead th { vertical-align: bottom; border-bottom: 2px solid var(--quiet); white-space: normal; }
tbody th { font-weight: normal; }
td small { display: block; color: var(--quiet); }
tbody th, thead th.name { text-align: left; }
tbody tr:hover > * { background: #f2f6fa; }
th button { padding: 0; border: 0; background: none; color: inherit; font: inherit; text-align: inherit;
  cursor: pointer; }
th button::after { content: "\\a0\\2195"; color: var(--quiet); }
th[aria-sort=ascending] button::after { content: "\\a0\\2191"; color: inherit; }
th[aria-sort=descending] button::after { content: "\\a0\\2193"; color: inherit; }
figure { margin: .5rem 0 1rem; } figcaption { color: var(--quiet); font-size: .875rem; }
img { display: block; max-width: 100%; height: auto; }
.panels { display: flex; flex-wrap: wrap; gap: 0 1rem; } .panels figure { flex: 1 1 30rem; max-width: 42.4rem; }
article { content-visibility: auto; contain-intrinsic-size: auto 34rem; }
@media (max-width: 45rem) {
  body { padding: 0 .7rem 2rem; } dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .4rem; }
  .wide img { max-width: none; width: 52rem; }
  table { font-size: .8rem; } th, td { padding: .2rem .3rem; }
  tbody th { max-width: 8rem; white-space: normal; overflow-wrap: anywhere; }
  thead th.name { min-width: 5rem; } thead th.name:first-child { min-width: 6.5rem; }
  nav { gap: .3rem .8rem; font-size: .875rem; }
}
@media print {
  nav { display: none; } th button::after { content: none; } body { max-width: none; } .scroll { overflow: visible; }
  table { font-size: .6rem; } th, td { padding: .1rem .25rem; } article { content-visibility: visible; }
  article, figure, tr { break-inside: avoid; }
}
"""
# A click on a head sorts its table, a second one the other way; what is no number comes last.
SCRIPT = """
"use strict";
const keyOf = (row, column) => {
  const cell = row.cells[column];
  return cell.tagName === "TD" ? parseFloat(cell.textContent.replace("[", "")) : cell.textContent;
};
const compare = (a, b) => typeof a === "number" ? a - b : a.localeCompare(b, undefined, {numeric: true});
for (const head of document.querySelectorAll("table.sort thead th")) {
  const button = document.createElement("button");
  button.append(...head.childNodes);
  head.append(button);
  button.addEventListener("click", () => {
    const direction = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
    const body = head.closest("table").tBodies[0];
    const keyed = Array.from(body.rows, row => [keyOf(row, head.cellIndex), row]);
    keyed.sort(([a], [b]) => Number.isNaN(a) - Number.isNaN(b) || (Number.isNaN(a) ? 0 : direction * compare(a, b)));
    const sorted = document.createDocumentFragment();
    for (const [, row] of keyed) sorted.append(row);
    body.append(sorted);
  });
}
"""


class Html(str):
    """Text that is markup already; `tag` escapes any other."""


def tag(element: str, /, *content: str, **attributes) -> Html:
    """An element; in the names of attributes `_` stands for `-`, and one at the end for nothing (`class_`)."""
    inner = "".join(part if isinstance(part, Html) else escape(part) for part in content)
    return Html(f"{start(element, **attributes)}{inner}</{element}>")


def start(element: str, /, **attributes) -> Html:
    """An element's beginning, or one that has no end, such as `img`."""
    said = (f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"' for key, value in attributes.items())
    return Html(f"<{element}{''.join(said)}>")


def join(parts: Iterable[Html]) -> Html:
    return Html("".join(parts))


def table(caption: str, columns: list[str], rows: list[list[str]], names: int = 1, sort: bool = True) -> Html:
    """A table in a box that scrolls. The first `names` columns are text, the others numbers."""
    head = (tag("th", column, scope="col", **{"class": "name"} if place < names else {})
            for place, column in enumerate(columns))  # fmt: skip
    body = (
        tag("tr", *(tag("th", cell, scope="row") for cell in row[:names]), *(tag("td", cell) for cell in row[names:]))
        for row in rows
    )
    content = tag("caption", caption), tag("thead", tag("tr", *head)), tag("tbody", *body)
    return tag("div", tag("table", *content, **{"class": "sort"} if sort else {}),
               class_="scroll", tabindex=0, role="group", aria_label=caption)  # fmt: skip


def figure(picture: bytes, caption: str, kind: str = "", lazy: bool = False) -> Html:
    """A PNG or JPEG below its caption; `kind` is the class of the element. A `lazy` picture is not drawn before it is
    scrolled to, which pays where there are hundreds."""
    image = Image.open(io.BytesIO(picture))  # reads no more than the size
    source = f"data:image/{image.format.lower()};base64,{base64.b64encode(picture).decode()}"
    size = {"width": image.width, "height": image.height}
    drawn = {"loading": "lazy", "decoding": "async"} if lazy else {"decoding": "sync"}
    shown = start("img", alt=caption, **size, **drawn, src=source)
    return tag("figure", tag("figcaption", caption), tag("div", shown, class_="scroll"), class_=kind)


def page(title: str, body: Iterable[Html], style: str) -> Iterator[str]:
    """Yield the whole file in parts; `style` is CSS in addition to STYLE."""
    style = STYLE + style
    policy = (f"default-src 'none'; img-src data:; style-src {_source(style)}; script-src {_source(SCRIPT)}; "
              "base-uri 'none'; form-action 'none'")  # fmt: skip
    head = (
        start("meta", charset="utf-8"),
        start("meta", http_equiv="Content-Security-Policy", content=policy),
        start("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Html(style)),
    )
    yield "<!doctype html>\n" + start("html", lang="en") + tag("head", *head) + "<body>"
    yield from body
    yield tag("script", Html(SCRIPT)) + "</body></html>\n"


def _source(text: str) -> str:
    """How a policy names an inline style or script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
