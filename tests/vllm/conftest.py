from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.vllm.servers import Servers

from hyperflexis.make_model import Recipe, make_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed in this environment: `make test-vllm` makes one that has it, and runs this")
    directory: Path = tmp_path_factory.mktemp("vllm") / "1m"
    make_model(directory, Recipe("1m", context=2048))
    return directory


@pytest.fixture(scope="session")
def servers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    found = Servers(model, tmp_path_factory.mktemp("vllm-logs"))
    yield found
    found.stop()
