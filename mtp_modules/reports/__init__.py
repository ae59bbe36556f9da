"""Figures, tables and pages of what was measured."""

__all__: list[str] = []
