"""Fixtures of the CUDA tests: a device on this CPU."""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from deltanet_ref.backends.cuda import stand_in
from deltanet_ref.backends.cuda.device import Device


def pytest_collection_modifyitems(items):
    """Skip the tests where something that they need is missing; in CI they fail then."""
    found = {"g++": shutil.which("g++"), "ml_dtypes (extra cuda13)": find_spec("ml_dtypes")}
    missing = " and ".join(name for name, where in found.items() if where is None)
    if missing and os.environ.get("CI") != "true":
        for item in items:
            if item.path.is_relative_to(Path(__file__).parent):
                item.add_marker(pytest.mark.skip(reason=f"needs {missing}"))


@pytest.fixture(scope="session")
def device():
    """The stand-in: arrays in host memory, kernels in the emulator."""
    return Device(stand_in)
