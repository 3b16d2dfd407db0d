"""Compiler options that make tests compile sooner, and those of a test that must do without."""

from fedhelp_jax.core.compilation import jaxlib_release

# Tests compile a lot and compute little. Without LLVM's optimisations, and with XLA's older way to
# emit fused loops, they take a third of the time. jaxlib 0.11 and newer have the new way only.
_HAS_OLDER_WAY = jaxlib_release() < (0, 11)
FLAGS = ["--xla_backend_optimization_level=0"]
if _HAS_OLDER_WAY:
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")

# The older way contracts products and sums differently where they are fused with other operations.
# Two different programs are therefore equal to the bit less often. This is the way of users.
AS_FOR_USERS = {"xla_cpu_use_fusion_emitters": True} if _HAS_OLDER_WAY else {}
