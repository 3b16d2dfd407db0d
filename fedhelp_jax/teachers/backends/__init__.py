"""Backends of foundation models, one module for each way of asking one."""
