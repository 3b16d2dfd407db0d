r"""Compares settings over seeds, with 95 % intervals, from finished run folders.

    python -m benchmarks.paired --runs='runs/study/{}-{}' --seeds=0,1,2 \
        --pairs=path_mnv2:path_labels,cifar_mnv2:cifar_labels

Run folders are named by a setting and a seed. Each pair is compared seed by seed, with the same
clients, splits and private batches on both sides. The interval is Student's t interval of the mean
difference, which is wide for three seeds. A single setting is reported as mean and standard
deviation over seeds.

With --metric=dice, the mean over all clients is available too: --keys=mean,small_mean,large_mean.
"""

import json
from pathlib import Path

import numpy as np
from absl import app, flags
from scipy import stats

from fedhelp_jax.report.summary import group_summary

_RUNS = flags.DEFINE_string("runs", None, "folders, {} for setting and for seed", required=True)
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "seeds")
_PAIRS = flags.DEFINE_list("pairs", None, "with:without, ...", required=True)
_KEYS = flags.DEFINE_list("keys", ["small_mean", "worst_small", "large_mean"], "of summary.json")
_METRIC = flags.DEFINE_string("metric", None, "of each client, in place of the headline metric")
_LAST = flags.DEFINE_integer("last", 0, "mean validation of the last rounds instead of the test")


def value(setting: str, seed: str, key: str) -> float:
    """Returns one number of one run."""
    folder = Path(_RUNS.value.format(setting, seed))
    if _LAST.value:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return float(np.mean([row[key] for row in rows[-_LAST.value :]]))
    summary = json.loads((folder / "summary.json").read_text())
    if _METRIC.value is None:
        return summary[key]
    by_role: dict[str, list[float]] = {"small": [], "large": []}
    for client in summary["per_client"]:
        by_role[client["role"]].append(client["metrics"][_METRIC.value])
    mean = float(np.mean(by_role["small"] + by_role["large"]))
    return {"mean": mean, **group_summary(by_role)}[key]


def main(_: list[str]) -> None:
    """Prints a Markdown table of the settings, then one of the pairs."""
    pairs = [pair.split(":") for pair in _PAIRS.value]
    settings = list(dict.fromkeys(name for pair in pairs for name in pair))
    values = {
        (name, key): np.array([value(name, seed, key) for seed in _SEEDS.value])
        for name in settings
        for key in _KEYS.value
    }
    print("| | " + " | ".join(_KEYS.value) + " |\n|---" * 1 + "|---" * len(_KEYS.value) + "|")
    for name in settings:
        cells = [
            f"{v.mean():.3f} ± {v.std(ddof=1):.3f}" for v in (values[name, k] for k in _KEYS.value)
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")
    for name, other in pairs:
        cells = []
        for key in _KEYS.value:
            change = values[name, key] - values[other, key]
            half = stats.t.ppf(0.975, len(change) - 1) * stats.sem(change)
            cells.append(
                f"{change.mean():+.3f} [{change.mean() - half:+.3f}, {change.mean() + half:+.3f}]"
            )
        print(f"| {name} - {other} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    app.run(main)
