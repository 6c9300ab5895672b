"""What was found, as text and as a JSON document."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

import yaml

from vitcop_server.calibrate.bounds import lower_bound, trials_needed
from vitcop_server.calibrate.groups import Goal, Result
from vitcop_server.calibrate.measurement import Measurement, Refused
from vitcop_vllm.pruning.settings import PUBLISHED_ROWS

_MOST_BREAKS = 5
_TEXT_LENGTH = 60


@dataclass(frozen=True)
class Break:
    """A conversation that disagrees, at the lowest ratio at which it does."""

    ratio: float
    images: str
    question: str
    unpruned: str
    pruned: str


@dataclass(frozen=True)
class Report:
    """Everything that a run found.

    Attributes:
        results: One for each group and measure; the first is of all images.
        time_shares: Times at the chosen ratio over those at ratio 0, of several answers.
        num_repeated, num_unstable: Answers asked again at ratio 0, and how many of them changed.
        num_unscored: Conversations that the measure ``logprob`` compares exactly.
        settings: The server's, as ``/v1/pruning/config`` says; empty if it was not reached.
        notes: Sentences about the run.
    """

    model: str
    measurement: Measurement
    goal: Goal
    results: Sequence[Result]
    time_shares: Sequence[float] = ()
    refused: Sequence[Refused] = ()
    num_repeated: int = 0
    num_unstable: int = 0
    num_unscored: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def total(self) -> Result:
        """All images, by the measure that chooses the ratio."""
        return self.results[0]

    @property
    def chosen_ratio(self) -> float:
        """The proven ratio; if there is none, the observed one."""
        return self.total.proven.ratio or self.total.observed.ratio

    def costs(self) -> list[dict[str, float]]:
        """Tokens of all images at each ratio at which all were asked."""
        members = self.total.group.members
        rows = []
        for ratio in self.total.curve:
            pairs = [
                (reply, baseline)
                for one in members
                for reply, baseline in zip(
                    self.measurement.replies(ratio, one),
                    self.measurement.replies(0.0, one),
                    strict=True,
                )
            ]
            visual = sum(reply.encoder for reply, _ in pairs)
            kept = sum(reply.encoder * (1 - reply.pruning_ratio) for reply, _ in pairs)
            rows.append(
                {
                    "ratio": ratio,
                    "visual_tokens": kept / len(pairs),
                    "visual_tokens_saved": 1 - kept / visual if visual else 0.0,
                    "prompt_tokens": fmean(reply.prompt_tokens for reply, _ in pairs),
                }
            )
        return rows

    def breaks(self) -> list[Break]:
        """The conversations that disagree at the lowest ratios, by the first measure."""
        found = []
        for one in self.total.group.members:
            for ratio in self.total.curve:
                if self.measurement.agrees(self.total.measure, ratio, one):
                    continue
                replies = self.measurement.replies(ratio, one)
                baselines = self.measurement.replies(0.0, one)
                turns = list(zip(one.questions, baselines, replies, strict=True))
                changed = [turn for turn in turns if turn[1].text != turn[2].text] or turns
                question, baseline, reply = changed[0]
                found.append(Break(ratio, one.name, question, baseline.text, reply.text))
                break
        return sorted(found, key=lambda one: one.ratio)[:_MOST_BREAKS]

    def document(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "keep": self.goal.keep,
            "confidence": self.goal.confidence,
            "images": self.total.group.num_images,
            "images_needed": self.goal.images_needed,
            "proven_ratio": self.total.proven.ratio,
            "observed_ratio": self.total.observed.ratio,
            "groups": [
                {
                    "kind": result.group.kind,
                    "use": result.group.use,
                    "measure": result.measure,
                    "images": result.group.num_images,
                    "proven_ratio": result.proven.ratio,
                    "observed_ratio": result.observed.ratio,
                    "monotone": result.proven.is_monotone and result.observed.is_monotone,
                    "agreement": {
                        f"{ratio:.6g}": {
                            "agreeing": agreement.agreeing,
                            "bound": round(self.goal.bound(agreement), 6),
                        }
                        for ratio, agreement in result.curve.items()
                    },
                }
                for result in self.results
            ],
            "costs": self.costs(),
            "time": {
                "ratio": self.chosen_ratio,
                "share": median(self.time_shares) if self.time_shares else None,
                "pairs": len(self.time_shares),
            },
            "breaks": [vars(one) for one in self.breaks()],
            "unscored": self.num_unscored,
            "refused": [
                {"images": one.conversation.name, "message": one.message} for one in self.refused
            ],
            "repeated": {"asked": self.num_repeated, "changed": self.num_unstable},
        }

    def text(self) -> str:
        """The report for people, with the YAML snippet."""
        parts = [self._head(), self._groups(), self._verdict(), self._costs(), self._breaks()]
        parts += [self._notes(), self.yaml()]
        return "\n\n".join(part for part in parts if part)

    def yaml(self) -> str:
        """Settings for the server's file; comments if they are not proven."""
        result = self.total
        pruning: dict[str, Any] = {"default_ratio": self.chosen_ratio}
        fractions = self.settings.get("fractions")
        if fractions and fractions != [row.model_dump() for row in PUBLISHED_ROWS]:
            pruning["fractions"] = fractions
        lines = yaml.safe_dump({"pruning": pruning}, sort_keys=False).splitlines()
        if not result.proven.ratio:
            if not result.observed.ratio:
                return "# No ratio of the grid keeps the goal: leave the ratio at 0."
            lines = [
                "# Not proven, only observed on these images. Remove the # to use it anyway.",
                *(f"# {line}" for line in lines),
            ]
        return "\n".join(lines)

    def _head(self) -> str:
        group = self.total.group
        return (
            f"{self.model}: {group.num_images} images, {len(group.members)} conversations.\n"
            f"Goal: {_percent(self.goal.keep)} of images answer as they do at ratio 0, "
            f"at {_percent(self.goal.confidence)} confidence."
        )

    def _groups(self) -> str:
        head = ["kind", "use", "measure", "images", "proven", "observed", "agree", "at least"]
        rows = []
        for result in self.results:
            can_prove = result.group.num_images >= self.goal.images_needed
            shown = result.proven.ratio or result.observed.ratio
            agreement = result.curve[shown]
            rows.append(
                [
                    result.group.kind,
                    result.group.use,
                    result.measure,
                    str(result.group.num_images),
                    _ratio(result.proven.ratio) if can_prove else "-",
                    _ratio(result.observed.ratio),
                    result.count(shown) if shown else "",
                    _percent(self.goal.bound(agreement)) if shown else "",
                ]
            )
        return _table(head, rows)

    def _verdict(self) -> str:
        result, keep = self.total, _percent(self.goal.keep)
        num_images = result.group.num_images
        if result.proven.ratio:
            bound = _percent(self.goal.bound(result.curve[result.proven.ratio]))
            return (
                f"Proven by {result.measure}: at ratio {_ratio(result.proven.ratio)} at least "
                + (f"{bound} of such images agree.")
            )
        lines = [f"No ratio is proven to keep {keep}."]
        needed = self.goal.images_needed
        if num_images < needed:
            most = _percent(lower_bound(num_images, num_images, self.goal.confidence))
            lines.append(
                f"These images are too few: {num_images} can prove at most {most}, if all agree. "
                f"{keep} needs {needed} images that all agree"
                + f", or {trials_needed(self.goal.keep, self.goal.confidence, 1)} with one break."
            )
        if observed := result.observed.ratio:
            agreement = result.curve[observed]
            lines.append(
                f"Observed only: at ratio {_ratio(observed)}, {agreement.agreeing} of "
                f"{agreement.images} images agree, which proves "
                f"{_percent(self.goal.bound(agreement))}."
            )
        return "\n".join(lines)

    def _costs(self) -> str:
        head = ["ratio", "visual tokens", "saved", "prompt tokens"]
        measures = _of_total(self.results, self.total)
        head[1:1] = [f"agree ({result.measure})" for result in measures]
        rows = [
            [
                _ratio(row["ratio"]),
                *(result.count(row["ratio"]) for result in measures),
                f"{row['visual_tokens']:.1f}",
                _percent(row["visual_tokens_saved"]),
                f"{row['prompt_tokens']:.1f}",
            ]
            for row in self.costs()
        ]
        return _table(head, rows) + (
            "\nTokens: means per answer, from usage; visual tokens averaged over layers."
            + self._time()
        )

    def _time(self) -> str:
        if not self.time_shares:
            return ""
        share = median(self.time_shares)
        change = f"{_percent(abs(1 - share))} {'less' if share <= 1 else 'more'}"
        return (
            f"\nTime of an answer at ratio {_ratio(self.chosen_ratio)}: {change} than at ratio 0\n"
            f"(median of {len(self.time_shares)} pairs, one request after the other)."
        )

    def _breaks(self) -> str:
        breaks = self.breaks()
        if not breaks:
            return "No image breaks at the ratios that were asked."
        rows = [
            [
                _ratio(one.ratio),
                one.images,
                _short(one.question),
                _short(one.unpruned),
                _short(one.pruned),
            ]
            for one in breaks
        ]
        title = f"Images that break first ({self.total.measure}):\n"
        return title + _table(["ratio", "image", "question", "at ratio 0", "pruned"], rows)

    def _notes(self) -> str:
        notes = list(self.notes)
        if self.num_unstable:
            notes.append(
                f"{self.num_unstable} of {self.num_repeated} answers changed when they were asked "
                "again at ratio 0: some breaks are the server's own, and not from pruning."
            )
        if self.num_unscored:
            notes.append(
                f"{self.num_unscored} conversations have an answer that the server cannot score: "
                "by logprob they are compared exactly."
            )
        if any(not (r.proven.is_monotone and r.observed.is_monotone) for r in self.results):
            notes.append(
                "Agreement does not fall steadily in some groups. There all ratios were asked, and "
                "the ratio is the last below the first that fails."
            )
        if self.refused:
            first = self.refused[0]
            notes.append(
                f"{len(self.refused)} conversations were refused at ratio 0 and left out, such as "
                f"{first.conversation.name}: {first.message}"
            )
        return "\n".join(notes)


def print_report(report: Report) -> None:
    """Print the text, then the JSON document in one line."""
    print(report.text())
    print()
    print(json.dumps({"calibrate": report.document()}))


def _of_total(results: Sequence[Result], total: Result) -> list[Result]:
    return [result for result in results if result.group == total.group]


def _ratio(ratio: float) -> str:
    return f"{ratio:.3f}".rstrip("0").rstrip(".") if ratio else "0"


def _percent(share: float) -> str:
    # Rounded down: a bound of 98.96 % is no 99 %.
    return f"{math.floor(share * 1000 + 1e-9) / 10:g} %"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _TEXT_LENGTH else line[: _TEXT_LENGTH - 1] + "…"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(head), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
