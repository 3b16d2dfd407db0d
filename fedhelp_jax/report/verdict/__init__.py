"""The verdict: which hospitals gain from a federation, which lose, and which cannot be told."""
