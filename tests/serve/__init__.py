"""A real inference server, Seldon MLServer, for tests; it runs in its own Python environment."""
