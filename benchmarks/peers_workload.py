"""The workload and the loss of `benchmarks.peers`, in NumPy and independent of ``fedhelp_jax``.

Weights are a dict of arrays with the names and shapes of PyTorch's ``state_dict`` of the network in
`benchmarks/peers_torch.py`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

CLASSES, SIDE = 10, 32
SHAPES = {
    "0.weight": (32, 3, 3, 3),
    "0.bias": (32,),
    "2.weight": (64, 32, 3, 3),
    "2.bias": (64,),
    "6.weight": (128, 64 * ((SIDE - 4) // 2) ** 2),
    "6.bias": (128,),
    "8.weight": (CLASSES, 128),
    "8.bias": (CLASSES,),
}

Weights = Mapping[str, np.ndarray]


class Workload(NamedTuple):
    """The images of all users, and the initial weights.

    Attributes:
      images: uint8 ``[N, 32, 32, 3]``; every image belongs to one user.
      labels: int64 ``[N]``, 0 to 9.
      owned: ``[users, n]`` positions in ``images`` of each user's images.
      weights: The initial weights.
    """

    images: np.ndarray
    labels: np.ndarray
    owned: np.ndarray
    weights: Weights


def make_workload(users: int, images: int, float64: bool) -> Workload:
    """Makes synthetic images: a coarse pattern for each class, with noise six times as strong.

    Args:
      users: Number of users.
      images: Number of images per user.
      float64: Whether the weights are float64 rather than float32.

    Returns:
      The workload; every user's images are a random sample of all classes.
    """
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, users * images)
    coarse = rng.normal(size=(CLASSES, SIDE // 4, SIDE // 4, 3))
    pattern = (8 * coarse).repeat(4, axis=1).repeat(4, axis=2).astype(np.float32)
    pixels = np.empty((len(labels), SIDE, SIDE, 3), np.uint8)
    for start in range(0, len(labels), 1000):
        rows = slice(start, start + 1000)
        noise = rng.standard_normal(pixels[rows].shape, np.float32)
        pixels[rows] = (128 + pattern[labels[rows]] + 48 * noise).clip(0, 255)
    weights = {}
    for name, shape in SHAPES.items():
        # Glorot uniform weights and zero biases.
        area = int(np.prod(shape[2:]))
        bound = (6 / (area * sum(shape[:2]))) ** 0.5 if len(shape) > 1 else 0.0
        weights[name] = rng.uniform(-bound, bound, shape).astype(float if float64 else np.float32)
    owned = np.arange(len(labels)).reshape(users, images)
    return Workload(pixels, labels, owned, weights)


def save_workload(workload: Workload, folder: str | Path) -> None:
    np.savez(_file(folder), **workload._asdict() | {"weights": 0}, **workload.weights)


def load_workload(folder: str | Path) -> Workload:
    with np.load(_file(folder)) as file:
        weights = {name: file[name] for name in SHAPES}
        return Workload(file["images"], file["labels"], file["owned"], weights)


def _file(folder: str | Path) -> Path:
    return Path(folder) / "workload.npz"


def scaled(images: Any) -> Any:
    """Returns pixels 0..255 scaled to [-1, 1], for arrays of any library."""
    return images / 127.5 - 1.0


def mean_loss(weights: Weights, images: np.ndarray, labels: np.ndarray) -> float:
    """Returns the network's mean cross-entropy, computed by NumPy for every framework."""
    dtype = weights["8.bias"].dtype
    total = 0.0
    for start in range(0, len(images), 100):
        rows = slice(start, start + 100)
        x = scaled(images[rows].astype(dtype))
        x = _relu(_convolve(x, weights["0.weight"]) + weights["0.bias"])
        x = _relu(_convolve(x, weights["2.weight"]) + weights["2.bias"])
        batch, side, _, channels = x.shape
        x = x.reshape(batch, side // 2, 2, side // 2, 2, channels).max((2, 4))
        x = x.transpose(0, 3, 1, 2).reshape(batch, -1)
        x = _relu(x @ weights["6.weight"].T + weights["6.bias"])
        logits = (x @ weights["8.weight"].T + weights["8.bias"]).astype(float)
        logits -= logits.max(axis=1, keepdims=True)
        chosen = logits[np.arange(batch), labels[rows]]
        total += float((np.log(np.exp(logits).sum(axis=1)) - chosen).sum())
    return total / len(images)


def _relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def _convolve(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Convolves without padding: ``[B, H, W, C] -> [B, H - 2, W - 2, O]``."""
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
    out = windows.reshape(-1, kernel[0].size) @ kernel.reshape(len(kernel), -1).T
    return out.reshape(*windows.shape[:3], -1)
