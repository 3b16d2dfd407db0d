"""What is shown of a run and written about it."""
