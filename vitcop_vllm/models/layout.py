"""Grid of an image's visual tokens."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ImageLayout:
    """Layout of an image without pruning.

    Attributes:
        rows, columns: Grid of the visual tokens, in row-major order.
        box: Left, top, right, bottom of the part that the encoder sees, in pixels of the image.
    """

    rows: int
    columns: int
    box: tuple[float, float, float, float]

    @property
    def num_tokens(self) -> int:
        """V, number of visual tokens."""
        return self.rows * self.columns
