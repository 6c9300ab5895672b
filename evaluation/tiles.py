"""Should Stage I rank the tiles of an image together, or keep a quota of each?

``python -m evaluation.tiles``: four images of the demo's world make one image of four tiles, and
scaled down a fifth, as in LLaVA-NeXT. Each tile's scene says which of its patches show something.
Printed is the share of these patches that are among the kept, by the attention of [CLS] in the
demo's encoder: ranked over all tiles, and with an equal quota for each tile.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm  # type: ignore[import-untyped]

from demo.drawing import draw
from demo.questions import EXAM_SEED, FAMILIES, SINGLE, compose
from evaluation.signals import Signals, shown_patches
from vitcop_vllm.demo.checkpoint import DEMO_NAME, resolve

Scores = npt.NDArray[np.floating[Any]]
Shown = npt.NDArray[np.bool_]

SIDE = 336

SHARES = (0.02, 0.05, 0.1, 0.2, 0.3)
"""Of tokens that Stage I keeps; 0.3 is published for a ratio of 8/9."""


def ranked_together(saliency: Scores, count: int) -> Shown:
    """(tiles, patches) bool: the ``count`` patches of highest saliency."""
    kept = np.zeros(saliency.size, dtype=bool)
    kept[np.argsort(-saliency.ravel(), kind="stable")[:count]] = True
    return kept.reshape(saliency.shape)


def equal_quotas(saliency: Scores, count: int) -> Shown:
    """(tiles, patches) bool: of each tile the patches of highest saliency, ``count`` in all."""
    ends = np.arange(len(saliency) + 1) * count // len(saliency)
    return np.concatenate(
        [
            ranked_together(tile[None], quota)
            for tile, quota in zip(saliency, np.diff(ends), strict=True)
        ]
    )


def saliency_and_truth(signals: Signals, rng: np.random.Generator) -> tuple[Scores, Shown]:
    """(5, patches) saliency, the whole image first, and (4, patches) what the tiles show."""
    families = list(SINGLE)
    scenes = [compose(families[int(rng.integers(len(families)))], rng)[0][0] for _ in range(4)]
    tiles = [draw(scene) for scene in scenes]
    mosaic = Image.new("RGB", (2 * SIDE, 2 * SIDE))
    for number, tile in enumerate(tiles):
        mosaic.paste(tile, (number % 2 * SIDE, number // 2 * SIDE))
    whole = mosaic.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    saliency = np.stack([signals.cls_attention(image) for image in (whole, *tiles)])
    return saliency, np.stack([shown_patches(scene) for scene in scenes])


def measure(path: Path, images: int, seed: int) -> list[dict[str, float]]:
    """A row for each of :data:`SHARES`."""
    signals = Signals(path)
    rng = np.random.default_rng([EXAM_SEED + seed, len(FAMILIES)])
    read = [saliency_and_truth(signals, rng) for _ in tqdm(range(images), desc="images")]
    rows = []
    for share in SHARES:
        row = {"kept": share}
        for name, keep in (("together", ranked_together), ("quotas", equal_quotas)):
            found = [
                (keep(saliency, int(share * saliency.size))[1:] & shown).sum() / shown.sum()
                for saliency, shown in read
            ]
            row[f"{name}_mean"], row[f"{name}_worst"] = float(np.mean(found)), float(np.min(found))
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DEMO_NAME, help="a LLaVA-1.5 folder")
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = measure(Path(resolve(args.model)), args.images, args.seed)
    for row in rows:
        print("  ".join(f"{name} {value:.3f}" for name, value in row.items()))
    print(json.dumps({"images": args.images, "rows": rows}))


if __name__ == "__main__":
    main()
