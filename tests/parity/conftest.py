"""Everything here compares with torch and transformers: `pip install -e '.[parity]'`."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.parity)
            # What transformers and torch warn of is theirs.
            item.add_marker(pytest.mark.filterwarnings("default"))
