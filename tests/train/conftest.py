"""What several tests of whole runs begin with."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.train.common import measure_little, tiny_folder, write_messages


@pytest.fixture(scope="session", autouse=True)
def small_measurements() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        measure_little(patch)
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_folder(folder / "model", max_position_embeddings=64)
    write_messages(folder / "m.jsonl", 40)
    return folder
