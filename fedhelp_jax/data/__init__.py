"""Data sets: arrays of images and index tables, read or generated with NumPy and Pillow only."""
