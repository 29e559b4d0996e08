"""PDF, DOCX, EPUB, HTML, Markdown, CSV and code: texts, pages, headings, offsets; what is hostile or damaged."""

import html
import os
import struct
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longverse.documents.document import Document
from longverse.documents.reader import decode, read_many
from longverse.errors import UserError
from tests.documents.makers import (
    W,
    docx_bytes,
    docx_paragraph,
    epub_bytes,
    pdf_bytes,
    pdf_of_paragraphs,
    zip_bytes,
)

LATIN = "abcdefghijklmnopqrstuvwxyz"
word = st.text(LATIN, min_size=1, max_size=9) | st.sampled_from(["R&D", "3.5", "<b>", "café"])
english = st.lists(word, min_size=3, max_size=60).map(lambda words: " ".join(words).capitalize() + ".")
chinese = st.text("董事长报告分为三个部分第一回顾全年经营情况二说明各项目的进展，、", min_size=4, max_size=120).map(
    lambda text: f"文{text}。"
)
sentence = english | chinese
pages_of = st.lists(st.lists(sentence, min_size=1, max_size=5), min_size=1, max_size=4)

PROSE = (
    "The quick brown fox jumps over the lazy dog and then goes home to sleep in the warm house of its owner, which"
    " stands at the edge of the wood near the river."
)
ZH = "董事长报告分为三个部分，第一部分回顾全年的经营情况，第二部分说明各项目的进展，第三部分展望来年的计划和预算安排。"


def check_offsets(document: Document) -> None:
    end = 0
    for number, paragraph in enumerate(document.paragraphs, start=1):
        assert paragraph.number == number
        assert document.text[paragraph.start : paragraph.end] == paragraph.text == paragraph.text.strip() != ""
        assert not document.text[end : paragraph.start].strip()
        assert 1 <= paragraph.page <= document.pages
        assert document.paragraph_at(paragraph.start) is paragraph
        assert document.paragraph_at(paragraph.end - 1) is paragraph
        end = paragraph.end
    assert not document.text[end:].strip()


def read_or_refused(data: bytes, name: str) -> None:
    """Any bytes give a sound document or one sentence."""
    said = ""
    try:
        check_offsets(decode(data, name))
    except UserError as error:
        said = str(error)
    assert "\n" not in said


def told(document: Document) -> list[tuple[int, str]]:
    return [(paragraph.page, paragraph.text) for paragraph in document.paragraphs]


# ---- PDF ----------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(pages_of)
def test_pdf_paragraphs_pages_and_offsets(pages: list[list[str]]) -> None:
    # A paragraph of more lines than one shows what the usual distance of lines is.
    words = PROSE.split()
    pages = [[" ".join(words[5 * n :] + words[: 5 * n]), *page] for n, page in enumerate(pages)]
    document = decode(pdf_of_paragraphs(pages), "a.pdf")
    check_offsets(document)
    assert told(document) == [(number, text) for number, page in enumerate(pages, start=1) for text in page]
    assert (document.format, document.pages, document.unit) == ("pdf", len(pages), "page")


def test_pdf_headings_and_title() -> None:
    data = pdf_of_paragraphs([["# Annual report", PROSE, "# 第二章 概况", ZH], [PROSE]])
    document = decode(data, "a.pdf")
    check_offsets(document)
    assert document.title == "Annual report"
    assert [p.heading for p in document.paragraphs] == [("Annual report",)] * 2 + [("第二章 概况",)] * 3
    assert document.paragraphs[0].text == "# Annual report"
    assert document.place(document.paragraphs[-1].start, document.paragraphs[-1].end) == "page 2, paragraph 5"
    named = decode(pdf_bytes([[(PROSE[:60], 60, 700, 10, False)]], title="二零二五年报"), "a.pdf")
    assert named.title == "二零二五年报"


def test_pdf_bold_headings_hyphens_bullets_indents_and_tables() -> None:
    lines = [
        ("Results", 60.0, 780.0, 10.0, True),
        ("Revenue grew because the new plant began its manufac-", 60.0, 760.0, 10.0, False),
        ("turing early and all the well-", 60.0, 748.0, 10.0, False),
        ("known customers of the whole region stayed with us for", 60.0, 736.0, 10.0, False),
        ("another year.", 60.0, 724.0, 10.0, False),
        ("An indented line begins another paragraph that has to run", 75.0, 712.0, 10.0, False),
        ("over two lines at the least to be seen.", 60.0, 700.0, 10.0, False),
        ("1. the first item of a list that stands below the text", 60.0, 688.0, 10.0, False),
        ("2. the second item", 60.0, 676.0, 10.0, False),
        ("Plant", 60.0, 640.0, 10.0, False),
        ("Tonnes", 300.0, 640.0, 10.0, False),
    ]
    document = decode(pdf_bytes([lines]), "a.pdf")
    texts = [paragraph.text for paragraph in document.paragraphs]
    assert texts[0] == "# Results"
    assert "manufacturing early" in texts[1]
    assert texts[1].endswith("another year.")
    assert texts[2].startswith("An indented")
    assert texts[3:5] == ["1. the first item of a list that stands below the text", "2. the second item"]
    assert texts[5].split() in (["Plant", "|", "Tonnes"], ["Plant", "Tonnes"])


def test_pdf_running_heads_are_left_out_and_noted() -> None:
    pages = [
        [
            ("ACME Annual Report", 60.0, 820.0, 8.0, False),
            (f"Body of page number {['one', 'two', 'three', 'four', 'five', 'six'][n]}.", 60.0, 700.0, 10.0, False),
            ("Second sentence of the page.", 60.0, 660.0, 10.0, False),
            (f"Page {n + 1}", 280.0, 20.0, 8.0, False),
        ]
        for n in range(6)
    ]
    document = decode(pdf_bytes(pages), "a.pdf")
    assert "ACME" not in document.text
    assert "Page 3" not in document.text
    assert document.paragraphs[0].text == "Body of page number one."
    assert [note for note in document.notes if "ACME Annual Report" in note]


def test_rows_of_pdf_tables_are_no_running_heads() -> None:
    """Digits aside they are all alike, on every page, at its edges and inside of it."""
    pages = [
        [("Invoices of the mill", 60.0, 820.0, 8.0, False)]
        + [(f"Invoice {100 * n + row} of 2024 paid 12{row}", 60.0, 780.0 - 20 * row, 10.0, False) for row in range(12)]
        for n in range(6)
    ]
    text = " ".join(decode(pdf_bytes(pages), "a.pdf").text.split())
    assert all(f"Invoice {100 * n + row} of 2024 paid 12{row}" in text for n in range(6) for row in range(12))
    assert "Invoices of the mill" not in text


def test_pdfs_that_cannot_be_read_are_named() -> None:
    cases = [
        (pdf_bytes([[], []], picture_pages=(1, 2)), "is a scan: its 2 pages are pictures"),
        (pdf_bytes([[(PROSE[:40], 60, 700, 10, False)]], encrypt="x"), "locked with a password"),
        (pdf_bytes([[]]), "holds no text on its 1 pages"),
        (b"%PDF-1.7\n1 0 obj\n<<", "a damaged PDF"),
        (pdf_bytes([[(PROSE[:40], 60, 700, 10, False)]])[:300], "a damaged PDF|without pages|no text"),
    ]
    for data, said in cases:
        with pytest.raises(UserError, match=said) as caught:
            decode(data, "a.pdf")
        assert "\n" not in str(caught.value)


def test_some_pages_without_text_are_noted() -> None:
    page = [(PROSE[:70], 60.0, 700.0, 10.0, False), (PROSE[70:], 60.0, 688.0, 10.0, False)]
    document = decode(pdf_bytes([page, [], page], picture_pages=(2,)), "a.pdf")
    assert document.notes == ("1 of 3 pages are pictures without text and were not read: 2.",)
    assert [paragraph.page for paragraph in document.paragraphs] == [1, 3]


@settings(max_examples=6, deadline=None)
@given(st.data())
def test_a_pdf_with_changed_bytes_is_read_or_refused(data: st.DataObject) -> None:
    whole = bytearray(pdf_of_paragraphs([[PROSE], [ZH]]))
    for _ in range(data.draw(st.integers(1, 20))):
        whole[data.draw(st.integers(8, len(whole) - 1))] = data.draw(st.integers(0, 255))
    read_or_refused(bytes(whole), "a.pdf")


def test_a_reader_that_crashes_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from longverse.documents import pdf_lines

    monkeypatch.setattr(pdf_lines.sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="stops the PDF reader"):
        decode(pdf_of_paragraphs([[PROSE]]), "a.pdf")


# ---- DOCX ---------------------------------------------------------------------------------------------------

BREAK = '<w:br w:type="page"/>'
RENDERED = "<w:lastRenderedPageBreak/>"


@settings(max_examples=40, deadline=None)
@given(pages_of, st.sampled_from([BREAK, RENDERED]))
def test_docx_paragraphs_pages_and_offsets(pages: list[list[str]], mark: str) -> None:
    body = "".join(
        docx_paragraph(text, before=mark if number and not place else "")
        for number, page in enumerate(pages)
        for place, text in enumerate(page)
    )
    document = decode(docx_bytes(body), "a.docx")
    check_offsets(document)
    assert told(document) == [(number, text) for number, page in enumerate(pages, start=1) for text in page]


def test_docx_headings_lists_tables_notes_and_what_is_left_out() -> None:
    item = '<w:p><w:pPr><w:numPr><w:ilvl w:val="0"/></w:numPr></w:pPr><w:r><w:t>an item</w:t></w:r></w:p>'
    table = (
        f"<w:tbl><w:tr><w:tc>{docx_paragraph('年份')}</w:tc><w:tc>{docx_paragraph('a')}{docx_paragraph('b')}</w:tc></w:tr>"
        f"<w:tr><w:tc>{docx_paragraph('2025')}</w:tc><w:tc>{docx_paragraph('7')}</w:tc></w:tr></w:tbl>"
    )
    changed = (
        '<w:p><w:r><w:t xml:space="preserve">kept </w:t></w:r><w:del><w:r><w:delText>gone</w:delText></w:r></w:del>'
        "<w:ins><w:r><w:t>added</w:t></w:r></w:ins><w:r><w:instrText>PAGE</w:instrText></w:r>"
        '<w:r><w:footnoteReference w:id="2"/></w:r></w:p>'
    )
    notes = (
        f'<w:footnotes {W}><w:footnote w:type="separator" w:id="0"><w:p><w:r><w:t>no</w:t></w:r></w:p></w:footnote>'
        '<w:footnote w:id="2"><w:p><w:r><w:t>Source: ours</w:t></w:r></w:p></w:footnote></w:footnotes>'
    )
    body = docx_paragraph("Report", "H1") + docx_paragraph("第二节", "Mine") + item + table + changed
    document = decode(docx_bytes(body, word__footnotes_xml=notes), "a.docx")
    check_offsets(document)
    texts = ["# Report", "## 第二节", "- an item", "年份 | a b", "2025 | 7", "kept added", "[Source: ours]"]
    assert [paragraph.text for paragraph in document.paragraphs] == texts
    assert document.paragraphs[-1].heading == ("Report", "第二节")
    assert (document.title, document.unit, document.encoding) == ("Report", "", "")


def test_docx_sections_and_breaks_before() -> None:
    section = "<w:p><w:pPr><w:sectPr/></w:pPr><w:r><w:t>ends a section</w:t></w:r></w:p>"
    before = "<w:p><w:pPr><w:pageBreakBefore/></w:pPr><w:r><w:t>three</w:t></w:r></w:p>"
    document = decode(docx_bytes(section + docx_paragraph("two") + before), "a.docx")
    assert told(document) == [(1, "ends a section"), (2, "two"), (3, "three")]


# ---- EPUB and HTML ------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(pages_of)
def test_epub_sections_and_offsets(chapters: list[list[str]]) -> None:
    bodies = ["".join(f"<p>{html.escape(text)}</p>\n" for text in chapter) for chapter in chapters]
    document = decode(epub_bytes(bodies), "a.epub")
    check_offsets(document)
    assert told(document) == [(number, text) for number, chapter in enumerate(chapters, start=1) for text in chapter]
    assert (document.unit, document.title, document.pages) == ("section", "A book", len(chapters))


def test_epub_page_marks_of_the_printed_book() -> None:
    first = '<h1>一</h1><p>a<span epub:type="pagebreak" title="12"/></p><p>b <a role="doc-pagebreak" id="p13"/>c</p>'
    document = decode(epub_bytes([first, "<p>d</p>"]), "a.epub")
    assert document.unit == "page"
    assert told(document) == [(1, "# 一"), (1, "a"), (12, "b c"), (13, "d")]


def test_html_shows_what_a_reader_sees() -> None:
    page = (
        '<!DOCTYPE html><html><head><title>The &amp; title</title><meta charset="gb2312"><style>p{}</style></head>'
        "<h1>标题</h1><p>One <b>bold</b>word<br>next&nbsp;line<p>Unclosed <i>text<ul><li>first<li>second</ul>"
        '<script>alert("no")</script><div style="display: none">hidden</div><p hidden>hidden</p>'
        "<table><tr><th>k<td>v<tr><td><p>a</p><p>b</p><td>c</table><pre>  x = 1\n\n  y</pre><h3>深</h3>&lt;end&gt;"
    )
    document = decode(page.encode("gb18030"), "a.html")
    check_offsets(document)
    assert [paragraph.text for paragraph in document.paragraphs] == [
        "# 标题", "One boldword\nnext line", "Unclosed text", "- first", "- second", "k | v", "a b | c", "x = 1\n\n  y",
        "### 深", "<end>",
    ]  # fmt: skip
    assert (document.title, document.encoding, document.format) == ("The & title", "gb18030", "html")
    assert document.paragraphs[-1].heading == ("标题", "深")


def test_an_empty_cell_keeps_its_column() -> None:
    page = "<table><tr><th>Name<th>2022<th>2023<tr><td>Costs<td></td><td>5</td><td></td></tr><tr><td> <td> </table>"
    assert [paragraph.text for paragraph in decode(page.encode(), "a.html").paragraphs] == [
        "Name | 2022 | 2023",
        "Costs |  | 5",
    ]


def test_a_page_that_says_utf_16_in_ascii_is_not() -> None:
    page = '<?xml version="1.0" encoding="utf-16"?><html><body><p>Plain words.</p></body></html>'
    assert [paragraph.text for paragraph in decode(page.encode(), "a.html").paragraphs] == ["Plain words."]


@settings(max_examples=60, deadline=None)
@given(st.text(st.sampled_from("<>/=\"' &;!-[]?abph123\n") | st.characters(exclude_categories=["Cs"]), max_size=400))
def test_html_of_any_shape_is_read_or_refused(value: str) -> None:
    read_or_refused(("<html>" + value).encode(), "a.html")


def test_html_nested_without_end_is_refused() -> None:
    with pytest.raises(UserError, match="nests more than"):
        decode(b"<div>" * 100_000 + b"x", "a.html")
    for unclosed in (b"<br>", b"<p>", b"<li>"):
        assert decode(unclosed * 20_000 + b"x", "b.html").text.endswith("x")


# ---- hostile archives ---------------------------------------------------------------------------------------


def test_entities_bombs_and_depth_are_refused() -> None:
    laughs = '<?xml version="1.0"?><!DOCTYPE d [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]><w:document/>'
    deep = f"<w:document {W}>" + "<w:x>" * 100_000
    for document, said in (
        (laughs, "declares entities"),
        (deep, "nests more than"),
        ("<w:document", "not well formed"),
    ):
        with pytest.raises(UserError, match=said):
            decode(zip_bytes({"word/document.xml": document}), "a.docx")
    outside = '<?xml version="1.0"?><!DOCTYPE d [<!ENTITY x SYSTEM "file:///etc/passwd">]><w:document>&x;</w:document>'
    with pytest.raises(UserError, match="declares entities"):
        decode(zip_bytes({"word/document.xml": outside}), "a.docx")


def test_a_zip_bomb_is_refused_without_unpacking_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from longverse.documents import archives

    monkeypatch.setattr(archives, "PART", 2**20)
    bomb = zip_bytes({"word/document.xml": b" " * 2**24})
    assert len(bomb) < 100_000
    with pytest.raises(UserError, match="more than 1 MB of text"):
        decode(bomb, "a.docx")
    # A size that lies in the archive's list changes nothing.
    lying = bomb.replace(struct.pack("<I", 2**24), struct.pack("<I", 100))
    with pytest.raises(UserError):
        decode(lying, "a.docx")


def test_too_many_files_and_locked_ones_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from longverse.documents import archives

    monkeypatch.setattr(archives, "ENTRIES", 3)
    with pytest.raises(UserError, match="holds 4 files"):
        decode(docx_bytes(docx_paragraph("x")), "a.docx")
    monkeypatch.undo()
    data = bytearray(zip_bytes({"word/document.xml": "x"}))
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(mark) + place] |= 1  # "encrypted", in both places that say so
    with pytest.raises(UserError, match="locked with a password"):
        decode(bytes(data), "a.docx")
    office = b"\xd0\xcf\x11\xe0" + bytes(512) + "EncryptedPackage".encode("utf-16-le")
    with pytest.raises(UserError, match="locked with a password"):
        decode(office, "a.docx")


def test_paths_out_of_an_epub_lead_nowhere(tmp_path: Path) -> None:
    secret = tmp_path / "secret.xhtml"
    secret.write_text("<p>secret</p>")
    data = epub_bytes(["<p>x</p>"])
    with zipfile.ZipFile(BytesIO(data)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    package = files["OEBPS/book.opf"].decode()
    for link in ("../../../../../.." + str(secret), "file://" + str(secret), "/etc/passwd", "%2e%2e/%2e%2e/etc/passwd"):
        files["OEBPS/book.opf"] = package.replace("text/chapter%200.xhtml", link).encode()
        with pytest.raises(UserError, match="which is missing"):
            decode(zip_bytes(files), "a.epub")  # type: ignore[arg-type]
    files["OEBPS/book.opf"] = package.encode()
    locked = (
        '<encryption xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><EncryptedData'
        ' xmlns="http://www.w3.org/2001/04/xmlenc#"><CipherData><CipherReference URI="OEBPS/text/chapter%200.xhtml"/>'
        "</CipherData></EncryptedData></encryption>"
    )
    with pytest.raises(UserError, match="locked by DRM"):
        decode(zip_bytes(files | {"META-INF/encryption.xml": locked}), "a.epub")  # type: ignore[operator,arg-type]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_archives_with_changed_bytes_are_read_or_refused(data: st.DataObject) -> None:
    whole = bytearray(data.draw(st.sampled_from([docx_bytes(docx_paragraph(PROSE)), epub_bytes([f"<p>{ZH}</p>"])])))
    for _ in range(data.draw(st.integers(1, 12))):
        whole[data.draw(st.integers(4, len(whole) - 1))] = data.draw(st.integers(0, 255))
    read_or_refused(bytes(whole), "a.bin")


def test_other_archives_are_named() -> None:
    with pytest.raises(UserError, match=r"an Excel file; save it as \.csv"):
        decode(zip_bytes({"xl/workbook.xml": "x"}), "a.xlsx")
    with pytest.raises(UserError, match="a ZIP archive"):
        decode(zip_bytes({"a.txt": "x"}), "a.zip")
    with pytest.raises(UserError, match="holds no text"):
        decode(docx_bytes(""), "a.docx")
    with pytest.raises(UserError, match=r"lacks|no package"):
        decode(zip_bytes({"META-INF/container.xml": "<container/>"}), "a.epub")


# ---- text: Markdown, CSV, code, chapters, form feeds ---------------------------------------------------------


def test_markdown_headings_but_not_in_code() -> None:
    document = decode("# 年报\ntext\n```\n# no\n\nx\n```\n## Part B ##\n\ntwo\n### C\nthree".encode(), "a.md")
    check_offsets(document)
    assert [p.text for p in document.paragraphs] == [
        "# 年报", "text\n```\n# no\n\nx\n```", "## Part B ##", "two", "### C", "three",
    ]  # fmt: skip
    assert document.paragraphs[-1].heading == ("年报", "Part B", "C")
    assert document.place(document.paragraphs[1].start, document.paragraphs[1].end) == "lines 2-7"


markdown_line = st.sampled_from(
    ["# h", "## 二", "```", "~~~", "text", "文字", "", "  ", "- item", "#no", "\f", "    code"]
)


@given(st.lists(markdown_line, min_size=1, max_size=30), st.sampled_from(["a.md", "a.txt", "a.py", "a.csv"]))
def test_texts_of_every_kind_keep_their_offsets(lines: list[str], name: str) -> None:
    value = "\n".join(lines)
    if value.strip():
        document = decode(value.encode(), name)
        assert document.text == value
        check_offsets(document)


def test_csv_records_are_paragraphs() -> None:
    document = decode('name;town\n"Ada; B";"Up\n\nton"\n李雷;北京\n'.encode(), "a.csv")
    check_offsets(document)
    assert [p.text for p in document.paragraphs] == ["name;town", '"Ada; B";"Up\n\nton"', "李雷;北京"]


def test_code_stands_under_its_definitions() -> None:
    source = "def f(x):\n    return 1\n\nclass A:\n    y = 2\n\n    async def g(self):\n        pass\n\nx = 1\n"
    document = decode(source.encode(), "a.py")
    assert [p.heading for p in document.paragraphs] == [("f",), ("A",), ("A", "g"), ()]
    assert document.place(document.paragraphs[2].start, document.paragraphs[2].end) == "lines 7-8"


def test_chapters_and_form_feeds_of_plain_text() -> None:
    document = decode("Chapter IV. Of ships\n\ntext\fmore\n\n第三回 某某\n\n正文".encode(), "a.txt")
    assert [p.heading[-1] for p in document.paragraphs] == ["Chapter IV. Of ships"] * 3 + ["第三回 某某"] * 2
    assert told(document)[1:3] == [(1, "text"), (2, "more")]
    assert document.unit == "page"
    assert decode(b"Part of it was sold, and the rest was kept by the two of them.", "a.txt").paragraphs[0].level == 0


# ---- folders and several files ------------------------------------------------------------------------------


def test_folders_and_several_files(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "two.md").write_text("# 二")
    (tmp_path / "one.txt").write_text("one")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / ".git" / "config").write_text("hidden")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "report.docx").write_bytes(docx_bytes(docx_paragraph(ZH)))
    skipped: list[tuple[str, str]] = []
    found = read_many([tmp_path, tmp_path / "one.txt"], skipped=lambda name, reason: skipped.append((name, reason)))
    assert [document.name for document in found] == ["one.txt", "report.docx", "b/two.md"]
    assert [name for name, _ in skipped] == ["picture.png"]
    assert [document.name for document in read_many([tmp_path / "b" / "two.md", tmp_path])][:2] == ["two.md", "one.txt"]
    with pytest.raises(UserError, match=r"picture\.png is a PNG picture"):
        read_many([tmp_path / "picture.png"])
    (tmp_path / "b" / "two.md").write_text(" ")
    with pytest.raises(UserError, match="without a document in it"):
        read_many([tmp_path / "b"])
    with pytest.raises(UserError, match="no document"):
        read_many([])


def test_a_folder_that_cannot_be_listed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locked").mkdir()
    (tmp_path / "one.txt").write_text("one")
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    skipped: list[tuple[str, str]] = []
    found = read_many([tmp_path], skipped=lambda name, reason: skipped.append((name, reason)))
    assert [document.name for document in found] == ["one.txt"]
    place = f"{tmp_path / 'locked'}"
    assert skipped == [(f"{place}/", f"{place} cannot be listed (Permission denied): check its permissions.")]


def test_a_folder_past_the_limits_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from longverse.documents import reader

    monkeypatch.setattr(reader, "FOLDER_FILES", 2)
    for name in "abc":
        (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match="more than 2 files"):
        read_many([tmp_path])


def test_a_page_that_ends_inside_a_row_loses_nothing() -> None:
    document = decode(b"<html><body><table><tr><td>Total<td>1,240", "a.html")
    assert document.text == "Total | 1,240"


def test_one_long_line_is_parted_at_its_sentences() -> None:
    for sentence in ("The mill grinds the grain of the town. ", "磨坊为全镇磨面，风车日夜转动。"):
        document = decode((sentence * 400).encode(), "a.txt")
        assert "".join(document.text.split()) == "".join((sentence * 400).split())
        assert len(document.paragraphs) > 2
        for paragraph in document.paragraphs:
            assert len(paragraph.text) <= 2000
            assert paragraph.text.endswith(sentence.strip()[-1])
    assert [len(p.text) for p in decode(b"x" * 4500, "a.txt").paragraphs] == [2000, 2000, 500]


def test_word_files_without_pages_are_cited_by_paragraph() -> None:
    document = decode(docx_bytes(docx_paragraph("One.") + docx_paragraph("Two.")), "a.docx")
    assert document.place(document.paragraphs[1].start, document.paragraphs[1].end) == "paragraph 2"


def test_a_file_that_cannot_be_looked_at_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text(name)
    is_file = Path.is_file

    def refuse(path: Path) -> bool:
        if path.name == "two.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refuse)
    skipped: list[str] = []
    assert [d.name for d in read_many([tmp_path], skipped=lambda name, reason: skipped.append(reason))] == ["one.txt"]
    assert skipped == [f"{tmp_path / 'two.txt'} cannot be listed (Permission denied): check its permissions."]
