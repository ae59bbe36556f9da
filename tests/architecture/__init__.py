"""Tests of how the package is put together."""
