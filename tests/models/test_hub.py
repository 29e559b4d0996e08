"""Downloading from a hub: a small server that speaks as much of its protocol as a download needs."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from longverse.errors import UserError
from longverse.models import checkpoint, hub
from longverse.models.hub import is_hub_id
from tests.models.folders import save_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CODE = """
import json, sys
from longverse.models.checkpoint import load
steps = []
options = dict(dtype="float32", device="cpu")
loaded = load("someone/tiny", **options, on_progress=lambda done, total: steps.append((done, total)))
again = load("someone/tiny", **options)
print(json.dumps({"name": loaded.name, "last": steps[-1], "files": sorted(p.name for p in loaded.path.iterdir())}))
"""


class Hub(BaseHTTPRequestHandler):
    """One model, someone/tiny; every request is noted."""

    folder: Path
    asked: list[str]
    status = 200

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        type(self).asked.append(f"{self.command} {path}")
        files = sorted(self.folder.iterdir())
        if path.startswith("/api/models/someone/tiny"):
            if type(self).status != 200:
                self.send_response(type(self).status)
                self.send_header("X-Error-Code", "GatedRepo")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            siblings = [{"rfilename": file.name} for file in files]
            if "/tree/" in path:
                data = json.dumps(
                    [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0"} for f in files]
                )
            else:
                data = json.dumps({"id": "someone/tiny", "sha": COMMIT, "siblings": siblings, "tags": []})
            content, kind = data.encode(), "application/json"
        elif "/resolve/" in path and (self.folder / path.rsplit("/", 1)[1]).is_file():
            content, kind = (self.folder / path.rsplit("/", 1)[1]).read_bytes(), "application/octet-stream"
        else:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    save_folder(tmp_path / "files")
    (tmp_path / "files" / "pytorch_model.bin").write_bytes(b"never asked for beside safetensors")
    (tmp_path / "files" / "modeling_xverse.py").write_text("never asked for")
    handler = type("TinyHub", (Hub,), {"folder": tmp_path / "files", "asked": []})
    running = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()


def run(server: ThreadingHTTPServer, tmp_path: Path, code: str = CODE) -> subprocess.CompletedProcess[str]:
    environment = {
        **{key: value for key, value in os.environ.items() if "proxy" not in key.lower()},
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hub"),
        "LONGVERSE_CACHE": str(tmp_path / "cache"),
        "LONGVERSE_COMMAND": "1",
    }
    environment.pop("HF_HUB_OFFLINE", None)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def test_only_what_is_needed_is_downloaded_and_once(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    done = run(server, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # the client's own bars stay silent
    result = json.loads(done.stdout)
    assert result["name"] == "tiny"
    assert result["files"] == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    weights = (tmp_path / "files" / "model.safetensors").stat().st_size
    assert result["last"][0] == result["last"][1] >= weights
    asked = server.RequestHandlerClass.asked  # type: ignore[attr-defined]
    assert sum(line.startswith("GET") and line.endswith("model.safetensors") for line in asked) == 1
    assert not any("pytorch_model" in line or "modeling_xverse" in line for line in asked if "/resolve/" in line)


@pytest.mark.parametrize(
    ("change", "says"),
    [({"model_type": "gemma"}, "Models of type 'gemma'"), ({"quantization_config": {"quant_method": "awq"}}, "awq")],
)
def test_what_cannot_be_loaded_is_not_downloaded(
    server: ThreadingHTTPServer, tmp_path: Path, change: dict[str, object], says: str
) -> None:
    path = tmp_path / "files" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    (tmp_path / "files" / "consolidated.safetensors").write_bytes(b"twice")
    done = run(server, tmp_path)
    assert done.returncode != 0
    assert "someone/tiny was not downloaded." in done.stderr
    assert says in done.stderr
    asked = server.RequestHandlerClass.asked  # type: ignore[attr-defined]
    assert not any(line.startswith("GET") and line.endswith("safetensors") for line in asked)


def test_a_broken_download_is_resumed(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    files = tmp_path / "files"
    for file in files.iterdir():
        file.unlink()
    save_folder(files, shards=3)
    assert run(server, tmp_path).returncode == 0
    snapshot = tmp_path / "hub" / "hub" / "models--someone--tiny" / "snapshots" / COMMIT
    asked = server.RequestHandlerClass.asked  # type: ignore[attr-defined]
    assert hub._is_complete(snapshot)
    lost = ["config.json", "model-00002-of-00003.safetensors", "model.safetensors.index.json", "tokenizer.json"]
    for name in lost:
        (snapshot / name).rename(tmp_path / name)
        assert hub._is_complete(snapshot) == (name == "model.safetensors.index.json")  # all three are there
        (tmp_path / name).rename(snapshot / name)
    for name in lost:
        (snapshot / name).resolve().unlink()
        (snapshot / name).unlink()
    assert not hub._is_complete(snapshot)
    asked.clear()
    done = run(server, tmp_path)
    assert done.returncode == 0, done.stderr
    got = [line for line in asked if line.startswith("GET") and "/resolve/" in line]
    assert sorted({Path(line).name for line in got}) == lost  # the config first of all too, to see what it is


@pytest.mark.parametrize(("code", "says"), [(errno.ENOSPC, "disk is full"), (errno.EACCES, "cannot be written")])
def test_a_full_disk_is_not_called_a_missing_network(monkeypatch: pytest.MonkeyPatch, code: int, says: str) -> None:
    import huggingface_hub

    def full(*arguments: object, **options: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(hub, "cached", lambda hub_id: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *a, **k: type("Info", (), {"siblings": []}))
    monkeypatch.setattr(hub, "_check_before", lambda hub_id, names: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(UserError, match=says):
        hub.download("someone/tiny")
    monkeypatch.setattr(checkpoint.embedded, "find", lambda name: None)
    with pytest.raises(UserError, match=f"'smol' is not installed.*{says}"):
        checkpoint.locate("smol")


@pytest.mark.parametrize("name", ["a/b--c", "a/b.git", "a/b.", "a/b..c", "é/b", "a/" + "b" * 99])
def test_names_the_hub_does_not_take(name: str) -> None:
    assert not is_hub_id(name)
    with pytest.raises(UserError):
        checkpoint.locate(name)


def test_a_gated_model_says_what_to_do(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    server.RequestHandlerClass.status = 403  # type: ignore[attr-defined]
    done = run(server, tmp_path, "from longverse.models.checkpoint import load\nload('someone/tiny')")
    assert done.returncode != 0
    assert "UserError: someone/tiny is gated: accept its terms" in done.stderr
    assert "hf auth login" in done.stderr


def test_what_counts_as_a_hub_id() -> None:
    assert is_hub_id("xverse/XVERSE-13B-256K")
    assert not any(map(is_hub_id, ("smol", "a/b/c", "/a/b", "./a", "a/", "a b/c")))


def test_an_adapter_of_the_hub_needs_no_config_of_a_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    names = ["adapter_config.json", "adapter_model.safetensors"]
    info = type("Info", (), {"siblings": [type("File", (), {"rfilename": name}) for name in names]})
    monkeypatch.setattr(hub, "cached", lambda hub_id: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *a, **k: info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(tmp_path))
    assert hub.download("someone/lora") == tmp_path
