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
        "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下过子说产种面"
        "而方后多定行学法所民得经十三"
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
        (b"%PDF-1.7\n...", "a damaged PDF"),
        (b"\x89PNG\r\n\x1a\n", "a PNG picture"),
        (b"\xff\xd8\xff\xe0", "a JPEG picture"),
        (b"PK\x03\x04rest", "a ZIP archive"),
        (b"GGUF\x03\x00\x00\x00", "with --model"),
        (b"RIFF\x24\x08\x00\x00WAVEfmt ", "a RIFF file"),
        (b"SQLite format 3\x00\x10\x00\x01\x01", "an SQLite database"),
        (b"GIF89a\xf7\xff\xff\x21", "a GIF picture"),
        (b"{\\rtf1\\ansi Hello}", "an RTF file"),
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


@pytest.mark.parametrize(
    "value",
    [
        "GGUF is a format for model files.",
        "RIFF files hold chunks.",
        "SQLite format 3 is described here.",
        "GIF8 或 GIF89a 是图片的格式。",
        "Rar! he said.",
    ],
)
def test_texts_that_begin_with_the_word_of_a_format_are_read(value: str) -> None:
    assert decode(value.encode(), "a.txt").text == value
    assert decode(value.encode("gb18030"), "a.txt").text == value


# Our own sentences, and for the old style the public openings of the Analects, the Daodejing and the Art of War.
CHINESE = {
    "law": "第一条 为了保护当事人的合法权益，维护市场秩序，根据有关法律，制定本办法。第二条 经营者应当遵守自愿、"
    "平等、公平的原则，"
    "不得损害他人的利益。第三条 县级以上人民政府应当加强对本行政区域内仓储工作的领导，督促有关部门依法履行职责。"
    "违反本办法规定的，"
    "由主管部门责令改正，处一千元以上五千元以下罚款；构成犯罪的，依法追究刑事责任。",
    "classic": "学而时习之，不亦说乎？有朋自远方来，不亦乐乎？人不知而不愠，不亦君子乎？道可道，非常道；名可名，"
    "非常名。"
    "无名，天地之始；有名，万物之母。兵者，国之大事，死生之地，存亡之道，不可不察也。",
    "modern": "昨天下了一整天的雨，孩子们没有去学校，只好留在家里读书。傍晚雨停了，祖母带着我们到河边散步，卖豆"
    "腐的老人还在桥头等着。"
    "公司今年的销售额比去年增加了两成，新的实验室明年春天就要建好。他说，等那个时候，大家都会过得更好。",
    "short": "你好",
    "title": "关于加强仓储管理工作的通知",
    "names": "张伟、李娜、王芳、刘洋",
}
KOREAN = (
    "어제는 비가 많이 와서 학교에 가지 못했다. 그래서 집에서 책을 읽고 음악을 들었다. 저녁에는 어머니와 함께 시"
    "장에 가서 과일과 생선을"
    " 샀다. 회사는 올해 매출이 크게 늘었다고 발표했다."
)
JAPANESE = "昨日は雨がたくさん降ったので、学校へ行けなかった。夕方には母と一緒に市場へ行き、果物と魚を買った。"


@pytest.mark.parametrize("kind", CHINESE)
def test_chinese_of_every_kind_is_read_from_gb18030(kind: str) -> None:
    document = decode(CHINESE[kind].encode("gb18030"), "a.txt")
    assert (document.text, document.encoding) == (CHINESE[kind], "gb18030")


@given(st.sampled_from(["law", "classic", "modern"]), st.data())
def test_stretches_of_chinese_are_read_from_gb18030(kind: str, data: st.DataObject) -> None:
    whole = CHINESE[kind]
    start = data.draw(st.integers(0, len(whole) - 8))
    value = whole[start : data.draw(st.integers(start + 8, len(whole)))]
    assert decode(value.encode("gb18030"), "a.txt").text == value


@pytest.mark.parametrize(
    ("value", "codec", "said"),
    [
        (KOREAN, "euc_kr", "reads as Korean in EUC-KR"),
        (KOREAN[:24], "euc_kr", "reads as Korean in EUC-KR"),
        (JAPANESE, "euc_jp", "reads as Japanese, perhaps in EUC-JP"),
        (JAPANESE, "shift_jis", "another encoding, such as EUC-KR, EUC-JP, Shift-JIS, Big5"),
        ("昨天下了很大的雨，所以我們留在家裡讀書。公司宣布今年的銷售額大幅成長。", "big5", "Big5"),
        # Nothing tells the language here, but Chinese it is not.
        ("".join(chr(0x9F50 - 3 * i) for i in range(60)), "gb18030", "may be another encoding"),
    ],
)
def test_other_east_asian_encodings_are_not_read_as_chinese(value: str, codec: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        decode(value.encode(codec), "a.txt")


@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize(
    "value",
    [
        CHINESE["law"],
        CHINESE["modern"] + "\n",
        "一一一，一是一，二是二。\n" * 5,  # its zero bytes stand on both sides
        "显存 80GB，上下文 256K；第一章\n",
        "Вчера шёл дождь, и мы остались дома.\n",
        "Déjà vu — “naïve” café\n",
    ],
)
def test_utf16_without_a_mark_in_either_order(value: str, codec: str) -> None:
    document = decode(value.encode(codec), "a.txt")
    assert (document.text, document.encoding) == (value, codec)


@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("value", ["开明桥、北开明桥", "어제는 비가 많이 와서 학교에 가지 못했다.\n"])
def test_utf16_whose_order_does_not_show_is_refused_and_not_guessed(value: str, codec: str) -> None:
    with pytest.raises(UserError, match="UTF-16 without a byte-order mark"):
        decode(value.encode(codec), "a.txt")


def test_zero_bytes_that_are_no_utf16_name_it_all_the_same() -> None:
    with pytest.raises(UserError, match="UTF-16 without a byte-order mark"):
        decode(bytes(range(256)) * 4, "a.bin")


def test_nobodys_home_folder() -> None:
    with pytest.raises(UserError, match=r"nobody's home folder here: write \./~nosuchuser"):
        read("~nosuchuser/x.txt")


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


def test_prose_without_blank_lines_has_a_paragraph_a_line() -> None:
    lines = [f"　　这一年的第{n}天，镇上的人都去河边看船，船上装满了盐和布。" for n in range(120)]
    text = "\n".join(["第一章 河边", *lines[:60], "第二章 归来", *lines[60:]])
    document = decode(text.encode(), "novel.txt")
    assert [paragraph.text for paragraph in document.paragraphs] == [line.strip() for line in text.split("\n")]
    assert document.paragraphs[-1].heading[-1].startswith("第二章")
    wrapped = "The river rose again in the spring and\nthe boats could not be found. " * 60
    parts = [paragraph.text for paragraph in decode(wrapped.encode(), "a.txt").paragraphs]
    assert max(map(len, parts)) <= 2_000
    assert "".join("".join(parts).split()) == "".join(wrapped.split())
    log = "\n".join(f"12:00:{n % 60:02d} unit {n} answered in {n} ms" for n in range(500))
    parts = [paragraph.text for paragraph in decode(log.encode(), "a.log").paragraphs]
    assert len(parts) > 5
    assert "\n".join(parts) == log
    short = "One line.\nAnd another."
    assert len(decode(short.encode(), "a.txt").paragraphs) == 1
