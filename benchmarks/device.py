"""Checks and measures everything that matters on this machine's GPU or TPU, in a few minutes.

    python -m benchmarks.device --out=device.json
    python -m benchmarks.device --parts=forms,rounds     # these, after the check
    python -m benchmarks.device --short                  # tiny sizes, to see that it runs

Each part is another benchmark of this folder in a process of its own, the most important first:

- ``parity``: a convolution and a training step against the CPU; if they are wrong, nothing is timed
  and the exit code is 1.
- ``rounds``: rounds of FedHelp's small clients beside a PyTorch loop and ``torch.func.vmap``. The
  loop trains one client after the other, so its time of 64 clients also stands for other numbers.
- ``forms``: the forms in which a convolution can be computed.
- ``roofline``: the attainable rate, of which rounds reach a fraction.
- ``fedavg``: FedAvg on the shape of pfl-research's benchmark.
- ``sweep``: a sweep beside single runs.
- ``more``: rounds of other sizes.

What is missing or does not end in time is skipped, and the table says why. Only one GPU is used,
unless CUDA_VISIBLE_DEVICES says otherwise, as PyTorch uses one. The weights are not compared with
the rivals' here; `benchmarks.round` does that, in float64 and on a CPU too. The table comes last.
"""

import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags

_MINUTES = flags.DEFINE_float("minutes", 8, "after which everything else is skipped")
_PARTS = flags.DEFINE_list(
    "parts", ["rounds", "forms", "roofline", "fedavg", "sweep", "more"], "which, besides parity"
)
_SHORT = flags.DEFINE_bool("short", False, "tiny sizes, whose times mean nothing")
_OUT = flags.DEFINE_string("out", None, "file that gets all results as JSON")

# What writing the table may take.
_SPARE_SECONDS = 3
_OURS = "fedhelp_jax"

Record = dict[str, Any]


class Sizes(NamedTuple):
    """The sizes of the long or the short form.

    Attributes:
      clients: The number that is compared with PyTorch, then a large and a small one.
      batches: The numbers of images in a step; the last is that of the roofline.
      network: Flags of the network and its images.
      repeats: How often times are taken.
      fedavg: Flags of `benchmarks.peers`.
    """

    clients: tuple[int, int, int]
    batches: tuple[int, int]
    network: tuple[str, ...]
    repeats: int
    fedavg: tuple[str, ...]


_LONG = Sizes((64, 1024, 8), (4, 16), ("--depth=20", "--image_size=32"), 3, ("--evaluated=1000",))
_TINY = Sizes(
    (2, 4, 3),
    (2, 3),
    ("--depth=8", "--image_size=8"),
    1,
    ("--users=4", "--images=4", "--cohort=2", "--batch_size=2", "--rounds=1", "--evaluated=8"),
)


class Part(NamedTuple):
    """A benchmark to run.

    Attributes:
      group: One of ``--parts``, or parity.
      name: What it measures.
      module: The benchmark.
      flags: Its flags.
      least: Seconds below which it is not started.
      needs: The libraries that it needs.
      skip: Why it is not run at all, or None.
    """

    group: str
    name: str
    module: str
    flags: tuple[str, ...]
    least: float = 0.0
    needs: tuple[str, ...] = ()
    skip: str | None = None


# It is started whatever time there is, since nothing counts without it.
PARITY = Part("parity", "parity", "benchmarks.parity", (), 240)


def parts(sizes: Sizes, without_torch: str | None) -> list[Part]:
    """Returns all parts but parity, the most important first."""
    some, many, few = sizes.clients
    little, much = sizes.batches
    repeats = f"--repeats={sizes.repeats}"

    def rounds(group: str, clients: int, batch: int, dtype: str = "float32") -> Part:
        rivals = "loop,vmap" * (clients == some and dtype == "float32" and not without_torch)
        how = (f"--clients={clients}", f"--batch_sizes={batch}", f"--compute_dtype={dtype}")
        rest = ("--nocheck", "--notorch_compile", f"--rivals={rivals}", repeats)
        name = rounds_name(clients, batch, dtype)
        return Part(group, name, "benchmarks.round", (*sizes.network, *how, *rest), 45)

    stage = (f"--clients={some}", f"--batch_size={much}", "--noone_core", repeats)
    size = sizes.network[1]
    return [
        rounds("rounds", some, little),
        rounds("rounds", some, much),
        rounds("rounds", some, much, "bfloat16"),
        rounds("rounds", many, little),
        Part("forms", "forms", "benchmarks.forms", (size, *stage), 30),
        Part("roofline", "roofline", "benchmarks.roofline", (*sizes.network, *stage), 45),
        Part(
            "fedavg",
            "FedAvg, pfl-research's shape",
            "benchmarks.peers",
            ("--peers=", repeats, *sizes.fedavg),
            45,
        ),
        Part(
            "sweep",
            "sweep",
            "benchmarks.sweep",
            ("--sample=2", "--nocommands", "--nocheck"),
            90,
            ("ml_collections", "rich"),
            "has no short form" if sizes is _TINY else None,
        ),
        rounds("more", some, little, "bfloat16"),
        rounds("more", few, little),
        rounds("more", many, much),
        rounds("more", few, much),
    ]


def rounds_name(clients: int, batch: int, dtype: str) -> str:
    return f"{clients} clients, batch {batch}" + ", bfloat16" * (dtype == "bfloat16")


# --- running ------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """Returns the environment of the parts."""
    # Several processes share the device; and one GPU is what PyTorch's rivals use.
    defaults = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "CUDA_VISIBLE_DEVICES": "0"}
    defaults["PYTHONUNBUFFERED"] = "1"  # so that the last line of a log is the last
    found = defaults | dict(os.environ)
    platforms = found.get("JAX_PLATFORMS")
    if platforms and "cpu" not in platforms.split(","):  # parity needs it too
        found["JAX_PLATFORMS"] = f"{platforms},cpu"
    return found


def run(part: Part, left: float) -> Record:
    """Runs a part and returns its result, or why there is none.

    Args:
      part: The part.
      left: The seconds that are left. It gets half of them, so that one that hangs leaves time for
        the others.
    """
    record: Record = {"part": part.group, "name": part.name, "result": None, "reason": None}
    record["command"] = ["python", "-m", part.module, *part.flags]
    missing = [name for name in part.needs if importlib.util.find_spec(name) is None]
    if part.skip:
        return record | {"reason": part.skip}
    if missing:
        return record | {"reason": f"{' and '.join(missing)} not installed"}
    if left < part.least:
        return record | {
            "reason": f"{max(0, left):.0f} s are left, it takes {part.least:.0f} or more"
        }
    print(f"{part.name} ...", file=sys.stderr, flush=True)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        log, out = Path(folder) / "log", Path(folder) / "out"
        reason = _run(part, max(part.least, left / 2), log, out)
        record["seconds"] = time.perf_counter() - began
        try:
            record["result"] = json.loads(out.read_text().splitlines()[-1])
        except (OSError, IndexError, ValueError):  # it was ended before, or while, it wrote
            reason = reason or "wrote no result"
        if reason:
            print(log.read_text()[-3000:], file=sys.stderr)
    return record | {"reason": reason}


def _run(part: Part, limit: float, log: Path, out: Path) -> str | None:
    """Runs a part's command and returns why it failed, or None."""
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", part.module, *part.flags, f"--out={out}"],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment(),
            start_new_session=True,  # so that its workers can be ended with it
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"did not end within {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code == 0:
        return None
    text = log.read_text()
    if "RESOURCE_EXHAUSTED" in text or "OutOfMemoryError" in text:
        return "out of memory"
    lines = text.strip().splitlines() or ["no output"]
    # JAX ends a traceback with a remark of its own.
    told = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Exit):", line)]
    return f"failed: {(told or lines)[-1][:200]}"


def without_torch(platform: str) -> str | None:
    """Returns why PyTorch is not compared, or None if it is."""
    for name in ("torch", "pytest"):  # the rivals' network is that of the tests
        if importlib.util.find_spec(name) is None:
            return f"{name} not installed"
    if platform == "cpu":
        return None
    import torch

    return None if torch.cuda.is_available() else "PyTorch has no GPU here"


def measure(sizes: Sizes, minutes: float, groups: Sequence[str]) -> Record:
    """Runs the parts and returns what the JSON holds."""
    end = time.perf_counter() + 60 * minutes - _SPARE_SECONDS
    network = sizes.network if sizes is _TINY else ()
    parity = PARITY._replace(flags=network + PARITY.flags)
    records = [run(parity, max(parity.least, end - time.perf_counter()))]
    checked = records[0]["result"] or {}
    no_torch = None
    if records[0]["reason"] is None:
        no_torch = without_torch(checked["platform"])
        for part in parts(sizes, no_torch):
            if part.group in groups:
                records.append(run(part, end - time.perf_counter()))
    return {
        **{key: checked.get(key) for key in ("device", "devices", "memory_gib", "version")},
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "date": time.strftime("%Y-%m-%d"),
        "minutes": minutes,
        "short": sizes is _TINY,
        "without_torch": no_torch,
        "records": records,
    }


# --- the table ----------------------------------------------------------------------------------


class Row(NamedTuple):
    """A line of the table; a goal is ``("at least" or "at most", number)``."""

    what: str
    value: float | None
    unit: str = ""
    goal: tuple[str, float] | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        """Whether the goal is reached."""
        if self.goal is None or self.value is None:
            return ""
        how, number = self.goal
        reached = self.value >= number if how == "at least" else self.value <= number
        return "reached" if reached else "missed"

    def text(self) -> str:
        """Returns a row of Markdown."""
        value = self.note if self.value is None else f"{self.value:.3g}{self.unit}"
        goal = "" if self.goal is None else f"{self.goal[0]} {self.goal[1]:g}{self.unit}"
        return f"| {self.what} | {value} | {goal} | {self.verdict} |"


def rows(found: Record) -> list[Row]:
    """Returns the table of what was measured, with the goals, which are for an H100."""
    records = {record["name"]: record for record in found["records"]}
    results = {name: r["result"] for name, r in records.items() if r["reason"] is None}
    table = []
    for name, record in records.items():
        result = record["result"]
        if record["part"] == "parity" and result:
            for row in result["rows"]:
                what = f"{row['what']}, {row['precision']}: error"
                table.append(Row(what, row["error"], goal=("at most", row["bound"])))
        if record["reason"] is not None:
            table.append(Row(name, None, note=record["reason"]))
        elif record["part"] in ("rounds", "more"):
            table += _round_rows(result, results, found)
        elif name == "forms":
            for row in result["rows"]:
                what = f"{row['channels']} channels, {row['side']}x{row['side']}, {row['form']}"
                note = f"{row['ms']:.3g} ms, {row['fraction']:.2f} of attainable"
                table.append(Row(what, None, note=note))
        elif name == "roofline":
            table.append(Row("stages of the network, of attainable", result["fraction"]))
        elif record["part"] == "fedavg":
            table.append(
                Row(f"{name}, rounds a minute", result["rounds_per_minute"][_OURS]["median"])
            )
        elif name == "sweep":
            ratio = result["sweep"] / result["one_by_one"]
            table.append(Row("sweep / single runs", ratio, "x", ("at most", 0.3)))
    return table


def _round_rows(result: Record, results: Mapping[str, Any], found: Record) -> list[Row]:
    """Returns the rows of a round: its time, ratios to the rivals' times, share of attainable."""
    sizes = _TINY if found["short"] else _LONG
    clients, batch, dtype = result["clients"], result["batch_size"], result["compute_dtype"]
    name, ours = rounds_name(clients, batch, dtype), result["ms"][_OURS]["median"]
    # The rivals compute in float32, and run at one number of clients only.
    compared = results.get(rounds_name(sizes.clients[0], batch, "float32"), {}).get("ms", {})
    table = [Row(f"{name}: ms a client and step", ours)]
    goals = {sizes.clients[0]: 50, sizes.clients[1]: 100}
    goal = ("at least", goals[clients]) if clients in goals else None
    if "loop" in compared:
        ratio = compared["loop"]["median"] / ours
        table.append(Row(f"{name}: PyTorch loop / ours", ratio, "x", goal))
    elif found["without_torch"]:
        table.append(Row(f"{name}: PyTorch loop / ours", None, "x", goal, found["without_torch"]))
    if "vmap" in result["ms"]:
        ratio = result["ms"]["vmap"]["median"] / ours
        table.append(Row(f"{name}: torch.func.vmap / ours", ratio, "x", ("at least", 3)))
    roofline = results.get("roofline")
    if roofline and batch == roofline["batch_size"] and dtype == "float32":
        # A step of FedHelp's small clients trains on a private and then on a public batch.
        ideal = 2e3 * roofline["ideal_s"] / roofline["clients"] / result["about"][_OURS]["devices"]
        table.append(Row(f"{name}: of attainable", ideal / ours, goal=("at least", 0.5)))
    return table


def main(_: list[str]) -> None:
    sizes = _TINY if _SHORT.value else _LONG
    found = measure(sizes, _MINUTES.value, _PARTS.value)
    table = rows(found)
    found["table"] = [row._asdict() | {"verdict": row.verdict} for row in table]
    if _OUT.value:
        Path(_OUT.value).write_text(json.dumps(found, indent=1) + "\n")
    print("| what | measured | goal | |\n|---|---|---|---|")
    print("\n".join(row.text() for row in table))
    tiny = "; tiny sizes, whose times mean nothing" if found["short"] else ""
    print(f"\n{found['device']}, {found['version']}, {found['machine']}, {found['date']}{tiny}")
    sys.exit(found["records"][0]["reason"] is not None)


if __name__ == "__main__":
    app.run(main)
