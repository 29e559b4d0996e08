"""Files for the reader's tests, written by the formats' definitions; none of our reading code is used."""

import io
import zipfile
from xml.sax.saxutils import escape

# A line of a PDF page: text, x, y, size, bold
PdfLine = tuple[str, float, float, float, bool]


def pdf_bytes(
    pages: list[list[PdfLine]], *, title: str = "", picture_pages: tuple[int, ...] = (), encrypt: str = ""
) -> bytes:
    """A PDF 1.7 file. Latin text in Helvetica; text with Chinese in the standard font STSong-Light, which needs no
    embedding (predefined CMap UniGB-UCS2-H). `picture_pages` (from 1) show a small picture. With `encrypt`, a
    dictionary that asks for a password which nobody knows."""
    objects: list[bytes] = []

    def add(body: bytes) -> int:
        objects.append(body)
        return len(objects)

    catalog, tree = add(b""), add(b"")
    plain = add(b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica/Encoding/WinAnsiEncoding>>")
    bold = add(b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica-Bold/Encoding/WinAnsiEncoding>>")
    descriptor = add(
        b"<</Type/FontDescriptor/FontName/STSong-Light/Flags 6/FontBBox[-25 -254 1000 880]/ItalicAngle 0/Ascent 880"
        b"/Descent -120/CapHeight 880/StemV 93>>"
    )
    system = b"<</Registry(Adobe)/Ordering(GB1)/Supplement 2>>"
    cid = add(
        b"<</Type/Font/Subtype/CIDFontType0/BaseFont/STSong-Light/CIDSystemInfo%s/DW 1000/FontDescriptor %d 0 R>>"
        % (system, descriptor)
    )
    chinese = add(
        b"<</Type/Font/Subtype/Type0/BaseFont/STSong-Light/Encoding/UniGB-UCS2-H/DescendantFonts[%d 0 R]>>" % cid
    )
    image = add(
        b"<</Type/XObject/Subtype/Image/Width 2/Height 2/ColorSpace/DeviceGray/BitsPerComponent 8/Length 4>>"
        b"stream\n\x00\x80\xc0\xff\nendstream"
    )
    kids = []
    for number, lines in enumerate(pages, start=1):
        parts = []
        for text, x, y, size, is_bold in lines:
            if all(ord(character) < 256 for character in text):
                font = b"/B" if is_bold else b"/F"
                shown = b"(" + text.encode("cp1252").translate(None, b"()\\") + b")"
            else:
                font, shown = b"/C", b"<" + text.encode("utf-16-be").hex().encode() + b">"
            parts.append(b"BT %s %g Tf %g %g Td %s Tj ET" % (font, size, x, y, shown))
        if number in picture_pages:
            parts.append(b"q 400 0 0 400 60 300 cm /P Do Q")
        stream = b"\n".join(parts)
        content = add(b"<</Length %d>>stream\n%s\nendstream" % (len(stream), stream))
        resources = b"<</Font<</F %d 0 R/B %d 0 R/C %d 0 R>>/XObject<</P %d 0 R>>>>" % (plain, bold, chinese, image)
        kids.append(
            add(
                b"<</Type/Page/Parent %d 0 R/MediaBox[0 0 595 842]/Resources%s/Contents %d 0 R>>"
                % (tree, resources, content)
            )
        )
    objects[catalog - 1] = b"<</Type/Catalog/Pages %d 0 R>>" % tree
    listed = b" ".join(b"%d 0 R" % kid for kid in kids)
    objects[tree - 1] = b"<</Type/Pages/Kids[%s]/Count %d>>" % (listed, len(kids))
    info = add(b"<</Title<feff%s>>>" % title.encode("utf-16-be").hex().encode())
    out = io.BytesIO()
    out.write(b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n")
    places = []
    for number, body in enumerate(objects, start=1):
        places.append(out.tell())
        out.write(b"%d 0 obj\n%s\nendobj\n" % (number, body))
    table = out.tell()
    out.write(b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1))
    out.writelines(b"%010d 00000 n \n" % place for place in places)
    locked = b""
    if encrypt:
        locked = b"/Encrypt<</Filter/Standard/V 2/R 3/Length 128/P -4/O<%s>/U<%s>>>/ID[<%s><%s>]" % (
            b"28" * 32, b"4e" * 32, b"00" * 16, b"00" * 16,
        )  # fmt: skip
    out.write(b"trailer\n<</Size %d/Root %d 0 R/Info %d 0 R" % (len(objects) + 1, catalog, info))
    out.write(locked + b">>\nstartxref\n%d\n%%%%EOF\n" % table)
    return out.getvalue()


def pdf_of_paragraphs(pages: list[list[str]], *, width: int = 0) -> bytes:
    """A PDF whose pages hold paragraphs in lines, with a gap between them; `# ` marks a heading."""
    made = []
    for paragraphs in pages:
        y, lines = 780.0, []
        for paragraph in paragraphs:
            heading = paragraph.startswith("# ")
            size = 18.0 if heading else 10.0
            for line in wrapped(paragraph.removeprefix("# "), 30 if any(ord(c) > 255 for c in paragraph) else 80):
                lines.append((line, 60.0, y, size, False))
                y -= 1.2 * size
            y -= 12.0
        assert y > 20, "the page is full"
        made.append(lines)
    return pdf_bytes(made)


def wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width` characters; Chinese breaks anywhere."""
    if any(ord(character) > 255 for character in text):
        return [text[at : at + width] for at in range(0, len(text), width)]
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return [*lines, line]


def zip_bytes(files: dict[str, str | bytes]) -> bytes:
    """A ZIP archive of files."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


W = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
DOCX_RELATIONS = (
    '<?xml version="1.0"?><Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">'
    '<Relationship Id="r1" Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument"'
    ' Target="word/document.xml"/></Relationships>'
)
DOCX_STYLES = (
    f'<?xml version="1.0"?><w:styles {W}>'
    '<w:style w:type="paragraph" w:default="1" w:styleId="Normal"><w:name w:val="Normal"/></w:style>'
    '<w:style w:type="paragraph" w:styleId="H1"><w:name w:val="heading 1"/><w:basedOn w:val="Normal"/></w:style>'
    '<w:style w:type="paragraph" w:styleId="H2"><w:name w:val="heading 2"/></w:style>'
    '<w:style w:type="paragraph" w:styleId="Mine"><w:name w:val="My heading"/><w:basedOn w:val="H2"/></w:style>'
    "</w:styles>"
)


def docx_paragraph(text: str, style: str = "", *, before: str = "") -> str:
    """A paragraph's XML; `before` is put into its first run."""
    properties = f'<w:pPr><w:pStyle w:val="{style}"/></w:pPr>' if style else ""
    middle = len(text) // 2  # Word cuts text into runs wherever it likes
    runs = f'<w:r>{before}<w:t xml:space="preserve">{escape(text[:middle])}</w:t></w:r>'
    runs += f'<w:r><w:t xml:space="preserve">{escape(text[middle:])}</w:t></w:r>'
    return f"<w:p>{properties}{runs}</w:p>"


def docx_bytes(body: str, **more: str | bytes) -> bytes:
    """A .docx file with the given body XML."""
    document = f'<?xml version="1.0" encoding="UTF-8"?><w:document {W}><w:body>{body}</w:body></w:document>'
    files: dict[str, str | bytes] = {"[Content_Types].xml": "<Types/>", "_rels/.rels": DOCX_RELATIONS}
    files |= {"word/document.xml": document, "word/styles.xml": DOCX_STYLES}
    return zip_bytes(files | {name.replace("__", "/").replace("_xml", ".xml"): text for name, text in more.items()})


CONTAINER = (
    '<?xml version="1.0"?><container xmlns="urn:oasis:names:tc:opendocument:xmlns:container" version="1.0"><rootfiles>'
    '<rootfile full-path="OEBPS/book.opf" media-type="application/oebps-package+xml"/></rootfiles></container>'
)


def epub_bytes(chapters: list[str], *, title: str = "A book", **more: str | bytes) -> bytes:
    """An .epub file with the given chapter bodies (XHTML)."""
    items = "".join(
        f'<item id="c{n}" href="text/chapter%20{n}.xhtml" media-type="application/xhtml+xml"/>'
        for n in range(len(chapters))
    )
    order = "".join(f'<itemref idref="c{n}"/>' for n in range(len(chapters)))
    package = (
        '<?xml version="1.0"?><package xmlns="http://www.idpf.org/2007/opf" version="3.0">'
        f'<metadata xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:title>{escape(title)}</dc:title></metadata>'
        f'<manifest><item id="style" href="a.css" media-type="text/css"/>{items}</manifest><spine>{order}</spine>'
        "</package>"
    )
    files: dict[str, str | bytes] = {"mimetype": "application/epub+zip", "META-INF/container.xml": CONTAINER}
    files["OEBPS/book.opf"] = package
    for number, body in enumerate(chapters):
        files[f"OEBPS/text/chapter {number}.xhtml"] = (
            '<?xml version="1.0" encoding="utf-8"?><!DOCTYPE html><html xmlns="http://www.w3.org/1999/xhtml"'
            f' xmlns:epub="http://www.idpf.org/2007/ops"><head><title>c{number}</title></head><body>{body}</body></html>'
        )
    return zip_bytes(files | more)
