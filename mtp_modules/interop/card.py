"""The model card of an export: what it is, what it was trained on, how many drafts are accepted, and two commands."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from mtp_modules.core.component import describe
from mtp_modules.interop.serving import Exported
from mtp_modules.model import MTPModel

CARD = "README.md"


class Facts(NamedTuple):
    """What is known of a model beyond its weights.

    Attributes:
        data: The section of the run's configuration that describes its data; ``None`` if it is not known.
        acceptance: Share of accepted drafts at each depth, of those verified there; ``None`` if it was not measured.
        origin: How the acceptance was measured.
    """

    data: Mapping[str, Any] | None = None
    acceptance: tuple[float, ...] | None = None
    origin: str = ""


def card(model: MTPModel, format: str, exported: Exported, read_back: str, facts: Facts) -> str:
    """Return the text of a model card.

    Args:
        model: The model that was written.
        format: Name of the format.
        exported: How it is served.
        read_back: The command that reads the folder with this package.
        facts: What else is known.
    """
    heads = describe(model.heads)
    arguments = ", ".join(f"{name}={value!r}" for name, value in heads["init_args"].items() if value is not None)
    horizons, drafts = len(model.horizons), max(model.horizons) - 1
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lines = [
        "---",
        "library_name: mtp_modules",
        "tags: [multi-token-prediction, speculative-decoding]",
        "---",
        "",
        "# A language model that predicts several tokens at once",
        "",
        f"Exported by mtp_modules in the format `{format}`. {parameters:,} parameters; a vocabulary of "
        f"{model.trunk.vocab_size:,} tokens; {horizons} horizons, which draft {drafts} tokens at once.",
        "",
        "## Heads",
        "",
        f"`{type(model.heads).__name__}({arguments})`",
        "",
        "## Data",
        "",
        *_data(facts),
        "",
        "## Accepted drafts",
        "",
        *_acceptance(facts),
        "",
        "## Use",
        "",
        *([] if exported.command is None else ["```bash", exported.command, "```", ""]),
        *(f"- {note}" for note in exported.notes),
        *([""] if exported.notes else []),
        "With mtp_modules:",
        "",
        "```bash",
        read_back,
        "```",
    ]
    return "\n".join(lines) + "\n"


def _data(facts: Facts) -> list[str]:
    if facts.data is None:
        return ["Not known."]
    return ["```json", json.dumps(dict(facts.data), indent=2, default=str), "```"]


def _acceptance(facts: Facts) -> list[str]:
    if facts.acceptance is None:
        return [
            "Not measured: `python -m mtp_modules diagnose --json FILE` does, and `export --measured FILE` adds them."
        ]
    rows = [f"| {depth} | {share:.1%} |" for depth, share in enumerate(facts.acceptance, 1)]
    return [
        "| draft | accepted |",
        "|---|---|",
        *rows,
        "",
        f"Of the drafts verified at that depth. {facts.origin}".strip(),
    ]
