"""Evaluates the final state of a run and writes its results."""

import time
from pathlib import Path

import numpy as np

from fedhelp_jax.core import distributed
from fedhelp_jax.core.compilation import compile_totals
from fedhelp_jax.experiments import identity
from fedhelp_jax.experiments.experiment import Experiment
from fedhelp_jax.models.model import multiplied_in
from fedhelp_jax.report import predictions, run_files
from fedhelp_jax.report.masks import final_masks, merged
from fedhelp_jax.report.predictions import PREDICTIONS
from fedhelp_jax.report.summary import (
    Results,
    client_rows,
    group_summary,
    headline,
    per_client,
    versions,
)
from fedhelp_jax.simulation.divergence import Divergence
from fedhelp_jax.simulation.recheck import recheck
from fedhelp_jax.simulation.round import RunState
from fedhelp_jax.typing import JsonObject, Record

# Bytes that a client sends and receives; a method may report them under these keys of its info.
TRAFFIC = ("bytes_up", "bytes_down")


def write_results(
    experiment: Experiment,
    workdir: Path,
    state: RunState,
    done: int,
    split: str,
    health: Divergence,
    *,
    compile_s: float,
    trained_by: Record | None = None,
) -> JsonObject:
    """Evaluates the final state and writes the results.

    Args:
      experiment: What was run.
      workdir: The run folder.
      state: The state after the last round.
      done: The number of rounds done.
      split: The split that the summary is about; "validation" uses no test image.
      health: Which clients have diverged so far.
      compile_s: Seconds of compiling ahead that are not in any round's.
      trained_by: The program that trained, if it is not this one.

    Returns:
      The content of ``summary.json`` in the first process; an empty dict in the others.
    """
    started, compiled = time.perf_counter() - compile_s, compile_totals().seconds - compile_s
    simulation, config = experiment.simulation, experiment.config
    results, logits = {}, {}
    for name in dict.fromkeys(("validation", split)):
        results[name], logits[name] = simulation.evaluate_examples(state, name)
    for name, found in results.items():
        health.measured(f"round {done}, {name}", found)
    recheck(
        simulation.phases,
        simulation.groups,
        simulation.federation.public,
        state,
        experiment.dataset,
        split,
        results[split],
        bfloat16=config.model.compute_dtype == "bfloat16",
    )
    if experiment.task.predict is not None and split == "test":
        folder = workdir if distributed.is_coordinator() else None
        found = final_masks(simulation, state, experiment.dataset, folder, config.algorithm.name)
        results["test"] = merged(results["test"], found)
    if not distributed.is_coordinator():
        return {}
    names = {group.role: group.names for group in simulation.groups}
    clients = client_rows(names, results)
    run_files.write_csv(workdir / run_files.CLIENTS, run_files.CLIENT_COLUMNS, clients)
    if experiment.task.keeps_logits:
        labels, classes = experiment.dataset.labels, experiment.dataset.label_names
        found = predictions.of_run(simulation.groups, labels, logits)
        predictions.write_predictions(workdir / PREDICTIONS, found, classes)
    rows = run_files.read_metrics(workdir / run_files.METRICS, done)
    program = identity.program(experiment)
    summary = run_files.plain(
        {
            **_about(experiment),
            "split": split,
            **_scores(experiment, results[split], health),
            "stopped_after": done if done < config.rounds else None,
            "quarantined": {
                role: sum(row.get("quarantined", {}).get(role, 0) for row in rows) for role in names
            },
            **{f"{way}_per_round": round(np.mean([row[way] for row in rows])) for way in TRAFFIC},
            "program": trained_by or program,
            "measured_by": program,
            "multiplied_in": multiplied_in(
                config.model.compute_dtype, config.model.precision, simulation.mapping.platform
            ),
            "compile_s": sum(row["compile_s"] for row in rows)
            + compile_totals().seconds
            - compiled,
            "wall_s": sum(row["wall_s"] for row in rows) + time.perf_counter() - started,
            "versions": versions(),
        }
    )
    run_files.write_json(workdir / run_files.SUMMARY, summary)
    return summary


def _about(experiment: Experiment) -> JsonObject:
    """Returns what was run: the method, its data and its foundation model."""
    config, dataset = experiment.config, experiment.dataset
    public, answers = experiment.public, experiment.answers
    return {
        "algorithm": config.algorithm.name,
        "dataset": dataset.name,
        "synthetic": dataset.synthetic,
        "public": None if public is None else public.name,
        "left_out": {
            "private": len(dataset.left_out),
            "public": 0 if public is None else len(public.left_out),
        },
        "teacher": None if answers is None else answers.fingerprint,
        "teacher_agreement": None if answers is None or public is None else answers.top_1(public),
        "teacher_queries": 0 if answers is None or public is None else len(set(public.sha256)),
        "seed": config.seed,
        "rounds": config.rounds,
        "metric": experiment.task.headline,
    }


def _scores(experiment: Experiment, measured: Results, health: Divergence) -> JsonObject:
    """Returns the scores of roles and clients, and which clients have diverged."""
    metric, groups = experiment.task.headline, experiment.simulation.groups
    names = {group.role: group.names for group in groups}
    sizes = {
        g.role: tuple(np.asarray(table.size).tolist() for table in (g.train, g.test))
        for g in groups
    }
    broadcast = {
        r: models["global"][metric] for r, models in measured.items() if "global" in models
    }
    return {
        **group_summary(health.scores(headline(measured, metric))),
        "diverged": {role: len(clients) for role, clients in health.clients.items()},
        "evaluated": {role: list(models) for role, models in measured.items()},
        "global": group_summary(health.scores(broadcast)),
        "per_client": per_client(names, sizes, measured, health.clients),
    }
