"""Known releases: recognised by name and by shape, completed aloud, never overruled."""

from pathlib import Path

import pytest

from longverse.models import releases
from longverse.models.network import NetworkConfig
from longverse.models.releases import LONG, RELEASES, complete, licence_note, recognise
from tests.models.official_layout import official_config


def real_config(**changes: object) -> dict[str, object]:
    return official_config(
        hidden_size=5120, intermediate_size=13824, num_attention_heads=40, num_hidden_layers=40, vocab_size=100534
    ) | dict(changes)


@pytest.mark.parametrize(
    ("name", "release"),
    [
        ("XVERSE-13B-256K", "XVERSE-13B-256K"),
        ("xverse-13b-256k-copy", "XVERSE-13B-256K"),
        ("XVERSE-13B-2-Chat", "XVERSE-13B-2-Chat"),
        ("XVERSE-13B-Chat-2", "XVERSE-13B-2-Chat"),
        ("XVERSE-13B-2", "XVERSE-13B-2"),
        ("XVERSE-13B", "XVERSE-13B"),
        ("XVERSE-7B-Chat", "XVERSE-7B-Chat"),
        ("XVERSE-65B", "XVERSE-65B"),
    ],
)
def test_by_name(name: str, release: str) -> None:
    found = recognise(official_config(), name)
    assert found is not None
    assert found.name == release


@pytest.mark.parametrize("window", [32768, 262144])
def test_by_shape_the_window_tells_the_long_one(window: int) -> None:
    assert recognise(real_config(max_position_embeddings=window), "download") is LONG


def test_by_shape_the_others() -> None:
    found = recognise(real_config(max_position_embeddings=8192), "download")
    assert found is not None
    assert found.name == "XVERSE-13B-Chat"
    assert recognise(official_config(), "my-own-model") is None
    assert recognise(real_config() | {"model_type": "llama"}, "XVERSE-13B-256K") is None


@pytest.mark.parametrize("window", [32768, 262144])
def test_the_long_model_gets_the_base_its_config_leaves_out(window: int) -> None:
    config, release, notes = complete(real_config(max_position_embeddings=window), "XVERSE-13B-256K")
    assert release is LONG
    assert "500,000" in notes[0]
    shape = NetworkConfig.from_dict(config)
    assert shape.window == 262144
    assert shape.rope.kind == "dynamic"
    assert shape.rope.original_window == 32768
    assert round(shape.rope.base(262144)) == 7_829_416
    assert shape.rope.base(32768) == 500_000


def test_what_a_file_states_is_not_overruled() -> None:
    config, _, notes = complete(real_config(rope_theta=10_000.0), "XVERSE-13B-256K")
    assert NetworkConfig.from_dict(config).rope.theta == 10_000
    assert "trained with 500,000" in notes[0]
    stated = real_config(rope_parameters={"rope_type": "default", "rope_theta": 600_000.0})
    assert complete(stated, "XVERSE-13B-256K")[2] == []


def test_a_release_without_a_published_base_says_so() -> None:
    config, release, notes = complete(official_config(max_position_embeddings=None), "XVERSE-65B")
    assert release is not None
    assert "none is published" in notes[0]
    assert config["max_position_embeddings"] == 16384
    assert config["rope_parameters"]["rope_theta"] == 10_000


def test_the_licence_is_shown_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGVERSE_CACHE", str(tmp_path / "cache"))
    note = licence_note(LONG)
    assert note is not None
    assert "licence" in note
    assert licence_note(LONG) is None
    assert licence_note(RELEASES[0]) is not None
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LONGVERSE_CACHE", str(tmp_path / "file"))
    assert releases.licence_note(LONG) is not None
    assert releases.licence_note(LONG) is not None
