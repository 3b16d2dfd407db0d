"""A real inference server, Seldon MLServer, for tests; it runs in a Python of its own."""
