"""Tests of mtp_modules."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""Checks types and shapes of the package while tests run; an int is a float, as for mypy."""
