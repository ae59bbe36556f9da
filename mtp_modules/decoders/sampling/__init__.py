"""How tokens are sampled, and when rows end."""

__all__: list[str] = []
