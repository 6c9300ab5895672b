"""``python -m evaluation.tiles``: rank the tiles of an image together, or with a quota for each?

Four images of the demo's world make one image of four tiles, and scaled down a fifth, as in
LLaVA-NeXT. Each tile's scene says which of its patches show something. Printed is the share of
these patches that are among the kept, by the attention of [CLS] in the demo's encoder.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image
from tqdm import trange  # type: ignore[import-untyped]

from demo.drawing import draw
from demo.questions import EXAM_SEED, FAMILIES, SINGLE, compose
from evaluation.signals import Bools, Floats, Signals, Tables, run, shown_patches

SIDE = 336

SHARES = (0.02, 0.05, 0.1, 0.2, 0.3)
"""Of tokens that Stage I keeps; 0.3 is published for a ratio of 8/9."""

EMPTY_TILES = (0, 2)
"""Of four; an empty tile has background only, such as sky in a photo."""


def ranked_together(saliency: Floats, count: int) -> Bools:
    """(tiles, patches) bool: the ``count`` patches of highest saliency."""
    kept = np.zeros(saliency.size, dtype=bool)
    kept[np.argsort(-saliency.ravel(), kind="stable")[:count]] = True
    return kept.reshape(saliency.shape)


def equal_quotas(saliency: Floats, count: int) -> Bools:
    """(tiles, patches) bool: of each tile the patches of highest saliency, ``count`` in all."""
    quotas = np.diff(np.arange(len(saliency) + 1) * count // len(saliency))
    tiles = zip(saliency, quotas, strict=True)
    return np.concatenate([ranked_together(tile[None], quota) for tile, quota in tiles])


def read_image(signals: Signals, rng: np.random.Generator, empty: int) -> tuple[Floats, Bools]:
    """(5, patches) saliency, the whole image first, and (4, patches) what the tiles show."""
    families = list(SINGLE)
    scenes = [compose(families[int(rng.integers(len(families)))], rng)[0][0] for _ in range(4)]
    for number in rng.permutation(4)[:empty]:
        scenes[number] = replace(scenes[number], things=(), sign=None)
    tiles = [draw(scene) for scene in scenes]
    mosaic = Image.new("RGB", (2 * SIDE, 2 * SIDE))
    for number, tile in enumerate(tiles):
        mosaic.paste(tile, (number % 2 * SIDE, number // 2 * SIDE))
    whole = mosaic.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    saliency = np.stack([signals.encoder_attention(image)[0] for image in (whole, *tiles)])
    return saliency, np.stack([shown_patches(scene) for scene in scenes])


def found_shares(
    images: Sequence[tuple[Floats, Bools]], keep: Callable[[Floats, int], Bools], share: float
) -> Floats:
    """For each image, the share of the tiles' patches with content that are kept."""
    found = [
        (keep(saliency, int(share * saliency.size))[1:] & shown).sum() / shown.sum()
        for saliency, shown in images
    ]
    return np.array(found)


def measure(signals: Signals, images: int, seed: int) -> Tables:
    """A row for each of :data:`EMPTY_TILES` and :data:`SHARES`."""
    rows = []
    for empty in EMPTY_TILES:
        rng = np.random.default_rng([EXAM_SEED + seed, len(FAMILIES)])
        progress = trange(images, desc=f"images with {empty} empty tiles")
        read = [read_image(signals, rng, empty) for _ in progress]
        for share in SHARES:
            row: dict[str, Any] = {"empty_tiles": empty, "kept_share": share}
            for name, keep in (("together", ranked_together), ("quotas", equal_quotas)):
                found = found_shares(read, keep, share)
                row[name] = round(float(found.mean()), 3)
                row[f"{name}_spread"] = [round(float(end), 3) for end in (found.min(), found.max())]
            rows.append(row)
    return {"tiles": rows}


if __name__ == "__main__":
    run("tiles", __doc__, measure)
