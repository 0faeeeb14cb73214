"""The page of a report: HTML that stands alone."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }}
h1 {{ font-size: 1.5em; }} h2 {{ font-size: 1.2em; margin-top: 2em; }}
.verdict {{ border-left: 4px solid #0072b2; padding: .6em 1em; background: #f3f7fb; font-size: 1.1em; }}
.note {{ color: #555; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; margin: .6em 0; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .2em .7em; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
th {{ border-bottom: 2px solid #999; }}
img {{ max-width: 100%; height: auto; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def tag(name: str, text: str) -> str:
    """An element that holds plain text."""
    return f"<{name}>{escape(text)}</{name}>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain text, which scrolls where it is too wide."""

    def line(name: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(tag(name, cell) for cell in cells) + "</tr>"

    return '<div class="wide"><table>' + line("th", head) + "".join(line("td", row) for row in rows) + "</table></div>"


def picture(name: str, figures: Mapping[str, Path]) -> str:
    """A PNG file, held in the page."""
    data = base64.b64encode(figures[name].read_bytes()).decode()
    return f'<p><img alt="{name}" src="data:image/png;base64,{data}"></p>'
