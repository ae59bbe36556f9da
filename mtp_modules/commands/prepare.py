"""``python -m mtp_modules prepare``: tokenise the text of a run ahead."""

from pathlib import Path

from mtp_modules.configuration import assemble_data, read_yaml
from mtp_modules.core.checks import refuse
from mtp_modules.data import TextDataModule

_ANY_VOCABULARY = 2**32


def prepare(config: str, cache: str | None = None) -> None:
    """Tokenise the text of a configuration into its cache, so that runs begin at once.

    An interrupted run of this command goes on where it stopped. Nothing is done where the cache has the tokens already.

    Args:
        config: A configuration of fit; its section data is a TextDataModule.
        cache: Folder of the cache; that of the configuration if null.
    """
    if not Path(config).is_file():
        refuse("config", f"{config} does not exist; give a configuration of fit.")
    sections = read_yaml(config, Path(config))
    section = sections.get("data") if isinstance(sections, dict) else None
    if not isinstance(section, dict):
        refuse("config", f"{config} has no section data; give a configuration of fit.")
    given = dict(section.get("init_args") or {})
    if cache is not None:
        given["cache"] = cache
    data = assemble_data({**section, "init_args": given}, lookahead=1, vocab_size=_ANY_VOCABULARY)
    if not isinstance(data, TextDataModule):
        refuse("config", f"data must be a TextDataModule, which has text to prepare, got {type(data).__name__}.")
    if data.cache is None:
        refuse("cache", f"{config} names none; give cache, a folder for tokens on disk.")
    data.prepare_data()
    data.setup()
    for split in ("train", "val", "test"):
        rows = data.rows(split)
        if rows is not None:
            stream = rows.stream
            print(f"{split}: {len(stream.tokens)} tokens of {len(stream.document_starts)} documents in {data.cache}")
