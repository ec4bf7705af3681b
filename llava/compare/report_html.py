"""The report of a comparison as one HTML file: style, script and pictures are in it, nothing is loaded from outside.

Text of the data reaches the page in two ways: escaped, or as JSON that the script puts in as text and never as HTML.
"""

import base64
import html
import json

from llava.compare.report_content import READS, Bullets, Picture, Section, Strong, Table
from llava.compare.report_page import EXPLORER, PAGE, SCRIPT, STYLE

LONG = 36  # characters, from which a cell is broken into lines


def escape(text) -> str:
    return html.escape(str(text))


def table(part: Table) -> str:
    """In a box of its own, which scrolls where the page is narrow, also by keyboard."""
    caption = escape(part.caption)
    right, lines = part.numeric(), []
    head = "".join(_heading(column, "col", at) for column, at in zip(part.columns, right, strict=True))
    for first, *cells in part.rows:
        marked = (_cell(cell, at) for cell, at in zip(cells, right[1:], strict=True))
        lines.append(f"<tr>{_heading(first, 'row', False)}{''.join(marked)}</tr>")
    rows = "\n".join(lines)
    return (
        f'<div class="box" role="region" aria-label="{caption}" tabindex="0"><table>'
        f"<caption><span>{caption}</span></caption><thead><tr>{head}</tr></thead>\n"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _heading(text: str, scope: str, right: bool) -> str:
    words = escape(text).replace("_", "_<wbr>")  # where a long name may go on in the next line
    words = words.replace("(n ", "(n&nbsp;")
    return f'<th scope="{scope}"{_look(text, right)}>{words}</th>'


def _cell(text: str, right: bool) -> str:
    words = f"<strong>{escape(text)}</strong>" if isinstance(text, Strong) else escape(text)
    return f"<td{_look(text, right)}>{words}</td>"


def _look(text: str, right: bool) -> str:
    names = ["right"] * right + ["long"] * (len(text) > LONG)
    return f' class="{" ".join(names)}"' if names else ""


def written(part, pictures: dict[str, bytes]) -> str:
    if isinstance(part, Table):
        return table(part)
    if isinstance(part, Bullets):
        return f'<ul class="notes">{"".join(f"<li>{escape(line)}</li>" for line in part.lines)}</ul>'
    if isinstance(part, Picture):
        data, words = base64.b64encode(pictures[part.file]).decode("ascii"), escape(part.words)
        image = f'<img src="data:image/png;base64,{data}" alt="{words}">'
        box = f'<div class="box" role="region" aria-label="{words}" tabindex="0">{image}</div>'
        return f"<figure>{box}<figcaption>{words}</figcaption></figure>"
    return f"<p>{escape(part)}</p>"


def embedded_json(value) -> str:
    """JSON inside a <script>, which no text in it can end."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def page(title: str, sections: list[Section], pictures: dict[str, bytes], questions: dict) -> str:
    """The whole of `report.html`.

    Args:
        pictures: PNG files by name.
        questions: from `report_questions.embedded`.
    """
    parts, links = [], []
    for number, section in enumerate(sections):
        head = f"<h2>{escape(section.title)}</h2>" if section.title else ""
        if head:
            links.append(f'<li><a href="#part{number}">{escape(section.title)}</a></li>')
        body = "\n".join(written(part, pictures) for part in section.parts)
        body += explorer(questions) if section.title == READS else ""
        parts.append(f'<section id="part{number}">{head}\n{body}</section>')
    fields = {"TITLE": escape(title), "STYLE": STYLE, "LINKS": "".join(links), "PARTS": "\n".join(parts)}
    return PAGE.substitute(fields)


def explorer(questions: dict) -> str:
    shown, total = len(questions["questions"]), questions["total"]
    if not shown:
        return "<p>On no question one tower is right where another is wrong.</p>"
    if shown == total:
        words = f"All {total} questions on which towers disagree are here."
    else:
        words = f"{shown} of the {total} questions on which towers disagree are here, from every pair of towers."
    data = f'<script type="application/json" id="data">{embedded_json(questions)}</script>'
    return f"<p>{words}</p>\n{EXPLORER}\n{data}\n<script>{SCRIPT}</script>"
