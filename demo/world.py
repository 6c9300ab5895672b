"""The small world of the demo model: coloured shapes and signs on a background ("ground").

The ground is plain, a texture or a photo. Training and exams use this world with different
seeds.
"""

from dataclasses import dataclass

import numpy as np

from vitcop_vllm.demo.checkpoint import DEMO

PATCH = DEMO.patch_size
"""Height and width of the vision tower's patches in pixels."""

SIDE = DEMO.image_size
"""Height and width of a square exam's image in pixels. Things have the same size on smaller
images."""

Size = tuple[int, int]
"""Width and height of an image in pixels."""

SQUARE: Size = (SIDE, SIDE)

COLOURS = {
    "red": (214, 40, 40),
    "orange": (247, 132, 24),
    "yellow": (250, 220, 40),
    "green": (46, 158, 64),
    "blue": (40, 90, 220),
    "purple": (142, 60, 178),
    "white": (246, 246, 246),
    "black": (22, 22, 22),
}
COLOUR_NAMES = tuple(COLOURS)
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "moon")
RADII = {"small": (17, 21), "big": (31, 38)}  # pixels
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
_WORDS = """
ANT APE ARM ART ASH BAG BAKE BANK BAR BARN BAT BEAR BED BEE BELL BIKE BIRD BOAT BONE BOOK BOX
BREAD BUS CAB CAFE CAKE CAMP CAR CAT CHAIR CITY CLOCK COAT COFFEE COIN COW CROWN CUP DANCE DAY
DEER DESK DOG DOOR DRUM DUCK EAST EGG EXIT FARM FERRY FILM FIRE FISH FLAG FOG FOX FROG GAME GATE
GOAT GOLD GRAPE HAND HAT HEN HILL HOME HORSE HOTEL HOUR ICE INK IRON JAM JAR JAZZ JUICE KEY KING
KITE LAKE LAMP LEAF LEMON LION MAIL MAP MARKET MILK MINT MOON MOUSE MUSIC NEST NIGHT NORTH NUT
OAK OIL OPEN OVEN OWL PARK PEAR PEN PIANO PIE PLUM POND POST QUEEN QUIZ RAIN RIVER ROAD ROBOT
ROSE SALT SAND SHIP SHOE SHOP SILK SNOW SOAP SOUP SOUTH STOP SUN TAXI TEA TENT TIGER TOWER TRAIN
TREE TRUCK TUNA VAN VASE VIEW WALL WAX WEST WHALE WIND WOLF WOOD YARD YEAR ZEBRA ZERO ZOO
"""
WORDS = tuple(_WORDS.split())

FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSansMono-Bold",
    "DejaVuSerif-Bold",
)
"""Fonts that come with Matplotlib."""

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "camera", "moon", "motorcycle_left")
TEXTURES = ("brick", "grass", "gravel")

Rng = np.random.Generator


@dataclass(frozen=True)
class Thing:
    """A coloured shape. ``x``, ``y`` and ``radius`` in pixels, ``angle`` in degrees."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    angle: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Sign:
    """A written word or number.

    Attributes:
        text: Capital letters or digits.
        font: One of :data:`FONTS`.
        height: Font size in pixels.
        x, y: Left and top of the text in pixels.
        ink: Colour of the letters, RGB.
        ground: Colour of the plate behind them, RGB, or of their outline.
        plate: Whether the letters are drawn on a plate; otherwise they have an outline.
    """

    text: str
    font: str
    height: int
    x: float
    y: float
    ink: tuple[int, int, int]
    ground: tuple[int, int, int]
    plate: bool


@dataclass(frozen=True)
class Letter:
    """A letter of a sign, by its index in the text."""

    sign: Sign
    index: int


Shown = Thing | Sign | Letter
"""An item that patches may show."""


@dataclass(frozen=True)
class Scene:
    """The content of an image. ``ground`` names the background; ``seed`` fixes drawing details."""

    size: Size
    things: tuple[Thing, ...]
    sign: Sign | None
    ground: str
    seed: int
    odd: Thing | None = None

    @property
    def shown(self) -> tuple[Thing | Sign, ...]:
        """The things and the sign."""
        return self.things if self.sign is None else (*self.things, self.sign)
