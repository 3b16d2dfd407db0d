"""A method over the clients of a federation: the round, its devices, and the compiled run."""
