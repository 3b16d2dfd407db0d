"""The report of runs: one self-contained page, and its figures and numbers as files."""
