"""``fedhelp data check``: reports what a run would read, before training on it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fedhelp_jax.algorithms import ALGORITHMS
from fedhelp_jax.core.errors import first_of
from fedhelp_jax.data.types import FederatedDataset, PublicDataset
from fedhelp_jax.experiments.config import RunConfig
from fedhelp_jax.experiments.experiment import load_data
from fedhelp_jax.report.console import marked_synthetic
from fedhelp_jax.report.contact_sheet import write_contact_sheets

_MOST_REASONS = 20


def check_data(config: RunConfig, folder: Path | None, say: Callable[[str], None] = print) -> bool:
    """Reads a run's data and describes it; nothing is trained.

    Args:
      config: The settings; unusable examples are listed whatever ``on_bad_example`` is.
      folder: Folder for a contact sheet of each client; None draws none.
      say: Called with each line of the report.

    Returns:
      Whether a run would accept the data.

    Raises:
      UserError: If the data cannot be read at all.
    """
    skipping = dataclasses.replace(config.data, on_bad_example="skip")
    with_public = ALGORITHMS[config.algorithm.name].uses_public and config.public.name != "none"
    dataset, public = load_data(dataclasses.replace(config, data=skipping), with_public=with_public)
    for line in _private(dataset):
        say(line)
    if public is not None:
        say("")
        for line in _public(public):
            say(line)
    bad = [*dataset.left_out, *(() if public is None else public.left_out)]
    if not bad:
        say("\nunusable: none")
    else:
        say(f"\nunusable: {len(bad)} (data.on_bad_example = {config.data.on_bad_example})")
        for example in bad[:_MOST_REASONS]:
            say(f"  {example.reason}")
        if len(bad) > _MOST_REASONS:
            say(f"  and {len(bad) - _MOST_REASONS} more")
    if folder is not None:
        files = write_contact_sheets(folder, dataset)
        say(f"\nwritten: {first_of([str(file) for file in files], 4)}")
    return not bad or config.data.on_bad_example == "skip"


def _private(dataset: FederatedDataset) -> list[str]:
    masks = dataset.labels.ndim > 1
    lines = [f"private: {marked_synthetic(dataset.name, dataset.synthetic)}"]
    lines += [f"  {name}: {text}" for name, text in dataset.facts]
    shape = "x".join(map(str, dataset.images.shape[1:]))
    lines.append(f"  examples: {len(dataset.images)} of {shape}, {dataset.images.dtype}")
    named = first_of(dataset.label_names)
    lines.append(f"  {'masks of' if masks else 'classes'}: {len(dataset.label_names)} ({named})")
    width = max(len("client"), *(len(client.name) for client in dataset.clients))
    head = f"  {'client':<{width}}  {'train':>7}  {'valid.':>7}  {'test':>7}"
    lines += ["", head if masks else f"{head}  classes in training"]
    for client in dataset.clients:
        sizes = (len(client.train), len(client.validation), len(client.test))
        line = f"  {client.name:<{width}}" + "".join(f"  {size:>7}" for size in sizes)
        if not masks:
            counts = np.bincount(dataset.labels[client.train], minlength=len(dataset.label_names))
            line += f"  {np.count_nonzero(counts)} of {len(counts)}"
            line += f" ({counts[counts > 0].min()} to {counts.max()} images)"
        lines.append(line)
    return lines


def _public(public: PublicDataset) -> list[str]:
    lines = [f"public: {marked_synthetic(public.name, public.synthetic)}"]
    lines += [f"  {name}: {text}" for name, text in public.facts]
    shape = "x".join(map(str, public.images.shape[1:]))
    lines.append(f"  examples: {len(public.images)} of {shape}, {public.images.dtype}")
    if public.label_names is None:
        lines.append("  labels: none")
    else:
        lines.append(f"  classes: {len(public.label_names)} ({first_of(public.label_names)})")
    return lines
