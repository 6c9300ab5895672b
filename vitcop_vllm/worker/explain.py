"""What was chosen, for pictures whose name asks that it be told.

Nothing is kept for other pictures. What is kept waits in the worker until it is asked for, or
until newer explanations take its place.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from vitcop_vllm.pruning.selection import StageTwoSelection

MOST_PICTURES = 256
"""Explanations that wait to be asked for; some 10 kB each."""


class PatchChoice(NamedTuple):
    """What Stage I made of one picture.

    Attributes:
        patches: (n1,) int64, ascending.
        labels: (n1,) int64 cluster labels; ``None`` where nothing is clustered.
        saliency: (V,) float32, higher is more salient; ``None`` where the selector does not
            look at it.
    """

    patches: Tensor
    labels: Tensor | None
    saliency: Tensor | None


@dataclass
class ChoiceRecorder:
    """Choices by picture name, as lists that can be sent to another process.

    A picture's choices are a dictionary with ``patches`` (n1 of V), ``labels``, ``saliency``,
    ``shallow`` (n2 of n1), ``merged`` (groups of n1, each with the row it is merged into
    first) and ``deep`` (n3 of n2). What a stage did not choose, because it drops nothing, is
    absent.
    """

    _choices: OrderedDict[str, dict[str, Any]] = field(default_factory=OrderedDict)

    def record_patches(self, name: str, choice: PatchChoice) -> None:
        """Take down Stage I's choice."""
        chosen = self._of(name)
        for key, tensor in choice._asdict().items():
            if tensor is not None:
                chosen[key] = tensor.tolist()

    def record_tokens(
        self, names: Sequence[str | None], stage: int, chosen: Tensor | StageTwoSelection
    ) -> None:
        """Take down what spans keep at a boundary; spans without a name are passed over.

        Args:
            names: G names.
            stage: 1 or 2.
            chosen: (G, m) int64, the places in each span of the tokens that go on; with their
                groups, if Stage II merged tokens.
        """
        index = chosen.index if isinstance(chosen, StageTwoSelection) else chosen
        for number, name in enumerate(names):
            if name is None:
                continue
            told = self._of(name)
            told["shallow" if stage == 1 else "deep"] = index[number].tolist()
            if isinstance(chosen, StageTwoSelection):
                told["merged"] = _groups(chosen, number)

    def take(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Hand over what is known of these pictures, and forget it."""
        return {name: self._choices.pop(name) for name in names if name in self._choices}

    def _of(self, name: str) -> dict[str, Any]:
        chosen = self._choices.setdefault(name, {})
        while len(self._choices) > MOST_PICTURES:
            self._choices.popitem(last=False)
        return chosen


def _groups(selection: StageTwoSelection, number: int) -> list[list[int]]:
    """Members of each merged group, the one whose row stands for them first."""
    rows = selection.index[number][selection.merged[number]].tolist()
    group_of = selection.groups[number].tolist()
    return [
        [row, *(token for token, its in enumerate(group_of) if its == group and token != row)]
        for group, row in enumerate(rows)
    ]
