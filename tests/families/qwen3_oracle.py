"""Qwen3-VL, dense and MoE, with pruning as one dense forward in plain PyTorch, float32.

Transformers' vision tower computes the input of its last block and the outputs of the blocks that
deepstack reads. This module computes the rest, from the method's description.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from tests.engine.dense_oracle import Encoded
from tests.families.qwen_oracle import DenseQwen, Frame, Grid
from vitcop_vllm.pruning.plan import VisualTokenCounts
from vitcop_vllm.pruning.settings import PruningSettings


class DenseQwen3(DenseQwen):
    """Qwen3-VL."""

    settings = PruningSettings(shallow_boundary=2, decoder_signal="values")
    layer_norm_eps = 1e-6
    tower_class: type[torch.nn.Module] = Qwen3VLVisionModel

    @property
    def levels(self) -> list[int]:
        return list(self.config.vision_config.deepstack_visual_indexes)

    def load_tower(self, path: Path) -> Any:
        config = AutoConfig.from_pretrained(path).vision_config
        config._attn_implementation = "sdpa"
        tower = self.tower_class(config)
        prefix = "model.visual."
        tower.load_state_dict(
            {
                name.removeprefix(prefix): weight
                for name, weight in self.weights.items()
                if name.startswith(prefix)
            }
        )
        return tower.float().eval()

    def rotary_axes(self, sections: list[int]) -> list[int]:
        """Row and column take every third frequency, and time the others."""
        axes = [0] * sum(sections)
        for axis in (1, 2):
            for i in range(sections[axis]):
                axes[3 * i + axis] = axis
        return axes

    def encode(self, image: Any, counts: VisualTokenCounts) -> Encoded:
        encoded = super().encode(image, counts)
        rows = torch.tensor([row * self.grid[1] + column for _, row, column in encoded.offsets])
        last = self.config.vision_config.depth - 1
        encoded.deepstack = []
        for number, block in enumerate(self.levels):
            x = self.last_output if block == last else self.outputs[block][rows]
            name = f"model.visual.deepstack_merger_list.{number}"
            y = self.norm(f"{name}.norm", x.flatten(1))
            y = F.gelu(self.linear(f"{name}.linear_fc1", y))
            encoded.deepstack.append(self.linear(f"{name}.linear_fc2", y))
        return encoded

    def times(self, count: int, seconds: float, grid: Grid) -> tuple[list[int], list[int]]:
        return [0] * count, [max(grid)] * count  # text stands before each frame

    def last_block_input(self, frame: Frame) -> torch.Tensor:
        """(V, 4, C), tokens row by row; keeps the outputs of all blocks."""
        self.grid = frame.grid
        blocks = self.tower.blocks
        rows, columns = frame.grid
        outputs: list[torch.Tensor] = []
        hooks = [
            block.register_forward_hook(lambda _, __, output: outputs.append(output))
            for block in blocks
        ]
        with torch.no_grad():
            self.tower(frame.pixels, torch.tensor([[frame.num_frames, 2 * rows, 2 * columns]]))
        for hook in hooks:
            hook.remove()
        self.outputs = [
            output.unflatten(0, (frame.num_frames, -1, 4))[frame.number] for output in outputs
        ]
        return self.outputs[-2]

    def block_mlp(self, name: str, x: torch.Tensor) -> torch.Tensor:
        y = F.gelu(self.linear(f"{name}.mlp.linear_fc1", x), approximate="tanh")
        return self.linear(f"{name}.mlp.linear_fc2", y)

    def merge_patches(self, x: torch.Tensor) -> torch.Tensor:
        self.last_output = x
        y = self.norm("model.visual.merger.norm", x).flatten(1)
        y = F.gelu(self.linear("model.visual.merger.linear_fc1", y))
        return self.linear("model.visual.merger.linear_fc2", y)


class DenseQwen3Moe(DenseQwen3):
    """Qwen3-VL-MoE: the best experts compute each token."""

    def mlp(self, name: str, x: torch.Tensor) -> torch.Tensor:
        chances = self.linear(f"{name}.gate", x).softmax(-1)
        best = chances.topk(self.config.text_config.num_experts_per_tok)
        shares = best.values / best.values.sum(-1, keepdim=True)
        output = torch.zeros_like(x)
        for token in range(len(x)):
            for share, expert in zip(shares[token], best.indices[token].tolist(), strict=True):
                gate, up = (x[token] @ self.weights[f"{name}.experts.gate_up_proj"][expert]).chunk(
                    2
                )
                y = F.silu(gate) * up
                output[token] += share * (y @ self.weights[f"{name}.experts.down_proj"][expert])
        return output
