"""One server for the tests of a module: a random model, real HTTP."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from longverse.inference.engine import Engine
from longverse.server.service import Settings
from tests.server.common import Running, load, save_model, serving


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def engine(model_folder: Path) -> Engine:
    return load(model_folder)


@pytest.fixture(scope="module")
def server(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    settings = Settings(answer_tokens=24, keep_alive=0.05)
    with serving(engine, tmp_path_factory.mktemp("library"), settings, slots=3, queue_limit=32) as running:
        yield running
