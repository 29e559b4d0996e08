"""Text files of any encoding; what a wrong one is called is tested with the documents' reader."""

from pathlib import Path

import pytest

from longverse import textfiles
from longverse.errors import UserError
from longverse.textfiles import decoded, read_text

CHINESE = "河水记得自己的旧河道，这是人们常说的一句话。\n清晨，花匠慢慢走过小小的码头。\n"


@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "gb18030"])
def test_the_same_text_in_every_encoding(tmp_path: Path, codec: str) -> None:
    (tmp_path / "a.txt").write_bytes(CHINESE.replace("\n", "\r\n").encode(codec))
    assert read_text(tmp_path / "a.txt") == CHINESE


def test_what_is_no_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b.bin").write_bytes(b"\x00\x01\xff\xfe\x80" * 20)
    with pytest.raises(UserError, match="binary data"):
        read_text(tmp_path / "b.bin")
    (tmp_path / "latin.txt").write_bytes("Früher war das Café größer, früher.".encode("latin-1"))
    with pytest.raises(UserError, match="neither UTF-8"):  # valid GB18030, but no Chinese
        read_text(tmp_path / "latin.txt")
    with pytest.raises(UserError, match="There is no file"):
        read_text(tmp_path / "absent.txt")
    with pytest.raises(UserError, match="is a folder"):
        read_text(tmp_path)
    monkeypatch.setattr(textfiles, "LIMIT", 3)
    with pytest.raises(UserError, match="is larger than"):
        decoded(b"abcd", "x")
