"""The kernels, bytes and FLOP of compiled modules are those known by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from benchmarks.count import CHIPS, Chip, Count, count
from benchmarks.hlo import arrays
from fedhelp_jax.core.compilation import jit


def compiled(fn: Any, *shapes: tuple[int, ...]) -> Count:
    """Counts a function of float32 arrays, as it is compiled here."""
    given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return count(jit(fn).lower(*given).compile().as_text())


def module(entry: str, others: str = "") -> Count:
    """Counts a module whose entry computation has these lines."""
    return count(f"HloModule m\n\n{others}\nENTRY %main (p: f32[]) -> f32[] {{\n{entry}\n}}\n")


# --- shapes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ("f32[2,3]{1,0}", [24]),
        ("(bf16[5]{0}, pred[], s4[3]{0}, f8e4m3fn[7]{0})", [10, 1, 2, 7]),
        ("f32[4,3]{1,0:T(8,128)}", [8 * 128 * 4]),
        ("f32[4,3]{0,1:T(8,128)}", [8 * 128 * 4]),
        ("f32[300,3]{0,1:T(4,128)}", [4 * 384 * 4]),
        ("bf16[7,9,130]{2,1,0:T(8,128)(2,1)}", [7 * 16 * 256 * 2]),
        ("f32[5,/*index=1*/200]{1,0:T(8,128)S(1)}", [0]),
        ("s32[]{:T(128)}", [4]),
    ],
)
def test_bytes_are_those_that_the_layout_stores(shape, sizes):
    assert [array.bytes for array in arrays(shape)] == sizes


# --- FLOP ---------------------------------------------------------------------------------------


def test_a_product_counts_two_flop_per_multiplication():
    found = compiled(lambda a, b: a @ b, (64, 128), (128, 32))
    assert found.flop == 2 * 64 * 128 * 32
    assert found.bytes == 4 * (64 * 128 + 128 * 32 + 64 * 32)
    assert found.launches == 1


def test_a_batched_product_counts_each_product_of_the_batch():
    found = compiled(lambda a, b: jnp.einsum("kij,kjl->kil", a, b), (5, 6, 7), (5, 7, 8))
    assert found.flop == 2 * 5 * 6 * 7 * 8


@pytest.mark.parametrize(
    ("options", "kernel", "flop"),
    [
        ({"padding": "VALID"}, (3, 3, 16, 32), 2 * 2 * (6 * 3) ** 2 * 16 * 32),
        # Of the 8 x 3 positions along an axis, the first and the last lie in the padding.
        ({"padding": "SAME"}, (3, 3, 16, 32), 2 * 2 * (8 * 3 - 2) ** 2 * 16 * 32),
        (
            {"padding": "SAME", "feature_group_count": 4},
            (3, 3, 4, 32),
            2 * 2 * (8 * 3 - 2) ** 2 * 4 * 32,
        ),
        (
            {"padding": "VALID", "window_strides": (2, 2)},
            (2, 2, 16, 32),
            2 * 2 * (4 * 2) ** 2 * 16 * 32,
        ),
        # A transposed convolution meets each of 8 values once per kernel position.
        (
            {"padding": [(1, 1), (1, 1)], "lhs_dilation": (2, 2)},
            (2, 2, 16, 32),
            2 * 2 * (8 * 2) ** 2 * 16 * 32,
        ),
    ],
)
def test_a_convolution_counts_the_positions_where_both_values_exist(options, kernel, flop):
    def conv(x, k):
        given = {"window_strides": (1, 1), "dimension_numbers": ("NHWC", "HWIO", "NHWC")} | options
        return lax.conv_general_dilated(x, k, **given)

    assert compiled(conv, (2, 8, 8, 16), kernel).flop == flop


def test_a_product_written_as_a_convolution_over_the_batch_counts_no_more():
    # So does a TPU's compiler: the batch of 64 becomes a spatial axis, spread so that each of its
    # values meets one kernel position.
    found = module(
        "  %x = f32[64,10,20]{2,1,0} parameter(0)\n"
        "  %k = f32[64,20,30]{2,1,0} parameter(1)\n"
        "  ROOT %c = f32[64,10,30]{2,1,0} convolution(%x, %k), window={size=64 stride=63 pad=0_0"
        " lhs_dilate=64}, dim_labels=0bf_0io->0bf"
    )
    assert found.flop == 2 * 64 * 10 * 20 * 30


def test_calls_of_libraries_count_like_what_they_compute():
    gemm = module(
        "  %a = f32[5,6,7]{2,1,0} parameter(0)\n"
        "  %b = f32[5,7,8]{2,1,0} parameter(1)\n"
        "  ROOT %g = (f32[5,6,8]{2,1,0}, s8[4194304]{0}) custom-call(%a, %b),"
        ' custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":'
        '{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"]}}}'
    )
    assert gemm.flop == 2 * 5 * 6 * 7 * 8
    assert gemm.bytes == 4 * 5 * (6 * 7 + 7 * 8 + 6 * 8)  # scratch memory does not count
    image, kernel, result = "f32[2,8,8,16]{3,2,1,0}", "f32[3,3,16,32]{3,2,1,0}", "f32[2,8,8,32]"
    shapes = {
        "Forward": (image, kernel, result),
        "BackwardInput": (result, kernel, image),
        "BackwardFilter": (image, result, kernel),
    }
    for direction, (a, b, out) in shapes.items():
        found = module(
            f"  %a = {a} parameter(0)\n  %b = {b} parameter(1)\n"
            f"  ROOT %c = ({out}, u8[0]{{0}}) custom-call(%a, %b), window={{size=3x3 pad=1_1x1_1}},"
            f' dim_labels=b01f_01io->b01f, custom_call_target="__cudnn$conv{direction}"'
        )
        assert found.flop == 2 * 2 * (8 * 3 - 2) ** 2 * 16 * 32, direction


# --- loops --------------------------------------------------------------------------------------


def test_a_loop_counts_as_often_as_it_runs():
    def loop(a, b):
        return lax.fori_loop(0, 5, lambda _, x: jnp.tanh(x @ b), a)

    found = compiled(loop, (64, 64), (64, 64))
    assert [loop.trips for loop in found.loops] == [5]
    assert found.flop == 5 * 2 * 64**3
    products = [kernel for kernel in found.kernels if kernel.flop]
    assert sum(kernel.launches for kernel in products) == 5
    assert all(kernel.path == found.loops[0].path for kernel in products)


def test_loops_in_loops_multiply():
    def loop(a, b):
        def inner(x):
            return lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ b), x)

        return lax.fori_loop(0, 4, lambda _, x: inner(x) + 1, a)

    found = compiled(loop, (64, 64), (64, 64))
    assert sorted(loop.trips or 0 for loop in found.loops) == [3, 4]
    assert found.flop == 12 * 2 * 64**3


def test_a_loop_of_unknown_length_counts_once():
    def loop(n, a, b):
        return lax.fori_loop(0, n.astype(int), lambda _, x: jnp.tanh(x @ b), a)

    found = compiled(loop, (), (64, 64), (64, 64))
    assert [loop.trips for loop in found.loops] == [None]
    assert found.flop == 2 * 64**3


TPU_LOOP = """
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %p = (s32[], f32[8]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %one = s32[] constant({step})
  %next = s32[] add(%i, %one)
  %x = f32[8]{{0}} get-tuple-element(%p), index=1
  %y = f32[8]{{0}} negate(%x)
  ROOT %t = (s32[], f32[8]{{0}}) tuple(%next, %y)
}}

%condition (q: (s32[], f32[8])) -> pred[] {{
  %q = (s32[], f32[8]{{0}}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %end = s32[] constant(44)
  ROOT %less = pred[] compare(%j, %end), direction={direction}
}}
"""


@pytest.mark.parametrize(
    ("direction", "step", "trips"), [("LT", 1, 42), ("LT", 5, 9), ("GT", 1, None)]
)
def test_without_a_known_trip_count_a_loop_is_read(direction, step, trips):
    found = module(
        "  %start = s32[] constant(2)\n  %copied = s32[] copy(%start)\n"
        "  %x = f32[8]{0} parameter(0)\n  %t = (s32[], f32[8]{0}) tuple(%copied, %x)\n"
        "  ROOT %w = (s32[], f32[8]{0}) while(%t), condition=%condition, body=%body",
        TPU_LOOP.format(direction=direction, step=step),
    )
    assert [loop.trips for loop in found.loops] == [trips]
    assert sum(k.launches for k in found.kernels if k.name == "y") == (trips or 1)


def test_the_costliest_branch_counts():
    found = module(
        "  %x = f32[8]{0} parameter(0)\n  %i = s32[] parameter(1)\n"
        "  ROOT %c = f32[8]{0} conditional(%i, %x, %x), branch_computations={%cheap, %dear}",
        "%cheap (a: f32[8]) -> f32[8] {\n  ROOT %a = f32[8]{0} parameter(0)\n}\n"
        "%dear (b: f32[8]) -> f32[8] {\n  %b = f32[8]{0} parameter(0)\n"
        "  ROOT %n = f32[8]{0} negate(%b)\n}\n",
    )
    assert [kernel.name for kernel in found.kernels] == ["n"]


# --- bytes --------------------------------------------------------------------------------------


def test_an_update_in_a_loop_counts_its_slice():
    def loop(x, rows):
        def one(i, x):
            return lax.dynamic_update_slice(x, jnp.sin(rows) * i, (3 * i, 0))

        return lax.fori_loop(0, 7, one, x)

    found = compiled(loop, (1000, 100), (3, 100))
    inside = sum(k.launches * k.bytes for k in found.kernels if k.path)
    # Each iteration reads the new rows and writes them, and counts in scalars.
    assert 7 * 2400 <= inside <= 7 * 2400 + 7 * 100


def fusion(result: str, lines: str, given: str) -> Count:
    """Counts a fusion with these lines of the operands ``%a`` and so on."""
    shapes = given.split("; ")
    names = [chr(ord("a") + i) for i in range(len(shapes))]
    parameters = "".join(
        f"  %{name} = {shape} parameter({i})\n"
        for i, (name, shape) in enumerate(zip(names, shapes, strict=True))
    )
    operands = ", ".join(f"%{name}" for name in names)
    return module(
        f"{parameters}  ROOT %f = {result} fusion({operands}), kind=kLoop, calls=%fused",
        f"%fused (a: f32[]) -> f32[] {{\n{parameters}{lines}\n}}\n",
    )


def test_a_fusion_reads_only_the_slice_that_it_uses():
    found = fusion(
        "f32[1,100]{1,0}",
        "  %s = f32[1,100]{1,0} dynamic-slice(%a, %b, %b), dynamic_slice_sizes={1,100}\n"
        "  ROOT %r = f32[1,100]{1,0} negate(%s)",
        "f32[50,100]{1,0}; s32[]",
    )
    assert found.bytes == 400 + 4 + 400


def test_a_fusion_reads_all_of_what_it_also_uses_whole():
    found = fusion(
        "f32[]",
        "  %s = f32[1,100]{1,0} dynamic-slice(%a, %b, %b), dynamic_slice_sizes={1,100}\n"
        "  %n = f32[50,100]{1,0} negate(%a)\n"
        "  ROOT %r = f32[] reduce(%n, %s), dimensions={0,1}, to_apply=%add",
        "f32[50,100]{1,0}; s32[]",
    )
    assert found.bytes == 4 * 5000 + 4 + 4


@pytest.mark.parametrize("into", ["%a", "%cast"])
@pytest.mark.parametrize(
    "update",
    [
        "dynamic-update-slice({into}, %n, %c, %c)",
        "scatter({into}, %c, %n), update_window_dims={{1}}, to_apply=%second",
    ],
)
def test_a_fusion_updates_only_a_parameter_in_place(into, update):
    found = fusion(
        "f32[50,100]{1,0}",
        "  %cast = f32[50,100]{1,0} negate(%a)\n  %n = f32[1,100]{1,0} negate(%b)\n"
        f"  ROOT %r = f32[50,100]{{1,0}} {update.format(into=into)}",
        "f32[50,100]{1,0}; f32[1,100]{1,0}; s32[]",
    )
    assert found.bytes == (400 + 400 + 4 if into == "%a" else 4 * 5000 + 400 + 4 + 4 * 5000)


def test_a_fusion_with_several_results_writes_each():
    found = fusion(
        "(f32[50,100]{1,0}, f32[50]{0})",
        "  %n = f32[50,100]{1,0} negate(%a)\n  %z = f32[] constant(0)\n"
        "  %s = f32[50]{0} reduce(%n, %z), dimensions={1}, to_apply=%add\n"
        "  ROOT %r = (f32[50,100]{1,0}, f32[50]{0}) tuple(%n, %s)",
        "f32[50,100]{1,0}",
    )
    assert found.bytes == 4 * 5000 + 4 * 5000 + 4 * 50


def test_a_fusion_in_a_fusion_passes_on_what_it_reads():
    inner = (
        "%inner (d: f32[], e: s32[]) -> f32[] {\n  %d = f32[50,100]{1,0} parameter(0)\n"
        "  %e = s32[] parameter(1)\n"
        "  ROOT %s = f32[1,100]{1,0} dynamic-slice(%d, %e, %e), dynamic_slice_sizes={1,100}\n}\n"
    )
    outer = (
        "%fused (a: f32[], b: s32[]) -> f32[] {\n  %a = f32[50,100]{1,0} parameter(0)\n"
        "  %b = s32[] parameter(1)\n"
        "  ROOT %g = f32[1,100]{1,0} fusion(%a, %b), kind=kLoop, calls=%inner\n}\n"
    )
    found = module(
        "  %x = f32[50,100]{1,0} parameter(0)\n  %i = s32[] parameter(1)\n"
        "  ROOT %f = f32[1,100]{1,0} fusion(%x, %i), kind=kLoop, calls=%fused",
        inner + outer,
    )
    assert found.bytes == 400 + 4 + 400


def test_copies_of_a_tpu_count_only_main_memory():
    found = module(
        "  %x = f32[8,128]{1,0:T(8,128)} parameter(0)\n"
        "  %s = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)})"
        " copy-start(%x)\n"
        "  %y = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%s)\n"
        "  ROOT %n = f32[8,128]{1,0:T(8,128)S(1)} negate(%y)"
    )
    assert [kernel.bytes for kernel in found.kernels] == [4096, 0]


# --- the estimate -------------------------------------------------------------------------------


def test_the_estimate_takes_the_scarcer_of_bandwidth_and_peak_of_each_kernel():
    found = compiled(lambda a, b: jnp.tanh(a @ b).sum(0), (64, 128), (128, 32))
    slow_memory, slow_products = Chip(1.0, 1e12), Chip(1e12, 1.0)
    assert found.seconds(slow_memory) == pytest.approx(found.bytes)
    assert found.seconds(slow_products) == pytest.approx(found.flop, rel=1e-3)
    # The bytes alone and the FLOP alone both take at least as long.
    for chip in CHIPS.values():
        least = max(found.bytes / chip.bandwidth, found.flop / chip.peak)
        assert least <= found.seconds(chip) <= found.bytes / chip.bandwidth + found.flop / chip.peak


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        count("module @jit_f { }")
