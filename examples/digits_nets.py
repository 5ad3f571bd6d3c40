"""The digits network twice, in Flax and in PyTorch, and the map between their weights.

Two 3x3 convolutions with BatchNorm, a 2x2 mean pool and a linear layer: 9,978
weights. The convolutions carry no bias, since BatchNorm would only subtract it.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import torch


class FlaxNet(nn.Module):
    """Images (batch, 8, 8, 1) to logits (batch, 10)."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        norm = partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
        )
        h = nn.Conv(16, (3, 3), use_bias=False, name="conv1")(images)
        h = nn.relu(norm(name="bn1")(h))
        h = nn.Conv(32, (3, 3), use_bias=False, name="conv2")(h)
        h = nn.relu(norm(name="bn2")(h))
        h = nn.avg_pool(h, (2, 2), strides=(2, 2))
        return nn.Dense(10, name="out")(h.reshape(len(h), -1))


class TorchNet(torch.nn.Module):
    """Images (batch, 1, 8, 8) to logits (batch, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(16, eps=1e-5, momentum=0.1)
        self.conv2 = torch.nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(32, eps=1e-5, momentum=0.1)
        self.out = torch.nn.Linear(4 * 4 * 32, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.bn1(self.conv1(images)))
        h = torch.relu(self.bn2(self.conv2(h)))
        h = torch.nn.functional.avg_pool2d(h, 2)
        # Flattened in Flax's order (height, width, channel), so that the linear
        # layer is the same matrix in both.
        return self.out(h.permute(0, 2, 3, 1).flatten(1))


def torch_layout(tree: Any) -> dict[str, np.ndarray]:
    """Flax's parameters, or anything of their structure, by PyTorch's names.

    Convolutions go from (height, width, in, out) to (out, in, height, width), the
    linear kernel is transposed, BatchNorm's scale is called weight.

    Args:
        tree: nested dict with FlaxNet's parameter structure.

    Returns:
        dict of NumPy arrays in the order of `TorchNet().named_parameters()`.
    """
    t = jax.tree.map(np.array, tree)  # copies: the step donates its buffers
    return {
        "conv1.weight": t["conv1"]["kernel"].transpose(3, 2, 0, 1),
        "bn1.weight": t["bn1"]["scale"],
        "bn1.bias": t["bn1"]["bias"],
        "conv2.weight": t["conv2"]["kernel"].transpose(3, 2, 0, 1),
        "bn2.weight": t["bn2"]["scale"],
        "bn2.bias": t["bn2"]["bias"],
        "out.weight": t["out"]["kernel"].T,
        "out.bias": t["out"]["bias"],
    }
