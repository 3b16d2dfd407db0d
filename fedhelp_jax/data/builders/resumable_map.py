"""Makes examples in parallel, one part at a time, and keeps each part until all are made."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fedhelp_jax.data.cache import whole_npz, write_npz

Item = TypeVar("Item")
Example = dict[str, Any]

SIZE = 128  # examples per part


def made(
    items: Sequence[Item],
    make: Callable[[Item], Example],
    folder: Path,
    done: Callable[[int], None] = lambda count: None,
    size: int = SIZE,
) -> Iterator[Example]:
    """Yields the examples made from items, in order, reusing those made by an earlier attempt.

    One thread per core makes them: the slow operations (decoding, resizing, compressing) release
    Python's global interpreter lock. While one part is consumed, the next one is being made.

    Args:
      items: What examples are made from; their ``repr`` identifies the parts of earlier attempts.
      make: Makes one example, whose values are bytes, strings, numbers or arrays.
      folder: Folder for finished parts. The caller removes it when it has all examples.
      done: Called with the number of examples in each part that is finished.
      size: Number of examples per part; two parts are in memory at a time.

    Yields:
      The examples.
    """
    parts = [items[start : start + size] for start in range(0, len(items), size)]
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def begun(number: int) -> tuple[Path, list[Example] | None, list[Future[Example]]]:
            path = folder / f"{_name(parts[number])}.npz"
            found = _read(path)
            futures = [] if found is not None else [pool.submit(make, x) for x in parts[number]]
            return path, found, futures

        following = begun(0) if parts else None
        try:
            for number in range(len(parts)):
                assert following is not None
                path, examples, futures = following
                following = begun(number + 1) if number + 1 < len(parts) else None
                if examples is None:
                    examples = [future.result() for future in futures]
                    _write(path, examples)
                done(len(examples))
                yield from examples
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _name(items: Sequence[Any]) -> str:
    return hashlib.sha256("\n".join(map(repr, items)).encode()).hexdigest()


def _write(path: Path, examples: Sequence[Example]) -> None:
    arrays: dict[str, np.ndarray] = {}
    for i, example in enumerate(examples):
        for name, value in example.items():
            # Bytes are stored as void, which needs no pickle and keeps trailing zeros.
            arrays[f"{name}/{i}"] = np.array(np.void(value) if isinstance(value, bytes) else value)
    write_npz(path, arrays)


def _read(path: Path) -> list[Example] | None:
    """Returns the examples of a part; None if it is missing or damaged."""
    arrays = whole_npz(path)
    if arrays is None:
        return None
    examples: list[Example] = []
    for name, array in arrays.items():
        name, _, number = name.partition("/")
        if not number:
            return None  # written by a version that stored all values of a name together
        examples += [{} for _ in range(int(number) + 1 - len(examples))]
        examples[int(number)][name] = _plain(array)
    return examples


def _plain(array: np.ndarray) -> Any:
    if array.dtype.kind == "V":
        return array.tobytes()
    return array if array.ndim else array.item()
