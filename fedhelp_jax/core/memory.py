"""How much memory there is, so that what cannot fit is refused before it is allocated."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedhelp_jax.core.errors import UserError

_CGROUP = Path("/sys/fs/cgroup/memory.max")


def host_bytes() -> int | None:
    """Returns the memory of this machine, or of the container around it; None if not known."""
    try:
        limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    try:
        return min(limit, int(_CGROUP.read_text()))
    except (OSError, ValueError):  # no container, or one without a limit: "max"
        return limit


def check_fits(shape: Sequence[int], dtype: str, key: str, what: str) -> None:
    """Checks that an array would fit the memory of this machine.

    Args:
        shape: Of the array.
        dtype: Of the array.
        key: The setting that makes it so large, for the message.
        what: What the array holds.

    Raises:
        UserError: It would not. The message has the bytes it would take.
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
