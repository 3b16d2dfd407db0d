"""Every program is compiled with the options that keep its products right on CPU."""

import ast
import os
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import fedhelp, train_command
from helpers import use_tiny_networks
from jax._src import compiler
from test_repeatability import python

import fedhelp_jax
from fedhelp_jax.core import compilation
from fedhelp_jax.core.compilation import compiler_options, jit, traced_once

PACKAGE = Path(fedhelp_jax.__file__).parent
FILES = sorted([*PACKAGE.rglob("*.py"), *PACKAGE.parent.glob("benchmarks/*.py")])
ONLY_ON_CPU = pytest.mark.skipif(jax.default_backend() != "cpu", reason="is about XLA's CPU")


def compiles_by_itself(source: str) -> bool:
    """Whether a module uses `jax.jit` or its kin."""
    kin = {"jit", "pmap", "pjit"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in kin:
            if ast.unparse(node.value).split(".")[0] == "jax":
                return True
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "jax":
            if kin & {alias.name for alias in node.names}:
                return True
    return False


def test_the_reading_of_modules():
    assert compiles_by_itself("import jax\njax.jit(f)")
    assert compiles_by_itself(
        "import jax\n@functools.partial(jax.jit, static_argnums=0)\ndef f(): ..."
    )
    assert compiles_by_itself("from jax import jit as compiled")
    assert not compiles_by_itself("from fedhelp_jax.core.compilation import jit\njit(f)")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE.parent)))
def test_nothing_else_compiles(file):
    assert compiles_by_itself(file.read_text()) == (file.name == "compilation.py")


@pytest.fixture
def compiled(monkeypatch):
    """The programs with a loop or a product that are compiled, and the options of each."""
    found: list[tuple[str, str]] = []
    original = compiler.compile_or_get_cached

    def record(backend: Any, computation: Any, devices: Any, options: Any, *rest: Any, **more: Any):
        text = str(computation)
        if any(f"stablehlo.{kind}" in text for kind in ("while", "dot_general", "convolution")):
            name = str(computation.operation.attributes["sym_name"])
            found.append((name, str(dict(options.env_option_overrides))))
        return original(backend, computation, devices, options, *rest, **more)

    monkeypatch.setattr(compiler, "compile_or_get_cached", record)
    return found


@pytest.mark.slow
@ONLY_ON_CPU
@pytest.mark.parametrize(
    "command",
    [
        "train",
        "train --config.mapping.max_device_bytes=60000",
        "train --config.algorithm.name=feddf",
        "train segmentation",
        "sweep --sweep=learning_rate=1e-3,1e-2",
        "teach",
    ],
)
def test_no_program_of_a_command_goes_without(tmp_path, monkeypatch, compiled, command):
    name, _, rest = command.partition(" ")
    use_tiny_networks(monkeypatch)
    run = train_command(tmp_path / "run", rest).removeprefix("train ")
    masks = Path(__file__).parent / "mask_config.py"
    if rest == "segmentation":
        run = f"--config={masks}:2d --workdir={tmp_path / 'run'}"
    elif name == "teach":
        run = f"--config={masks}:3d --config.teacher.store={tmp_path / 'answers'}"
    assert fedhelp(f"{name} {run}") == 0
    if name == "train":
        assert fedhelp(f"evaluate --workdir={tmp_path / 'run'}") == 0
    assert len(compiled) >= (1 if name == "teach" else 3)
    for program, options in compiled:
        assert "cpu-parallel-task-assigner" in options, program


@ONLY_ON_CPU
def test_options_reach_what_is_lowered_and_compiled():
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    program = jit(lambda x: jnp.tanh(x * 2)).lower(x).compile()
    assert "outer_dimension_partitions" not in program.as_text()


def test_options_are_for_cpus_alone():
    assert compiler_options("cpu")["xla_disable_hlo_passes"].split(",")[0] == (
        "cpu-parallel-task-assigner"
    )
    assert compiler_options("gpu") == compiler_options("tpu") == {}
    assert compiler_options("cpu", optimized=False)["xla_backend_optimization_level"] == 0


def test_a_program_takes_what_jax_jit_takes():
    program = jit(lambda x, n: x * n, static_argnums=1)
    assert program(jnp.arange(3), 2).tolist() == [0, 2, 4]
    assert program.eval_shape(jnp.arange(3), 2).shape == (3,)
    assert jit(lambda x, *, by: x + by)(jnp.ones(()), by=2.0) == 3.0


def test_what_is_traced_once_runs_inside_a_program():
    traces = []

    @traced_once
    def body(x: jax.Array) -> jax.Array:
        traces.append(x)
        return x + 1

    assert jit(lambda x: body(body(x)))(np.float32(1)) == 3.0
    assert len(traces) == 1


EXPOSURE = """
import warnings
import jax, jax.numpy as jnp, numpy as np
from fedhelp_jax.core import compilation
from fedhelp_jax.algorithms.client import predict
from fedhelp_jax.data.federation import Pool
from fedhelp_jax.models.cnn import CNNS, cnn

if "protect" in sys.argv:
    compilation.protect_process()
model = cnn(CNNS["cnn_small"], 2)
pool = Pool(jnp.zeros((4, 12, 12, 3), jnp.uint8), jnp.zeros(4, jnp.int32))

def logits(variables):
    return predict(model, variables, pool, jnp.arange(4), jnp.int32(4), 2)

def warns(program):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        program(variables)
    return any("wrong matrix products" in str(w.message) for w in found)

variables = compilation.jit(model.init, static_argnums=1)(jax.random.key(0), (12, 12, 3))
print(compilation.process_is_exposed(), warns(jax.jit(logits)), warns(compilation.jit(logits)))
"""


@pytest.mark.slow
@ONLY_ON_CPU
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core: XLA splits nothing")
def test_who_compiles_by_themselves_is_warned_unless_the_process_is_protected():
    bare = python("-c", f"import sys\n{EXPOSURE}")
    assert bare.stderr == "" and bare.stdout.split()[2] == "False"
    affected = compilation.jaxlib_is_affected()
    assert bare.stdout.split()[:2] == [str(affected)] * 2
    protected = python("-c", f"import sys\n{EXPOSURE}", "protect")
    assert protected.stdout.split() == ["False"] * 3


def test_the_flag_is_added_once_to_those_of_the_user(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    compilation.protect_process()
    compilation.protect_process()
    assert os.environ["XLA_FLAGS"] == (
        "--xla_cpu_enable_fast_math=false --xla_disable_hlo_passes=cpu-parallel-task-assigner"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compilation.warn_if_exposed()  # tests run in a protected process
