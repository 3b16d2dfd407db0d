"""Assignment of the examples of a data set to clients, and to each client's splits."""
