"""Keeps pytest from importing modules that only MLServer's own Python can import."""

collect_ignore = ["runtime.py"]
