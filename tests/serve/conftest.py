"""Keeps pytest from importing what only MLServer's own Python can import."""

collect_ignore = ["runtime.py"]
