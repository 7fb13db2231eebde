from __future__ import annotations

from pathlib import Path

import pytest

from hyperflexis.make_model import Recipe, make_model


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 1M model with tokenizer, made once."""
    directory = tmp_path_factory.mktemp("models") / "small"
    make_model(directory, Recipe(size="1m", context=512))
    return directory
