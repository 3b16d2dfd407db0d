"""Runs with their files: settings, orchestration, checkpoints, studies and sweeps."""
