"""What a verdict may compare, as the command line offers it."""

# The method to compare with unless another is named: training alone.
ALONE = "local"

# What a hospital may deploy after a federation: what its run deployed, the network that it trained
# itself, the broadcast one, whichever is best on its validation images, or none if those say so.
AS_RUN, GUARDED = "as_run", "guarded"
RULES = (AS_RUN, "own", "global", "best_on_validation", GUARDED)
