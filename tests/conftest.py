"""What tests run under: shapes checked in unit tests and nightly, one thread, and a hypothesis profile."""

import os
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
from jaxtyping import install_import_hook

install_import_hook("mtp_modules", "tests.checked")  # before the first import of the package

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, Phase, settings  # noqa: E402

from mtp_modules.decoders.request import DecodableModel  # noqa: E402
from mtp_modules.losses.multi_token import MultiTokenModel  # noqa: E402
from mtp_modules.model import MTPModel  # noqa: E402

for protocol in (DecodableModel, MultiTokenModel):
    protocol.register(MTPModel)  # from Python 3.12 on, the check of a protocol does not see an nn.Module's parts

_SLOW_IS_FINE = (HealthCheck.too_slow, HealthCheck.data_too_large)
settings.register_profile(
    "ci", derandomize=True, deadline=None, max_examples=25, suppress_health_check=_SLOW_IS_FINE, database=None
)
settings.register_profile("nightly", deadline=None, max_examples=50, suppress_health_check=_SLOW_IS_FINE)
settings.register_profile(  # a bug that was put in on purpose needs no small example
    "mutants", settings.get_profile("ci"), phases=(Phase.explicit, Phase.generate)
)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ci")
settings.load_profile(PROFILE)

torch.set_num_threads(1)

UNCHECKED = [
    Path(__file__).parent / folder
    for folder in ("configs", "distributed", "faults", "properties", "unit/commands", "unit/data", "unit/studies")
]
"""Folders without shapes of their own, or that call thousands of times what unit tests of tensors call."""


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Check shapes and types of the package's functions where it is cheap.

    The nightly session checks them in every folder, but not in searches over many examples.
    """
    is_search = getattr(getattr(item, "obj", None), "is_hypothesis_test", False)
    unchecked = not set(UNCHECKED).isdisjoint(item.path.parents) and (PROFILE != "nightly" or is_search)
    jaxtyping.config.update("jaxtyping_disable", unchecked)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Start every test from the same random state, and leave none to the processes of the next."""
    torch.manual_seed(0)
    yield
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # Lightning's, for the ranks that it starts
        os.environ.pop(name, None)
