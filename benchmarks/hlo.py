"""Reads the text of a compiled XLA module: computations, instructions, shapes and their bytes."""

import functools
import math
import re
from typing import NamedTuple

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r" ([a-z][\w\-]*)\(")
_OPERAND = re.compile(r"%([\w.\-]+)")


class Array(NamedTuple):
    """An array in a module.

    Attributes:
      dims: Its shape.
      stored: The elements that its layout stores; a TPU pads each tile.
      bits: Bits of an element.
      on_chip: Whether it lies in the memory on the chip (VMEM of a TPU, and so on), which is not
        the one whose bandwidth limits programs.
    """

    dims: tuple[int, ...]
    stored: int
    bits: int
    on_chip: bool

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes in the main memory of the device."""
        return 0 if self.on_chip else -(-self.stored * self.bits // 8)


class Instruction(NamedTuple):
    """A line of a computation.

    Attributes:
      name: Its name.
      arrays: The arrays of its result; several if it is a tuple.
      opcode: Its operation.
      operands: Names of its operands, in the same computation.
      attributes: The text after the opcode, with that of the operands.
      root: Whether it is the result of the computation.
    """

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @property
    def elements(self) -> int:
        """The number of elements of the result."""
        return sum(array.elements for array in self.arrays)

    @property
    def bytes(self) -> int:
        """The bytes of the result in the main memory of the device."""
        return sum(array.bytes for array in self.arrays)

    @property
    def dims(self) -> tuple[int, ...]:
        """The shape of the first array of the result."""
        return self.arrays[0].dims

    def called(self, *attributes: str) -> list[str]:
        """Returns the names of the computations that these attributes hold."""
        found = []
        for attribute in attributes:
            text = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
            found += re.findall(r"[\w.\-]+", text.group(1)) if text else []
        return found

    def numbers(self, attribute: str) -> list[int]:
        """Returns the integers of an attribute such as ``lhs_contracting_dims={1}``."""
        text = re.search(rf"\b{attribute}=\{{?([\d,]*)", self.attributes)
        return [int(number) for number in text.group(1).split(",") if number] if text else []


Computation = dict[str, Instruction]


class Module(NamedTuple):
    """A module: its computations by name, and the name of the one that runs first."""

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """Reads the text of a compiled module.

    Raises:
      ValueError: If there is no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = computations[header.group(2)] = {}
            entry = header.group(2) if header.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := _instruction(line)):
            current[found.name] = found
    if not entry:
        raise ValueError("this is no text of an XLA module: it has no ENTRY")
    return Module(computations, entry)


def _instruction(line: str) -> Instruction | None:
    named = _NAME.match(line)
    # The opcode is the first word before a parenthesis; that of a tuple's shape has none.
    opcode = _OPCODE.search(line, named.end() - 1) if named else None
    if named is None or opcode is None:
        return None
    end = _closing(line, opcode.end())
    return Instruction(
        name=named.group(2),
        arrays=arrays(line[named.end() : opcode.start()]),
        opcode=opcode.group(1),
        operands=tuple(_OPERAND.findall(line[opcode.end() : end])),
        attributes=line[opcode.end() :],
        root=named.group(1) is not None,
    )


def _closing(line: str, start: int) -> int:
    """Returns the position of the parenthesis that closes one opened before ``start``."""
    depth = 1
    for found in re.finditer(r"[()]", line[start:]):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return start + found.start()
    return len(line)


@functools.cache
def arrays(shape: str) -> tuple[Array, ...]:
    """Returns the arrays of a shape's text, such as ``(f32[2,3]{1,0}, pred[])``."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", shape)):
        width = re.search(r"\d+$", dtype.split("e")[0])
        bits = _BITS.get(dtype, int(width.group()) if width else 0)
        sides = tuple(int(side) for side in dims.split(",") if side)
        found.append(Array(sides, _stored(sides, layout), bits, "S(" in layout))
    return tuple(found)


def _stored(dims: tuple[int, ...], layout: str) -> int:
    tile = re.search(r":T\(([\d,]+)\)", layout)
    if not dims or not tile:
        return math.prod(dims)
    sides = [int(side) for side in tile.group(1).split(",")]
    order = [int(i) for i in layout.split(":")[0].split(",") if i]
    physical = [dims[i] for i in reversed(order)]
    physical = [1] * (len(sides) - len(physical)) + physical
    split = len(physical) - len(sides)
    tiles = (-(-n // side) * side for n, side in zip(physical[split:], sides, strict=True))
    return math.prod(physical[:split]) * math.prod(tiles)
