"""Finds how much memory there is, so that arrays that cannot fit are refused in advance."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedhelp_jax.core.errors import UserError

_CGROUP = Path("/sys/fs/cgroup/memory.max")


def host_bytes() -> int | None:
    """Returns the memory of this machine, or of its container, in bytes; None if unknown."""
    try:
        limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    try:
        return min(limit, int(_CGROUP.read_text()))
    except (OSError, ValueError):  # no container, or the limit is "max"
        return limit


def free_host_bytes() -> int | None:
    """Returns the memory of this machine that is free, in bytes; None if unknown."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def device_bytes(device: Any) -> int | None:
    """Returns the memory of an accelerator that programs may use, in bytes; None if unknown."""
    return (device.memory_stats() or {}).get("bytes_limit")


def program_bytes(program: Any) -> int:
    """Returns the bytes that a compiled program needs on a device, with arguments and results."""
    sizes = program.memory_analysis()
    assert sizes is not None
    return (
        sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        + sizes.temp_size_in_bytes
        - sizes.alias_size_in_bytes
    )


def check_fits(shape: Sequence[int], dtype: str, key: str, what: str) -> None:
    """Checks that an array would fit in the memory of this machine.

    Args:
        shape: The shape of the array.
        dtype: The dtype of the array.
        key: The setting that determines its size, for the message.
        what: What the array holds, for the message.

    Raises:
        UserError: If it would not fit. The message states the bytes it would take.
    """
    size, limit = math.prod(shape) * np.dtype(dtype).itemsize, host_bytes()
    if limit is not None and size > limit:
        raise UserError(
            f"config.{key} is too large: {what}, {dtype} {list(shape)}, would take {size:,} bytes "
            f"({gib(size)}), but there are {gib(limit)} of memory"
        )


def gib(size: float) -> str:
    """Returns a number of bytes as text.

    Example:
        >>> gib(3 * 2**29)
        '1.50 GiB'
    """
    return f"{size / 2**30:,.2f} GiB"
