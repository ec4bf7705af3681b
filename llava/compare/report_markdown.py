"""The report of a comparison as Markdown."""

import html
import re

from llava.compare.report_content import READS, Bullets, Picture, Section, Strong, Table

# what Markdown would read as something other than text (HTML's own marks are made entities first): an underscore inside
# a word and brackets without an address are text
_MARKS = re.compile(r"[\\`*|~$]|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[:])|^[-+#](?=[#\s])")


def escape(text: str) -> str:
    """Text on one line that Markdown shows as it is, also in a table."""
    return _MARKS.sub(r"\\\g<0>", html.escape(" ".join(str(text).split()), quote=False))


def table(part: Table) -> str:
    lines = [f"**{escape(part.caption)}**", "", _row(part.columns)]
    lines.append(_row(["---:" if right else "---" for right in part.numeric()], escape=str))
    lines += [_row(row) for row in part.rows]
    return "\n".join(lines)


def _row(cells, escape=escape) -> str:
    return f"| {' | '.join(f'**{escape(cell)}**' if isinstance(cell, Strong) else escape(cell) for cell in cells)} |"


def written(part) -> str:
    if isinstance(part, Table):
        return table(part)
    if isinstance(part, Bullets):
        return "\n".join(f"- {escape(line)}" for line in part.lines)
    if isinstance(part, Picture):
        return f"![{escape(part.words)}]({part.file})"
    return escape(part)


def markdown(title: str, sections: list[Section]) -> str:
    """The whole of `report.md`."""
    parts = [f"# {escape(title)}"]
    for section in sections:
        parts += [f"## {escape(section.title)}"] if section.title else []
        parts += [written(part) for part in section.parts]
        if section.title == READS:
            parts.append("[The questions themselves, with pictures, towers side by side](report.html)")
    return "\n\n".join(parts) + "\n"
