"""``python -m evaluation.signals``: quality of the signals that pruning selects by.

The demo's images come with the content of each patch, so signals can be judged without pruning:
does a signal rank patches with content above background? Do key norms, which do not depend on the
question, rank tokens like the question's attention? Runs the unpruned model in transformers.
"""

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import mannwhitneyu, spearmanr  # type: ignore[import-untyped]
from tqdm import trange  # type: ignore[import-untyped]

from benchmarks.conditions import machine
from benchmarks.tables import print_document
from demo.drawing import draw, patch_targets
from demo.questions import EXAM_SEED, FAMILIES, SINGLE, compose
from vitcop_vllm.demo.checkpoint import DEMO_NAME, resolve
from vitcop_vllm.pruning.selection import mean_key_norm

Floats = npt.NDArray[np.floating[Any]]
Bools = npt.NDArray[np.bool_]
Tables = dict[str, list[dict[str, Any]]]

ENCODER_SIGNALS = ("attention of [CLS]", "attention received")
DECODER_FIGURES = ("small_key_norm_auc", "attention_of_last_token_auc", "rank_correlation")


class Signals:
    """Reads the signals of each visual token from a LLaVA-1.5 in transformers."""

    def __init__(self, path: str) -> None:
        from transformers import AutoProcessor, LlavaForConditionalGeneration

        self.processor: Any = AutoProcessor.from_pretrained(path)
        self.model: Any = LlavaForConditionalGeneration.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    @torch.inference_mode()
    def encoder_attention(self, image: Any) -> Floats:
        """(1 + V, V) attention to visual tokens, averaged over heads; the first row is [CLS]'s.

        It is that of the layer whose output the decoder gets, as in Stage I.
        """
        inputs = self.processor.image_processor(image, return_tensors="pt")
        seen = self.model.model.vision_tower(**inputs, output_attentions=True).attentions
        attention: Floats = (
            seen[self.model.config.vision_feature_layer][0, :, :, 1:].mean(0).numpy()
        )
        return attention

    @torch.inference_mode()
    def decoder_signals(self, image: Any, question: str) -> tuple[Floats, Floats]:
        """(L, V) key norms, and attention from the last prompt token, averaged over heads."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        prompt = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = self.processor(
            images=image, text=prompt, return_tensors="pt", add_special_tokens=False
        )
        out = self.model(**inputs, output_attentions=True, use_cache=True)
        visual = inputs["input_ids"][0] == self.model.config.image_token_id
        keys = [layer.keys[0].transpose(0, 1)[visual] for layer in out.past_key_values.layers]
        norms = torch.stack([mean_key_norm(layer) for layer in keys])
        seen = torch.stack([layer[0, :, -1, visual].mean(dim=0) for layer in out.attentions])
        return norms.numpy(), seen.numpy()


def shown_patches(scene: Any) -> Bools:
    """(V,) whether a patch shows a part of a shape or of a letter."""
    grids = patch_targets(scene)
    shown: Bools = ((grids["shape"] > 0) | (grids["letter"] > 0)).reshape(-1)
    return shown


def content_auc(score: Floats, shown: Bools) -> float:
    """Probability that a patch with content scores above a background patch (ROC AUC)."""
    statistic = mannwhitneyu(score[shown], score[~shown]).statistic
    return float(statistic / (shown.sum() * (~shown).sum()))


def measure(signals: Signals, images: int, seed: int) -> Tables:
    """Averages over images: rows of the encoder's signals, and of the decoder's layers."""
    encoder, decoder = [], []
    families = list(SINGLE)
    for number in trange(images, desc="images"):
        rng = np.random.default_rng([EXAM_SEED + seed, len(FAMILIES), number])
        (scene,), turns = compose(families[number % len(families)], rng)
        shown = shown_patches(scene)
        if not shown.any():
            continue
        image = draw(scene)
        attention = signals.encoder_attention(image)
        encoder.append([content_auc(one, shown) for one in (attention[0], attention.mean(axis=0))])
        norms_and_seen = zip(*signals.decoder_signals(image, turns[0].question), strict=True)
        decoder.append(
            [
                (content_auc(-norms, shown), content_auc(seen, shown), spearmanr(-norms, seen)[0])
                for norms, seen in norms_and_seen
            ]
        )
    of_encoder = np.mean(encoder, axis=0).round(3).tolist()
    of_layers = np.mean(decoder, axis=0).round(3).tolist()
    return {
        "encoder": [
            {"signal": signal, "auc": auc}
            for signal, auc in zip(ENCODER_SIGNALS, of_encoder, strict=True)
        ],
        "decoder": [
            {"layer": layer, **dict(zip(DECODER_FIGURES, figures, strict=True))}
            for layer, figures in enumerate(of_layers)
        ],
    }


def run(
    program: str, description: str | None, measure: Callable[[Signals, int, int], Tables]
) -> None:
    """Print what ``measure`` finds with the command line's model, images and seed."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DEMO_NAME, help="a LLaVA-1.5 folder")
    parser.add_argument("--images", type=int, default=180, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    command = f"python -m evaluation.{program} --images {arguments.images}"
    model = {"model": arguments.model, "weights": "float32"}
    conditions = {"command": command, "seed": arguments.seed, **machine(), **model}
    measured = measure(Signals(resolve(arguments.model)), arguments.images, arguments.seed)
    print_document({"conditions": conditions, **measured})


if __name__ == "__main__":
    run("signals", __doc__, measure)
