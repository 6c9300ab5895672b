"""``python -m benchmarks.results``: write docs/results.md from measured documents.

docs/results/ holds one JSON document per run, the last line of a bench's output, and
``template.txt``. In the template, ``{{ run conditions }}``, ``{{ run goals }}`` and
``{{ run prefill }}`` stand for a run's conditions, its goals, and a scenario's rows.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.goals import check_goals
from benchmarks.tables import markdown

DOCS = Path(__file__).parents[1] / "docs"
_PLACE = re.compile(r"\{\{ (\S+) (\S+) \}\}")


def render(folder: Path = DOCS / "results") -> str:
    """The text of docs/results.md.

    Raises:
        KeyError: If the template names rows that a run does not have.
        OSError: If the template names an unknown run.
    """

    def part(place: re.Match[str]) -> str:
        run, name = place.groups()
        document = json.loads((folder / f"{run}.json").read_text())
        if name == "conditions":
            return _conditions(document["conditions"])
        return _goals(document) if name == "goals" else markdown(document[name])

    return _PLACE.sub(part, (folder / "template.txt").read_text())


def _conditions(conditions: Mapping[str, Any]) -> str:
    about = dict(conditions)
    if "load_format" in about:
        about.setdefault("weights", _weights(about))
    note = f"; {about['note']}" if "note" in about else ""
    lines = [f"- Command: `{about['command']}`{note}"]
    if "processor" in about:
        versions = ", ".join(f"{name} {about[name]}" for name in ("vllm", "torch") if name in about)
        lines += [
            f"- Machine: {about['cpus']} cores of {about['processor']}; {versions}",
            f"- Model: {about['model']}"
            + (f"; weights: {about['weights']}" if "weights" in about else ""),
        ]
    if "rounds" in about:
        lines.append(f"- Rounds: {about['rounds']}")
    return "\n".join(lines)


def _weights(conditions: Mapping[str, Any]) -> str:
    options = conditions.get("options", {})
    return f"{conditions.get('load_format')}, {options.get('dtype')}" + (
        ", compiled" if conditions.get("compile") else ""
    )


def _goals(document: Mapping[str, Any]) -> str:
    """The goals that are met and missed, with worst figure and limit."""
    goals = document.get("goals") or check_goals(document)
    lines = []
    for title, met in (("Met", True), ("Missed", False)):
        names = [
            f"{name.replace('_', ' ')} {goal['figure']:.3g} ({goal['goal']})"
            for name, goal in goals.items()
            if goal["met"] is met
        ]
        lines.append(f"**{title}**: {', '.join(names) or 'nothing'}.")
    return "\n".join(lines)


def main() -> None:
    (DOCS / "results.md").write_text(render())


if __name__ == "__main__":
    main()
