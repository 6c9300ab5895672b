"""The operator's settings of pruning, validated once and then frozen.

The same object is built from a YAML file's ``pruning:`` section, from vLLM's
``--additional-config`` and from Python. Only :meth:`PruningSettings.parse_ratio` decides whether a
request's ratio is valid.
"""

import difflib
import math
import pkgutil
import re
import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

RATIO_KEY = "pruning_ratio"
"""Name of a request's ratio, in the request body and in the processor keywords."""

RATIO_HEADER = "X-Pruning-Ratio"
"""Request header that sets the ratio, and response header that reports the accepted ratio."""

AUTO = "auto"
"""In place of a ratio: a ratio for each image, by its detail; see ``amount``."""

CONFIG_KEY = "pruning"
"""Name of the settings, in a YAML file, in ``--additional-config`` and in ``hf_config``."""

_DECIMAL = re.compile(r"[0-9]{1,3}(\.[0-9]{1,20})?|\.[0-9]{1,20}", re.ASCII)

SELECTOR_NAMES = tuple(
    module.name for module in pkgutil.iter_modules([str(Path(__file__).with_name("selectors"))])
)
"""Selectors are the files of the folder ``selectors``."""


def _known_selector(name: str) -> str:
    if name not in SELECTOR_NAMES:
        raise ValueError(f"no selector is called {name!r}; choose {', '.join(SELECTOR_NAMES)}")
    return name


SelectorName = Annotated[str, AfterValidator(_known_selector)]

KernelsName = Literal["auto", "torch", "triton"]
"""Implementations of the functions that select tokens; see ``kernel_set``."""

SignalName = Literal["keys", "raw_keys", "values", "image_attention"]
"""Signals that Stages II and III rank tokens by; see ``signals``."""

Fraction = Annotated[float, Field(gt=0.0, le=1.0, strict=True)]
Positive = Annotated[float, Field(gt=0.0, strict=True)]
Ratio = Annotated[float, Field(ge=0.0, lt=1.0, strict=True)]
RatioOrAuto = Annotated[
    Annotated[Ratio, Tag("")] | Annotated[Literal["auto"], Tag("auto")],
    Discriminator(lambda value: AUTO if value == AUTO else ""),
]
"""Errors are those of a ratio, with its name only: :func:`format_validation_error` leaves out the
empty tag."""

Layer = Annotated[int, Field(ge=1, strict=True)]


def format_validation_error(error: ValidationError, section: str = CONFIG_KEY) -> str:
    """One line that names each invalid setting with its section, and says what is wrong."""
    return "; ".join(
        ".".join(str(part) for part in (section, *detail["loc"]) if part != "")
        + ": "
        + detail["msg"].removeprefix("Value error, ")
        for detail in error.errors()
    )


def quote(value: object) -> str:
    """A client's value for an error message, shortened. Accepts any value."""
    try:
        return reprlib.repr(value)
    except ValueError:  # an integer with too many digits to print
        return f"a value of type {type(value).__name__}"


class Frozen(BaseModel):
    """Base of settings: immutable and hashable. An unknown key raises an error with all keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = list(cls.model_fields)
        for key in data:
            if key in known:
                continue
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown setting {key!r}.{hint} Allowed: {', '.join(sorted(known))}.")
        return data


class FractionRow(Frozen):
    """One row of the published table: fractions of Stage I at one keep fraction.

    Attributes:
        keep: Layer-averaged keep fraction, in (0, 1].
        encoder: Share of the encoder's visual tokens that Stage I keeps, in (0, 1].
        centres: Cluster centres as a share of the tokens that Stage I keeps, in (0, 1].
    """

    keep: Fraction
    encoder: Fraction
    centres: Fraction


PUBLISHED_ROWS = (
    FractionRow(keep=1 / 9, encoder=0.3, centres=0.12),
    FractionRow(keep=2 / 9, encoder=0.4, centres=0.15),
    FractionRow(keep=1 / 3, encoder=0.5, centres=0.18),
)
"""ViTCoP's settings for LLaVA-1.5-7B (arXiv 2601.17818)."""


class AutoBounds(Frozen):
    """The two ratios that ``auto`` chooses from.

    Attributes:
        min: For images with fine detail, such as text.
        max: For images without.
    """

    min: Ratio = 7 / 9
    max: Ratio = 11 / 12

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min {self.min} must not be above max {self.max}")
        return self


class PruningSettings(Frozen):
    """Settings of the method, and limits on requests.

    Attributes:
        selector: Method that selects visual tokens: ViTCoP, or another published method at the
            same budget. ``fractions`` to ``spatial_radius`` and ``encoder_signal`` apply to ViTCoP
            only. The default is a selector of the encoder for models that Stage I alone prunes.
        shallow_boundary: First decoder layer that computes the tokens kept by Stage II.
            ``None`` scales the published layer, 2 of 32, to the model's depth, and is at least the
            number of layers after which the model adds features of the encoder.
        deep_boundary: First decoder layer that computes the tokens kept by Stage III.
            ``None`` scales the published layer, 22 of 32, to the model's depth.
        fractions: Stage I fractions per keep fraction, ascending in ``keep``. Values between
            rows are interpolated, values outside are extrapolated.
        density_scale: d_c of the density exp(-(d/d_c)^2), in feature distance. ``None`` means
            the published 8 for LLaVA-1.5. No d_c is published for other models; for these it
            means ``relative_density_scale``.
        relative_density_scale: d_c as a share of the root-mean-square distance between an
            image's tokens. That distance depends on a model's width and weights, so a share
            suits more models than a fixed d_c.
        spatial_radius: Largest distance of a denser neighbour, in image heights and widths.
        decoder_signal: What Stages II and III rank tokens by: the norm of the key (``keys``, as
            published), of the key before its norm and rotary embedding (``raw_keys``), or of the
            value (``values``), or the attention from the image's last tokens
            (``image_attention``). ``None`` means ``keys``, and ``values`` for decoders that
            normalise keys.
        encoder_signal: What Stage I ranks tokens by: ``cls``, the attention from [CLS], or
            ``received``, the attention from all tokens. ``None`` is ``cls`` if the encoder has
            [CLS], as published.
        positions: ``original`` keeps prompt positions in every layer. ``reference`` renumbers
            prefill tokens from the deep boundary on, like the published program.
        compare_frames: Whether Stage I compares each frame of a video with the frame before, and
            drops the tokens first that show the same; see ``frames``. The first frame then keeps
            more tokens than the others.
        kernels: Implementation of the functions that select tokens. ``triton`` needs a GPU and
            launches a few kernels per image, where ``torch`` launches some hundred; for images
            of more than 1024 tokens it uses ``torch``. ``auto`` is ``torch`` until the Triton
            kernels have been tested on GPUs.
        default_ratio: Pruning ratio of a request that sets none, in [0, 1), or ``auto``.
        auto: Ratios that ``auto`` chooses from.
        max_pruning_ratio: Largest pruning ratio that a request may set, in [0, 1).
    """

    selector: SelectorName = "vitcop"
    shallow_boundary: Layer | None = None
    deep_boundary: Annotated[int, Field(ge=2, strict=True)] | None = None
    fractions: Annotated[tuple[FractionRow, ...], Field(min_length=1)] = PUBLISHED_ROWS
    density_scale: Positive | None = None
    relative_density_scale: Positive = 0.5
    spatial_radius: Positive = 0.6
    decoder_signal: SignalName | None = None
    encoder_signal: Literal["cls", "received"] | None = None
    positions: Literal["original", "reference"] = "original"
    compare_frames: Annotated[bool, Field(strict=True)] = False
    kernels: KernelsName = "auto"
    default_ratio: RatioOrAuto = 0.0
    auto: AutoBounds = AutoBounds()
    max_pruning_ratio: Ratio = 0.95

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        keeps = [row.keep for row in self.fractions]
        if keeps != sorted(set(keeps)):
            raise ValueError(f"keep must be strictly ascending in fractions; got {keeps}")
        # The default bounds are not the operator's: max_pruning_ratio limits them.
        limited = {"auto.max": self.auto.max} if self.auto != AutoBounds() else {}
        if not isinstance(self.default_ratio, str):
            limited["default_ratio"] = self.default_ratio
        for name, ratio in limited.items():
            if ratio > self.max_pruning_ratio:
                raise ValueError(
                    f"{name} {ratio} must not be above max_pruning_ratio {self.max_pruning_ratio}"
                )
        shallow, deep = self.shallow_boundary, self.deep_boundary
        if shallow is not None and deep is not None and shallow >= deep:
            raise ValueError(f"shallow_boundary {shallow} must be below deep_boundary {deep}")
        return self

    def boundaries(self, num_layers: int) -> tuple[int, int]:
        """First layers of segments 1 and 2 in a decoder of ``num_layers`` layers.

        A segment is a run of decoder layers that compute the same tokens; see ``plan``.

        Raises:
            ValueError: If the boundaries do not satisfy 0 < shallow < deep < num_layers.
        """
        shallow = self.shallow_boundary
        deep = self.deep_boundary
        if shallow is None:
            shallow = max(1, round(num_layers * 2 / 32))
        if deep is None:
            deep = max(shallow + 1, round(num_layers * 22 / 32))
        if not 0 < shallow < deep < num_layers:
            raise ValueError(
                f"boundaries ({shallow}, {deep}) do not fit {num_layers} decoder "
                "layers: 0 < shallow_boundary < deep_boundary < layers must hold"
            )
        return shallow, deep

    def parse_ratio(
        self, value: object, *, name: str = RATIO_KEY, largest: float | None = None
    ) -> float:
        """Validate a ratio that a request sent.

        Args:
            value: A JSON number, or a header's text (plain decimal, no exponent).
            name: Name of the value in the error message.
            largest: Replaces ``max_pruning_ratio``.

        Raises:
            ValueError: If ``value`` is not a decimal number in [0, ``largest``].
        """
        largest = self.max_pruning_ratio if largest is None else largest
        expected = (
            f"{name} must be a decimal number from 0 to {largest:g}: "
            "the share of visual tokens removed, averaged over the decoder's layers"
        )
        shown = quote(value)
        if isinstance(value, str):
            if not _DECIMAL.fullmatch(value.strip(" \t")):
                raise ValueError(f"{expected}; got {shown}")
            ratio = float(value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            # An integer too large for float must not raise OverflowError.
            ratio = float(value) if abs(value) <= 1 else math.nan
        else:
            raise ValueError(f"{expected}; got {shown}")
        if not 0.0 <= ratio <= largest:
            raise ValueError(f"{expected}; got {shown}")
        return abs(ratio)  # -0.0 is 0
