"""Surface distances, the Dice of each example, and pictures, made once at the end of a run."""

from pathlib import Path
from typing import Any

import numpy as np

from fedhelp_jax.data.types import FederatedDataset
from fedhelp_jax.metrics import NO_CLASS
from fedhelp_jax.metrics.surface_distance import surface_metrics
from fedhelp_jax.report.dice import DICE, ExampleDice, dice_of_examples, write_dice
from fedhelp_jax.report.pictures import Row, segmentation_panel
from fedhelp_jax.simulation.compiled import CompiledRounds
from fedhelp_jax.simulation.round import RunState

PICTURES = "pictures"

_SHOWN_CLIENTS = 3


def final_masks(
    simulation: CompiledRounds,
    state: RunState,
    dataset: FederatedDataset,
    folder: Path | None,
    method: str,
) -> dict[str, dict[str, np.ndarray]]:
    """Returns surface distances of the deployed models on the test images.

    It also writes the Dice of each example, and draws some of them.

    For the first three clients of each role, the test images with the median and the worst Dice
    are drawn into ``pictures/<role>.png``.

    Args:
      simulation: The run.
      state: The final state of the run.
      dataset: The data.
      folder: The run folder; None writes nothing.
      method: Name of the method, for the titles of the pictures.

    Returns:
      ``{role: {metric: [K]}}``.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    by_example: list[ExampleDice] = []
    for group in simulation.groups:
        measured, rows = [], []
        for number, client in enumerate(group.names):
            examples = np.asarray(group.test.index[number])[: int(group.test.size[number])]
            predicted = simulation.predictions(state, group, number, "test")
            truth = dataset.labels[examples]
            measured.append(surface_metrics(predicted, truth, dataset.label_names))
            unanswered = (predicted == NO_CLASS).any(tuple(range(1, predicted.ndim)))
            values = dice_of_examples(predicted, truth, len(dataset.label_names))
            values = np.where(unanswered, 0.0, values)
            by_example.append(ExampleDice(client, group.role, examples, values))
            if folder is not None and number < _SHOWN_CLIENTS:
                predicted = np.where(predicted == NO_CLASS, 0, predicted)
                dice = np.nan_to_num(dice_of_examples(predicted > 0, truth > 0, 1), nan=1.0)
                dice = np.where(unanswered, 0, dice)
                order = np.argsort(dice, kind="stable")
                for place, word in ((order[len(order) // 2], "middle"), (order[0], "worst")):
                    name = f"{client}, {word} of {len(order)}"
                    name += ", logits not finite" if unanswered[place] else ""
                    image = _pixels(dataset.images[examples[place]])
                    rows.append(
                        Row(name, image, truth[place], predicted[place], float(dice[place]))
                    )
        found[group.role] = {
            name: np.array([metrics[name] for metrics in measured]) for name in measured[0]
        }
        if folder is None:
            continue
        kind = " (synthetic)" if dataset.synthetic else ""
        title = f"{method} on {dataset.name}{kind}: {group.role} clients, test"
        drawn = folder / PICTURES / f"{group.role}.png"
        drawn.parent.mkdir(parents=True, exist_ok=True)
        segmentation_panel(drawn, title, rows, dataset.label_names)
    if folder is not None:
        write_dice(folder / DICE, by_example)
    return found


def _pixels(image: np.ndarray) -> np.ndarray:
    """Returns uint8 pixels; of a volume only the first modality, of floats percentiles 1 to 99."""
    image = image[..., :1] if image.ndim == 4 else image
    if image.dtype == np.uint8:
        return image
    low, high = np.percentile(image, (1, 99))
    return np.rint(255 * ((image - low) / ((high - low) or 1)).clip(0, 1)).astype(np.uint8)


def merged(results: Any, found: dict[str, dict[str, np.ndarray]]) -> Any:
    """Returns test results with the metrics in ``found`` added to each role's deployed model."""
    together = {role: dict(models) for role, models in results.items()}
    for role, metrics in found.items():
        name = next(iter(together[role]))
        together[role][name] = {**together[role][name], **metrics}
    return together
