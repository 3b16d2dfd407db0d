"""U-Nets and mask losses in plain PyTorch; FedHelp's clients are in `torch_reference`.

The code follows the papers' formulas as a PyTorch user would write them, and uses nothing of
``fedhelp_jax``. Trees of NumPy arrays have the layout of our variables: kernels are
``[*size, in, out]``.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: no parity to check")
from torch_reference import Losses, Tree  # noqa: E402

nn = torch.nn
functional = torch.nn.functional

CONVS = {2: nn.Conv2d, 3: nn.Conv3d}
GROWING = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
POOLS = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
BATCH_NORMS = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


# --- The network: Ronneberger et al., arXiv:1505.04597; Cicek et al., arXiv:1606.06650. ---


class Level(nn.Sequential):
    def __init__(self, rank: int, inputs: int, outputs: int, convs: int, norm: str):
        layers = []
        for i in range(convs):
            source = outputs if i else inputs
            layers.append(CONVS[rank](source, outputs, 3, padding=1, bias=norm == "none"))
            if norm == "batch":
                layers.append(BATCH_NORMS[rank](outputs))
            elif norm == "group":
                layers.append(nn.GroupNorm(min(8, outputs), outputs))
            layers.append(nn.ReLU())
        super().__init__(*layers)


class Features(nn.Module):
    """Maps ``[B, C, *spatial]`` to ``[B, widths[0], *spatial]``."""

    def __init__(self, rank: int, channels: int, widths: tuple[int, ...], convs: int, norm: str):
        super().__init__()
        self.pool = POOLS[rank](2)
        self.down, self.grow, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for before, width in zip((channels, *widths), widths, strict=False):
            self.down.append(Level(rank, before, width, convs, norm))
        for width, coarser in zip(widths, widths[1:], strict=False):
            self.grow.append(GROWING[rank](coarser, width, 2, stride=2))
            self.up.append(Level(rank, 2 * width, width, convs, norm))

    def forward(self, x):
        spatial, multiple = x.shape[2:], 2 ** len(self.grow)
        before = [(-n % multiple) // 2 for n in spatial]
        after = [-n % multiple - b for n, b in zip(spatial, before, strict=True)]
        # PyTorch lists the padding of the last axis first.
        pads = [n for pair in zip(before[::-1], after[::-1], strict=True) for n in pair]
        x = functional.pad(x, pads, mode="replicate")
        skips = []
        for level in self.down[:-1]:
            x = level(x)
            skips.append(x)
            x = self.pool(x)
        x = self.down[-1](x)
        for i in reversed(range(len(skips))):
            x = self.up[i](torch.cat([skips[i], self.grow[i](x)], dim=1))
        for axis, (start, length) in enumerate(zip(before, spatial, strict=True)):
            x = x.narrow(2 + axis, start, length)
        return x


class UNet(nn.Module):
    """Maps ``[B, C, *spatial]`` to logits ``[B, num_classes, *spatial]``."""

    def __init__(self, rank, channels, widths, convs, num_classes, norm="batch"):
        super().__init__()
        self.features = Features(rank, channels, widths, convs, norm)
        self.head = CONVS[rank](widths[0], num_classes, 1)

    def forward(self, x):
        return self.head(self.features(x))


def channels_first(x: np.ndarray) -> Any:
    """Returns an array ``[B, *spatial, C]`` in PyTorch's layout."""
    return torch.tensor(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def channels_last(x: Any) -> np.ndarray:
    """Returns a tensor in PyTorch's layout as an array ``[B, *spatial, C]``."""
    return np.moveaxis(x.detach().numpy(), 1, -1)


# --- Conversion of states. ---


def _layers(features: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields each path in our tree with its layer."""
    for side in ("down", "up"):
        for i, level in enumerate(getattr(features, side)):
            count = 0
            for layer in level:
                if isinstance(layer, tuple(CONVS.values())):
                    count += 1
                    yield (f"{side}{i}", f"conv{count}"), layer
                elif not isinstance(layer, nn.ReLU):
                    yield (f"{side}{i}", f"norm{count}"), layer
    for i, layer in enumerate(features.grow):
        yield (f"grow{i}",), layer


def _leaves(layer: Any) -> Iterator[tuple[str, Any, tuple[int, ...]]]:
    """Yields our name of each parameter, the parameter, and the order of its axes in our layout."""
    axes = tuple(range(2, layer.weight.ndim))
    if isinstance(layer, tuple(CONVS.values())):
        yield "kernel", layer.weight, (*axes, 1, 0)
    elif isinstance(layer, tuple(GROWING.values())):
        yield "kernel", layer.weight, (*axes, 0, 1)
    else:
        yield "scale", layer.weight, (0,)
    if layer.bias is not None:
        yield "bias", layer.bias, (0,)


def _at(tree: Tree, path: tuple[str, ...]) -> Tree:
    for part in path:
        tree = tree.setdefault(part, {})
    return tree


def _itself(tensor: Any) -> Any:
    return tensor


def features_tree(features: Any, get: Callable[[Any], Any] = _itself) -> Tree:
    """Returns ``get(parameter)`` of every parameter, such as its gradient or an Adam moment."""
    tree: Tree = {}
    for path, layer in _layers(features):
        for name, parameter, order in _leaves(layer):
            _at(tree, path)[name] = get(parameter).detach().permute(order).numpy().copy()
    return tree


def batch_stats_tree(features: Any) -> Tree:
    """Returns the running statistics; empty without batch normalisation."""
    tree: Tree = {}
    for path, layer in _layers(features):
        if isinstance(layer, tuple(BATCH_NORMS.values())):
            stats = {"mean": layer.running_mean.numpy(), "var": layer.running_var.numpy()}
            _at(tree, path).update({name: value.copy() for name, value in stats.items()})
    return tree


def head_tree(head: Any, get: Callable[[Any], Any] = _itself) -> Tree:
    """Returns ``get(parameter)`` of a convolution of size one."""
    kernel = get(head.weight).detach().flatten(1).T
    return {"kernel": kernel.numpy().copy(), "bias": get(head.bias).detach().numpy().copy()}


def params_tree(model: Any, get: Callable[[Any], Any] = _itself) -> Tree:
    """Returns ``get(parameter)`` of a whole network."""
    return {"features": features_tree(model.features, get), "head": head_tree(model.head, get)}


def variables_tree(model: Any) -> Tree:
    """Returns a whole network in the layout of our variables."""
    return {"params": params_tree(model), "batch_stats": batch_stats_tree(model.features)}


def make_head(tree: Tree, rank: int) -> Any:
    """Returns a convolution of size one with the parameters of ``tree``, in their precision."""
    kernel = torch.tensor(tree["kernel"])
    head = CONVS[rank](*kernel.shape, 1, dtype=kernel.dtype)
    with torch.no_grad():
        head.weight.copy_(kernel.T.reshape(head.weight.shape))
        head.bias.copy_(torch.tensor(tree["bias"]))
    return head


def make_unet(widths: tuple[int, ...], convs: int, norm: str, variables: Tree) -> Any:
    """Returns a network with the parameters and statistics of ``variables``, in their precision."""
    params = variables["params"]
    first = params["features"]["down0"]["conv1"]["kernel"]
    rank, channels = first.ndim - 2, first.shape[-2]
    classes = params["head"]["bias"].size
    model = UNet(rank, channels, widths, convs, classes, norm).to(torch.tensor(first).dtype)
    model.head = make_head(params["head"], rank)
    with torch.no_grad():
        for path, layer in _layers(model.features):
            for name, parameter, order in _leaves(layer):
                parameter.permute(order).copy_(torch.tensor(_at(params["features"], path)[name]))
            if isinstance(layer, tuple(BATCH_NORMS.values())):
                stats = _at(variables["batch_stats"], path)
                layer.running_mean.copy_(torch.tensor(stats["mean"]))
                layer.running_var.copy_(torch.tensor(stats["var"]))
    return model


# --- Losses, as means over the batch. Logits are [B, C, *spatial], masks [B, *spatial]. ---


def mask_loss(logits, masks):
    """Returns cross-entropy plus soft Dice; logits are resized linearly to the masks' size."""
    if masks.shape[1:] != logits.shape[2:]:
        mode = "bilinear" if logits.ndim == 4 else "trilinear"
        logits = functional.interpolate(logits, masks.shape[1:], mode=mode)
    if logits.shape[1] == 1:
        truth = masks[:, None].to(logits.dtype)
        return functional.binary_cross_entropy_with_logits(logits, truth) + _dice(
            logits.sigmoid(), truth
        )
    truth = functional.one_hot(masks.long(), logits.shape[1]).movedim(-1, 1)
    crossed = functional.cross_entropy(logits, masks.long())
    return crossed + _dice(logits.softmax(dim=1)[:, 1:], truth[:, 1:])


def _dice(probs, truth):
    """Returns the soft Dice loss of each example and channel, averaged."""
    both = (probs * truth).flatten(2).sum(dim=2)
    either = probs.flatten(2).sum(dim=2) + truth.flatten(2).sum(dim=2)
    return (1 - (2 * both + 1) / (either + 1)).mean()


def distillation(student, teacher, temperature):
    """Returns the mean T^2 KL( teacher || student ) per pixel; answers are resized linearly."""
    if teacher.shape[2:] != student.shape[2:]:
        if teacher.ndim == 4:
            options: dict[str, Any] = {"mode": "bilinear", "antialias": True}
        else:
            options = {"mode": "trilinear"}
        teacher = functional.interpolate(teacher, student.shape[2:], **options)
    student, teacher = student / temperature, teacher / temperature
    if student.shape[1] == 1:
        bernoulli = torch.distributions.Bernoulli
        kl = torch.distributions.kl_divergence(bernoulli(logits=teacher), bernoulli(logits=student))
        return temperature**2 * kl.mean()
    kl = functional.kl_div(student.log_softmax(dim=1), teacher.softmax(dim=1), reduction="none")
    return temperature**2 * kl.sum(dim=1).mean()


def ranking(student, teacher, k, margin):
    """Returns the hinge loss that puts the teacher's first class ``margin`` above the others."""
    assert k == 1
    if student.shape[1] == 1:
        student, teacher = (torch.cat([torch.zeros_like(x), x], 1) for x in (student, teacher))
    best = teacher.argmax(dim=1, keepdim=True)
    hinge = torch.relu(margin + student - student.gather(1, best))
    others = torch.ones_like(hinge).scatter(1, best, 0.0)
    return (hinge * others).sum(dim=1).mean() / (student.shape[1] - 1)


SEGMENTATION = Losses(mask_loss, distillation, ranking)
