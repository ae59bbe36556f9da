"""How the model is run: as it is, or compiled."""

__all__: list[str] = []
