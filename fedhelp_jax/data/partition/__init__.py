"""How the examples of a data set become clients, and each client's splits."""
