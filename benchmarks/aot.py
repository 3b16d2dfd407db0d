"""Compiles the programs of a round for accelerators that need not be there, and counts their work.

    make aot                                      # those that a change should pass, in minutes
    .aot/bin/python -m benchmarks.aot --all       # every method and target, in an hour
    .aot/bin/python -m benchmarks.aot --only='v5e/*,*/train_small' --clients=1024
    .aot/bin/python -m benchmarks.aot --all --record            # renews benchmarks/aot.json

XLA compiles for an NVIDIA H100 and for TPU v5e chips by their descriptions, from shapes alone, on a
machine that has neither. Every program must compile and fit the device's memory, call nothing on
the host, and have no loop over clients. It must not exceed the recorded kernels, bytes and
temporaries by more than 10 %, unless those were recorded with other versions of the compilers.

A program is named ``target/method-kind/program`` (`benchmarks.absent`). ``v5e-4`` is four chips,
each with only its own clients' data; its figures are those of one chip. Loops over a client's steps
have an unknown number of iterations, so the figures are those of one step (`benchmarks.count`). The
estimated times are no measurements.
"""

import fnmatch
import json
import re
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import app, flags

from benchmarks.absent import TARGETS, Target, programs_of
from benchmarks.count import CHIPS, Count, count
from fedhelp_jax.core.memory import program_bytes
from fedhelp_jax.typing import JsonObject

_ALL = flags.DEFINE_boolean("all", False, "compile every program, not only the default ones")
_ONLY = flags.DEFINE_list("only", None, "patterns of the programs to compile, such as h100/*")
_CLIENTS = flags.DEFINE_integer("clients", 64, "clients; 5 of 16 are large")
_RECORD = flags.DEFINE_boolean("record", False, "record the figures instead of checking them")
_TEXTS = flags.DEFINE_string("texts", None, "folder that gets the programs, for benchmarks.count")
_MARKDOWN = flags.DEFINE_string("markdown", None, "file that gets the table")

_RECORDED = Path(__file__).with_suffix(".json")
_TOLERANCE, _FEW_BYTES = 1.1, 2**16

# Those that a change should pass, the most important first. Compilers of TPUs take minutes for a
# ResNet, so that here a smaller network stands for it.
DEFAULT = (
    "h100/fedhelp/train_small",
    "v5e/fedavg-cnn/train_small",
    "h100/fedhelp/aggregate",
    "h100/fedhelp/evaluate_small",
    "h100/fedavg/train_small",
    "h100/fedhelp-masks/train_small",
)
# The others. Methods that differ from these only in what the server does with uploads, or in a term
# of the gradient, are left out.
REST = (
    *("v5e/fedhelp/train_small", "v5e/fedavg/train_small", "v5e-4/fedhelp-cnn/train_small"),
    *("v5e-4/fedhelp-cnn/aggregate", "v5e-4/fedhelp-cnn/evaluate_small", "h100/fedavg/rounds"),
    *("h100/fedhelp-sweep/rounds", "h100/fedhelp/train_large", "h100/fedhelp/rounds"),
    *(f"h100/{name}/aggregate" for name in ("feddf", "fedgh", "centralized")),
    *(
        f"h100/{name}/train_small"
        for name in (
            *("scaffold", "ditto", "per_fedavg", "pfedme", "fml"),
            *("fedmd", "fedproto", "fedkd", "fedtype"),
        )
    ),
    *("h100/fedhelp/evaluate_large", "h100/fedavg/aggregate", "h100/fedavg/evaluate_small"),
    *("h100/fedhelp-masks/train_large", "h100/fedhelp-masks/evaluate_small"),
    *("v5e/fedhelp/aggregate", "v5e/fedhelp/evaluate_small", "v5e/fedhelp-masks/train_small"),
    *("v5e-4/fedhelp/train_small", "v5e-4/fedavg-cnn/rounds"),
    *("h100/fedhelp-bf16/train_small", "v5e/fedavg-bf16/train_small"),
)


# Programs that go through the clients one after the other on purpose. The server of FedDF would
# otherwise need the activations of all clients' networks at once.
SERIAL = ("*/feddf/aggregate",)


class Figures(NamedTuple):
    """What is recorded of a program."""

    kernels: int
    bytes: int
    flop: int
    temporaries: int


def faults(
    target: Target, compiled: Any, counted: Count, lengths: set[int], before: Figures | None
) -> list[str]:
    """Returns what is wrong with a program.

    Args:
      target: The device.
      compiled: The program.
      counted: What was counted in it.
      lengths: Those that no loop may have.
      before: The recorded figures, or None.
    """
    found, text = [], compiled.as_text()
    for host in re.findall(r'custom_call_target="[^"]*callback|\b(?:infeed|outfeed)\(', text):
        found.append(f"calls the host: {host}")
    for loop in counted.loops:
        inside = Count([k for k in counted.kernels if k.path[: len(loop.path)] == loop.path], [])
        # A TPU gathers the indices of a batch one client after the other, which is negligible.
        heavy = inside.flop or inside.bytes > counted.bytes / 100
        if loop.trips in lengths and heavy:
            found.append(f"loops over clients: {'/'.join(loop.path)}, {loop.trips} times")
    needed = program_bytes(compiled)
    if needed > target.memory:
        found.append(f"needs {needed / 2**30:.1f} GiB of {target.memory / 2**30:.1f}")
    now = figures(compiled, counted)
    for name in ("kernels", "bytes", "temporaries"):
        was, value = getattr(before, name, None), getattr(now, name)
        slack = _FEW_BYTES if name == "temporaries" else 0
        if was is not None and value > _TOLERANCE * was + slack:
            found.append(f"{name}: {value}, recorded {was}")
    return found


def figures(compiled: Any, counted: Count) -> Figures:
    """Returns what is recorded of a program."""
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    return Figures(counted.launches, counted.bytes, counted.flop, temporaries)


def row(name: str, found: Figures, counted: Count) -> str:
    """Returns a row of the table."""
    target, method, program = name.split("/")
    milliseconds = 1e3 * counted.seconds(CHIPS[TARGETS[target].chip])
    return (
        f"| {target} | {method} | {program} | {found.kernels} | {found.bytes / 1e9:.2f} | "
        f"{found.flop / 1e9:.1f} | {found.temporaries / 2**30:.2f} | {milliseconds:.2f} |"
    )


HEADER = """\
| target | method | program | kernels | GB | GFLOP | temporaries, GiB | estimated ms |
| -- | -- | -- | -- | -- | -- | -- | -- |"""


def chosen() -> list[str]:
    """Returns the programs that the flags ask for."""
    names = (*DEFAULT, *REST) if _ALL.value or _ONLY.value else DEFAULT
    patterns = _ONLY.value or ["*"]
    return [name for name in names if matches(name, patterns)]


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Returns whether a program is one of those that the patterns name."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def compilers() -> dict[str, str]:
    """Returns the versions of what the figures depend on."""
    return {name: metadata.version(name) for name in ("jaxlib", "libtpu")}


def recorded_figures() -> JsonObject:
    """Returns the versions and figures of `benchmarks/aot.json`, or no figures for other versions.

    The figures are by number of clients and name of the program.
    """
    found = json.loads(_RECORDED.read_text()) if _RECORDED.exists() else {"versions": compilers()}
    if found["versions"] != compilers():
        print(f"compilers {compilers()}, recorded {found['versions']}: no figures are compared")
        found = {"versions": compilers()}
    return {"figures": {}} | found


def main(_: list[str]) -> None:
    """Compiles, checks and counts the chosen programs."""
    jax.config.update("jax_platforms", "cpu")  # else the CUDA plug-in looks for a driver
    jax.config.update("jax_num_cpu_devices", max(target.devices for target in TARGETS.values()))
    recorded = recorded_figures()
    own = recorded["figures"].setdefault(str(_CLIENTS.value), {})
    table, wrong = [HEADER], []
    for name in chosen():
        began = time.monotonic()
        programs, lengths = programs_of(name, _CLIENTS.value)
        lengths = set() if matches(name, SERIAL) else lengths
        try:
            compiled = programs.lower(name.split("/")[2]).compile()
        except Exception as error:  # XLA has no more precise type
            wrong.append(f"{name} does not compile: {str(error).splitlines()[0]}")
            print(wrong[-1], flush=True)
            continue
        text = compiled.as_text()
        counted = count(text)
        if _TEXTS.value:
            Path(_TEXTS.value, name.replace("/", "_") + ".txt").write_text(text)
        before = Figures(**own[name]) if name in own and not _RECORD.value else None
        bad = faults(TARGETS[name.split("/")[0]], compiled, counted, lengths, before)
        print(f"{name}: compiled in {time.monotonic() - began:.0f} s", *bad, sep="\n  ", flush=True)
        wrong += [f"{name} {fault}" for fault in bad]
        found = figures(compiled, counted)
        table.append(row(name, found, counted))
        if _RECORD.value:
            own[name] = found._asdict()
            _RECORDED.write_text(json.dumps(recorded, indent=1) + "\n")
    print("\n".join(table))
    if _MARKDOWN.value:
        Path(_MARKDOWN.value).write_text("\n".join(table) + "\n")
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    app.run(main)
