"""Naive twins: the same results as the package, by code that a reader believes at sight."""
