"""The network of `benchmarks.peers` in PyTorch, for the peers that are built on it."""

import os

import numpy as np
import torch
from torch import nn

from benchmarks.peers_workload import Weights, Workload, scaled


class ToChannelsFirst(nn.Module):
    """``[B, H, W, C] -> [B, C, H, W]`` without moving memory, which makes oneDNN faster here."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Applies the layer."""
        return x.permute(0, 3, 1, 2)


class Network(nn.Sequential):
    """Two convolutions and two dense layers, like pfl-research's ``simple_cnn`` without dropout."""

    def __init__(self, weights: Weights):
        # The first layer, which has no parameters, is not numbered, so that the others start at 0.
        layers = (
            nn.Conv2d(3, 32, 3),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(weights["6.weight"].shape[1], 128),
            nn.ReLU(),
            nn.Linear(128, len(weights["8.bias"])),
        )
        super().__init__()
        self.add_module("first", ToChannelsFirst())
        for number, layer in enumerate(layers):
            self.add_module(str(number), layer)
        self.to(torch.from_numpy(weights["8.bias"]).dtype)
        self.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})


def to_weights(network: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in network.state_dict().items()}


def user_data(workload: Workload, user: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a user's scaled images, and their labels."""
    rows = workload.owned[user]
    images = scaled(workload.images[rows].astype(workload.weights["8.bias"].dtype))
    return torch.from_numpy(images), torch.from_numpy(workload.labels[rows])


def use_threads(count: int) -> None:
    """Sets the number of threads of this process and of those that it starts."""
    os.environ["OMP_NUM_THREADS"] = str(count)
    torch.set_num_threads(count)
