"""A page of text, tables and pictures, written once and rendered as HTML and as Markdown.

In texts, `code` stands in backticks, in both forms.
"""

from __future__ import annotations

import base64
import html
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Block", "Cell", "Column", "Facts", "Items", "Picture", "Section", "Table", "Text", "to_html", "to_markdown"]


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Items:
    """A list of sentences."""

    items: Sequence[str]


@dataclass(frozen=True)
class Facts:
    """Names and their values."""

    facts: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Column:
    """A column's name, and what it shares with its neighbours: columns of one group stand under one heading."""

    name: str
    group: str = ""


@dataclass(frozen=True)
class Cell:
    """What stands in a table: a value, and a smaller note beneath it, such as its interval."""

    text: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells, the first of each naming the row."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Picture:
    """A PNG beside the page, in light and in dark colours; alt says in words what it shows."""

    file: str
    alt: str
    caption: str
    light: bytes
    dark: bytes


Block = Text | Items | Facts | Table | Picture


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: Sequence[Block]


def to_markdown(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The page as Markdown; pictures are links to the files beside it."""
    lines = [f"# {_plain(title)}", "", _markdown_text(lead)]
    for section in sections:
        lines += ["", f"## {_plain(section.title)}"]
        for block in section.blocks:
            lines += ["", *_markdown(block)]
    return "\n".join(lines) + "\n"


def _markdown(block: Block) -> list[str]:
    if isinstance(block, Text):
        return [_markdown_text(block.text)]
    if isinstance(block, Items):
        return [f"- {_markdown_text(item)}" for item in block.items]
    if isinstance(block, Facts):
        return [f"- {_plain(name)}: {_markdown_text(value)}" for name, value in block.facts]
    if isinstance(block, Picture):
        return [f"![{_plain(block.alt)}]({block.file})", "", _markdown_text(block.caption)]
    head = [f"{column.group}, {column.name}" if column.group else column.name for column in block.columns]
    rows = [[f"{cell.text} ({cell.note})" if cell.note else cell.text for cell in row] for row in block.rows]
    lines = [_markdown_text(block.caption), ""]
    lines += ["| " + " | ".join(map(_plain, line)) + " |" for line in [head]]
    lines += ["| --- |" + " ---: |" * (len(head) - 1)]
    return lines + ["| " + " | ".join(map(_plain, row)) + " |" for row in rows]


def _plain(text: str) -> str:
    """Text that Markdown must not read as its own marks."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", text.replace("\n", " "))


def _markdown_text(text: str) -> str:
    parts = text.split("`")
    return "".join(f"`{part}`" if i % 2 else _plain(part) for i, part in enumerate(parts))


def to_html(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The page as one HTML file, pictures inside: light or dark as the reader's system is."""
    names = _identifiers([section.title for section in sections])
    links = "".join(f'<li><a href="#{name}">{html.escape(section.title)}</a></li>' for name, section in zip(names, sections))
    body = "\n".join(
        f'<section aria-labelledby="{name}">\n<h2 id="{name}">{html.escape(section.title)}</h2>\n' + "\n".join(map(_html, section.blocks)) + "\n</section>"
        for name, section in zip(names, sections)
    )
    nav = f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n' if len(sections) > 1 else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n'
        f"<header>\n<h1>{html.escape(title)}</h1>\n<p>{_inline(lead)}</p>\n{nav}</header>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _identifiers(titles: Sequence[str]) -> list[str]:
    found: list[str] = []
    for title in titles:
        name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
        found.append(name if name not in found else f"{name}-{len(found)}")
    return found


def _inline(text: str) -> str:
    parts = html.escape(text).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


def _html(block: Block) -> str:
    if isinstance(block, Text):
        return f"<p>{_inline(block.text)}</p>"
    if isinstance(block, Items):
        return "<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in block.items) + "</ul>"
    if isinstance(block, Facts):
        return "<dl>" + "".join(f"<div><dt>{html.escape(name)}</dt><dd>{_inline(value)}</dd></div>" for name, value in block.facts) + "</dl>"
    return _html_picture(block) if isinstance(block, Picture) else _html_table(block)


def _html_picture(picture: Picture) -> str:
    width, height = struct.unpack(">II", picture.light[16:24])  # the PNG's header: room is kept while the page loads
    light, dark = (f"data:image/png;base64,{base64.b64encode(data).decode()}" for data in (picture.light, picture.dark))
    return (
        f'<figure>\n<div class="scroll" tabindex="0" role="group" aria-label="Picture, scrolls sideways on narrow screens"><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{html.escape(picture.alt)}" width="{width * 5 // 8}" height="{height * 5 // 8}"></picture></div>\n'
        f"<figcaption>{_inline(picture.caption)}</figcaption>\n</figure>"
    )


def _html_table(table: Table) -> str:
    groups: list[tuple[str, list[str]]] = []  # columns side by side of one group share a heading
    for column in table.columns:
        if groups and column.group and groups[-1][0] == column.group:
            groups[-1][1].append(column.name)
        else:
            groups.append((column.group, [column.name]))
    two = any(group for group, _ in groups)
    first, second = "", ""
    for group, names in groups:
        if group:
            first += f'<th scope="colgroup" colspan="{len(names)}">{html.escape(group)}</th>'
            second += "".join(f'<th scope="col">{html.escape(name)}</th>' for name in names)
        else:
            first += f'<th scope="col"{" rowspan=2" if two else ""}>{html.escape(names[0])}</th>'
    head = f"<tr>{first}</tr>" + (f"<tr>{second}</tr>" if two else "")

    def cell(value: Cell) -> str:
        return html.escape(value.text) + (f"<small>{html.escape(value.note)}</small>" if value.note else "")

    rows = "\n".join(f'<tr><th scope="row">{cell(row[0])}</th>' + "".join(f"<td>{cell(value)}</td>" for value in row[1:]) + "</tr>" for row in table.rows)
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="Table, scrolls sideways on narrow screens"><table>\n'
        f"<caption>{_inline(table.caption)}</caption>\n<thead>{head}</thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>"
    )


# The dark ground is that of the dark pictures.
STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --muted: #5a5f66; --line: #d9dce0; --paper: #ffffff; --tint: #f4f5f7; --link: #005a9c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --muted: #a9afb6; --line: #343b43; --paper: #15191e; --tint: #1d2229; --link: #7cc0f0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; -webkit-text-size-adjust: 100%; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 2.5rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); overflow-wrap: anywhere; }
p, li, figcaption, caption { max-width: 46rem; overflow-wrap: anywhere; }
a { color: var(--link); }
nav ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; }
code { font: .9em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: var(--tint); padding: .1em .3em; border-radius: .25em; }
.scroll { overflow-x: auto; }
.scroll:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--muted); font-size: .9rem; padding-bottom: .6rem; }
th, td { padding: .4rem .75rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); white-space: nowrap; }
thead th { vertical-align: bottom; font-weight: 600; }
thead th[colspan] { text-align: center; }
tr > th:first-child[scope] { text-align: left; }
thead tr + tr > th:first-child[scope] { text-align: right; }
tbody th { font-weight: 600; position: sticky; left: 0; background: var(--paper); }
small { display: block; font-size: .8rem; font-weight: 400; color: var(--muted); }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .5rem 1rem; margin: 1rem 0; }
dt { font-size: .8rem; color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 1.5rem 0; }
figcaption { color: var(--muted); font-size: .9rem; margin-top: .5rem; }
img { display: block; max-width: 100%; min-width: 34rem; height: auto; }
@media print { .scroll { overflow: visible; } img { min-width: 0; } figure { break-inside: avoid; } }
"""
