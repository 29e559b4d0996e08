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
    sizes = {"7": (32, 4096), "1": (40, 5120), "6": (80, 8192)}
    layers, hidden = sizes[release.removeprefix("XVERSE-")[0]]
    config = real_config(num_hidden_layers=layers, hidden_size=hidden, max_position_embeddings=8192)
    found = recognise(config | {"rope_theta": 10_000.0}, name)
    assert found is not None
    assert found.name == release


@pytest.mark.parametrize("name", ["xverse-13b-long", "my-xverse-13b", "xverse-7b", "XVERSE-13B", "XVERSE-65B", "x"])
def test_a_renamed_long_model_is_known_by_its_shape(name: str) -> None:
    config, release, notes = complete(real_config(), name)
    assert release is LONG
    assert NetworkConfig.from_dict(config).rope.theta == 500_000
    assert "window 262,144" in notes[0]
    ours = real_config(rope_parameters={"rope_type": "default", "rope_theta": 600_000.0})
    assert recognise(ours, "XVERSE-13B-2-Chat") is RELEASES[5]  # extended by its owner: the name stands


def test_a_name_needs_its_shape_unless_it_is_exact() -> None:
    assert recognise(real_config(max_position_embeddings=8192), "xverse-7b") is RELEASES[3]
    assert recognise(official_config(), "my-xverse-13b-256k") is None
    assert recognise(official_config(), "xverse/XVERSE-13B-256K") is LONG
    assert recognise(official_config(_name_or_path="xverse/XVERSE-13B-256K"), "copy") is LONG
    window = complete(real_config(max_position_embeddings=16384), "download")[2][0]
    assert "window 16,384" in window  # what is in force, not what the release has


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
    assert licence_note(LONG) == note  # nobody has seen it yet
    releases.licence_shown(["another note", note])
    assert licence_note(LONG) is None
    assert licence_note(RELEASES[0]) is not None
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LONGVERSE_CACHE", str(tmp_path / "file"))
    releases.licence_shown([note])
    assert licence_note(LONG) == note
