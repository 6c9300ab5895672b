"""Tables of measured rows, for the terminal and for docs/results.md.

A column has a figure's name in the JSON document. Figures have three digits; a spread follows its
figure in brackets.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

Row = Mapping[str, Any]

_SPREAD = "_spread"


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """Headings, then the cells of each row; missing figures are empty."""
    names = list(dict.fromkeys(name for row in rows for name in row if not name.endswith(_SPREAD)))
    headings = [name.replace("_", " ") for name in names]
    return [headings, *([_cell(row, name) for name in names] for row in rows)]


def _cell(row: Row, name: str) -> str:
    text = _text(row.get(name))
    if name.endswith("share") and name in row:
        return f"{100 * row[name]:.2g} %"
    if spread := row.get(name + _SPREAD):
        text += f" ({' to '.join(map(_text, spread))})"
    return text


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.{3 + (abs(value) >= 10)}g}"
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return "" if value is None else str(value)


def markdown(rows: Sequence[Row]) -> str:
    """A table in GitHub's Markdown."""
    headings, *lines = cells(rows)
    return "\n".join(
        "| " + " | ".join(line) + " |" for line in (headings, ["---"] * len(headings), *lines)
    )


def named_tables(document: Mapping[str, Any]) -> Iterator[tuple[str, list[Row]]]:
    """Name and rows of every table in a bench's document."""
    engines = document["conditions"].get("engines", {})
    yield "engines", [{"engine": name, **row} for name, row in engines.items()]
    for name, rows in document.items():
        if isinstance(rows, list):
            yield name, rows
    goals = document.get("goals", {})
    yield "goals", [{"name": name, **row} for name, row in goals.items()]


def print_document(document: Mapping[str, Any]) -> None:
    """Print tables for people, then the document as JSON in the last line."""
    console = Console(width=None if sys.stdout.isatty() else 400)
    for name, rows in named_tables(document):
        if rows:
            headings, *lines = cells(rows)
            table = Table(*headings, title=name, title_justify="left", box=box.SIMPLE)
            for line in lines:
                table.add_row(*line)
            console.print(table)
    print(json.dumps(document), flush=True)
