"""Readers of folders, .npz files and prepared data sets, which reject unusable input."""
