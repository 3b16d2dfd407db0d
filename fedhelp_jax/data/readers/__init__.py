"""Readers of folders, .npz files and prepared sets, which refuse what they cannot use."""
