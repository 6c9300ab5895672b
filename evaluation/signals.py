"""``python -m evaluation.signals``: quality of the signals that pruning selects by.

The demo's images come with the content of each patch, so signals can be judged without pruning:
does a signal rank patches with content above background? Do key norms, which do not depend on the
question, rank tokens like the question's attention? Runs the unpruned model in transformers.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from demo.drawing import draw, patch_targets
from demo.questions import EXAM_SEED, FAMILIES, SINGLE, compose
from vitcop_vllm.demo.checkpoint import DEMO_NAME, resolve
from vitcop_vllm.pruning.image_clusters import rms_distance
from vitcop_vllm.pruning.saliency import attention_received, cls_saliency
from vitcop_vllm.pruning.selection import mean_key_norm

Floats = npt.NDArray[np.floating[Any]]


def content_auc(score: Floats, shown: npt.NDArray[np.bool_]) -> float:
    """Probability that a patch with content scores above a background patch (ROC AUC)."""
    from scipy.stats import mannwhitneyu  # type: ignore[import-untyped]

    statistic = mannwhitneyu(score[shown], score[~shown]).statistic
    return float(statistic / (shown.sum() * (~shown).sum()))


def rank_correlation(a: Floats, b: Floats) -> float:
    """Spearman's rank correlation over an image's visual tokens."""
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic)


class Reading(NamedTuple):
    """Signals about an image's V tokens, in a decoder of L layers.

    Attributes:
        cls: (V,) attention of [CLS].
        received: (V,) attention of all tokens, the substitute in encoders without [CLS].
        key_norms: (L, V); a smaller norm is more salient.
        seen: (L, V) attention from the last prompt token, averaged over heads.
        distances: Root mean square distance between the clustered tokens' features, then the
            5th, 50th and 95th percentile relative to it.
    """

    cls: Floats
    received: Floats
    key_norms: Floats
    seen: Floats
    distances: Floats


def shown_patches(scene: Any) -> npt.NDArray[np.bool_]:
    """(V,) whether a patch shows a part of a shape or of a letter."""
    grids = patch_targets(scene)
    shown: npt.NDArray[np.bool_] = ((grids["shape"] > 0) | (grids["letter"] > 0)).reshape(-1)
    return shown


class Signals:
    """Reads the signals of each visual token from a model in transformers."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoProcessor, LlavaForConditionalGeneration

        self.processor: Any = AutoProcessor.from_pretrained(path)
        self.model: Any = LlavaForConditionalGeneration.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()

        tower = self.model.model.vision_tower
        layer = tower.encoder.layers[self.model.config.vision_feature_layer]
        self._attention: Any = layer.self_attn

    @contextmanager
    def _recorded(self) -> Iterator[list[torch.Tensor]]:
        """Queries and keys of the encoder's layer, (B, 1 + V, heads, D) each, once it has run."""
        recorded: list[torch.Tensor] = []

        def record(_: Any, __: Any, output: torch.Tensor) -> None:
            recorded.append(output.unflatten(-1, (self._attention.num_heads, -1)))

        projections = self._attention.q_proj, self._attention.k_proj
        hooks = [projection.register_forward_hook(record) for projection in projections]
        try:
            yield recorded
        finally:
            for hook in hooks:
                hook.remove()

    @torch.inference_mode()
    def cls_attention(self, image: Any) -> Floats:
        """(V,) attention of [CLS]; runs the encoder only."""
        inputs = self.processor.image_processor(image, return_tensors="pt")
        with self._recorded() as recorded:
            self.model.model.vision_tower(inputs["pixel_values"])
        queries, keys = recorded
        saliency: Floats = cls_saliency(queries[:, 0], keys, self._attention.scale)[0].numpy()
        return saliency

    @torch.inference_mode()
    def read(self, image: Any, question: str) -> Reading:
        """Run the model on an image and a question about it."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        prompt = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = self.processor(
            images=image, text=prompt, return_tensors="pt", add_special_tokens=False
        )
        with self._recorded() as recorded:
            out = self.model(**inputs, output_attentions=True, use_cache=True)
        queries, keys = recorded
        saliency = cls_saliency(queries[:, 0], keys, self._attention.scale)
        received = attention_received(queries, keys, self._attention.scale)[:, 1:]
        features = keys[:, 1:].flatten(2)
        rms = rms_distance(features)
        shares = torch.pdist(features[0]).quantile(torch.tensor([0.05, 0.5, 0.95])) / rms
        visual = inputs["input_ids"][0] == self.model.config.image_token_id
        norms = [
            mean_key_norm(layer.keys[0].transpose(0, 1))[visual]
            for layer in out.past_key_values.layers
        ]
        seen = [layer[0, :, -1, visual].mean(dim=0) for layer in out.attentions]
        return Reading(
            saliency[0].numpy(),
            received[0].numpy(),
            torch.stack(norms).numpy(),
            torch.stack(seen).numpy(),
            torch.cat((rms, shares)).numpy(),
        )


def measure(path: Path, images: int, seed: int) -> dict[str, Any]:
    """Averages over images; :func:`main` prints them."""
    signals = Signals(path)
    found: dict[str, list[Any]] = defaultdict(list)
    families = list(SINGLE)
    for i in tqdm(range(images), desc="images"):
        rng = np.random.default_rng([EXAM_SEED + seed, len(FAMILIES), i])
        (scene,), turns = compose(families[i % len(families)], rng)
        shown = shown_patches(scene)
        if not shown.any():
            continue
        saliency, received, norms, seen, distances = signals.read(draw(scene), turns[0].question)
        found["saliency_auc"].append(content_auc(saliency, shown))
        found["received_auc"].append(content_auc(received, shown))
        found["distances"].append(distances)
        found["key_norm_auc"].append([content_auc(-norm, shown) for norm in norms])
        found["attention_auc"].append([content_auc(one, shown) for one in seen])
        found["key_norm_attention"].append(
            [rank_correlation(-norm, one) for norm, one in zip(norms, seen, strict=True)]
        )
    return {
        "images": len(found["saliency_auc"]),
        **{name: np.round(np.mean(values, axis=0), 3).tolist() for name, values in found.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEMO_NAME, help="a LLaVA-1.5 folder")
    parser.add_argument("--images", type=int, default=180)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    result = measure(Path(resolve(args.model)), args.images, args.seed)
    print(f"\n{result['images']} images")
    print(f"[CLS] saliency finds content: AUC {result['saliency_auc']:.3f}")
    print(f"received attention finds content: AUC {result['received_auc']:.3f}")
    rms, low, median, high = result["distances"]
    print(
        f"distances between tokens: rms {rms:.2f}, 5/50/95 % {low:.2f}/{median:.2f}/{high:.2f} of "
        f"it; the published scale 8 is {8 / rms:.2f} of it\n"
    )
    print("layer  key norm AUC  attention AUC  rank correlation of -key norm and attention")
    rows = zip(
        result["key_norm_auc"], result["attention_auc"], result["key_norm_attention"], strict=True
    )
    for layer, (norm, attention, correlation) in enumerate(rows):
        print(f"{layer:5}  {norm:12.3f}  {attention:13.3f}  {correlation:11.3f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
