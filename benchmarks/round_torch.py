"""Worker: the same rounds in PyTorch, as a tuned loop or by ``torch.func.vmap`` over clients.

The loop reuses its modules for all clients and rounds, copies weights in place, uses the fused
Adam, and never synchronises to read a value. It uses the fastest combination of one thread or all,
channels last or not, and ``torch.compile`` or not on this machine. Under vmap, batch normalisation
keeps no running statistics, since functorch cannot update them there; vmap therefore does slightly
less work than the others.
"""

import copy
import itertools
import json
import os
import pickle
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.alternate import serve
from tests.torch_reference import (
    distillation,
    make_head,
    make_resnet,
    params_tree,
    ranking,
    variables_tree,
)

functional, func = torch.nn.functional, torch.func

OPTIONS = json.loads(sys.argv[1])
FOLDER = Path(OPTIONS["folder"])
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAMBDA_B, RANKED, MARGIN = 0.2, 5, 0.0
# As in the method, the first round has no distillation, and later rounds do.
WARMUP_ROUNDS = 1
PROBE_STEPS = 6


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3, weight_decay=1e-4, fused=True)


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def pixels(images: np.ndarray) -> torch.Tensor:
    """Returns ``[N, 3, H, W]`` in [-1, 1], prepared once, whereas ours does it in every batch."""
    dtype = torch.float64 if OPTIONS["float64"] else torch.float32
    x = torch.tensor(images, device=DEVICE).permute(0, 3, 1, 2).to(dtype) / 127.5 - 1.0
    return x.contiguous()


class Loop:
    """Trains the clients sequentially."""

    def __init__(self, start: dict[str, Any], channels_last: bool, compiled: bool):
        self.data = Data(start)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.data.images = self.data.images.contiguous(memory_format=layout)
        self.data.public_images = self.data.public_images.contiguous(memory_format=layout)

        def network(depth: int, variables: Any) -> Any:
            return make_resnet(depth, variables).to(DEVICE, memory_format=layout)

        self.w, self.model = (network(OPTIONS["depth"], start["w"]) for _ in range(2))
        self.sums = copy.deepcopy(self.w)
        clients = OPTIONS["clients"]
        forward = torch.compile if compiled else lambda module: module
        if OPTIONS["role"] == "small":
            self.features = forward(self.model.features)
            heads = [take(start["clients"], i) for i in range(clients)]
            self.heads = [make_head(head["labels"]).to(DEVICE) for head in heads]
        else:
            depth = OPTIONS["large_depth"]
            self.large = [network(depth, take(start["clients"], i)) for i in range(clients)]
            self.small_net = forward(self.model)
            self.large_nets = [forward(large) for large in self.large]
        self.round_number = 0

    def round(self, clients: int | None = None, steps: int | None = None) -> None:
        """Trains all clients and averages them; or, as a probe, trains some for a few steps."""
        total = list(self.sums.state_dict().values())
        torch._foreach_zero_([t for t in total if t.is_floating_point()])
        for client in range(clients or OPTIONS["clients"]):
            self.model.load_state_dict(self.w.state_dict())
            batches = self.data.batches(self.round_number, client)
            train = self.small if OPTIONS["role"] == "small" else self.large_client
            train(client, list(itertools.islice(batches, steps)))
            for t, value in zip(total, self.model.state_dict().values(), strict=True):
                if t.is_floating_point():
                    t.add_(value, alpha=1 / OPTIONS["clients"])
        if clients is None:
            self.w.load_state_dict(self.sums.state_dict())
            self.round_number += 1
        synchronize()

    def small(self, client: int, batches: Any) -> None:
        """Runs steps A and B on every batch."""
        model, head = self.model.train(), self.heads[client]
        private = adam(model.parameters())
        public = adam([*model.features.parameters(), *head.parameters()])
        norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        for x, y, public_x, public_y, answers in batches:
            private.zero_grad()
            functional.cross_entropy(model.head(self.features(x)), y).backward()
            private.step()
            for norm in norms:
                norm.momentum = 0.0  # statistics of the public batch are not kept
            public.zero_grad()
            logits = head(self.features(public_x))
            loss = functional.cross_entropy(logits, public_y) + distillation(logits, answers, 1.0)
            loss.backward()
            public.step()
            for norm in norms:
                norm.momentum = 0.1

    def large_client(self, client: int, batches: Any) -> None:
        """Runs steps A and B on every batch, with distillation after the warm-up."""
        proxy, large = self.model, self.large[client]
        small_net, large_net = self.small_net, self.large_nets[client]
        opt_proxy, opt_large = adam(proxy.parameters()), adam(large.parameters())
        warm = self.round_number >= WARMUP_ROUNDS
        for x, y, *_ in batches:
            proxy.train()
            large.eval()
            with torch.no_grad():
                teacher = large_net(x)
            opt_proxy.zero_grad()
            logits = small_net(x)
            loss = functional.cross_entropy(logits, y)
            if warm:
                loss = loss + distillation(logits, teacher, 1.0)
            loss.backward()
            opt_proxy.step()
            proxy.eval()
            large.train()
            with torch.no_grad():
                teacher = small_net(x)
            opt_large.zero_grad()
            logits = large_net(x)
            loss = functional.cross_entropy(logits, y)
            if warm:
                loss = loss + LAMBDA_B * ranking(logits, teacher, RANKED, MARGIN)
            loss.backward()
            opt_large.step()

    def result(self) -> Any:
        """Returns the averaged network as our variables."""
        return variables_tree(self.w.cpu())


class Vmap:
    """Trains all small clients at once by ``torch.func.vmap`` over ``stack_module_state``."""

    def __init__(self, start: dict[str, Any]):
        self.data = Data(start)
        self.w = make_resnet(OPTIONS["depth"], start["w"]).to(DEVICE)
        for module in self.w.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.track_running_stats = False
                module.running_mean = module.running_var = module.num_batches_tracked = None
        self.w.train()
        self.base = copy.deepcopy(self.w).to("meta")
        heads = [make_head(take(start["clients"], i)["labels"]) for i in range(OPTIONS["clients"])]
        self.heads, _ = func.stack_module_state([head.to(DEVICE) for head in heads])
        self.round_number = 0

        def private_loss(params: Any, x: Any, y: Any) -> Any:
            return functional.cross_entropy(func.functional_call(self.base, params, (x,)), y)

        def public_loss(params: Any, head: Any, x: Any, y: Any, answers: Any) -> Any:
            features = func.functional_call(self.base.features, params, (x,))
            logits = functional.linear(features, head["weight"], head["bias"])
            return functional.cross_entropy(logits, y) + distillation(logits, answers, 1.0)

        self.private = func.vmap(func.grad(private_loss))
        self.public = func.vmap(func.grad(public_loss, argnums=(0, 1)))

    def round(self) -> None:
        """Trains all clients and averages them."""
        clients = OPTIONS["clients"]
        params = {
            name: p.detach().expand(clients, *p.shape).clone().requires_grad_()
            for name, p in self.w.named_parameters()
        }
        prefix = "features."
        features = {n.removeprefix(prefix): p for n, p in params.items() if n.startswith(prefix)}
        private = adam(params.values())
        public = adam([*features.values(), *self.heads.values()])
        every = [list(self.data.batches(self.round_number, i)) for i in range(clients)]
        for step in zip(*every, strict=True):
            x, y, public_x, public_y, answers = (
                torch.stack(part) for part in zip(*step, strict=True)
            )
            set_gradients(params, self.private(detached(params), x, y))
            private.step()
            grads = self.public(
                detached(features), detached(self.heads), public_x, public_y, answers
            )
            set_gradients(features, grads[0])
            set_gradients(self.heads, grads[1])
            public.step()
        with torch.no_grad():
            for name, p in self.w.named_parameters():
                p.copy_(params[name].mean(dim=0))
        self.round_number += 1
        synchronize()

    def result(self) -> Any:
        """Returns the averaged network as our variables, without running statistics."""
        return {"params": params_tree(self.w.cpu())}


def detached(params: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in params.items()}


def set_gradients(params: dict[str, torch.Tensor], grads: dict[str, torch.Tensor]) -> None:
    for name, grad in grads.items():
        params[name].grad = grad


def take(tree: Any, i: int) -> Any:
    """Returns one client's part of stacked variables."""
    return {k: take(v, i) if isinstance(v, dict) else v[i] for k, v in tree.items()}


class Data:
    """Images on the device, and the indices of each batch."""

    def __init__(self, start: dict[str, Any]):
        def tensor(name: str) -> torch.Tensor:
            return torch.tensor(start[name], device=DEVICE)

        self.images, self.labels = pixels(start["images"]), tensor("labels").long()
        self.public_images = pixels(start["public_images"])
        self.public_labels, self.answers = tensor("public_labels").long(), tensor("answers")
        self.index = {
            name: torch.tensor(rows, device=DEVICE).long()
            for name, rows in start["batches"].items()
        }

    def batches(self, round: int, client: int) -> Any:
        """Yields a client's batches in a round, each with a private and a public part."""
        last = len(self.index["private"]) - 1
        own, public = (self.index[n][min(round, last), client] for n in ("private", "public"))
        for i, j in zip(own, public, strict=True):
            yield (
                self.images[i],
                self.labels[i],
                self.public_images[j],
                self.public_labels[j],
                self.answers[j],
            )


def tuned_loop(start: dict[str, Any]) -> tuple[Loop, str]:
    """Returns the fastest variant, timed by a few steps of one client, and its name."""
    if OPTIONS["float64"]:
        return Loop(start, channels_last=False, compiled=False), "float64"
    cores = len(os.sched_getaffinity(0))
    threads = (1, cores) if DEVICE.type == "cpu" else (1,)
    variants = itertools.product((False, True), OPTIONS["compile"], dict.fromkeys(threads))
    milliseconds = {}
    for channels_last, compiled, count in variants:
        torch.set_num_threads(count)
        loop = Loop(start, channels_last, compiled)
        loop.round(1, 1)
        times = []
        for _ in range(3):
            began = time.perf_counter()
            loop.round(1, PROBE_STEPS)
            times.append(1e3 * (time.perf_counter() - began))
        milliseconds[channels_last, compiled, count] = min(times)
    print("loop, (channels last, compiled, threads): ms:", milliseconds, file=sys.stderr)
    channels_last, compiled, count = min(milliseconds, key=lambda one: milliseconds[one])
    torch.set_num_threads(count)
    name = f"{count} threads" + ", channels last" * channels_last + ", compiled" * compiled
    # The probes trained heads and large models, so start again with fresh ones.
    return Loop(start, channels_last, compiled), name


def main() -> None:
    start = pickle.loads((FOLDER / "start.pickle").read_bytes())
    if OPTIONS["rival"] == "loop":
        rival, how = tuned_loop(start)
    else:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        rival, how = Vmap(start), f"{torch.get_num_threads()} threads"

    def timed(round: Callable[[], None] = rival.round) -> dict[str, float]:
        began = time.perf_counter()
        round()
        return {"seconds": time.perf_counter() - began}

    def memory() -> dict[str, float | None]:
        peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else None
        return {"device_gib": peak}

    def result() -> str:
        (FOLDER / f"{OPTIONS['rival']}.pickle").write_bytes(pickle.dumps(rival.result()))
        return f"{OPTIONS['rival']}.pickle"

    if DEVICE.type == "cuda":
        how = f"{torch.cuda.get_device_name()}, {how}"
    about = {"version": f"torch {torch.__version__}", "how": how}
    serve(about, {"round": timed, "memory": memory, "result": result})


if __name__ == "__main__":
    main()
