"""Tests of measuring and showing."""
