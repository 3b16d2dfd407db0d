"""One file for each way of asking a foundation model."""
