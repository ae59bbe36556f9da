"""Which drafts are accepted."""

__all__: list[str] = []
