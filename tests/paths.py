"""Where the committed numbers of other people's software lie (tests/fixtures/README.md tells their provenance)."""

from pathlib import Path

FIXTURES = Path(__file__).parent / "fixtures"
