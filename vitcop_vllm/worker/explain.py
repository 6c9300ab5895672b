"""Records what each Stage selects, for images and videos that a client wants explained.

A video has a record for each frame. Nothing is recorded for other images. A record waits in the
worker until the server takes it, or until newer records take its place.
"""

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor

from vitcop_vllm.pruning.identity import MOST_EXPLAINED, explained_size, frame_names
from vitcop_vllm.pruning.selection import StageTwoSelection


class PatchSelection(NamedTuple):
    """What Stage I keeps of one image.

    Attributes:
        patches: (n1,) int64, in the order of the prompt.
        labels: (n1,) int64 cluster labels; ``None`` where nothing is clustered.
        saliency: (V,) float32, higher is more salient; ``None`` where the selector does not
            rank by it.
    """

    patches: Tensor
    labels: Tensor | None
    saliency: Tensor | None


class SelectionSink:
    """Selections by image name, as lists that can be sent to another process.

    The encoder and the staged forward report every selection to it; it records those of images
    whose name is an :func:`~vitcop_vllm.pruning.identity.explained_identifier`.

    An image's record is a dictionary with ``patches`` (n1 of V), ``labels``, ``saliency``,
    ``shallow`` (n2 of n1), ``merged`` (groups of n1, each with the row it is merged into
    first) and ``deep`` (n3 of n2). A Stage that drops nothing records
    nothing.
    """

    def __init__(self) -> None:
        self._records: OrderedDict[str, dict[str, Any]] = OrderedDict()
        # Images of the encoder run in progress that are not reported yet, in its order.
        self._to_encode: deque[str] = deque()

    @contextmanager
    def attached_to(self, model: Any, names: Sequence[str]) -> Iterator[None]:
        """Be the sink of ``model`` while it encodes images of these names, in this order.

        vLLM's encoder call passes on neither names nor arguments of ours. Where no image is to be
        explained, the model has no sink and reports nothing.
        """
        if not any(map(explained_size, names)):
            yield
            return
        self._to_encode.extend(names)
        model.sink = self
        try:
            yield
            assert not self._to_encode, f"images that were not encoded: {self._to_encode}"
        finally:
            model.sink = None
            self._to_encode.clear()

    def expect_frames(self, num_frames: Sequence[int]) -> None:
        """Expect a selection for each frame of the next videos that are encoded.

        Args:
            num_frames: Of each of these videos.
        """
        names = [
            frame
            for number in num_frames
            for frame in frame_names(self._to_encode.popleft(), number)
        ]
        self._to_encode.extendleft(reversed(names))

    def record_patches(self, selections: Sequence[PatchSelection | None]) -> None:
        """Record Stage I of the next images or frames that are encoded.

        Args:
            selections: One per image; ``None`` for an image that Stage I leaves whole.
        """
        for selection in selections:
            name = self._to_encode.popleft()
            if selection is None or not explained_size(name):
                continue
            record = self._record_of(name)
            for key, tensor in selection._asdict().items():
                if tensor is not None:
                    record[key] = tensor.tolist()

    def record_tokens(
        self, names: Sequence[str], segment: int, selection: Tensor | StageTwoSelection
    ) -> None:
        """Record what spans keep at a boundary.

        Args:
            names: (G,) names of the spans' images.
            segment: The segment that the kept tokens enter, 1 or 2.
            selection: (G, m) int64, places of the kept tokens in each span; with their groups
                if Stage II merged tokens.
        """
        index = selection.index if isinstance(selection, StageTwoSelection) else selection
        for number, name in enumerate(names):
            if not explained_size(name):
                continue
            record = self._record_of(name)
            record["shallow" if segment == 1 else "deep"] = index[number].tolist()
            if isinstance(selection, StageTwoSelection):
                record["merged"] = _groups(selection, number)

    def take(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The records of these images, which the sink then forgets."""
        return {name: self._records.pop(name) for name in names if name in self._records}

    def _record_of(self, name: str) -> dict[str, Any]:
        record = self._records.setdefault(name, {})
        while len(self._records) > MOST_EXPLAINED:
            self._records.popitem(last=False)
        return record


def _groups(selection: StageTwoSelection, number: int) -> list[list[int]]:
    """Members of each merged group, the one whose row stands for them first."""
    rows = selection.index[number][selection.merged[number]].tolist()
    group_of = selection.groups[number].tolist()
    return [
        [row, *(token for token, its in enumerate(group_of) if its == group and token != row)]
        for group, row in enumerate(rows)
    ]
