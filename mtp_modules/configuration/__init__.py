"""YAML to components: parsers whose errors are one sentence, and sizes that are written once."""

from mtp_modules.configuration.assembly import assemble, assemble_data, check_sizes, link_sizes
from mtp_modules.configuration.parser import LightningSentenceParser, SentenceParser
from mtp_modules.configuration.yaml_text import read_yaml

__all__ = [
    "LightningSentenceParser",
    "SentenceParser",
    "assemble",
    "assemble_data",
    "check_sizes",
    "link_sizes",
    "read_yaml",
]
