"""A page of figures for any browser: one file, no scripts, nothing loaded from elsewhere."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

__all__ = ["Section", "report_page"]

Section = tuple[str, Any]  # a heading, and what stands below it

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem;
  color: #222; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
table { border-collapse: collapse; } td { padding: .1rem .8rem .1rem 0; vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
td.b { width: 24rem; } td.b div { background: #4878a8; height: .9rem; min-width: 1px; }
li { overflow-wrap: anywhere; }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #1c1d20; } }
"""


def report_page(title: str, sections: Sequence[Section]) -> str:
    """Write the page.

    Args:
        title: Of the page.
        sections: Headings, each with a text, a list of texts, a table by name, or the bars of a
            histogram: whole numbers by name. Sections without content are left out.

    Returns:
        HTML.
    """
    parts = [f"<h1>{escape(title)}</h1>"]
    for heading, content in sections:
        if content:
            parts.append(f"<h2>{escape(heading)}</h2>\n{_content(content)}")
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def _content(content: Any) -> str:
    if isinstance(content, str):
        return f"<p>{escape(content)}</p>"
    if not isinstance(content, Mapping):
        return "<ul>" + "".join(f"<li>{escape(str(item))}</li>" for item in content) + "</ul>"
    counted = all(type(value) is int for value in content.values())
    most = max(content.values()) if counted else 0
    rows = []
    for name, value in content.items():
        cells = f"<td>{escape(str(name))}</td>"
        if counted:
            width = 100 * value / (most or 1)
            cells += f'<td class="n">{value:,}</td>'
            cells += f'<td class="b"><div style="width:{width:.1f}%"></div></td>'
        else:
            cells += f'<td class="n">{escape(str(value))}</td>'
        rows.append(f"<tr>{cells}</tr>")
    return "<table>" + "".join(rows) + "</table>"
