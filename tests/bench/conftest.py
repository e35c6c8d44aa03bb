"""The scripts of bench/ as modules, their results in a folder of the test's own."""

import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
sys.path.insert(0, str(BENCH))


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    """Where results go; nothing that a test measures reaches the repository's."""
    import accuracy
    import common
    import figures
    import methods
    import subjects

    for module in (accuracy, common, figures, methods, subjects):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    return tmp_path
