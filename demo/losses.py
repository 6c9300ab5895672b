"""Losses of the vision tower, of the answers, and of the watched layer."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo.batch import IGNORED, SUBJECT_HEAD, Batch, Sequences
from demo.dataset import CONTENT
from demo.drawing import TARGETS
from demo.form import Form, Seen
from demo.questions import FAMILIES


class PatchHead(nn.Module):
    """Finds targets of the patches of a visual token.

    Args:
        width: Width of a visual token.
        names: Some of :data:`TARGETS`.
        patches: Patches of a visual token.
    """

    def __init__(self, width: int, names: tuple[str, ...], patches: int) -> None:
        super().__init__()
        self.classes = {name: TARGETS[name] for name in names}
        self.size = (patches, sum(self.classes.values()))
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, patches * self.size[1])

    def forward(self, tokens: Tensor, targets: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses by name, for (N, V, width) tokens and (N, V, patches) targets."""
        losses = {}
        logits = self.linear(self.norm(tokens)).float().unflatten(-1, self.size)
        parts = logits.split([*self.classes.values()], dim=-1)
        for name, part in zip(self.classes, parts, strict=True):
            target = targets[name].long().flatten()
            loss = F.cross_entropy(part.flatten(0, -2), target, reduction="none")
            shown = target > 0
            # Few patches show something; their mean loss weighs as much as that of all patches.
            losses[name] = 0.5 * loss.mean() + 0.5 * (loss * shown).sum() / shown.sum().clamp_min(1)
        return losses


class Heads(nn.Module):
    """Classification heads for training; not part of the model.

    From the tower's visual tokens a head finds what their patches show. From [CLS], if the tower
    has it, heads find the image's content; without this loss its attention is not trained. From
    the decoder's visual tokens a head finds their places, if the tower does not know them.
    """

    def __init__(self, form: Form) -> None:
        super().__init__()
        patches, width = form.merge**2, form.tower_width
        self.patches = PatchHead(width, form.tower_targets, patches)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(form.num_summaries))
        self.contents = nn.ModuleList(nn.Linear(width, CONTENT) for _ in self.norms)
        if form.decoder_targets:
            self.places = PatchHead(form.width, form.decoder_targets, patches)

    def forward(self, seen: Seen, batch: Batch) -> dict[str, Tensor]:
        """Losses of the vision tower."""
        losses = self.patches(seen.tokens, batch.targets)
        weight = torch.full((CONTENT,), 6.0, device=seen.tokens.device)
        for i, summary in enumerate(seen.summaries):
            guess = self.contents[i](self.norms[i](summary)).float()
            losses[f"cls{i}"] = F.binary_cross_entropy_with_logits(
                guess, batch.content, pos_weight=weight
            )
        return losses


def of_kept(values: Tensor, kept: Tensor) -> Tensor:
    """(N, n, ...) of (N, V, ...): the values of kept visual tokens."""
    index = kept[..., None].expand(-1, -1, values.shape[-1])
    return values.gather(1, index)


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
    form: Form, model: Any, tokens: Tensor, sequences: Sequences, image: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean cross-entropy of the answers' tokens, and the fraction of right answers by family.

    Args:
        form: Form of the model.
        model: The whole model.
        tokens: (N, V, width), from the vision tower.
        sequences: Conversations about the images.
        image: Id of the placeholder token.
    """
    language_model = model.model.language_model
    visual = form.embed(model, of_kept(tokens, sequences.kept))
    embeds = language_model.embed_tokens(sequences.ids)
    embeds = embeds.masked_scatter((sequences.ids == image)[..., None], visual)
    positions = sequences.positions
    hidden = language_model(
        inputs_embeds=embeds,
        attention_mask=_mask(sequences.segments, sequences.deep, embeds.dtype),
        position_ids=positions if len(positions) > 1 else positions[0],
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
