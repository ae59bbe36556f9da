"""Where drafts come from."""

__all__: list[str] = []
