"""Phases of the training of each form."""

from dataclasses import dataclass

from demo.batch import BatchShape


@dataclass(frozen=True)
class Phase:
    """A phase of training.

    Attributes:
        name: Name in the log.
        steps: Optimiser steps.
        batch: Shape of a step's batch.
        rate: Learning rate at the first and last step, as fractions of the full rate.
        tower_rate: The same for the vision tower and its heads.
    """

    name: str
    steps: int
    batch: BatchShape
    rate: tuple[float, float]
    tower_rate: tuple[float, float]

    def rates(self, step: int) -> tuple[float, float]:
        """Both rates at a step."""
        return self._at(step, *self.rate), self._at(step, *self.tower_rate)

    def _at(self, step: int, begin: float, end: float) -> float:
        return begin + (end - begin) * (step / self.steps)


DROPPED = (0.0, 0.0, 0.25)
"""Fractions of visual tokens dropped from the decoder; each batch draws one. Steps get cheaper, and
the model learns to spread information over several tokens, as large models do."""

GAPS = (0.0, 0.25, 0.5, 0.67, 0.85)
"""Fractions in the phases that drop background first. Without these phases the model counts and
lists things by the amount of background, and fails if a selector drops background."""

LLAVA_PHASES = (
    Phase("patches", 800, BatchShape(168, 64), (1.0, 1.0), (1.0, 0.25)),
    # The tower's rate is low: at the decoder's rate it unlearns letters and places.
    Phase("answers", 1500, BatchShape(168, 24, 190, DROPPED, 0.14), (1.0, 0.5), (0.3, 0.2)),
    Phase("full size", 381, BatchShape(336, 12, 190, DROPPED, 0.14), (0.5, 0.3303), (0.3, 0.1996)),
    # The tower's rate is higher now, because larger letters are new to it.
    Phase("finish", 800, BatchShape(336, 12, 190, DROPPED, 0.14), (0.35, 0.01), (0.5, 0.01)),
    Phase("gaps", 300, BatchShape(336, 12, 190, GAPS, 0.14, True), (0.15, 0.01), (0.05, 0.01)),
    # Large models hardly attend to images in their deep layers. This phase gives the deep layers
    # few visual tokens, so that the model learns the same.
    Phase(
        "depth", 220, BatchShape(336, 12, 190, GAPS, 0.14, True, 0.25), (0.25, 0.01), (0.05, 0.01)
    ),
)
WARMUP = 60  # steps

QWEN_PHASES = (
    # In the same time, small images show more things and have more questions.
    Phase("patches", 600, BatchShape(168, 32), (1.0, 1.0), (1.0, 0.5)),
    Phase("answers", 800, BatchShape(168, 24, 190, DROPPED, 0.14), (0.7, 0.5), (0.4, 0.4)),
    Phase("full size", 500, BatchShape(336, 12, 190, GAPS, 0.14, True), (0.5, 0.2), (0.4, 0.2)),
    Phase(
        "depth", 200, BatchShape(336, 12, 190, GAPS, 0.14, True, 0.25), (0.25, 0.01), (0.25, 0.01)
    ),
)
