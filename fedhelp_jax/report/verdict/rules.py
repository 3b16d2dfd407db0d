"""What a verdict may compare, as the command line offers it."""

# The method to compare with unless another is named: training alone.
ALONE = "local"

# What a hospital may deploy after a federation: what its run deployed, the network that it trained
# itself, the broadcast one, the better of these on its validation images, the best of these and of
# the models between them (``interpolate``), or none if its validation images say so.
AS_RUN, OWN, GLOBAL = "as_run", "own", "global"
BEST, INTERPOLATED, GUARDED = "best_on_validation", "interpolated", "guarded"
RULES = (AS_RUN, OWN, GLOBAL, BEST, INTERPOLATED, GUARDED)
