"""Runs and their files: settings, orchestration, checkpoints, studies and sweeps."""
