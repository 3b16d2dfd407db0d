"""FedHelp's two kinds of client in plain PyTorch, as a reference for our steps.

The code follows the method's formulas as a PyTorch user would write them, and uses nothing of
``fedhelp_jax``. Trees of NumPy arrays have the layout of our variables, so that states can be
converted to PyTorch and back: kernels are HWIO, and the blocks of a stage after the first are
stacked.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: no parity to check")
nn = torch.nn
functional = torch.nn.functional
# On tensors this small, a second thread only spins and takes cores from other programs.
torch.set_num_threads(1)

Tree = dict[str, Any]


# --- The network: He et al., arXiv:1512.03385, sec. 4.2, with shortcuts of option A. ---


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.stride, self.more = stride, outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x):
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        shortcut = functional.pad(shortcut, (0, 0, 0, 0, self.more // 2, self.more // 2))
        return functional.relu(y + shortcut)


class Features(nn.Module):
    def __init__(self, depth: int):
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        widths = [(16, 16, 1), (16, 32, 2), (32, 64, 2)]
        self.stages = nn.ModuleList(
            nn.Sequential(
                Block(inputs, outputs, stride),
                *(Block(outputs, outputs, 1) for _ in range(1, blocks)),
            )
            for inputs, outputs, stride in widths
        )

    def forward(self, x):
        x = functional.relu(self.bn(self.conv(x)))
        for stage in self.stages:
            x = stage(x)
        return x.mean(dim=(2, 3))


class CifarResNet(nn.Module):
    """Maps ``[B, 3, H, W]`` to logits ``[B, num_classes]``; ``.features`` gives ``[B, 64]``."""

    def __init__(self, depth: int, num_classes: int):
        super().__init__()
        self.features = Features(depth)
        self.head = nn.Linear(64, num_classes)

    def forward(self, x):
        return self.head(self.features(x))


def images(x: np.ndarray) -> Any:
    """Returns images ``[B, H, W, C]`` in PyTorch's layout."""
    return torch.tensor(x).permute(0, 3, 1, 2).contiguous()


# --- Conversion of states. ---


def _layers(features: Any) -> Iterator[tuple[tuple[str, ...], list[Any]]]:
    """Yields each path in our tree with its layers; layers under "rest" are stacked."""
    yield ("stem", "conv"), [features.conv]
    yield ("stem", "bn"), [features.bn]
    for i, stage in enumerate(features.stages):
        for name in ("conv1", "bn1", "conv2", "bn2"):
            layers = [getattr(block, name) for block in stage]
            yield (f"stage{i + 1}", "first", name), layers[:1]
            if len(layers) > 1:
                yield (f"stage{i + 1}", "rest", name), layers[1:]


def _put(tree: Tree, path: tuple[str, ...], leaves: Tree) -> None:
    for part in path:
        tree = tree.setdefault(part, {})
    tree.update(leaves)


def _get(tree: Tree, path: tuple[str, ...]) -> Tree:
    for part in path:
        tree = tree[part]
    return tree


def _itself(tensor: Any) -> Any:
    return tensor


def features_tree(features: Any, get: Callable[[Any], Any] = _itself) -> Tree:
    """Returns ``get(parameter)`` of every parameter, such as its gradient or an Adam moment."""
    tree: Tree = {}
    for path, layers in _layers(features):
        weights = [get(layer.weight).detach() for layer in layers]
        if isinstance(layers[0], nn.Conv2d):
            leaves = {"kernel": [w.permute(2, 3, 1, 0).numpy() for w in weights]}
        else:
            biases = [get(layer.bias).detach().numpy() for layer in layers]
            leaves = {"scale": [w.numpy() for w in weights], "bias": biases}
        stacked = "rest" in path
        _put(tree, path, {k: np.stack(v) if stacked else v[0].copy() for k, v in leaves.items()})
    return tree


def batch_stats_tree(features: Any) -> Tree:
    """Returns the running statistics."""
    tree: Tree = {}
    for path, layers in _layers(features):
        if isinstance(layers[0], nn.BatchNorm2d):
            mean = np.stack([layer.running_mean.numpy() for layer in layers])
            var = np.stack([layer.running_var.numpy() for layer in layers])
            stacked = "rest" in path
            _put(
                tree,
                path,
                {"mean": mean if stacked else mean[0], "var": var if stacked else var[0]},
            )
    return tree


def head_tree(head: Any, get: Callable[[Any], Any] = _itself) -> Tree:
    """Returns ``get(parameter)`` of a linear head."""
    kernel, bias = get(head.weight).detach(), get(head.bias).detach()
    return {"kernel": kernel.T.numpy().copy(), "bias": bias.numpy().copy()}


def params_tree(model: Any, get: Callable[[Any], Any] = _itself) -> Tree:
    """Returns ``get(parameter)`` of a whole network."""
    return {"features": features_tree(model.features, get), "head": head_tree(model.head, get)}


def variables_tree(model: Any) -> Tree:
    """Returns a whole network in the layout of our variables."""
    return {"params": params_tree(model), "batch_stats": batch_stats_tree(model.features)}


def make_head(tree: Tree) -> Any:
    """Returns a linear layer with the parameters of ``tree``, in their precision."""
    kernel = torch.tensor(tree["kernel"])
    head = nn.Linear(*kernel.shape, dtype=kernel.dtype)
    with torch.no_grad():
        head.weight.copy_(kernel.T)
        head.bias.copy_(torch.tensor(tree["bias"]))
    return head


def make_resnet(depth: int, variables: Tree) -> Any:
    """Returns a network with the parameters and statistics of ``variables``, in their precision."""
    head = make_head(variables["params"]["head"])
    model = CifarResNet(depth, head.out_features).to(head.weight.dtype)
    model.head = head
    with torch.no_grad():
        for path, layers in _layers(model.features):
            params = _get(variables["params"]["features"], path)
            is_conv = isinstance(layers[0], nn.Conv2d)
            stats = {} if is_conv else _get(variables["batch_stats"], path)
            for i, layer in enumerate(layers):
                leaf = {
                    name: torch.tensor(value[i] if "rest" in path else value)
                    for name, value in (params | stats).items()
                }
                if is_conv:
                    layer.weight.copy_(leaf["kernel"].permute(3, 2, 0, 1))
                else:
                    layer.weight.copy_(leaf["scale"])
                    layer.bias.copy_(leaf["bias"])
                    layer.running_mean.copy_(leaf["mean"])
                    layer.running_var.copy_(leaf["var"])
    return model


# --- Losses, as means over the batch. ---


def cross_entropy(logits, labels):
    return functional.cross_entropy(logits, labels)


def distillation(student, teacher, temperature):
    """Returns T^2 KL( sigma(teacher / T) || sigma(student / T) )."""
    kl = functional.kl_div(
        torch.log_softmax(student / temperature, dim=-1),
        torch.softmax(teacher / temperature, dim=-1),
        reduction="none",
    )
    return temperature**2 * kl.sum(dim=-1).mean()


def ranking(student, teacher, k, margin):
    """Returns 1/(k (C-k)) sum_{t in top_k(teacher), r not} max(0, margin + s_r - s_t)."""
    order = torch.sort(teacher, dim=-1, descending=True, stable=True).indices
    total = torch.zeros_like(student[:, :1])
    for i in range(k):
        for j in range(k, student.shape[-1]):
            s_t = student.gather(-1, order[:, i : i + 1])
            s_r = student.gather(-1, order[:, j : j + 1])
            total = total + torch.relu(margin + s_r - s_t)
    return total.mean() / (k * (student.shape[-1] - k))


# --- Clients. ---


def adam(parameters: Any) -> Any:
    return torch.optim.Adam(parameters, lr=1e-3, weight_decay=1e-4)


def moment(optimizer: Any, name: str) -> Callable[[Any], Any]:
    """Returns a function that reads "exp_avg" or "exp_avg_sq" of a parameter."""
    return lambda parameter: optimizer.state[parameter][name]


class Losses(NamedTuple):
    """The losses ``supervised(logits, y)``, ``distill(student, teacher, T)``, ``rank(s, v, k, m)``.

    ``m`` is the margin.
    """

    supervised: Callable[..., Any]
    distill: Callable[..., Any]
    rank: Callable[..., Any]


CLASSIFICATION = Losses(cross_entropy, distillation, ranking)


class SmallClient:
    """A surrogate (theta, phi) and public heads psi, with two optimizers that share theta."""

    def __init__(self, model: Any, heads: dict[str, Any], losses: Losses = CLASSIFICATION):
        self.model, self.heads, self.losses = model, heads, losses
        psi = [p for head in heads.values() for p in head.parameters()]
        self.opt_private = adam(model.parameters())
        self.opt_public = adam([*model.features.parameters(), *psi])

    def step(self, x, y, public_x, public_y, answers, *, lambda_fm, temperature, discard):
        """Takes step A on the private batch, then step B on the public batch."""
        self.model.train()
        self.opt_private.zero_grad()
        private = self.losses.supervised(self.model(x), y)
        private.backward()
        self.opt_private.step()

        before = {name: value.clone() for name, value in self.model.named_buffers()}
        self.opt_public.zero_grad()
        features = self.model.features(public_x)
        public = self.losses.supervised(self.heads["labels"](features), public_y)
        answering = self.heads.get("answers", self.heads["labels"])
        public = public + lambda_fm * self.losses.distill(answering(features), answers, temperature)
        public.backward()
        self.opt_public.step()
        if discard:
            for name, value in self.model.named_buffers():
                value.copy_(before[name])
        return private.item(), public.item()


class LargeClient:
    """A proxy v and a large model W, each with its own optimizer."""

    def __init__(self, proxy: Any, large: Any, losses: Losses = CLASSIFICATION):
        self.proxy, self.large, self.losses = proxy, large, losses
        self.opt_proxy, self.opt_large = adam(proxy.parameters()), adam(large.parameters())

    def step(self, x, y, *, lambda_f, lambda_b, temperature, k, margin):
        """Takes step A on v with W in evaluation mode, then step B on W with v in that mode."""
        self.proxy.train()
        self.large.eval()
        with torch.no_grad():
            teacher = self.large(x)
        self.opt_proxy.zero_grad()
        logits = self.proxy(x)
        proxy = self.losses.supervised(logits, y)
        proxy = proxy + lambda_f * self.losses.distill(logits, teacher, temperature)
        proxy.backward()
        self.opt_proxy.step()

        self.proxy.eval()
        self.large.train()
        with torch.no_grad():
            teacher = self.proxy(x)
        self.opt_large.zero_grad()
        logits = self.large(x)
        large = self.losses.supervised(logits, y)
        large = large + lambda_b * self.losses.rank(logits, teacher, k, margin)
        large.backward()
        self.opt_large.step()
        return proxy.item(), large.item()
