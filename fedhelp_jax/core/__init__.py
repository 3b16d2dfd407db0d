"""What all rooms stand on: errors, trees, random keys, compilation, files, other processes."""
