"""The page about runs: what it says, that it opens anywhere, and that it survives damage."""

import base64
import csv
import gzip
import html
import itertools
import json
import re
import shutil
import subprocess
import time

import numpy as np
import pytest
from helpers import refusal
from made_up_runs import METRIC, make_run
from PIL import Image

from fedhelp_jax.experiments.reporting import report, report_at_the_end
from fedhelp_jax.metrics import classification_metrics
from fedhelp_jax.report import numbers, run_files
from fedhelp_jax.report.page.several_runs import _best_first
from fedhelp_jax.report.predictions import PREDICTIONS, read_predictions
from fedhelp_jax.report.run_data import find_runs, read_runs

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium is installed: the page is not opened"
)


def text_of(page):
    return page.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("one") / "run", classes=2)


@pytest.fixture(scope="module")
def page(run):
    return report([run])


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    for method, lift in (("fedhelp", 0.6), ("local", 0.0), ("fedavg", 0.2)):
        for seed in range(2):
            make_run(folder / "data" / method / f"seed{seed}", method=method, seed=seed, lift=lift)
    make_run(folder / "data" / "fedavg" / "trial0")
    return folder


# --- one run --------------------------------------------------------------------------------------


def test_it_says_what_the_summary_says_the_worst_client_first(run, page):
    text, summary = text_of(page), run_files.read_summary(run)
    for key in ("small_mean", "worst_small", "large_mean"):
        assert f"<b>{summary[key]:.3f}</b>" in text
    clients = sorted(summary["per_client"], key=lambda c: c["metrics"][METRIC])
    places = [text.index(f"<td>{client['name']}</td>") for client in clients]
    assert places == sorted(places)
    assert "Synthetic data" in text and "The foundation model is simulated." in text


def test_it_says_what_the_models_mostly_answer(run, page):
    found, classes = read_predictions(run / PREDICTIONS)
    small = [p for p in found if (p.role, p.model, p.split) == ("small", "personal", "test")]
    answers = np.concatenate([p.logits.argmax(-1) for p in small])
    labels = np.concatenate([p.labels for p in small])
    often = np.bincount(answers).argmax()
    words = (
        f"The models of small clients answer {classes[often]} for {(answers == often).sum()} of "
        f"{len(answers)} images; {(labels == often).sum()} images are of that class."
    )
    assert words in text_of(page)


def test_it_needs_nothing_but_itself(page):
    text = text_of(page)
    for word in ("http://", "https://"):
        links = [part[:60] for part in text.split(word)[1:]]
        assert all(part.startswith("www.w3.org/") for part in links), links  # names of XML spaces
    assert " src=" not in text and "<link rel=" not in text.replace('<link rel="icon"', "")


def test_every_figure_is_also_a_picture_and_a_table(run, page):
    folder = page.parent / "report"
    names = {path.stem for path in folder.iterdir()}
    assert names == {"learning", "loss", "clients", "confusion", "calibration", "classes"}
    for name in names:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in text_of(folder / f"{name}.svg")
    with (folder / "clients.csv").open(newline="") as file:
        rows = {row["client"]: row for row in csv.DictReader(file)}
    for client in run_files.read_summary(run)["per_client"]:
        row = rows[client["name"]]
        assert float(row[METRIC]) == pytest.approx(client["metrics"][METRIC])
        assert float(row["low"]) <= float(row[METRIC]) <= float(row["high"])
    with (folder / "confusion.csv").open(newline="") as file:
        counts = sum(int(row["images"]) for row in csv.DictReader(file))
    assert counts == 6 * 40  # every test image of every client once


def test_the_same_run_gives_the_same_page(run, page):
    before = text_of(page)
    assert text_of(report([run])) == before


def test_panels_of_segmentations_are_in_the_page(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("report*"))
    (folder / "pictures").mkdir()
    Image.new("RGB", (40, 30), "red").save(folder / "pictures" / "small.png")
    code = base64.b64encode((folder / "pictures" / "small.png").read_bytes()).decode()
    assert f'src="data:image/png;base64,{code}"' in text_of(report([folder]))


def test_names_are_escaped(tmp_path):
    folder = make_run(tmp_path / "run", rounds=2)
    text = (folder / "summary.json").read_text().replace("clinic_000", "<script>x</script>")
    (folder / "summary.json").write_text(text)
    assert "<td><script>" not in text_of(report([folder]))


# --- several runs ---------------------------------------------------------------------------------


def test_a_study_compares_its_methods_with_training_alone(study):
    text = text_of(report([study]))
    changes = []
    for seed in range(2):
        ours, alone = (
            {c["name"]: c["metrics"][METRIC] for c in s["per_client"] if c["role"] == "small"}
            for s in (
                run_files.read_summary(study / "data" / method / f"seed{seed}")
                for method in ("fedhelp", "local")
            )
        )
        changes += [ours[name] - alone[name] for name in ours]
    gained = sum(change > 0 for change in changes)
    assert f">{np.mean(changes):+.3f}<" in text and f"{gained} of {len(changes)}" in text
    assert "trial0" not in text and "3 methods on made up" in text
    assert (study / "report" / "methods.csv").exists()


def test_a_method_counts_by_its_finished_runs(study):
    runs = read_runs(find_runs([study]), [study])
    order = list(dict.fromkeys(run.label for run in _best_first(runs)))
    assert order[0] == "local" and len(order) > 2
    best = next(i for i, run in enumerate(runs) if run.label == order[1])
    runs[best] = runs[best]._replace(summary={})
    assert list(dict.fromkeys(run.label for run in _best_first(runs))) == order


def test_a_study_over_two_versions_of_a_data_set_has_a_section_for_each(tmp_path):
    for data, method in itertools.product(("few", "many"), ("fedhelp", "local")):
        for seed in range(2):
            make_run(tmp_path / data / method / f"seed{seed}", method=method, seed=seed, rounds=2)
    page = report([tmp_path])
    headings = re.findall(r"<h2>(.*?)</h2>", text_of(page))
    assert headings[:2] == ["few: made up (synthetic)", "many: made up (synthetic)"]
    assert "2 methods on made up" in text_of(page)
    assert {"1_methods.csv", "2_methods.csv"} <= {p.name for p in (tmp_path / "report").iterdir()}


def test_a_study_shows_each_client_under_each_method(study):
    rows = re.findall(r"<tr>(.*?)</tr>", text_of(report([study])), re.DOTALL)
    summaries = [
        run_files.read_summary(study / "data" / "local" / f"seed{seed}") for seed in range(2)
    ]
    for client in summaries[0]["per_client"]:
        values = [
            c["metrics"][METRIC]
            for s in summaries
            for c in s["per_client"]
            if c["name"] == client["name"]
        ]
        row, verdict = [row for row in rows if f">{client['name']}<" in row]
        assert re.search(r"(gains|loses|unclear): [+-]0\.\d+", verdict)
        assert f">{np.mean(values):.3f}<" in row


def test_several_folders_need_a_place_for_the_page(study, tmp_path):
    folders = [study / "data" / method / "seed0" for method in ("fedhelp", "local")]
    assert "--out" in refusal(lambda: report(folders))
    assert report(folders, tmp_path) == tmp_path / "report.html"
    assert "holds no run" in refusal(lambda: report([tmp_path / "empty"]))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """The report of a sweep of 72 runs: three learning rates, three weights, eight seeds."""
    rates, weights = (1e-4, 1e-3, 1e-2), (0.0, 0.2, 1.0)
    rows = [
        {
            "learning_rate": rate,
            "algorithm.lambda_b": weight,
            "seed": seed,
            "split": "validation",
            "metric": METRIC,
            "small_mean": 0.5 + 10 * rate + 0.1 * weight,
            "large_mean": 0.7,
            "worst_small": 0.4,
            "gap": 0.2,
        }
        for rate, weight, seed in itertools.product(rates, weights, range(8))
    ]
    folder = tmp_path_factory.mktemp("sweep")
    run_files.write_csv(folder / "runs.csv", list(rows[0]), rows)
    (folder / "runs.jsonl").write_text("")
    return report([folder])


def test_a_sweep(sweep):
    text = text_of(sweep)
    assert "72 runs" in text and "no test image was used" in text
    with (sweep.parent / "report" / "sweep_learning_rate.csv").open(newline="") as file:
        small = [row for row in csv.DictReader(file) if row["score"] == "small_mean"]
    means = {
        rate: np.mean([float(row["value"]) for row in small if row["learning_rate"] == rate])
        for rate in ("0.0001", "0.001", "0.01")
    }
    assert means == {
        "0.0001": pytest.approx(0.541),
        "0.001": pytest.approx(0.55),
        "0.01": pytest.approx(0.64),
    }


# --- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("summary.json", "10 of 10 rounds are done, but the run is not evaluated."),
        ("metrics.jsonl", "metrics.jsonl is missing."),
        ("config.json", "config.json is missing."),
        (PREDICTIONS, f"{PREDICTIONS} is missing."),
        ("shares.csv", "shares.csv is missing."),
    ],
)
def test_a_missing_file_is_named(run, tmp_path, name, words):
    folder = tmp_path / "run"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("report*"))
    (folder / name).unlink()
    assert words in text_of(report([folder]))


@pytest.mark.parametrize("name", ["summary.json", "config.json", "metrics.jsonl", PREDICTIONS])
def test_a_damaged_file_is_named(run, tmp_path, name):
    folder = tmp_path / "run"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("report*"))
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(b"\x00" + whole[: len(whole) // 2])
    assert f"{name} is damaged" in text_of(report([folder]))


def test_a_report_that_fails_is_a_warning(tmp_path, caplog):
    assert report_at_the_end(tmp_path) is None
    assert "no report" in caplog.text


# --- numbers --------------------------------------------------------------------------------------


def test_predictions_are_read_as_they_were_written(run):
    found, classes = read_predictions(run / PREDICTIONS)
    assert len(found) == 6 * 2 * 2 and len(classes) == 2
    summary = run_files.read_summary(run)
    expected = {client["name"]: client["metrics"][METRIC] for client in summary["per_client"]}
    for p in found:
        if (p.model, p.split) == ("personal", "test"):
            value = numbers.balanced_accuracy(numbers.confusion(p.logits, p.labels))
            assert value == pytest.approx(expected[p.client])
    with gzip.open(run / PREDICTIONS, "rt") as file:
        assert file.readline().startswith("client,role,model,split,example,label,logit ")


@pytest.mark.parametrize("recalls", [(0.9, 0.6), (0.95, 0.97), (0.5, 0.3, 0.8, 0.6)])
@pytest.mark.parametrize("examples", [12, 200])
def test_intervals_cover_as_often_as_they_say(examples, recalls):
    """Most of 400 intervals cover the true balanced accuracy, for small clients too."""
    rng, classes = np.random.default_rng(0), len(recalls)
    covered, true, trials = 0, np.mean(recalls), 400
    for trial in range(trials):
        labels = np.arange(examples) % classes
        right = rng.uniform(size=examples) < np.array(recalls)[labels]
        logits = np.eye(classes)[np.where(right, labels, (labels + 1) % classes)]
        low, high = numbers.interval(logits, labels, seed=trial)
        covered += low <= true <= high
    assert 0.92 <= covered / trials <= (0.98 if examples == 200 else 1.0)


def test_a_few_right_answers_are_not_certainty():
    low, high = numbers.interval(np.eye(3), np.arange(3))
    assert low < 0.8 and high == 1.0


def test_intervals_of_means_cover_as_often_as_they_say():
    rng, trials = np.random.default_rng(0), 1000
    dice = rng.beta(6, 2, (trials, 10))  # its mean is 0.75
    found = [numbers.interval_of_mean(own) for own in dice]
    assert 0.92 <= np.mean([low <= 0.75 <= high for low, high in found]) <= 0.98
    assert np.isnan(numbers.interval_of_mean(np.array([0.5, np.nan]))).all()


def test_the_threshold_is_the_best_of_all():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores, labels = rng.uniform(size=30).round(2), rng.integers(0, 2, 30)
        found = numbers.at_threshold(scores, labels, numbers.best_threshold(scores, labels))
        grid = [numbers.at_threshold(scores, labels, at) for at in np.linspace(0, 1.01, 400)]
        assert found >= max(grid[1:-1]) - 1e-9 or found == pytest.approx(max(grid))
    assert numbers.best_threshold(np.array([0.2, 0.9]), np.array([1, 1])) == 0.5


def test_the_temperature_is_that_with_which_answers_were_drawn():
    rng = np.random.default_rng(0)
    logits = 3 * rng.normal(size=(20_000, 4))
    labels = np.array([rng.choice(4, p=p) for p in numbers.softmax(logits / 2.5)])
    assert numbers.best_temperature(logits, labels) == pytest.approx(2.5, rel=0.03)
    before, after = (numbers.calibration_error(logits / t, labels) for t in (1.0, 2.5))
    assert after < 0.02 < before
    # Ten right answers do not make it certain, and none say nothing.
    assert 0.2 < numbers.best_temperature(logits[:10], logits[:10].argmax(1)) < 1
    assert numbers.best_temperature(logits[:0], labels[:0]) == pytest.approx(1, abs=1e-3)


def test_the_calibration_error_is_that_of_the_metrics():
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(300, 3)), rng.integers(0, 3, 300)
    theirs = classification_metrics(logits, labels, np.ones(300, bool))["ece"]
    assert numbers.calibration_error(logits, labels) == pytest.approx(float(theirs), abs=1e-6)
    assert np.isnan(numbers.calibration_error(logits[:0], labels[:0]))


def test_what_is_not_finite_is_no_answer():
    logits = np.array([[2.0, 0.0], [np.nan, 1.0], [0.0, 3.0]])
    counts = numbers.confusion(logits, np.array([0, 1, 1]))
    assert counts.tolist() == [[1, 0, 0], [0, 1, 1]]
    assert numbers.balanced_accuracy(counts) == pytest.approx(0.75)


# --- in a browser ---------------------------------------------------------------------------------

PROBE = """
<script>
const found = { errors: window.failures, cut: [], wide: document.documentElement.scrollWidth };
for (const e of document.querySelectorAll("body *")) {
  if (e.closest("svg, .table, pre, script")) continue;
  if (e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0) found.cut.push(e.outerHTML);
}
const heads = document.querySelectorAll("table")[0].querySelectorAll("th");
const column = [...heads].findIndex((th) => th.classList.contains("number"));
const values = () => [...document.querySelectorAll("table")[0].tBodies[0].rows].map(
  (row) => parseFloat(row.cells[column].dataset.sort));
heads[column].querySelector("button").click();
found.up = values();
heads[column].querySelector("button").click();
found.down = values();
found.asked = performance.getEntriesByType("resource").map((e) => e.name);
found.seconds = performance.now() / 1000;
const out = document.createElement("pre");
out.id = "found";
out.textContent = JSON.stringify(found);
parent.document.body.append(out);
</script>
"""
CATCH = (
    "<script>window.failures = []; const keep = (e) => failures.push(String(e.message ?? e));"
    'window.addEventListener("error", keep); console.error = keep; console.warn = keep;</script>'
)


def opened(page, tmp_path, width):
    """Opens a page in a browser without a network, and returns what a script in it found.

    The page is in a frame, since the window of a browser without a screen has a least width.
    """
    text = text_of(page).replace("<head>", "<head>" + CATCH, 1)
    text = html.escape(text.replace("</body>", PROBE + "</body>"))
    frame = f'<iframe srcdoc="{text}" style="width: {width}px; height: 900px; border: 0"></iframe>'
    around = tmp_path / "around.html"
    around.write_text(f'<meta charset="utf-8"><body>{frame}</body>', encoding="utf-8")
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += ["--window-size=1600,1000", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [*command, around.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    found = done.stdout.split('<pre id="found">')[1].split("</pre>")[0]
    return json.loads(html.unescape(found))


@needs_browser
@pytest.mark.parametrize("width", [390, 1440])
def test_in_a_browser_nothing_fails_nothing_is_cut_and_sorting_sorts(page, tmp_path, width):
    found = opened(page, tmp_path, width)
    assert found["errors"] == [] and found["asked"] == []
    assert found["cut"] == [] and found["wide"] <= width
    assert found["up"] == sorted(found["up"]) and len(set(found["up"])) > 1
    assert found["down"] == found["up"][::-1]


@needs_browser
def test_two_hundred_clients_and_a_hundred_rounds(tmp_path):
    folder = make_run(tmp_path / "run", small=180, large=20, rounds=100, classes=8)
    began = time.perf_counter()
    page = report([folder])
    print(f"written in {time.perf_counter() - began:.1f} s, {page.stat().st_size / 1e6:.2f} MB")
    assert page.stat().st_size < 5e6
    found = opened(page, tmp_path, 1440)
    print(f"opened and sorted twice in {found['seconds']:.2f} s")
    assert found["seconds"] < 2 and found["errors"] == []


@needs_browser
def test_a_sweep_in_a_browser(sweep, tmp_path):
    assert sweep.stat().st_size < 5e6
    found = opened(sweep, tmp_path, 1440)
    print(f"{sweep.stat().st_size / 1e6:.2f} MB, opened in {found['seconds']:.2f} s")
    assert found["seconds"] < 2 and found["errors"] == [] and found["cut"] == []
