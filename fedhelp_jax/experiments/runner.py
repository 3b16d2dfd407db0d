"""Runs the rounds and evaluations, and manages checkpoints and the run folder.

A run folder holds ``config.json``, ``metrics.jsonl`` (one line per round), ``checkpoints/`` and, at
the end, ``clients.csv`` and ``summary.json``; for masks also ``pictures/``. The same command on the
same folder resumes where the run stopped, and ends with the same bits as if it had never stopped.
"""

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fedhelp_jax.core import distributed
from fedhelp_jax.core.compilation import compile_totals, jit
from fedhelp_jax.core.errors import UserError
from fedhelp_jax.core.locks import folder_lock
from fedhelp_jax.data.bad_examples import QUARANTINE
from fedhelp_jax.data.federation import ClientData, Group, Pool, normalize_images
from fedhelp_jax.experiments import config as configs
from fedhelp_jax.experiments import identity
from fedhelp_jax.experiments.agreement import check_same_sources, check_together
from fedhelp_jax.experiments.checkpoint import Checkpointer
from fedhelp_jax.experiments.config import RunConfig
from fedhelp_jax.experiments.experiment import (
    Experiment,
    build_experiment,
    compiled_ahead,
    fitted,
    rounds_at_once,
)
from fedhelp_jax.experiments.final_results import TRAFFIC, write_results
from fedhelp_jax.experiments.plan import payload_line, plan_lines
from fedhelp_jax.experiments.stopping import Interrupted, StopRequest
from fedhelp_jax.experiments.tracking import Tracking
from fedhelp_jax.models.model import Model, Variables, apply_model
from fedhelp_jax.report import run_files
from fedhelp_jax.report.client_distribution import SHARES, write_left_out, write_shares
from fedhelp_jax.report.console import Progress
from fedhelp_jax.report.dice import DICE
from fedhelp_jax.report.masks import PICTURES
from fedhelp_jax.report.page import files as page
from fedhelp_jax.report.predictions import PREDICTIONS
from fedhelp_jax.report.run_files import CLIENTS, CONFIG, METRICS, SUMMARY
from fedhelp_jax.report.summary import group_summary, headline
from fedhelp_jax.simulation.divergence import Diverged, Divergence
from fedhelp_jax.simulation.round import RoundInfo, RunState
from fedhelp_jax.typing import JsonObject, Record

_log = logging.getLogger(__name__)

# Called after a round with ``(round, metrics, state)``; the run ends early if it returns True.
Callback = Callable[[int, Record, RunState], bool | None]

_CHECKPOINTS = "checkpoints"


def train(
    config: RunConfig,
    workdir: Path,
    overwrite: bool = False,
    *,
    split: str = "test",
    callbacks: Sequence[Callback] = (),
    tells_plan: bool = True,
) -> JsonObject:
    """Starts or resumes a run in a folder.

    Args:
      config: The settings.
      workdir: The run folder.
      overwrite: Whether to start from scratch and remove an earlier run from the folder.
      split: The split that the final models are evaluated on; "validation" uses no test image.
      callbacks: Called after every round with its number, its row of ``metrics.jsonl`` and the
        state; if one returns True, the run ends there and is evaluated.
      tells_plan: Whether to print what the run will do before its first round.

    Returns:
      The content of ``summary.json`` in the first process; an empty dict in the others.

    Raises:
      UserError: If the settings, the data or the folder do not allow the run.
      Diverged: If every client of a role has diverged, after saving the state and writing the
        results. Repeating the command on the folder raises it again.
      Interrupted: After SIGINT or SIGTERM, once the state is saved.
    """
    check_together(config, workdir)
    with folder_lock(workdir):
        return _train(config, workdir, overwrite, split, callbacks, tells_plan)


def _train(
    config: RunConfig,
    workdir: Path,
    overwrite: bool,
    split: str,
    callbacks: Sequence[Callback],
    tells_plan: bool,
) -> JsonObject:
    settings = dict(configs.flat(configs.to_dict(config)))
    tracking = distributed.run_on_all(lambda: Tracking(config.tracking, workdir, settings))
    if overwrite and distributed.is_coordinator():
        _remove_run(workdir)
    distributed.all_gather_text("removed")

    def prepare() -> Experiment:
        _check_same_config(config, workdir)
        return build_experiment(identity.as_started(config, workdir))

    experiment = distributed.run_on_all(prepare)
    check_same_sources(experiment)
    experiment = fitted(experiment)
    checkpointer = Checkpointer(workdir / _CHECKPOINTS)
    try:
        done, state, _ = _restore(experiment, checkpointer, workdir, same_program=True)
        if done > config.rounds:
            raise distributed.Agreed(
                f"config.rounds = {config.rounds}, but the run in {workdir} has done {done}: give "
                "at least as many, or name another folder"
            )
        if distributed.is_coordinator():
            run_files.write_json(workdir / CONFIG, configs.to_dict(experiment.config))
            identity.write_provenance(workdir, identity.provenance(experiment))
            write_shares(workdir, experiment.dataset, experiment.roles)
            write_left_out(workdir, experiment.dataset, experiment.public)
            run_files.cut_metrics(workdir / METRICS, done)
        if done:
            _log.warning("going on after round %d of %d", done, config.rounds)
        health = _health(experiment, workdir, done)
        trains = done < config.rounds and not _must_stop(config, health)
        shown = None
        if distributed.is_coordinator() and trains:
            shown = Progress(config.rounds, first_round=done, metric=experiment.task.headline)
        nothing = contextlib.nullcontext()
        with StopRequest() as stop, shown or nothing, tracking if trains else nothing:
            start = done
            experiment = _compiled(experiment, done, trains, shown, tells_plan)
            at = experiment, checkpointer, workdir, state, done
            done, state = _run_rounds(*at, stop, health, callbacks, shown, tracking)
        before = experiment.compile_s if done == start else 0.0  # else it is in the first round
        summary = write_results(experiment, workdir, state, done, split, health, compile_s=before)
        if _must_stop(experiment.config, health):
            raise Diverged(health.message(done, workdir), summary)
        if distributed.any_process(stop.requested):
            raise Interrupted(f"asked to stop in the last round; the run in {workdir} is finished")
        return summary
    finally:
        checkpointer.close()


def evaluate(workdir: Path, config: RunConfig | None = None) -> JsonObject:
    """Evaluates the newest checkpoint of a run folder again and rewrites its ``summary.json``.

    Args:
      workdir: The run folder.
      config: The settings of the run, which may differ in such things as the location of data; None
        takes the settings in the folder.

    Returns:
      The content of ``summary.json`` in the first process; an empty dict in the others.

    Raises:
      UserError: If the folder holds no checkpoint or is not as the run left it.
      Diverged: See `train`.
    """
    found: RunConfig = config or distributed.run_on_all(lambda: configs.load(workdir / CONFIG))
    check_together(found, workdir)
    with folder_lock(workdir):
        return _evaluate(found, workdir)


def _evaluate(config: RunConfig, workdir: Path) -> JsonObject:
    def prepare() -> Experiment:
        if not (workdir / _CHECKPOINTS).is_dir():
            raise UserError(f"--workdir={workdir}: there is no checkpoint; train first")
        return build_experiment(config)

    experiment = distributed.run_on_all(prepare)
    # With several processes, the state fits only the chunk size with which it was trained.
    experiment = fitted(experiment, training=experiment.simulation.mapping.private)
    checkpointer = Checkpointer(workdir / _CHECKPOINTS, read_only=True)
    try:
        done, state, meta = _restore(experiment, checkpointer, workdir, same_program=False)
    finally:
        checkpointer.close()
    health = _health(experiment, workdir, done)
    if done < config.rounds and not _must_stop(config, health):
        raise UserError(
            f"--workdir={workdir}: the run stopped after round {done} of {config.rounds}; "
            "the same train command goes on with it"
        )
    experiment = compiled_ahead(experiment, training=False)
    # A run that was evaluated on validation images must not be evaluated on test images later.
    before = run_files.read_summary(workdir) if (workdir / SUMMARY).exists() else {}
    split = before.get("split", "test")
    at = experiment, workdir, state, done, split, health
    summary = write_results(*at, compile_s=experiment.compile_s, trained_by=meta["program"])
    if _must_stop(config, health):
        raise Diverged(health.message(done, workdir), summary)
    return summary


def restore(config: RunConfig, workdir: Path) -> tuple[Experiment, RunState]:
    """Returns a run's experiment and the state of its last checkpoint, without changing the folder.

    Raises:
      UserError: If the folder holds no checkpoint or is not as the run left it.
    """
    experiment = build_experiment(config)
    checkpointer = Checkpointer(workdir / _CHECKPOINTS, read_only=True)
    try:
        return experiment, _restore(experiment, checkpointer, workdir, same_program=False)[1]
    finally:
        checkpointer.close()


def deployed(
    experiment: Experiment, state: RunState, group: Group, row: int
) -> tuple[Model, Variables]:
    """Returns the network that a client deploys, and its variables."""
    dataset = experiment.dataset
    train = dataset.clients[int(np.asarray(group.ids)[row])].train
    pool = Pool(jnp.asarray(dataset.images[train]), jnp.asarray(dataset.labels[train]))
    data = ClientData(pool, None, jnp.arange(len(train)), jnp.int32(len(train)))
    return experiment.simulation.deployed(state, group, row, data)


def logits_of(model: Model, variables: Variables, images: np.ndarray) -> np.ndarray:
    """Returns a network's logits on images, computed in batches."""
    apply = jit(lambda v, x: apply_model(model, v, normalize_images(x))[0])
    size = 64
    # The last batch is filled up, so that only one program is compiled.
    padded = np.concatenate([images, np.repeat(images[-1:], -len(images) % size, axis=0)])
    starts = range(0, len(padded), size)
    logits = [np.asarray(apply(variables, padded[i : i + size])) for i in starts]
    return np.concatenate(logits)[: len(images)]


def _run_rounds(
    experiment: Experiment,
    checkpointer: Checkpointer,
    workdir: Path,
    state: RunState,
    done: int,
    stop: StopRequest,
    health: Divergence,
    callbacks: Sequence[Callback],
    shown: Progress | None,
    tracking: Tracking,
) -> tuple[int, RunState]:
    """Runs the remaining rounds; returns the number of completed rounds and the final state."""
    config, simulation = experiment.config, experiment.simulation
    metric, payload, before = experiment.task.headline, None, experiment.compile_s
    while done < config.rounds and not _must_stop(config, health):
        # What was compiled before the first round is part of it.
        started = time.perf_counter() - before
        compiled, before = compile_totals().seconds - before, 0.0
        first, done = done, done + 1 if callbacks else _next_stop(config, done)
        state, infos = simulation.rounds(state, first, done)
        payload = payload or simulation.payload_bytes()
        rows: list[JsonObject] = [
            {
                "round": round,
                **_round_losses(experiment, i),
                **_traffic(experiment, i, payload),
                "quarantined": health.trained(round, i.participants, i.non_finite),
                "diverged": health.clients,
            }
            for round, i in enumerate(infos, start=first + 1)
        ]
        last = done == config.rounds
        if last or done % config.evaluate_every == 0:
            results = simulation.evaluate(state, "validation")
            health.measured(f"round {done}, validation", results)
            rows[-1] |= {"split": "validation", "metric": metric, "diverged": health.clients}
            scores = health.scores(headline(results, metric))
            rows[-1] |= {**group_summary(scores), "clients": scores}
        jax.block_until_ready(state)
        wall_s = (time.perf_counter() - started) / len(rows)
        compile_s = (compile_totals().seconds - compiled) / len(rows)
        for row in rows:
            if shown is None:
                continue
            row |= {"wall_s": wall_s, "compile_s": compile_s}
            run_files.append_metrics(workdir / METRICS, row)
            shown.update(run_files.plain(row) | {"seconds": wall_s - compile_s})
            tracking.log(run_files.plain(row))
        # If any process is asked to stop, all stop after the same round.
        stopping = distributed.any_process(stop.requested)
        ends = [callback(done, run_files.plain(rows[-1]), state) for callback in callbacks]
        # All processes end together, even if a callback returned True in only one of them.
        ended = bool(callbacks) and distributed.any_process(True in ends)
        last = last or _must_stop(config, health) or ended
        if last or stopping or done % config.checkpoint_every == 0:
            checkpointer.save(done, state, identity.of_checkpoint(experiment))
        if stopping and not last:
            raise Interrupted(
                f"stopped after round {done} of {config.rounds}, saved in {workdir}; "
                "the same command goes on from there"
            )
        if ended:
            break
    return done, state


def _compiled(
    experiment: Experiment, done: int, training: bool, shown: Progress | None, tells_plan: bool
) -> Experiment:
    """Says what the run will do, and returns it with its programs compiled."""
    if shown is None:
        return compiled_ahead(experiment, training=training)
    for line in plan_lines(experiment, done) if tells_plan else ():
        shown.note(line)
    experiment = compiled_ahead(experiment, training=training, told=shown.compiling)
    if tells_plan and jax.process_count() == 1:  # what was compiled has been traced
        shown.note(payload_line(experiment))
    return experiment


def _health(experiment: Experiment, workdir: Path, done: int) -> Divergence:
    """Returns the `Divergence` of a run, restored as it was after ``done`` rounds."""
    rows = run_files.read_metrics(workdir / METRICS, done) if distributed.is_coordinator() else []
    before = distributed.all_gather_text(json.dumps(rows[-1].get("diverged") if rows else None))[0]
    names = {group.role: group.names for group in experiment.simulation.groups}
    return Divergence(names, json.loads(before), warns=distributed.is_coordinator())


def _must_stop(config: RunConfig, health: Divergence) -> bool:
    return config.on_divergence == "stop" and bool(health.lost_roles)


def _next_stop(config: RunConfig, done: int) -> int:
    """Returns the next round at which to evaluate, to save, or to end a full dispatch."""
    every = (config.evaluate_every, config.checkpoint_every)
    return min(config.rounds, done + rounds_at_once(config), *((done // n + 1) * n for n in every))


def _round_losses(experiment: Experiment, info: RoundInfo) -> JsonObject:
    """Returns a round's mean loss over all participants, and the mean of each value by role."""
    details, losses = {}, []
    for group in experiment.simulation.groups:
        took_part = np.asarray(info.participants[group.role]) < len(group.names)
        report = {
            name: np.asarray(v) for name, v in info.info[group.role].items() if name not in TRAFFIC
        }
        details[group.role] = {name: float(v[took_part].mean()) for name, v in report.items()}
        losses.extend(report["loss"][took_part].tolist())
    return {"loss": float(np.mean(losses)), "train": details}


def _traffic(
    experiment: Experiment, info: RoundInfo, payload: Mapping[str, tuple[int, int]]
) -> dict[str, int]:
    """Returns the bytes that all participants sent and received.

    A method whose traffic changes by round reports it; for others, ``payload`` gives it.
    """
    total: dict[str, int] = {way: 0 for way in TRAFFIC}
    for group in experiment.simulation.groups:
        took_part = np.asarray(info.participants[group.role]) < len(group.names)
        for way, static in zip(TRAFFIC, payload[group.role], strict=True):
            said = info.info[group.role].get(way)
            each = np.full(len(took_part), static) if said is None else np.asarray(said)
            total[way] += int(each[took_part].sum())
    return total


def _restore(
    experiment: Experiment, checkpointer: Checkpointer, workdir: Path, *, same_program: bool
) -> tuple[int, RunState, JsonObject]:
    """Returns the newest checkpoint's round, state and metadata; without one, an initial state."""
    simulation, ours = experiment.simulation, identity.of_checkpoint(experiment)

    def check(meta: JsonObject) -> None:
        where = f"--workdir={workdir}"
        identity.refuse_other_checkpoint(meta, ours, where, same_program=same_program)

    found = checkpointer.restore_latest(simulation.state_shapes(), check)
    if found is None:
        return 0, simulation.init(), ours
    done, state, meta = found
    return done, simulation.put(state), meta


def _check_same_config(config: RunConfig, workdir: Path) -> None:
    path = workdir / CONFIG
    if path.exists():
        identity.refuse_other_settings(configs.load(path), config, f"--workdir={workdir}")


def _remove_run(workdir: Path) -> None:
    own = CONFIG, identity.PROVENANCE, METRICS, CLIENTS, PREDICTIONS, DICE, SUMMARY, QUARANTINE
    for name in (*own, *SHARES, page.PAGE):
        (workdir / name).unlink(missing_ok=True)
    for name in (_CHECKPOINTS, PICTURES, page.FOLDER, "tensorboard"):
        shutil.rmtree(workdir / name, ignore_errors=True)
