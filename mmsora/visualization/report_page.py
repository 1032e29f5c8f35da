"""A page for any browser: one file, nothing loaded from elsewhere."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

__all__ = ["Section", "content", "html_page", "report_page"]

Section = tuple[str, Any]  # a heading, and what stands below it

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #222; --faint: #6b7280; --line: #e3e5e9;
  --card: #f7f8fa; --accent: #4878a8; --warn: #b45309; --good: #2f855a; }
@media (prefers-color-scheme: dark) { :root { --paper: #1c1d20; --ink: #ddd; --faint: #9299a6;
  --line: #34363c; --card: #25262b; --accent: #7aa7d6; --warn: #f0b35a; --good: #6cc08b; } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem;
  color: var(--ink); background: var(--paper); }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
table { border-collapse: collapse; } td { padding: .1rem .8rem .1rem 0; vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
td.b { width: 24rem; } td.b div { background: var(--accent); height: .9rem; min-width: 1px; }
li, td { overflow-wrap: anywhere; }
"""


def html_page(title: str, body: str, style: str = "", script: str = "") -> str:
    """The page around a body.

    Args:
        title: Of the page.
        body: HTML.
        style: CSS beside that of all pages.
        script: JavaScript, run when the body is there.

    Returns:
        HTML.
    """
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head><body>\n{body}\n",
        f"<script>\n{script}</script>\n" if script else "",
        "</body></html>\n",
    ]
    return "".join(parts)


def report_page(title: str, sections: Sequence[Section]) -> str:
    """Write a page of figures.

    Args:
        title: Of the page.
        sections: Headings, each with what ``content`` takes. Those without are left out.

    Returns:
        HTML.
    """
    parts = [f"<h1>{escape(title)}</h1>"]
    for heading, what in sections:
        if what:
            parts.append(f"<h2>{escape(heading)}</h2>\n{content(what)}")
    return html_page(title, "\n".join(parts))


def content(what: Any) -> str:
    """What stands below a heading.

    Args:
        what: A text, a list of texts, a table by name, or the bars of a histogram: whole numbers
            by name.

    Returns:
        HTML.
    """
    if isinstance(what, str):
        return f"<p>{escape(what)}</p>"
    if not isinstance(what, Mapping):
        return "<ul>" + "".join(f"<li>{escape(str(item))}</li>" for item in what) + "</ul>"
    counted = all(type(value) is int for value in what.values())
    most = max(what.values()) if counted else 0
    rows = []
    for name, value in what.items():
        cells = f"<td>{escape(str(name))}</td>"
        if counted:
            width = 100 * value / (most or 1)
            cells += f'<td class="n">{value:,}</td>'
            cells += f'<td class="b"><div style="width:{width:.1f}%"></div></td>'
        else:
            cells += f'<td class="n">{escape(str(value))}</td>'
        rows.append(f"<tr>{cells}</tr>")
    return "<table>" + "".join(rows) + "</table>"
