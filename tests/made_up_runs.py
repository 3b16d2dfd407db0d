"""Makes run folders with random numbers, in which no network was trained."""

import itertools
import json

import numpy as np

from fedhelp_jax.report import numbers, run_files
from fedhelp_jax.report.dice import DICE, ExampleDice, write_dice
from fedhelp_jax.report.predictions import PREDICTIONS, Predictions, write_predictions
from fedhelp_jax.report.verdict.hospitals import Hospital

METRIC = "balanced_accuracy"


def make_run(
    folder, *, method="fedhelp", seed=0, rounds=10, small=4, large=2, classes=3, images=40, lift=0.0
):
    """Writes the files of a finished run; ``lift`` makes its models better."""
    rng = np.random.default_rng((seed, sum(map(ord, method))))
    truth = np.random.default_rng(seed)  # the labels are the same under every method
    folder.mkdir(parents=True, exist_ok=True)
    label_names = [f"class {i} of a long name" for i in range(classes)]
    names = {
        "small": [f"clinic_{i:03d}" for i in range(small)],
        "large": [f"centre_{i:03d}" for i in range(large)],
    }
    predictions, clients, entries, shares = [], [], [], []
    numbered = itertools.count(1_000_000 * seed)  # each seed tests on other patients
    for role, own in names.items():
        for name in own:
            for split, count in (("validation", images // 2), ("test", images)):
                examples = np.array(list(itertools.islice(numbered, count)))
                labels = truth.integers(0, classes, count)
                logits = rng.normal(size=(count, classes))
                strength = (1.5 if role == "large" else 0.8) + lift
                logits[np.arange(count), labels] += strength * rng.uniform(0.5, 1.5)
                for model, noise in (("personal", 0.0), ("global", 0.5)):
                    noisy = logits + noise * rng.normal(size=logits.shape)
                    predictions.append(
                        Predictions(name, role, model, split, examples, labels, noisy)
                    )
                    value = numbers.balanced_accuracy(numbers.confusion(noisy, labels))
                    clients.append(
                        {
                            "client": name,
                            "role": role,
                            "model": model,
                            "split": split,
                            "metric": METRIC,
                            "value": value,
                        }
                    )
            counts = rng.integers(5, 60, classes).tolist()
            row = {"client": name, "role": role, "split": "train", "examples": sum(counts)}
            shares.append({**row, "left_out": 0, **dict(zip(label_names, counts, strict=True))})
            test = [c for c in clients if c["client"] == name and c["split"] == "test"]
            entries.append(
                {
                    "name": name,
                    "role": role,
                    "model": "personal",
                    "n_train": sum(counts),
                    "n_test": images,
                    "diverged": False,
                    "metrics": {METRIC: test[0]["value"], "auroc": 0.5 + test[0]["value"] / 2},
                }
            )
    final = {role: [e["metrics"][METRIC] for e in entries if e["role"] == role] for role in names}
    history = []
    for round in range(1, rounds + 1):
        done = 1 - np.exp(-3 * round / rounds)
        now = {r: (0.3 + (np.array(v) - 0.3) * done).tolist() for r, v in final.items()}
        history.append(
            {
                "round": round,
                "loss": 2 - done,
                "train": {role: {"loss": 2 - done + 0.1 * (role == "small")} for role in names},
                "metric": METRIC,
                "split": "validation",
                **_groups(now),
                "clients": now,
                "wall_s": 1.0,
                "compile_s": 0.1,
                "bytes_up": 4_000_000,
                "bytes_down": 5_000_000,
            }
        )
    summary = {
        "algorithm": method,
        "dataset": "made up",
        "synthetic": True,
        "public": "made up too",
        "teacher": "simulated",
        "teacher_queries": 64,
        "seed": seed,
        "rounds": rounds,
        "metric": METRIC,
        "split": "test",
        **_groups(final),
        "stopped_after": None,
        "diverged": {"small": 0, "large": 0},
        "quarantined": {"small": 0, "large": 0},
        "per_client": entries,
        "bytes_up_per_round": 4_000_000,
        "bytes_down_per_round": 5_000_000,
        "compile_s": 12.0,
        "wall_s": 75.0,
        "versions": {"jax": "0.10.2"},
    }
    config = {"algorithm": {"name": method}, "seed": seed, "rounds": rounds, "data": {"name": "x"}}
    run_files.write_json(folder / "config.json", config)
    run_files.write_json(folder / "summary.json", summary)
    run_files.write_json(folder / "provenance.json", {"program": {"devices": 2}, "sources": {}})
    lines = "".join(json.dumps(row) + "\n" for row in history)
    run_files.write_text(folder / "metrics.jsonl", lines)
    run_files.write_csv(folder / "clients.csv", run_files.CLIENT_COLUMNS, clients)
    run_files.write_csv(folder / "shares.csv", list(shares[0]), shares)
    write_predictions(folder / PREDICTIONS, predictions, label_names)
    return folder


def tell_dice(folder, dice):
    """Makes a finished run one about masks, in which each client's test images have this Dice."""
    path = folder / "summary.json"
    summary = json.loads(path.read_text()) | {"metric": "dice"}
    found = []
    for number, client in enumerate(summary["per_client"]):
        examples = np.arange(len(dice)) + 100 * number
        found.append(ExampleDice(client["name"], client["role"], examples, np.array(dice)))
        client["metrics"] = {"dice": float(np.nanmean(dice))}
    write_dice(folder / DICE, found)
    path.write_text(json.dumps(summary))


def _groups(values):
    small, large = np.mean(values["small"]), np.mean(values["large"])
    return {
        "small_mean": float(small),
        "large_mean": float(large),
        "worst_small": float(np.min(values["small"])),
        "gap": float(large - small),
    }


def hospital(**scores):
    """A hospital whose models have the given accuracies on validation, and the reverse on test."""
    labels = np.arange(40) % 2

    def predictions(model, split, accuracy):
        right = np.arange(40) // 2 < 20 * accuracy
        logits = np.eye(2)[np.where(right, labels, 1 - labels)]
        return Predictions("h", "small", model, split, np.arange(40), labels, logits)

    return Hospital(
        "h",
        "small",
        next(iter(scores)),
        {model: predictions(model, "test", 1 - score) for model, score in scores.items()},
        {model: predictions(model, "validation", score) for model, score in scores.items()},
    )


def study_of(tmp_path, seeds=3, **lifts):
    """Made-up runs of methods, of which some are better, in the folders of a study."""
    for method, lift in lifts.items():
        for seed in range(seeds):
            folder = tmp_path / "made" / method / f"seed{seed}"
            make_run(folder, method=method, seed=seed, lift=lift, images=300)
    return tmp_path
