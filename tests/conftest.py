"""What every test runs under: shapes checked at run time, one thread, and a hypothesis profile."""

import os

from jaxtyping import install_import_hook

install_import_hook("mtp_modules", "tests.checked")  # before the first import of the package

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

_SLOW_IS_FINE = (HealthCheck.too_slow, HealthCheck.data_too_large)
settings.register_profile(
    "ci", derandomize=True, deadline=None, max_examples=25, suppress_health_check=_SLOW_IS_FINE, database=None
)
settings.register_profile("nightly", deadline=None, max_examples=1000, suppress_health_check=_SLOW_IS_FINE)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Start every test from the same random state."""
    torch.manual_seed(0)
