"""Two CPU devices for every test, so that what is spread over devices is spread here too."""

import os

import jax

jax.config.update("jax_num_cpu_devices", 2)

# Tests compile much and compute little: without LLVM's optimisations they take half the time.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
