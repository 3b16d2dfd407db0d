"""Names that both training and reports must agree on."""

# How the names of models between a client's own and the broadcast one begin.
BETWEEN = "between_"
