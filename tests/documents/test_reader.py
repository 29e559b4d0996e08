"""Files to text: every encoding gives the text back, and what is not text is named."""

import io
import os
import sys
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from longverse.documents.reader import decode, read
from longverse.errors import UserError

# Everything a text file may hold: no control characters, no lone surrogates.
text = st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("\n\t"), min_size=1)
common_chinese = st.text(
    st.sampled_from(
        "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下过子说产种面而方后多定行学法所民得经十三"
    )
    | st.sampled_from("，。、：；“”（）《》\n abc123"),
    min_size=1,
)


def normalised(value: str) -> str:
    return value.replace("\r\n", "\n").replace("\r", "\n")


@given(text)
def test_any_text_comes_back_from_utf8(value: str) -> None:
    assume(value.strip() and not value.startswith("\ufeff"))
    document = decode(value.encode(), "a.txt")
    assert (document.text, document.encoding) == (normalised(value), "utf-8")
    assert decode(value.encode("utf-8-sig"), "a.txt").text == normalised(value)


@given(text, st.sampled_from(["little", "big"]))
def test_any_text_comes_back_from_utf16_with_its_mark(value: str, order: str) -> None:
    assume(value.strip() and not value.startswith("\ufeff"))
    mark, codec = (b"\xff\xfe", "utf-16-le") if order == "little" else (b"\xfe\xff", "utf-16-be")
    document = decode(mark + value.encode(codec), "a.txt")
    assert (document.text, document.encoding) == (normalised(value), "utf-16")


@given(
    st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1), st.sampled_from(["utf-16-le", "utf-16-be"])
)
def test_latin_utf16_without_a_mark_is_recognised(value: str, codec: str) -> None:
    assume(value.strip())
    document = decode(value.encode(codec), "a.txt")
    assert (document.text, document.encoding) == (value, codec)


@given(common_chinese)
def test_chinese_comes_back_from_gb18030(value: str) -> None:
    assume(value.strip())
    data = value.encode("gb18030")
    try:  # a few short byte strings mean something in both encodings; UTF-8 goes first
        data.decode("utf-8")
    except UnicodeDecodeError:
        document = decode(data, "a.txt")
        assert (document.text, document.encoding) == (value, "gb18030")


@given(text)
def test_paragraphs_are_exact_stretches_of_the_text(value: str) -> None:
    assume(value.strip())
    document = decode(b"\xef\xbb\xbf" + value.encode(), "a.txt")
    end = 0
    for paragraph in document.paragraphs:
        assert document.text[paragraph.start : paragraph.end] == paragraph.text
        assert paragraph.text == paragraph.text.strip() != ""
        assert not document.text[end : paragraph.start].strip()  # nothing but white space lies between
        end = paragraph.end
    assert not document.text[end:].strip()


def test_paragraphs_part_at_blank_lines_and_nowhere_else() -> None:
    document = decode(b"# One\r\n\r\ntwo\r\nlines\r\n \t\r\n\r\nthree\rfour", "a.md")
    assert [p.text for p in document.paragraphs] == ["# One", "two\nlines", "three\nfour"]
    assert document.title == "One"


def test_words_and_language() -> None:
    english = decode(b"The chair's report, in 3 parts.", "a.txt")
    assert (english.words, english.language, english.title) == (7, "en", "a.txt")
    chinese = decode("董事长报告分为3个部分。".encode(), "b.txt")
    assert (chinese.words, chinese.language) == (11, "zh")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "only white space"),
        (b"%PDF-1.7\n...", "a PDF; the PDF reader is not in this version"),
        (b"\x89PNG\r\n\x1a\n", "a PNG picture"),
        (b"\xff\xd8\xff\xe0", "a JPEG picture"),
        (b"PK\x03\x04rest", "a ZIP archive"),
        (b"GGUF\x03\x00\x00\x00", "with --model"),
        (bytes(range(256)) * 4, "holds binary data"),
        (b"\x01\x02\x03\x04\x05\x06", "control characters"),
        ("Fran\xe7ais \xe9t\xe9 na\xefve d\xe9j\xe0 vu".encode("latin-1"), "neither UTF-8"),
        (b"\xef\xbb\xbfabc\xff", "damaged at byte"),
        (b"\xff\xfea", "damaged at byte"),
    ],
)
def test_what_is_not_text_is_named(data: bytes, said: str) -> None:
    with pytest.raises(UserError, match=said):
        decode(data, "file.txt")


def test_office_files_are_named() -> None:
    with pytest.raises(UserError, match="a Word file"):
        decode(b"PK\x03\x04", "letter.docx")
    with pytest.raises(UserError, match="an EPUB book"):
        decode(b"PK\x03\x04", "novel.epub")


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "report.txt").write_text("x")
    with pytest.raises(UserError, match=r"no file .*did you mean .*report\.txt"):
        read(tmp_path / "reprot.txt")


def test_a_folder_a_device_and_impossible_names(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"):
        read(tmp_path)
    with pytest.raises(UserError, match="is a device"):
        read("/dev/zero")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="itself a file"):
        read(tmp_path / "file" / "below.txt")
    with pytest.raises(UserError, match="cannot be read"):
        read("a" * 5000)
    with pytest.raises(UserError, match="cannot be read"):
        read("a\0b")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_one_may_not_read(tmp_path: Path) -> None:
    path = tmp_path / "secret.txt"
    path.write_text("x")
    path.chmod(0)
    with pytest.raises(UserError, match="may not read"):
        read(path)


def test_no_permission_is_said_for_root_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "secret.txt").write_text("x")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match="may not read"):
        read(tmp_path / "secret.txt")


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("第一段\n\n第二段".encode("gb18030"))))
    document = read("-")
    assert (document.name, document.encoding, len(document.paragraphs)) == ("standard input", "gb18030", 2)


def test_standard_input_from_a_keyboard_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    with pytest.raises(UserError, match="nothing is piped in"):
        read("-")
