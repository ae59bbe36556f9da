"""Tests of mtp_modules."""
