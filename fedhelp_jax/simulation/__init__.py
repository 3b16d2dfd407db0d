"""Runs a method over the clients of a federation: the round, its devices, the compiled run."""
