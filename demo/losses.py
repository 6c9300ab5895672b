"""Losses of the vision tower, of the answers, and of the watched layer's attention."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo.batch import IGNORED, SUBJECT_HEAD, Batch, Sequences
from demo.dataset import CONTENT
from demo.drawing import TARGETS
from demo.questions import FAMILIES
from vitcop_vllm.demo.checkpoint import FEATURE_LAYER


class Heads(nn.Module):
    """Classification heads that train the vision tower; not part of the model.

    Patches predict what they show and where they are. [CLS], of the feature layer and of the
    last layer, predicts the image's content; without this loss its attention is not trained.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.patches = nn.Linear(width, sum(TARGETS.values()))
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.contents = nn.ModuleList([nn.Linear(width, CONTENT), nn.Linear(width, CONTENT)])

    def forward(self, states: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        losses = {}
        patches = self.norm(states[FEATURE_LAYER][:, 1:])
        logits = self.patches(patches).float()
        start = 0
        for name, classes in TARGETS.items():
            target = batch.targets[name].long().flatten()
            loss = F.cross_entropy(
                logits[..., start : start + classes].flatten(0, 1), target, reduction="none"
            )
            shown = target > 0
            # Few patches show something; their mean loss weighs as much as that of all patches.
            losses[name] = 0.5 * loss.mean() + 0.5 * (loss * shown).sum() / shown.sum().clamp_min(1)
            start += classes
        weight = torch.full((CONTENT,), 6.0, device=logits.device)
        for i, state in enumerate((states[FEATURE_LAYER], states[-1])):
            guess = self.contents[i](self.norms[i](state[:, 0])).float()
            losses[f"cls{i}"] = F.binary_cross_entropy_with_logits(
                guess, batch.content, pos_weight=weight
            )
        return losses


def _mask(segments: Tensor, deep: Tensor, dtype: torch.dtype) -> Tensor:
    """(S, 2, T, T) additive masks: a token sees segment 0 and its own segment, causally.

    The second mask is for layers of the deep stage, which see ``deep`` tokens only.
    """
    length = segments.shape[1]
    of_query, of_key = segments[:, :, None], segments[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    seen = causal & ((of_query == of_key) | (of_key == 0))
    both = torch.stack((seen, seen & deep[:, None, :]), dim=1)
    return torch.zeros(both.shape, dtype=dtype, device=segments.device).masked_fill_(
        ~both, torch.finfo(dtype).min
    )


def answer_loss(
    model: Any, features: Tensor, sequences: Sequences, image: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean cross-entropy of the answers' tokens, and the fraction of right answers by family.

    Args:
        model: The whole LLaVA.
        features: (N, V, width), from the vision tower.
        sequences: Conversations about the images.
        image: Id of the placeholder token.
    """
    inner = model.model
    kept = sequences.kept[..., None].expand(-1, -1, features.shape[-1])
    visual = inner.multi_modal_projector(features.gather(1, kept))
    embeds = inner.language_model.embed_tokens(sequences.ids)
    embeds = embeds.masked_scatter((sequences.ids == image)[..., None], visual)
    hidden = inner.language_model(
        inputs_embeds=embeds,
        attention_mask=_mask(sequences.segments, sequences.deep, embeds.dtype),
        position_ids=sequences.positions,
        use_cache=False,
    ).last_hidden_state
    in_answer = sequences.labels[:, 1:] != IGNORED
    logits = model.lm_head(hidden[:, :-1][in_answer]).float()
    wanted = sequences.labels[:, 1:][in_answer]
    right = _accuracies(sequences, logits.argmax(-1) == wanted, in_answer)
    return F.cross_entropy(logits, wanted), right


def attention_losses(weights: Tensor, sequences: Sequences, image: int) -> dict[str, Tensor]:
    """Losses of the watched layer's attention: -log(total attention to the tokens to look at).

    ``look`` is the mean over prompts' last tokens, ``tell`` over tokens before one with a
    subject.

    Args:
        weights: (S, heads, T, T) attention.
        sequences: At least one of them has a look.
        image: Id of the placeholder token.
    """
    row, token, head = sequences.looks.unbind(1)
    visual = (sequences.ids[0] == image).nonzero()[:, 0]
    seen = weights[row, head, token][:, visual].float()
    losses = -(seen * sequences.looked).sum(1).clamp_min(1e-6).log()
    parts = {"look": losses[head != SUBJECT_HEAD], "tell": losses[head == SUBJECT_HEAD]}
    return {name: part.mean() for name, part in parts.items() if len(part)}


def _accuracies(sequences: Sequences, right: Tensor, in_answer: Tensor) -> dict[str, Tensor]:
    """Family -> fraction of conversations whose answers greedy decoding gives exactly.

    ``in_answer`` (S, T - 1) marks tokens of answers, ``right`` those that are predicted right.
    """
    device = in_answer.device
    row = torch.arange(len(in_answer), device=device)[:, None].expand_as(in_answer)[in_answer]
    conversation = row * in_answer.shape[1] + sequences.segments[:, 1:][in_answer]
    _, number = conversation.unique(return_inverse=True)
    whole = torch.ones(int(number.max()) + 1, device=device)
    whole.scatter_reduce_(0, number, right.float(), "amin")
    family = torch.zeros(whole.shape, dtype=torch.int64, device=device)
    family.scatter_(0, number, sequences.families[:, 1:][in_answer])
    return {
        name: whole[family == i].mean()
        for i, name in enumerate(FAMILIES)
        if bool((family == i).any())
    }
