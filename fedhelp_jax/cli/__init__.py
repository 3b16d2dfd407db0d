"""The command line."""

from fedhelp_jax.cli.main import main_entry

__all__ = ["main_entry"]
