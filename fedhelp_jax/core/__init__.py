"""Provides what all packages share: errors, trees, random keys, compilation, files, processes."""
