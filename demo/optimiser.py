"""The optimiser: float32 masters for the updates, weights of any type for the forward pass."""

from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from demo.form import Form
from demo.losses import Heads

MATRIX_RATE = 2e-3
OTHER_RATE = 2e-3
"""Full learning rates of the layers' matrices and of all other weights."""


def orthogonal(
    grad: Tensor, ns_coefficients: tuple[float, float, float], ns_steps: int, eps: float
) -> Tensor:
    """Muon's Newton-Schulz iteration, which torch computes in bfloat16, in the gradient's type."""
    a, b, c = ns_coefficients
    wide = grad if grad.shape[0] <= grad.shape[1] else grad.T
    wide = wide / wide.norm().clamp(min=eps)
    for _ in range(ns_steps):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide if grad.shape[0] <= grad.shape[1] else wide.T


_BY_TORCH = "torch.optim._muon._zeropower_via_newtonschulz"


class Optimiser:
    """Muon for the layers' matrices, AdamW for all other weights, both on float32 masters."""

    def __init__(self, form: Form, modules: list[nn.Module]) -> None:
        self.weights: list[Tensor] = []
        self.masters: list[Tensor] = []
        matrices: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        others: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for module in modules:
            for name, weight in module.named_parameters():
                master = nn.Parameter(weight.detach().float().clone())
                self.weights.append(weight)
                self.masters.append(master)
                inside = any(part in name for part in form.matrices)
                tower = isinstance(module, Heads) or form.tower in name
                (matrices if inside and weight.dim() == 2 else others)[tower].append(master)

        def groups(by_tower: dict[bool, list[nn.Parameter]]) -> list[dict[str, Any]]:
            return [{"params": params, "tower": tower} for tower, params in by_tower.items()]

        self.parts: list[tuple[torch.optim.Optimizer, float]] = [
            (
                torch.optim.Muon(
                    groups(matrices),
                    lr=MATRIX_RATE,
                    weight_decay=0.05,
                    adjust_lr_fn="match_rms_adamw",
                ),
                MATRIX_RATE,
            ),
            (
                torch.optim.AdamW(
                    groups(others), lr=OTHER_RATE, betas=(0.9, 0.98), weight_decay=0.0
                ),
                OTHER_RATE,
            ),
        ]

    def step(self, share: float, tower_share: float) -> None:
        """Update the weights from their gradients, at fractions of the full learning rates.

        Args:
            share: Fraction for the decoder and the projector.
            tower_share: Fraction for the vision tower and its heads.
        """
        for weight, master in zip(self.weights, self.masters, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        used = [master for master in self.masters if master.grad is not None]
        nn.utils.clip_grad_norm_(used, 1.0)
        in_float32 = self.weights[0].dtype == torch.float32
        with patch(_BY_TORCH, orthogonal) if in_float32 else nullcontext():
            for part, rate in self.parts:
                for group in part.param_groups:
                    group["lr"] = rate * (tower_share if group["tower"] else share)
                part.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)

    def state_dict(self) -> dict[str, Any]:
        return {
            "masters": [master.detach() for master in self.masters],
            "parts": [part.state_dict() for part, _ in self.parts],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for master, saved in zip(self.masters, state["masters"], strict=True):
                master.copy_(saved)
            torch._foreach_copy_(self.weights, self.masters)
        for (part, _), saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)
