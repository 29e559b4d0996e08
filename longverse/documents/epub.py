"""EPUB books (EPUB 2 and 3): the chapters in reading order, each a page of XHTML.

A book has no pages of its own. Where the publisher marked those of the printed edition, they are the pages; else every
file of the reading order counts as a section. Not done: pictures, sound, and books locked by DRM, which are named.
"""

from ..errors import UserError
from .archives import Archive
from .document import Block, Document, assemble
from .markup import blocks_of, html_text

OPF = "{http://www.idpf.org/2007/opf}"
DC = "{http://purl.org/dc/elements/1.1/}"
CONTAINER = "{urn:oasis:names:tc:opendocument:xmlns:container}"
ENC = "{http://www.w3.org/2001/04/xmlenc#}"
_CHAPTERS = 20_000


def epub_document(data: bytes, name: str) -> Document:
    """The document of an .epub file. Raises UserError for a damaged, locked or hostile one."""
    archive = Archive(data, name)
    package_name, chapters, title = _reading_order(archive)
    locked = _locked(archive)
    blocks: list[Block] = []
    page, marks, read = 1, 0, 0
    sections: list[int] = []  # the section of every block
    for link in chapters[:_CHAPTERS]:
        part = archive.resolve(package_name, link)
        if part in locked:
            raise UserError(f"{name} is locked by DRM and only its seller's programs read it: get a copy without.")
        if part not in archive.names:
            raise archive.damaged(f"its reading order names {part[:80]}, which is missing")
        text, _ = html_text(archive.read(part), f"{part[:80]} in {name}")
        parsed = blocks_of(text, f"{part[:80]} in {name}", page)
        page, marks = parsed.page, marks + parsed.marks
        if parsed.blocks:
            read += 1
            sections += [read] * len(parsed.blocks)
            blocks += parsed.blocks
    if not marks:
        blocks = [Block(b.text, section, b.level) for b, section in zip(blocks, sections, strict=True)]
    return assemble(
        name, blocks, title=title, format="epub", pages=max((b.page for b in blocks), default=1),
        unit="page" if marks else "section",
    )  # fmt: skip


def _reading_order(archive: Archive) -> tuple[str, list[str], str]:
    """Name of the package file, the links of its spine, and the title."""
    container = archive.xml("META-INF/container.xml")
    root = container.find(f".//{CONTAINER}rootfile")
    if root is None:
        raise archive.damaged("its container names no package file")
    package_name = archive.resolve("", root.get("full-path", ""))
    package = archive.xml(package_name)
    items = {item.get("id"): item for item in package.iter(f"{OPF}item")}
    links = []
    for reference in package.iter(f"{OPF}itemref"):
        item = items.get(reference.get("idref"))
        if item is None:
            raise archive.damaged("its reading order names what its list of files lacks")
        if "html" in item.get("media-type", "html") and "nav" not in item.get("properties", "").split():
            links.append(item.get("href", ""))
    if not links:
        raise archive.damaged("its reading order is empty")
    return package_name, links, package.findtext(f".//{DC}title") or ""


def _locked(archive: Archive) -> set[str]:
    """Files that are encrypted; fonts may be in books that are otherwise open."""
    if "META-INF/encryption.xml" not in archive.names:
        return set()
    references = archive.xml("META-INF/encryption.xml").iter(f"{ENC}CipherReference")
    return {archive.resolve("", reference.get("URI", "")) for reference in references}
