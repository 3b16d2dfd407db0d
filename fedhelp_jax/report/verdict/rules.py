"""What a verdict may compare, as the command line offers it."""

# The method to compare with unless another is named: training alone.
ALONE = "local"

# What a hospital may deploy after a federation; the first is what its run deployed.
RULES = ("as_run", "own", "global", "best_on_validation")
