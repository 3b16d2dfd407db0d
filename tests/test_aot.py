"""The checks of programs that are compiled ahead of time find what they are for.

The programs here are compiled for the CPU, which stands in for a device that is not there.
"""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from benchmarks.absent import Target, rounds_of
from benchmarks.aot import Figures, faults, figures
from benchmarks.count import count
from fedhelp_jax.core.compilation import jit
from fedhelp_jax.simulation.vectorize import make_mapping

CLIENTS = 44
PLENTY = Target("h100", 1, 2**40)


def faults_of(
    fn: Any, *shapes: tuple[int, ...], target: Target = PLENTY, before: Figures | None = None
) -> list[str]:
    given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    program = jit(fn).lower(*given).compile()
    return faults(target, program, count(program.as_text()), {CLIENTS}, before)


def one_by_one(x, w):
    return lax.map(lambda client: jnp.tanh(client @ w), x)


def at_once(x, w):
    return jax.vmap(lambda client: jnp.tanh(client @ w))(x)


SHAPES = (CLIENTS, 16, 32), (32, 8)


def test_a_program_without_faults_has_none():
    assert faults_of(at_once, *SHAPES) == []


def test_a_loop_over_clients_is_found():
    (fault,) = faults_of(one_by_one, *SHAPES)
    assert fault.startswith("loops over clients") and fault.endswith("44 times")


def test_a_loop_of_another_length_is_none_over_clients():
    assert faults_of(one_by_one, (CLIENTS + 1, 16, 32), (32, 8)) == []


def test_a_negligible_loop_over_clients_is_allowed():
    def product_and_sum(x, w):
        total = lax.fori_loop(0, CLIENTS, lambda i, t: t + jnp.sin(i * 1.0), 0.0)
        return at_once(x, w) + total

    assert faults_of(product_and_sum, *SHAPES) == []


def test_a_call_of_the_host_is_found():
    def calls(x, w):
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        return at_once(x, w) + jax.pure_callback(lambda: jnp.float32(1), shape)

    (fault,) = faults_of(calls, *SHAPES)
    assert fault.startswith("calls the host")


def test_too_much_memory_is_found():
    needed = 4 * (CLIENTS * 16 * 32 + 32 * 8 + CLIENTS * 16 * 8)
    assert faults_of(at_once, *SHAPES, target=Target("h100", 1, 2 * needed)) == []
    (fault,) = faults_of(at_once, *SHAPES, target=Target("h100", 1, needed - 1))
    assert fault.startswith("needs")


@pytest.mark.parametrize("name", ["kernels", "bytes", "temporaries"])
def test_more_than_recorded_is_found(name):
    def large(x, w):  # needs temporaries
        return (x @ w) @ w.T @ w

    given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((512, 512), (512, 512))]
    program = jit(large).lower(*given).compile()
    now = figures(program, count(program.as_text()))
    shapes = (512, 512), (512, 512)
    assert faults_of(large, *shapes, before=now) == []
    less = now._replace(**{name: getattr(now, name) // 2})
    (fault,) = faults_of(large, *shapes, before=less)
    assert fault.startswith(name)


@pytest.mark.slow
def test_programs_of_a_run_are_lowered_from_shapes_alone():
    programs, lengths = rounds_of("fedhelp-cnn", 16, make_mapping(0, 1))
    assert lengths == {5, 11, 16}
    program = programs.lower("train_small").compile()
    counted = count(program.as_text())
    assert faults(PLENTY, program, counted, lengths, None) == []
    # A step trains two CNNs on 16 images of 32x32 a client each. The first convolution has no
    # gradient with respect to the images, the second takes three products.
    first, second = 27 * 32 * 16**2, 9 * 32 * 32 * 8**2
    assert counted.flop == pytest.approx(2 * 11 * 16 * 2 * (2 * first + 3 * second), rel=0.1)
    for name in ("train_large", "aggregate", "evaluate_small", "rounds"):
        assert programs.lower(name).as_text(), name
