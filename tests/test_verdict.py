"""Tests the verdict: influences, the coverage of its intervals, what is deployed, and its words."""

import csv
import itertools
import math

import numpy as np
import pytest
from helpers import refusal
from made_up_runs import hospital, make_run, study_of, tell_dice
from scipy import special, stats

from fedhelp_jax.cli.main import main
from fedhelp_jax.experiments.reporting import report
from fedhelp_jax.metrics import classification_metrics
from fedhelp_jax.report.predictions import (
    PREDICTIONS,
    Predictions,
    read_predictions,
    write_predictions,
)
from fedhelp_jax.report.run_data import find_runs, read_runs
from fedhelp_jax.report.verdict.gain import UNCLEAR, Gain, gain
from fedhelp_jax.report.verdict.hospitals import (
    OWN_THRESHOLD,
    Hospital,
    deployed_model,
    estimate,
)
from fedhelp_jax.report.verdict.influence import (
    auroc,
    average_precision,
    balanced_accuracy,
    mean_of_examples,
)
from fedhelp_jax.report.verdict.judge import ALL, Verdict, judge
from fedhelp_jax.report.verdict.rules import GUARDED, RULES
from fedhelp_jax.report.verdict.told import VERDICT, grids


def answers(rng, n=60, classes=3, strength=1.0, shares=None):
    """Random labels and logits, of which some are equal."""
    labels = rng.choice(classes, n, p=shares)
    logits = rng.normal(size=(n, classes))
    if classes == 2:
        logits = logits.round()  # with ties
    logits[np.arange(n), labels] += strength
    return np.arange(n), labels, logits


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_the_values_are_those_of_the_metrics(classes):
    examples, labels, logits = answers(np.random.default_rng(classes), classes=classes)
    theirs = classification_metrics(logits, labels, np.ones(len(labels), bool))
    for name, metric in (("auroc", auroc), ("balanced_accuracy", balanced_accuracy)):
        own = metric(examples, labels, logits)
        np.testing.assert_allclose(own.value, theirs[name], atol=1e-6)
        for c in range(classes):
            np.testing.assert_allclose(own.influence[labels == c].sum(), 0, atol=1e-12)


def test_the_influences_on_the_area_are_those_of_delong():
    examples, labels, logits = answers(np.random.default_rng(0), classes=2)
    scores = logits[:, 1] - logits[:, 0]
    positive, negative = scores[labels == 1], scores[labels == 0]
    wins = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
    expected = np.zeros(len(labels))
    expected[labels == 1] = (wins.mean(1) - wins.mean()) / len(positive)
    expected[labels == 0] = (wins.mean(0) - wins.mean()) / len(negative)
    np.testing.assert_allclose(auroc(examples, labels, logits).influence, expected, atol=1e-12)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_average_precision_of_rare_classes_is_that_of_scikit_learn(classes):
    metrics = pytest.importorskip("sklearn.metrics")
    shares = [0.9, 0.1] if classes == 2 else [0.8, 0.1, 0.1]
    examples, labels, logits = answers(
        np.random.default_rng(0), n=200, classes=classes, shares=shares
    )
    # The scores of a class against the rest, as the area under the curve has them.
    others = [special.logsumexp(np.delete(logits, c, 1), axis=1) for c in range(classes)]
    scores = logits - np.stack(others, 1)

    def expected(weights):
        return np.mean(
            [
                metrics.average_precision_score(labels == c, scores[:, c], sample_weight=weights)
                for c in range(1, classes)
            ]
        )

    found = average_precision(examples, labels, logits)
    assert found.value == pytest.approx(expected(None), abs=1e-12)
    slopes = np.zeros(200)
    for i in range(200):
        change = 1e-5 * (np.arange(200) == i)
        slopes[i] = (expected(1 + change) - expected(1 - change)) / 2e-5
    for c in range(classes):
        slopes[labels == c] -= slopes[labels == c].mean()
    np.testing.assert_allclose(found.influence, slopes, atol=1e-8)


def test_without_a_rare_class_there_is_no_average_precision():
    examples, labels, logits = answers(np.random.default_rng(0))
    assert math.isnan(average_precision(examples, labels, logits).value)
    assert math.isnan(average_precision(examples[:0], labels[:0], logits[:0]).value)


@pytest.mark.parametrize("metric", [auroc, balanced_accuracy, average_precision])
def test_the_standard_error_is_that_of_a_bootstrap(metric):
    rng = np.random.default_rng(1)
    shares = [0.6, 0.3, 0.1] if metric is average_precision else None
    examples, labels, logits = answers(rng, n=400, classes=3, shares=shares)
    other = logits + rng.normal(size=logits.shape)
    drawn = []
    for _ in range(500):
        own = [rng.choice(np.flatnonzero(labels == c), np.sum(labels == c)) for c in range(3)]
        rows = np.concatenate(own)
        pair = [metric(examples, labels[rows], of[rows]).value for of in (logits, other)]
        drawn.append(pair[0] - pair[1])
    difference = metric(examples, labels, logits).minus(metric(examples, labels, other))
    error = math.sqrt(np.sum(difference.influence**2))
    np.testing.assert_allclose(error, np.std(drawn), rtol=0.1)


def test_logits_that_are_not_finite_count_as_in_the_metrics():
    examples, labels, logits = answers(np.random.default_rng(0))
    logits[3, labels[3]] = np.nan
    theirs = classification_metrics(logits, labels, np.ones(len(labels), bool))
    own = balanced_accuracy(examples, labels, logits).value
    np.testing.assert_allclose(own, theirs["balanced_accuracy"], atol=1e-6)
    assert math.isnan(theirs["auroc"]) and math.isnan(auroc(examples, labels, logits).value)


def test_different_examples_are_not_compared():
    rng = np.random.default_rng(0)
    examples, labels, logits = answers(rng)
    ours = auroc(examples, labels, logits)
    order = rng.permutation(len(labels))
    shuffled = auroc(examples[order], labels[order], logits[order])
    np.testing.assert_allclose(ours.minus(shuffled).influence, 0, atol=1e-12)
    with pytest.raises(ValueError, match="same examples"):
        ours.minus(auroc(examples + 1, labels, logits))
    with pytest.raises(ValueError, match="same examples"):
        ours.minus(auroc(examples, (labels + 1) % 3, logits))


# --- intervals ------------------------------------------------------------------------------------


def planted(rng, *, metric, n, seeds, shared, lift, spread, hospitals=1):
    """Draws two models' scores for hospitals of n test images, a third of them positive.

    The models of each seed are better or worse by a normal draw of ``spread``.
    """

    def patients():
        labels = (np.arange(n) < max(1, n // 3)).astype(int)
        return labels, rng.normal(size=n)

    fixed = [patients() for _ in range(hospitals)]
    by_seed = []
    for seed in range(seeds):
        differences = {}
        skill = 1.0 + rng.normal(0, spread, 2) + (lift, 0)
        for h in range(hospitals):
            labels, common = fixed[h] if shared else patients()
            examples = np.arange(n) + 10_000 * h + (0 if shared else 1_000_000 * seed)
            found = []
            for own in skill:
                scores = 0.8 * common + 0.6 * rng.normal(size=n) + own * (labels - 0.5)
                logits = np.stack([np.zeros(n), scores], 1)
                found.append(metric(examples, labels, logits))
            differences[f"h{h}"] = found[0].minus(found[1])
        by_seed.append(differences)
    return by_seed


def true_gain(metric, lift, spread):
    """The expected difference of the planted models."""
    skill = 1.0 + np.random.default_rng(0).normal(0, spread, (200_000, 2)) + (lift, 0)
    scale = math.sqrt(2) if metric is auroc else 2
    value = stats.norm.cdf(skill / scale).mean(0)
    return float(value[0] - value[1])


CASES = [
    (metric, n, seeds, shared, lift, hospitals)
    for metric, (n, seeds, shared, hospitals), lift in itertools.product(
        (auroc, balanced_accuracy),
        (
            *((15, 1, True, 1), (88, 1, True, 1), (30, 3, True, 1), (30, 5, False, 1)),
            (88, 3, False, 1),
            (30, 3, True, 4),
        ),
        (0.0, 0.5),
    )
]


@pytest.mark.parametrize(("metric", "n", "seeds", "shared", "lift", "hospitals"), CASES)
def test_intervals_cover_planted_gains_as_often_as_they_say(
    metric, n, seeds, shared, lift, hospitals
):
    rng = np.random.default_rng((n, seeds, hospitals, int(10 * lift)))
    spread = 0.1 if seeds > 1 else 0.0  # what one seed cannot show, its interval leaves out
    truth = true_gain(metric, lift, spread)
    trials = 200
    hits = 0
    for _ in range(trials):
        g = gain(
            planted(
                rng,
                metric=metric,
                n=n,
                seeds=seeds,
                shared=shared,
                lift=lift,
                spread=spread,
                hospitals=hospitals,
            )
        )
        hits += g.low <= truth <= g.high
    assert hits / trials >= 0.91  # 0.95 less 2.6 standard errors of this count


@pytest.mark.parametrize(("n", "seeds"), [(6, 1), (18, 1), (18, 3), (80, 3)])
@pytest.mark.parametrize("lift", [0.0, 0.03])
def test_intervals_of_dice_cover_planted_gains_and_are_not_much_too_wide(n, seeds, lift):
    """As for lungs, most images are hard or easy for both models, and a few are failures."""
    rng = np.random.default_rng((n, seeds, int(100 * lift)))
    trials, hits, halves = 400, 0, []
    between = 0.004 if seeds > 1 else 0.0
    for _ in range(trials):
        by_seed = []
        for seed in range(seeds):
            common = rng.exponential(size=n)
            ours, theirs = (
                mean_of_examples(
                    np.arange(n) + 1000 * seed,
                    0.9 + skill - 0.04 * common - 0.015 * rng.exponential(size=n),
                )
                for skill in rng.normal(0, between, 2) + (lift, 0)
            )
            by_seed.append({"a": ours.minus(theirs)})
            assert ours.minus(theirs).reach == pytest.approx(theirs.minus(ours).reach)
        g = gain(by_seed)
        hits += g.low <= lift <= g.high
        halves.append((g.high - g.low) / 2)
    assert hits / trials >= 0.93  # 0.95 less 1.8 standard errors of this count
    error = math.sqrt(2 * (0.015**2 / n + between**2) / seeds)
    least = stats.t.ppf(0.975, n - 1 if seeds == 1 else seeds - 1) * error
    assert np.median(halves) < 2.5 * least


def test_dice_that_does_not_vary_is_no_proof_of_equality():
    for values in (np.zeros(9), np.array([0.9])):
        failed = mean_of_examples(np.arange(len(values)), values)
        g = gain([{"a": failed.minus(failed)}])
        assert g.value == 0 and g.low < -0.1 and g.high > 0.1 and g.verdict == UNCLEAR


def estimate_of(examples, labels, right):
    """The balanced accuracy of a model that is right where ``right`` says so."""
    logits = np.zeros((len(labels), 2))
    logits[np.arange(len(labels)), np.where(right, labels, 1 - labels)] = 1
    return balanced_accuracy(examples, labels, logits)


def test_agreement_on_few_images_is_no_proof_of_equality():
    labels = np.array([0, 0, 1])
    perfect = estimate_of(np.arange(3), labels, np.ones(3, bool))
    g = gain([{"a": perfect.minus(perfect)}])
    assert g.value == 0 and g.low < -0.3 and g.high > 0.3 and g.probability == 0.5
    assert g.verdict == UNCLEAR and g.needed == math.inf


def test_the_number_of_images_needed_is_enough_four_times_out_of_five():
    rng = np.random.default_rng(0)
    options = {"metric": auroc, "seeds": 1, "shared": True, "lift": 0.5, "spread": 0.0}
    needed = np.median([gain(planted(rng, n=200, **options)).needed for _ in range(200)])
    # The median over noisy gains is near the number that the true gain needs.
    told = [gain(planted(rng, n=int(needed), **options)).low > 0 for _ in range(300)]
    assert 0.6 < np.mean(told) < 0.95


def test_seeds_that_differ_need_more_seeds_not_more_images():
    examples, labels = np.arange(400), np.arange(400) % 2
    rng = np.random.default_rng(0)

    def difference(lift):
        ours = estimate_of(examples, labels, rng.random(400) < 0.8 + lift)
        return {"a": ours.minus(estimate_of(examples, labels, rng.random(400) < 0.8))}

    g = gain([difference(lift) for lift in (0.15, -0.15, 0.1)])
    assert g.verdict == UNCLEAR and math.isinf(g.needed)
    assert gain([difference(0.15) for _ in range(3)]).verdict == "gains"
    assert gain([difference(-0.15) for _ in range(3)]).verdict == "loses"


def test_nothing_defined_is_no_verdict():
    one_class = auroc(np.arange(3), np.zeros(3, int), np.zeros((3, 2)))
    assert math.isnan(one_class.value)
    assert math.isnan(gain([{"a": one_class.minus(one_class)}]).value)


# --- runs -----------------------------------------------------------------------------------------


def runs_in(folder):
    return read_runs(find_runs([folder]), [folder])


def test_a_method_that_is_better_gains_and_a_worse_one_loses(tmp_path):
    runs = runs_in(study_of(tmp_path, local=0.0, better=3.0, worse=-3.0))
    found = {(v.method, v.metric, v.hospital): v.gain.verdict for v in judge(runs, "local")}
    for metric in ("auroc", "balanced_accuracy"):
        assert found["better", metric, ALL["small"]] == "gains"
        assert found["worse", metric, ALL["small"]] == "loses"
        assert found["worse", metric, ALL["large"]] == "loses"
    turned = {(v.method, v.hospital): v.gain.verdict for v in judge(runs, "better")}
    assert turned["local", "all small"] == "loses"


def test_verdict_prints_and_writes_a_row_for_each_hospital(tmp_path, capsys):
    study_of(tmp_path, local=0.0, fedhelp=3.0)
    assert main(["fedhelp", "verdict", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "AUROC of fedhelp against local" in out
    assert f"written: {tmp_path / VERDICT}" in out
    with (tmp_path / VERDICT).open() as file:
        rows = list(csv.DictReader(file))
    own = [row for row in rows if row["metric"] == "auroc"]
    assert [row["hospital"] for row in own].count("clinic_000") == 1
    assert len(own) == 6 + len(ALL)
    for row in own:
        assert float(row["low"]) <= float(row["gain"]) <= float(row["high"])
        difference = float(row["value"]) - float(row["value_against"])
        np.testing.assert_allclose(float(row["gain"]), difference, atol=1e-6)
        assert row["seeds"] == "3"


def test_many_methods_are_summed_up_in_a_row_each(tmp_path, capsys):
    study_of(tmp_path, local=0.0, fedhelp=3.0, fedavg=-3.0)
    out = tmp_path / "new" / "folder"
    assert main(["fedhelp", "verdict", str(tmp_path), "--deploys=global", f"--out={out}"]) == 0
    assert (out / VERDICT).exists()
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.split()[:2] == ["fedhelp", "4"])
    assert row.split()[-3:] == ["4", "0", "0"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "no folder"),
        (["{}", "--against=locl"], "did you mean local"),
        (["{}/made/local"], "no method has a finished run"),
        (["{}/none"], "holds no run"),
        (["{}", "{}"], "--out"),
        (["{}", "--deploys=mine"], "deploys"),
    ],
)
def test_verdict_refuses_by_name(tmp_path, capsys, arguments, word):
    study_of(tmp_path, local=0.0, fedhelp=1.0)
    assert main(["fedhelp", "verdict", *(argument.format(tmp_path) for argument in arguments)]) == 2
    assert word in capsys.readouterr().err


def test_the_dice_of_images_is_judged_too(tmp_path):
    rng = np.random.default_rng(0)
    for method, lift in (("local", 0.0), ("fedhelp", 0.1)):
        make_run(folder := tmp_path / method, method=method)
        tell_dice(folder, np.append(np.nan, 0.5 + lift + rng.random(50) / 10))
    (verdict,) = (v for v in judge(runs_in(tmp_path), "local") if v.hospital == "clinic_000")
    assert verdict.metric == "dice" and verdict.gain.verdict == "gains"
    assert abs(verdict.gain.value - 0.1) < 0.03
    assert "--deploys=guarded is for" in refusal(lambda: judge(runs_in(tmp_path), "local", GUARDED))


def test_hospitals_that_were_tested_on_other_images_are_left_out_and_named(tmp_path, caplog):
    study_of(tmp_path, local=0.0, fedhelp=3.0)
    for seed in range(3):
        path = tmp_path / "made" / "fedhelp" / f"seed{seed}" / PREDICTIONS
        found, classes = read_predictions(path)
        moved = [
            p._replace(examples=p.examples + 7) if p.client == "clinic_001" else p for p in found
        ]
        write_predictions(path, moved, classes)
    left = {v.hospital for v in judge(runs_in(tmp_path), "local")}
    assert "clinic_001" not in left and {"clinic_000", "all small"} <= left
    assert len(caplog.messages) == 3
    assert all(message.endswith("compared with: clinic_001") for message in caplog.messages)
    assert "clinic_001" in report([tmp_path]).read_text()  # it has the other tables of them all


def test_hospitals_are_grouped_by_their_role_under_each_seed(tmp_path):
    runs = runs_in(study_of(tmp_path, local=0.0, fedhelp=3.0))

    def swapped(run):
        clients = run.summary["per_client"]
        own = [{**c, "role": {"small": "large", "large": "small"}[c["role"]]} for c in clients]
        return run._replace(summary={**run.summary, "per_client": own})

    def mean(runs):
        (found,) = (v for v in judge(runs, "local", metric="auroc") if v.hospital == ALL["small"])
        return found.ours

    once = [[run for run in runs if run.seed == seed] for seed in range(2)]
    both = [*once[0], *map(swapped, once[1])]
    np.testing.assert_allclose(
        mean(both), (mean(once[0]) + mean([swapped(run) for run in once[1]])) / 2
    )


def test_what_is_deployed_is_chosen_on_validation_images():
    own = hospital(personal=0.5, **{"global": 0.75})
    metric = "balanced_accuracy"
    chosen = {rule: deployed_model(own, rule, metric) for rule in RULES if rule != GUARDED}
    assert chosen == {
        "as_run": "personal",
        "own": "personal",
        "global": "global",
        "best_on_validation": "global",
        "interpolated": "global",
    }
    between = hospital(personal=0.5, between_half=0.9, **{"global": 0.75})
    assert deployed_model(between, "best_on_validation", metric) == "global"
    assert deployed_model(between, "interpolated", metric) == "between_half"
    equal = hospital(personal=0.5, **{"global": 0.5})
    assert deployed_model(equal, "best_on_validation", metric) == "personal"
    blind = own._replace(validation={})
    assert deployed_model(blind, "best_on_validation", metric) == "personal"
    large = hospital(large=0.5)
    assert {deployed_model(large, rule, metric) for rule in RULES} == {"large"}


def test_the_own_threshold_is_chosen_on_validation_images():
    labels = np.arange(40) % 2
    scores = np.where(labels == 1, 3.0, 2.0)  # right order, but all above the usual threshold
    logits = np.stack([np.zeros(40), scores], 1)
    test = Predictions("h", "small", "personal", "test", np.arange(40), labels, logits)
    own = Hospital("h", "small", "personal", {"personal": test}, {"personal": test})
    assert estimate("balanced_accuracy", own, "personal").value == 0.5
    assert estimate(OWN_THRESHOLD, own, "personal").value == 1.0
    assert estimate("auroc", own, "personal").value == 1.0


def verdict(value, low, high, needed=10, seeds=1, hospital="h", fewest=9, metric="auroc"):
    g = Gain(value, low, high, 0.5, seeds, 88, needed)
    return Verdict("xray", "fedhelp", metric, hospital, "small", 0.9, 0.9 - value, g, fewest)


def test_classes_with_few_test_images_are_told():
    few = [verdict(0.1, 0.05, 0.15, hospital=f"h{n}", fewest=n) for n in range(1, 7)]
    (grid,) = grids(few, "local")
    assert "h1 (1), h2 (2), h3 (3) and 1 more. Look" in grid.notes[-1]
    (grid,) = grids(few[3:], "local")
    assert "images: h4 (4). Look" in grid.notes[-1]
    for fine in ([verdict(0.1, 0.05, 0.15)], [verdict(0.1, 0.05, 0.15, fewest=1, metric="dice")]):
        (grid,) = grids(fine, "local")
        assert "Look" not in grid.notes[-1]


def test_a_verdict_counts_the_images_of_the_smallest_class(tmp_path):
    runs = runs_in(study_of(tmp_path, local=0.0, better=1.0))
    counts = {}
    for own in (p for run in runs for p in run.predictions if p.split == "test"):
        counts.setdefault(own.client, []).append(np.bincount(own.labels).min())
    found = {v.hospital: v.fewest for v in judge(runs, "local") if v.metric == "auroc"}
    assert {name: found[name] for name in counts} == {n: min(c) for n, c in counts.items()}
    assert found["all small"] == min(min(c) for n, c in counts.items() if "clinic" in n)


def test_the_table_says_how_many_images_would_tell():
    (grid,) = grids(
        [
            verdict(-0.1, -0.15, -0.05, 10),
            verdict(0.0, -0.05, 0.05, math.inf),
            verdict(0.01, -0.05, 0.07, 1873),
            verdict(0.02, -0.05, 0.09, 1e9),
            verdict(0.03, -0.05, 0.11, math.inf, 3),
            verdict(0.1, 0.05, 0.15, 10),
        ],
        "local",
    )
    assert [(row[-2].text, row[-1].text) for row in grid.rows] == [
        ("loses", "88"),
        (UNCLEAR, "88"),
        (UNCLEAR, "88 of 1,900"),
        (UNCLEAR, "88 of >100,000"),
        (UNCLEAR, "88; more seeds"),
        ("gains", "88"),
    ]
    (alone,) = grids([verdict(0.1, 0.05, 0.15, 10)], "local")
    assert "one seed" in " ".join(alone.notes)
