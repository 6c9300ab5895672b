"""What was chosen, for images whose name asks that it be told.

Nothing is kept for other images. What is kept waits in the worker until it is asked for, or
until newer explanations take its place.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor

from vitcop_vllm.pruning.identity import MOST_EXPLAINED, explained_size
from vitcop_vllm.pruning.selection import StageTwoSelection
from vitcop_vllm.worker.step import SpanGroup, StagedStep


class PatchChoice(NamedTuple):
    """What Stage I made of one image.

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
    """Choices by image name, as lists that can be sent to another process.

    An image's choices are a dictionary with ``patches`` (n1 of V), ``labels``, ``saliency``,
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

    @contextmanager
    def follow_encoder(self, model: Any, names: Sequence[str]) -> Iterator[None]:
        """Take down what Stage I chooses while ``model`` encodes images of these names."""
        if not any(map(explained_size, names)):
            yield
            return
        model.patch_choices = []
        try:
            yield
            for name, choice in zip(names, model.patch_choices, strict=True):
                if choice is not None and explained_size(name):
                    self.record_patches(name, choice)
        finally:
            model.patch_choices = None

    def follow(self, step: StagedStep | None) -> StagedStep | None:
        """``step``, with a recorder of what it chooses for images that are to be explained."""
        if step is None or step.forward is None:
            return step
        names = [name if explained_size(name) else None for name in step.forward.images]
        if not any(names):
            return step

        def record(group: SpanGroup, stage: int, chosen: Any) -> None:
            self.record_tokens([names[i] for i in group.images], stage, chosen)

        return replace(step, forward=replace(step.forward, record=record))

    def take(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Hand over what is known of these images, and forget it."""
        return {name: self._choices.pop(name) for name in names if name in self._choices}

    def _of(self, name: str) -> dict[str, Any]:
        chosen = self._choices.setdefault(name, {})
        while len(self._choices) > MOST_EXPLAINED:
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
