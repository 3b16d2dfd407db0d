"""Counts kernels, bytes and FLOP of a compiled module, and estimates its time on an accelerator.

    python -m benchmarks.count MODULE.txt --chip=h100    # the text of compiled.as_text()

Nothing runs. A kernel is an instruction that the device starts by itself: a fusion, a product, a
call of a library, a copy. A loop's kernels count as often as its known number of iterations, and
once if that is unknown, so a loop over steps of unknown number gives the figures of one step.

Bytes are those in the device's main memory: each kernel reads its operands and writes its result
once. Of an operand of which only a slice is used, the slice counts. A slice that is written into a
larger array in place counts, not the array. A TPU stores whole tiles, which count; arrays that the
compiler keeps on the chip do not.

FLOP are those of matrix products and convolutions, two for each multiplication of two values that
both exist: positions in padding or between dilated values do not count.

The estimate is the sum over kernels of max(bytes / bandwidth, FLOP / peak). It has no cost of a
launch, and every kernel is as fast as the device's data sheet, which none is.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from absl import app, flags

from benchmarks.hlo import Computation, Instruction, Module, parse

_CHIP = flags.DEFINE_enum("chip", "h100", ["h100", "v5e"], "the device of the estimate")
_TOP = flags.DEFINE_integer("top", 15, "how many of the costliest kernels are printed")


class Chip(NamedTuple):
    """Bytes per second and FLOP per second of a device, from its data sheet."""

    bandwidth: float
    peak: float


# The peaks are those of the products that XLA uses for float32 by default: one pass in TF32 on an
# H100 (SXM, dense), one in bfloat16 on a v5e.
CHIPS = {"h100": Chip(3.35e12, 495e12), "v5e": Chip(819e9, 197e12)}

# These only name, group or wait for data.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("optimization-barrier", "partition-id", "replica-id", "add-dependency"),
}
_FREE_CALLS = {"AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast", "Sharding"}
# These use every value of their operands for a result of as many values.
_WHOLE = {"reduce-window", "sort", "scatter"}
# The operand that these write into the first one.
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
_SLICES = {"slice", "dynamic-slice", "gather"}


class Kernel(NamedTuple):
    """A kernel, how often it is launched, and what one launch costs."""

    name: str
    kind: str
    launches: int
    bytes: int
    flop: int
    path: tuple[str, ...]  # the loops around it

    def seconds(self, chip: Chip) -> float:
        """Returns the least time of all its launches."""
        return self.launches * max(self.bytes / chip.bandwidth, self.flop / chip.peak)


class Loop(NamedTuple):
    """A loop, after those around it, and its number of iterations if that is known."""

    path: tuple[str, ...]
    trips: int | None


class Count(NamedTuple):
    """What was counted in a module."""

    kernels: list[Kernel]
    loops: list[Loop]

    @property
    def launches(self) -> int:
        """How many kernels are launched."""
        return sum(kernel.launches for kernel in self.kernels)

    @property
    def bytes(self) -> int:
        """The bytes read from and written to main memory."""
        return sum(kernel.launches * kernel.bytes for kernel in self.kernels)

    @property
    def flop(self) -> int:
        """The FLOP of products."""
        return sum(kernel.launches * kernel.flop for kernel in self.kernels)

    def seconds(self, chip: Chip) -> float:
        """Returns the estimate of the time."""
        return sum(kernel.seconds(chip) for kernel in self.kernels)


def count(text: str) -> Count:
    """Counts what the text of a compiled module does.

    Raises:
      ValueError: If it is no such text.
    """
    counter = _Counter(parse(text))
    counter.visit(counter.module.entry, 1, ())
    return Count(counter.kernels, counter.loops)


class _Counter:
    def __init__(self, module: Module):
        self.module = module
        self.kernels: list[Kernel] = []
        self.loops: list[Loop] = []

    def visit(self, name: str, times: int, path: tuple[str, ...]) -> None:
        """Adds the kernels of a computation that runs so many times."""
        computation = self.module.computations[name]
        for found in computation.values():
            if found.opcode == "while":
                trips = _trips(self.module, computation, found)
                inside = (*path, found.name)
                self.loops.append(Loop(inside, trips))
                self.visit(found.called("body")[0], times * (1 if trips is None else trips), inside)
            elif found.opcode == "conditional":
                self._visit_costliest(_branches(found), times, path)
            elif found.opcode in ("call", "async-start"):
                for called in found.called("to_apply", "calls", "called_computations"):
                    self.visit(called, times, path)
            elif not _is_free(found):
                moved, flop = self._bytes(computation, found), self._flop(computation, found)
                self.kernels.append(Kernel(found.name, _kind(found), times, moved, flop, path))

    def _visit_costliest(self, branches: list[str], times: int, path: tuple[str, ...]) -> None:
        counted = []
        for branch in branches:
            counter = _Counter(self.module)
            counter.visit(branch, times, path)
            counted.append(Count(counter.kernels, counter.loops))
        costliest = max(counted, key=lambda found: (found.bytes, found.launches))
        self.kernels += costliest.kernels
        self.loops += costliest.loops

    # --- bytes ----------------------------------------------------------------------------------

    def _bytes(self, computation: Computation, found: Instruction) -> int:
        operands = [computation[name] for name in found.operands]
        if found.opcode == "fusion":
            read, written = self._shares(found.called("calls")[0])
            parts = [*zip(operands, read, strict=True), *zip(found.arrays, written, strict=True)]
            return sum(round(share * array.bytes) for array, share in parts)
        if found.opcode in _SLICES:
            return 2 * found.bytes + sum(operand.bytes for operand in operands[1:])
        if found.opcode == "dynamic-update-slice":
            return 2 * operands[1].bytes
        if found.opcode == "scatter":
            return sum(operand.bytes for operand in operands[1:]) + operands[-1].bytes
        results = found.arrays
        if found.opcode == "slice-start":  # its result also names the source
            source, result = results[:2]
            return round(source.bytes * result.elements / source.elements) + result.bytes
        if found.opcode == "copy-start":
            results = results[:1]
        elif found.opcode.endswith("-start") and len(results) > len(operands):
            results = results[len(operands) :]
        elif found.opcode == "custom-call" and _has_scratch(found):
            results = results[:-1]
        return sum(array.bytes for array in (*operands, *results))

    def _shares(self, name: str) -> tuple[list[float], list[float]]:
        """Returns which share a fusion reads of each parameter, and writes of each result."""
        computation = self.module.computations[name]
        needed = dict.fromkeys(computation, 0)  # elements of each instruction
        root = _root(computation)
        results = [computation[r] for r in root.operands] if root.opcode == "tuple" else [root]
        written = []
        for result in results:
            update = _updated_in_place(computation, result)
            needed[result.name] = result.elements if update is None else update.elements
            share = needed[result.name] / max(1, result.elements)
            written += [share] * len(result.arrays)
        if results == [root] and root.opcode == "fusion":
            written = self._shares(root.called("calls")[0])[1]
        for found in reversed(computation.values()):
            if found is root and root.opcode == "tuple" or not needed[found.name]:
                continue
            sources = [computation[name] for name in found.operands]
            if found.opcode == "fusion":
                shares = self._shares(found.called("calls")[0])[0]
                needs = [share * s.elements for share, s in zip(shares, sources, strict=True)]
            elif _updated_in_place(computation, found) is not None:
                needs = [0, *(source.elements for source in sources[1:])]
            else:
                needs = [_need(found, i, s, needed[found.name]) for i, s in enumerate(sources)]
            for source, need in zip(sources, needs, strict=True):
                needed[source.name] = min(source.elements, needed[source.name] + need)
        parameters = [found for found in computation.values() if found.opcode == "parameter"]
        parameters.sort(key=lambda found: int(found.attributes.split(")")[0]))
        return [needed[p.name] / max(1, p.elements) for p in parameters], written

    # --- FLOP -----------------------------------------------------------------------------------

    def _flop(self, computation: Computation, found: Instruction) -> int:
        operands = [computation[name] for name in found.operands]
        if found.opcode == "dot":
            return _product(found.elements, operands[0], found.numbers("lhs_contracting_dims"))
        if found.opcode == "convolution":
            return _convolution(found, operands[0].dims, operands[1].dims, found.dims)
        if found.opcode == "custom-call":
            return _library(found, operands)
        return sum(
            self._flop(self.module.computations[name], inside)
            for name in found.called("calls")
            for inside in self.module.computations[name].values()
        )


def _trips(module: Module, around: Computation, loop: Instruction) -> int | None:
    """Returns how often a loop's body runs, or None if that is unknown."""
    told = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if told:
        return int(told.group(1))
    # A TPU's text does not tell; a counter is compared with a constant, and has a constant added.
    condition, body = (module.computations[loop.called(at)[0]] for at in ("condition", "body"))
    test, result, start = _root(condition), _root(body), around[loop.operands[0]]
    if test.opcode != "compare" or "direction=LT" not in test.attributes:
        return None
    counter = condition[test.operands[0]]
    if counter.opcode != "get-tuple-element" or not result.opcode == start.opcode == "tuple":
        return None
    (place,) = counter.numbers("index")
    step = body[result.operands[place]]
    first = _constant(around, start.operands[place])
    last = _constant(condition, test.operands[1])
    by = _constant(body, step.operands[1]) if step.opcode == "add" else None
    if first is None or last is None or not by:
        return None
    return max(0, -(-(last - first) // by))


def _root(computation: Computation) -> Instruction:
    (root,) = (found for found in computation.values() if found.root)
    return root


def _constant(computation: Computation, name: str) -> int | None:
    """Returns the value of an instruction that is an integer constant, or None."""
    found = computation[name]
    while found.opcode in ("copy", "bitcast", "copy-start", "copy-done"):
        found = computation[found.operands[0]]
    value = re.match(r"-?\d+(?=\))", found.attributes) if found.opcode == "constant" else None
    return int(value.group()) if value else None


def _branches(found: Instruction) -> list[str]:
    return found.called("branch_computations", "true_computation", "false_computation")


def _target(found: Instruction) -> str:
    target = re.search(r'custom_call_target="([^"]*)"', found.attributes)
    return target.group(1) if target else ""


def _is_free(found: Instruction) -> bool:
    if found.opcode == "custom-call":
        return _target(found) in _FREE_CALLS
    return found.opcode in _FREE or found.opcode.endswith(("-done", "-update"))


def _kind(found: Instruction) -> str:
    if found.opcode == "custom-call":
        return _target(found)
    return re.sub(r"[\d._]+$", "", found.name) if found.opcode == "fusion" else found.opcode


def _has_scratch(found: Instruction) -> bool:
    """Returns whether the last result of a library's call is its scratch memory.

    How much of that is used is unknown.
    """
    *results, last = found.arrays
    return bool(results) and _target(found).startswith("__cu") and last.bits == 8


def _updated_in_place(computation: Computation, found: Instruction) -> Instruction | None:
    """Returns the values that an instruction of a fusion writes into a parameter, or None."""
    while found.opcode == "bitcast":
        found = computation[found.operands[0]]
    if found.opcode not in _UPDATES or len(found.operands) <= _UPDATES[found.opcode]:
        return None
    into = computation[found.operands[0]]
    while into.opcode == "bitcast":
        into = computation[into.operands[0]]
    values = computation[found.operands[_UPDATES[found.opcode]]]
    return values if into.opcode == "parameter" else None


def _need(found: Instruction, position: int, source: Instruction, needed: float) -> float:
    """Returns how many elements of an operand an instruction needs for some of its result's."""
    if found.opcode in _SLICES and position == 0:
        return needed
    if found.opcode in _WHOLE or source.elements != found.elements:
        return source.elements
    return needed


# --- FLOP of products ---------------------------------------------------------------------------


def _product(result: int, left: Instruction, contracted: list[int]) -> int:
    return 2 * result * math.prod(left.dims[i] for i in contracted)


def _library(found: Instruction, operands: list[Instruction]) -> int:
    """Returns the FLOP of a call of a library."""
    target = _target(found)
    if target.startswith("__cublas"):
        inside = re.search(r'lhs_contracting_dimensions":\[([^\]]*)\]', found.attributes)
        numbers = re.findall(r"\d+", inside.group(1)) if inside else []
        return _product(found.arrays[0].elements, operands[0], [int(n) for n in numbers])
    if not target.startswith("__cudnn$conv"):
        return 0
    first, second = (operand.dims for operand in operands[:2])
    # The labels are always those of the convolution itself, of which gradients are taken.
    if "BackwardInput" in target:
        return _convolution(found, found.dims, second, first)
    if "BackwardFilter" in target:
        return _convolution(found, first, found.dims, second)
    return _convolution(found, first, second, found.dims)


def _convolution(
    found: Instruction, image: tuple[int, ...], kernel: tuple[int, ...], result: tuple[int, ...]
) -> int:
    """Returns the FLOP of a convolution with an image, kernel and result of these shapes."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", found.attributes)
    assert labels is not None, found.name
    image_of, kernel_of, result_of = (
        dict(zip(names, sides, strict=True))
        for names, sides in zip(labels.groups(), (image, kernel, result), strict=True)
    )
    # The kernel's axis of inputs holds those of one group only.
    pairs = kernel_of["i"] * result_of["b"] * result_of["f"]
    window = _window(found)
    for axis in (name for name in result_of if name.isdigit()):
        own = {name: values[int(axis)] for name, values in window.items()}
        pairs *= _positions(image_of[axis], kernel_of[axis], result_of[axis], **own)
    return 2 * pairs


def _window(found: Instruction) -> Mapping[str, list[int]]:
    """Returns stride, padding before, and dilations by spatial axis."""
    text = re.search(r"window=\{([^}]*)\}", found.attributes)
    parts = dict(part.split("=") for part in text.group(1).split()) if text else {}
    rank = len(parts.get("size", "").split("x"))

    def values(name: str, default: str) -> list[int]:
        return [int(value.split("_")[0]) for value in parts.get(name, default).split("x")]

    ones = "x".join("1" * rank)
    return {
        "stride": values("stride", ones),
        "pad": values("pad", ones.replace("1", "0_0")),
        "spread": values("lhs_dilate", ones),
        "dilation": values("rhs_dilate", ones),
    }


def _positions(
    image: int, kernel: int, result: int, *, stride: int, pad: int, spread: int, dilation: int
) -> int:
    """Returns how many pairs of an output and a kernel position meet an image's value."""
    found = 0
    for k in range(kernel):
        for at in range(k * dilation - pad, result * stride + k * dilation - pad, stride):
            found += at % spread == 0 and 0 <= at // spread < image
    return found


def main(arguments: list[str]) -> None:
    """Prints totals, loops and the costliest kernels of a module."""
    counted, chip = count(Path(arguments[1]).read_text(encoding="utf-8")), CHIPS[_CHIP.value]
    print(
        f"{counted.launches} kernels, {counted.bytes / 1e9:.2f} GB, {counted.flop / 1e9:.1f} GFLOP;"
        f" estimated {1e3 * counted.seconds(chip):.2f} ms on {_CHIP.value}"
    )
    for loop in counted.loops:
        print(f"loop {'/'.join(loop.path)}: {loop.trips or 'unknown'} times")
    for kernel in sorted(counted.kernels, key=lambda k: -k.seconds(chip))[: _TOP.value]:
        print(
            f"{1e3 * kernel.seconds(chip):9.3f} ms  {kernel.launches:6d} x"
            f" {kernel.bytes / 1e6:9.2f} MB {kernel.flop / 1e9:9.3f} GFLOP  {kernel.name}"
        )


if __name__ == "__main__":
    app.run(main)
