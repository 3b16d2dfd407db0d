"""Examples come in their order, and what was made before an end is not made again."""

import functools
import threading

import numpy as np
import pytest

from fedhelp_jax.data.builders import resumable_map

made = functools.partial(resumable_map.made, size=4)


def example(i):
    return {
        "bytes": b"x" * i + b"\0" if i else b"\0",
        "array": np.arange(i, dtype=np.float32),
        "number": i,
        "text": f"é{i}",
    }


def assert_equal(found, numbers):
    assert len(found) == len(numbers)
    for got, i in zip(found, numbers, strict=True):
        want = example(i)
        np.testing.assert_array_equal(got.pop("array"), want.pop("array"))
        assert got == want
        assert type(got["bytes"]) is bytes and type(got["number"]) is int


def test_examples_come_in_order_from_several_threads_and_again_from_what_is_kept(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(resumable_map.os, "cpu_count", lambda: 2)
    told, both = [], threading.Barrier(2, timeout=60)

    def make(i):
        both.wait()  # one thread alone would wait for ever
        return example(i)

    assert_equal(list(made(range(10), make, tmp_path, told.append)), range(10))
    assert told == [4, 4, 2]

    def never(i):
        raise AssertionError

    assert_equal(list(made(range(10), never, tmp_path)), range(10))
    assert list(made([], never, tmp_path)) == []


def test_after_an_end_only_what_is_missing_is_made(tmp_path):
    def make_some(i):
        if i == 9:
            raise KeyboardInterrupt
        return example(i)

    with pytest.raises(KeyboardInterrupt):
        list(made(range(10), make_some, tmp_path))
    again = []

    def make(i):
        again.append(i)
        return example(i)

    assert_equal(list(made(range(10), make, tmp_path)), range(10))
    assert sorted(again) == [8, 9]


def test_damaged_parts_and_those_of_other_items_are_made_anew(tmp_path):
    list(made(range(8), example, tmp_path))
    damaged = sorted(tmp_path.iterdir())[0]
    damaged.write_bytes(damaged.read_bytes()[:50])
    again = []

    def make(i):
        again.append(i)
        return example(i)

    assert_equal(list(made(range(8), make, tmp_path)), range(8))
    assert len(again) == 4
    again.clear()
    assert_equal(list(made(range(1, 9), make, tmp_path)), range(1, 9))
    assert len(again) == 8
