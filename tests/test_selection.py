"""The lists of tests that targets of the Makefile take or leave out name tests that exist."""

from pathlib import Path

import pytest

from tests.conftest import LONG, SLOW
from tests.machines import DESELECTED, NUMERIC

FILES = {path.name: path for path in Path(__file__).parent.rglob("test_*.py") if path.parent.name != "cuda"}


@pytest.mark.parametrize("test", [*LONG, *SLOW, *NUMERIC, *DESELECTED])
def test_the_named_test_exists(test):
    file, _, name = test.partition("::")
    assert file in FILES, f"there is no {file}"
    defined = f"def {name}(" in FILES[file].read_text("utf-8") or not name
    assert defined, f"{file} has no {name}"
