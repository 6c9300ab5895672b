"""What training makes small: of the vision tower, of answers, and of where one layer looks."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo.batch import IGNORED, TELLING, Batch, Sequences
from demo.dataset import CONTENT
from demo.drawing import TARGETS
from demo.questions import FAMILIES
from vitcop_vllm.demo.checkpoint import FEATURE_LAYER


class Heads(nn.Module):
    """What the vision tower is asked while it learns; not part of the model.

    Patches tell what they show and where they are, and [CLS], of the feature layer and of the
    last one, what the whole image holds: without that [CLS] would have no reason to look
    anywhere.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.patches = nn.Linear(width, sum(TARGETS.values()))
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.contents = nn.ModuleList([nn.Linear(width, CONTENT), nn.Linear(width, CONTENT)])

    def forward(self, states: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        losses = {}
        seen = self.norm(states[FEATURE_LAYER][:, 1:])
        logits = self.patches(seen).float()
        start = 0
        for name, classes in TARGETS.items():
            target = batch.targets[name].long().flatten()
            loss = F.cross_entropy(
                logits[..., start : start + classes].flatten(0, 1), target, reduction="none"
            )
            shown = target > 0
            # Most patches show nothing; those that do count as much as all together.
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
    """(S, 2, T, T) additive: a token sees segment 0 and its own, up to itself.

    The second is for layers of the deep stage, which see ``deep`` tokens only.
    """
    length = segments.shape[1]
    mine, theirs = segments[:, :, None], segments[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    seen = causal & ((mine == theirs) | (theirs == 0))
    both = torch.stack((seen, seen & deep[:, None, :]), dim=1)
    return torch.zeros(both.shape, dtype=dtype, device=segments.device).masked_fill_(
        ~both, torch.finfo(dtype).min
    )


def answers(
    model: Any, features: Tensor, sequences: Sequences, image: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean cross-entropy of the answers' tokens, and the share of right answers by family.

    Args:
        model: The whole LLaVA.
        features: (N, V, width) of the vision tower.
        sequences: Conversations about the images.
        image: Id of the visual tokens' placeholder.
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
    told = sequences.labels[:, 1:] != IGNORED
    logits = model.lm_head(hidden[:, :-1][told]).float()
    wanted = sequences.labels[:, 1:][told]
    return F.cross_entropy(logits, wanted), _exact(sequences, logits.argmax(-1) == wanted, told)


def looking(weights: Tensor, sequences: Sequences, image: int) -> dict[str, Tensor]:
    """How far the watched layer is from looking where the answer is.

    Means of -log(a head's attention to the visual tokens it should look at, summed): ``look``
    of the prompts' last tokens, ``tell`` of tokens before one that tells of something.

    Args:
        weights: (S, heads, T, T) attention.
        sequences: With at least one look.
        image: Id of the visual tokens' placeholder.
    """
    row, token, head = sequences.looks.unbind(1)
    visual = (sequences.ids[0] == image).nonzero()[:, 0]
    seen = weights[row, head, token][:, visual].float()
    losses = -(seen * sequences.looked).sum(1).clamp_min(1e-6).log()
    parts = {"look": losses[head != TELLING], "tell": losses[head == TELLING]}
    return {name: of.mean() for name, of in parts.items() if len(of)}


def _exact(sequences: Sequences, right: Tensor, told: Tensor) -> dict[str, Tensor]:
    """Share of answers with every token right, which is what greedy decoding says, by family."""
    row = torch.arange(told.shape[0], device=told.device)[:, None].expand_as(told)[told]
    conversation = row * told.shape[1] + sequences.segments[:, 1:][told]
    _, which = conversation.unique(return_inverse=True)
    whole = torch.ones(int(which.max()) + 1, device=told.device)
    whole.scatter_reduce_(0, which, right.float(), "amin")
    family = torch.zeros(whole.shape, dtype=torch.int64, device=told.device)
    family.scatter_(0, which, sequences.families[:, 1:][told])
    return {
        name: whole[family == i].mean()
        for i, name in enumerate(FAMILIES)
        if bool((family == i).any())
    }
