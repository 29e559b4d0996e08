"""Word files (.docx, Office Open XML, ISO 29500): body text with headings, items, tables and notes.

Pages are where Word last broke them (it stores the marks when it saves), or where breaks were set by hand in files that
other programs wrote. Tracked deletions, field codes, headers and footers are left out. Not done: text in pictures,
charts, comments, and the old .doc format.
"""

import re
from collections.abc import Iterator
from xml.etree.ElementTree import Element

from .archives import Archive
from .document import Block, Document, assemble

W = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
# The same elements in files that follow the strict variant of the standard.
STRICT = "{http://purl.oclc.org/ooxml/wordprocessingml/main}"
MC = "{http://schemas.openxmlformats.org/markup-compatibility/2006}"
MATH = "{http://schemas.openxmlformats.org/officeDocument/2006/math}"
_RELATION = "officeDocument/relationships/officeDocument", "relationships/officeDocument"
_SKIPPED = frozenset(
    (f"{W}del", f"{W}moveFrom", f"{W}instrText", f"{W}delText", f"{MC}Fallback", f"{W}rPr", f"{W}pPr", f"{W}sectPr")
)


def docx_document(data: bytes, name: str) -> Document:
    """The document of a .docx file. Raises UserError for a damaged, locked or hostile one."""
    archive = Archive(data, name)
    main = _main_part(archive)
    body = _Body(archive, main)
    blocks = list(body.blocks())
    return assemble(
        name, blocks, title=_title(archive), format="docx", pages=body.page, unit="page" if body.page > 1 else ""
    )


def _main_part(archive: Archive) -> str:
    if "_rels/.rels" in archive.names:
        for relation in archive.xml("_rels/.rels"):
            if relation.get("Type", "").endswith(_RELATION):
                return archive.resolve("", relation.get("Target", ""))
    return "word/document.xml"


def _title(archive: Archive) -> str:
    if "docProps/core.xml" not in archive.names:
        return ""
    return archive.xml("docProps/core.xml").findtext("{http://purl.org/dc/elements/1.1/}title") or ""


class _Body:
    def __init__(self, archive: Archive, main: str) -> None:
        folder = main.rsplit("/", 1)[0] + "/" if "/" in main else ""
        self.root = _transitional(archive.xml(main))
        self.levels = _heading_levels(archive, f"{folder}styles.xml")
        self.notes = {kind: _notes(archive, f"{folder}{kind}s.xml", kind) for kind in ("footnote", "endnote")}
        self.rendered = next(self.root.iter(f"{W}lastRenderedPageBreak"), None) is not None
        self.page = 1
        self.page_has_text = False
        self.text: list[str] = []
        self.begun = False  # the open paragraph shows something
        self.begun_on = 1
        self.called: list[str] = []  # the texts of notes that the open paragraph calls

    def blocks(self) -> Iterator[Block]:
        body = self.root.find(f"{W}body")
        if body is not None:
            yield from self._children(body)

    def _children(self, parent: Element) -> Iterator[Block]:
        for child in parent:
            if child.tag == f"{W}p":
                yield from self._paragraph(child)
            elif child.tag == f"{W}tbl":
                yield from self._table(child)
            elif child.tag in (f"{W}sdt", f"{W}sdtContent", f"{W}ins", f"{W}moveTo", f"{W}customXml", f"{W}smartTag"):
                yield from self._children(child)
            elif child.tag == f"{MC}AlternateContent":
                for choice in child.findall(f"{MC}Choice")[:1]:
                    yield from self._children(choice)

    def _paragraph(self, element: Element) -> Iterator[Block]:
        properties = element.find(f"{W}pPr")
        level, item, before = self._properties(properties)
        if before and not self.rendered and self.page_has_text:
            self._turn()
        self.text, self.begun, self.begun_on = [], False, self.page
        self._runs(element)
        text = "".join(self.text)
        if text.strip():
            self.page_has_text = True
            yield Block("- " + text.strip() if item and not level else text, self.begun_on, level)
        for note in self.called:
            yield Block(note, self.page)
        self.called = []
        section = properties.find(f"{W}sectPr") if properties is not None else None
        if section is not None and not self.rendered:
            kind = section.find(f"{W}type")
            if kind is None or _value(kind) not in ("continuous", "nextColumn"):
                self._turn()

    def _turn(self) -> None:
        self.page += 1
        self.page_has_text = False

    def _properties(self, properties: Element | None) -> tuple[int, bool, bool]:
        """Heading level, whether it is an item of a list, and whether it begins a page."""
        if properties is None:
            return self.levels.get("", 0), False, False
        style = properties.find(f"{W}pStyle")
        level = self.levels.get(_value(style) if style is not None else "", 0)
        outline = properties.find(f"{W}outlineLvl")
        if outline is not None:
            level = _outline(outline)
        before = properties.find(f"{W}pageBreakBefore")
        begins = before is not None and _value(before) not in ("0", "false", "off")
        return level, properties.find(f"{W}numPr") is not None, begins

    def _runs(self, element: Element) -> None:
        """The text of an element into `self.text`, turning pages on the way."""
        for child in element:
            tag = child.tag
            if tag in _SKIPPED:
                continue
            if tag in (f"{W}t", f"{MATH}t"):
                self._add(child.text or "")
            elif tag in (f"{W}tab", f"{W}ptab"):
                self.text.append(" ")
            elif tag == f"{W}noBreakHyphen":
                self._add("-")
            elif tag == f"{W}lastRenderedPageBreak":
                self._turn()
            elif tag in (f"{W}br", f"{W}cr"):
                kind = child.get(f"{W}type")
                if kind == "page" and not self.rendered:
                    self._turn()
                self.text.append("\n")
            elif tag in (f"{W}footnoteReference", f"{W}endnoteReference"):
                kind = tag.removeprefix(W).removesuffix("Reference")
                if note := self.notes[kind].get(child.get(f"{W}id", "")):
                    self.called.append(note)
            elif tag == f"{MC}AlternateContent":
                for choice in child.findall(f"{MC}Choice")[:1]:
                    self._runs(choice)
            elif tag == f"{W}p":  # a text box inside a paragraph
                self.text.append("\n")
                self._runs(child)
                self.text.append("\n")
            else:
                self._runs(child)

    def _add(self, text: str) -> None:
        if not self.begun and text.strip():
            self.begun, self.begun_on = True, self.page
        self.text.append(text)

    def _table(self, table: Element) -> Iterator[Block]:
        for row in _through(table, f"{W}tr"):
            cells, page = [], 0
            for cell in _through(row, f"{W}tc"):
                parts = []
                for block in self._children(cell):
                    page = page or block.page
                    parts.append(" ".join(block.text.split()))
                cells.append(" ".join(parts))
            if any(cells):
                yield Block(" | ".join(cells), page or self.page)


def _through(parent: Element, tag: str) -> Iterator[Element]:
    """Children with a tag, also inside content controls and tracked insertions."""
    for child in parent:
        if child.tag == tag:
            yield child
        elif child.tag in (f"{W}sdt", f"{W}sdtContent", f"{W}ins", f"{W}customXml"):
            yield from _through(child, tag)


def _heading_levels(archive: Archive, part: str) -> dict[str, int]:
    """Level by style id; "" is the default style. A style inherits the level of what it is based on."""
    if part not in archive.names:
        return {}
    own: dict[str, int] = {}
    based: dict[str, str] = {}
    default = ""
    for style in _transitional(archive.xml(part)).findall(f"{W}style"):
        identity = style.get(f"{W}styleId", "")
        name = style.find(f"{W}name")
        named = re.fullmatch(r"heading ([1-9])", (_value(name) if name is not None else "").lower())
        outline = style.find(f"{W}pPr/{W}outlineLvl")
        if outline is not None and _outline(outline):
            own[identity] = _outline(outline)
        elif named:
            own[identity] = int(named[1])
        elif name is not None and _value(name).lower() == "title":
            own[identity] = 1
        parent = style.find(f"{W}basedOn")
        if parent is not None:
            based[identity] = _value(parent)
        if style.get(f"{W}default") in ("1", "true") and style.get(f"{W}type") == "paragraph":
            default = identity
    levels = {}
    for identity in {*own, *based}:
        at, steps = identity, 0
        while at not in own and at in based and steps < 20:
            at, steps = based[at], steps + 1
        if at in own:
            levels[identity] = own[at]
    if default in levels:
        levels[""] = levels[default]
    return levels


def _notes(archive: Archive, part: str, kind: str) -> dict[str, str]:
    """The texts of foot- or endnotes by id; the separators among them have a type."""
    if part not in archive.names:
        return {}
    found = {}
    for note in _transitional(archive.xml(part)).findall(f"{W}{kind}"):
        if note.get(f"{W}type") in (None, "normal"):
            text = "".join(run.text or "" for run in note.iter(f"{W}t"))
            if text.strip():
                found[note.get(f"{W}id", "")] = f"[{text.strip()}]"
    return found


def _value(element: Element) -> str:
    return element.get(f"{W}val", "")


def _outline(element: Element) -> int:
    """Heading level of an outline level: 0 to 8 are headings, 9 is body text."""
    value = _value(element)
    return int(value) + 1 if value.isdigit() and int(value) < 9 else 0


def _transitional(root: Element) -> Element:
    """The strict variant under the names of the common one."""
    if root.tag.startswith(STRICT):
        for element in root.iter():
            element.tag = element.tag.replace(STRICT, W)
            for key in [key for key in element.attrib if key.startswith(STRICT)]:
                element.attrib[key.replace(STRICT, W)] = element.attrib.pop(key)
    return root
