"""How an image lies in its visual tokens."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ImageLayout:
    """An image as the decoder would see it unpruned.

    Attributes:
        rows, columns: Grid of its visual tokens, in row-major order.
        box: Left, top, right, bottom of what the encoder sees, in the image's own pixels.
    """

    rows: int
    columns: int
    box: tuple[float, float, float, float]

    @property
    def num_tokens(self) -> int:
        """V, its visual tokens."""
        return self.rows * self.columns
