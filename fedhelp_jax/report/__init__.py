"""Reports of runs: console output, tables, pictures and result files."""
