"""Safe reading of what DOCX and EPUB are made of: a ZIP archive of XML files, from anybody.

Nothing is unpacked to the disk, so a path with `../` leads nowhere; what is read is limited in bytes whatever the
archive says about itself; XML with entity declarations (the billion laughs) or thousands of nested elements is refused.
"""

import io
import posixpath
import zipfile
import zlib
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree as ET
from xml.parsers import expat

from ..errors import UserError

ENTRIES = 50_000  # files in an archive
PART = 128 * 2**20  # bytes of one file in it, unpacked
TOTAL = 512 * 2**20  # bytes of all that is read, unpacked
DEPTH = 500  # XML elements inside one another

# What zipfile raises over bytes that anybody may have written: a bad list of files or checksum, a bad stream, a method
# of packing it has not (NotImplementedError), lengths and offsets that lead nowhere, names nested without end.
DAMAGED = (
    zipfile.BadZipFile, zlib.error, NotImplementedError, ValueError, OSError, EOFError, RecursionError,
)  # fmt: skip


class Archive:
    """A ZIP archive in memory; `what` names it in messages (`report.docx`)."""

    def __init__(self, data: bytes, what: str) -> None:
        self.what = what
        self.left = TOTAL
        try:
            self.zip = zipfile.ZipFile(io.BytesIO(data))
            names = self.zip.namelist()
        except DAMAGED:
            raise self.damaged("its archive has no readable list of files") from None
        if len(names) > ENTRIES:
            raise UserError(f"{what} holds {len(names):,} files and at most {ENTRIES:,} are read: it is no document.")
        self.names = frozenset(names)

    def damaged(self, why: str) -> UserError:
        """The error that says so."""
        return UserError(f"{self.what} is damaged ({why}): get or save it anew.")

    def read(self, name: str) -> bytes:
        """The bytes of one file."""
        try:
            info = self.zip.getinfo(name)
            if info.flag_bits & 1:
                raise UserError(f"{self.what} is locked with a password: save a copy without one.")
            limit = min(PART, self.left)
            with self.zip.open(info) as file:
                data = file.read(limit + 1)
        except KeyError:
            raise self.damaged(f"it lacks {name[:80]}") from None
        except UserError:
            raise
        except DAMAGED:
            raise self.damaged(f"{name[:80]} cannot be unpacked") from None
        if len(data) > limit:
            raise UserError(
                f"{self.what} unpacks to more than {limit // 2**20} MB of text, which no document does (a ZIP bomb?):"
                " it is not read."
            )
        self.left -= len(data)
        return data

    def xml(self, name: str) -> ET.Element:
        """One file as XML."""
        return parse_xml(self.read(name), f"{name[:80]} in {self.what}")

    def resolve(self, base: str, link: str) -> str:
        """The name in the archive that a link in the file `base` means."""
        path = unquote(link.split("#")[0].split("?")[0])
        if path.startswith("/"):
            return path.lstrip("/")
        return posixpath.normpath(posixpath.join(posixpath.dirname(base), path))


def parse_xml(data: bytes, what: str) -> ET.Element:
    """Parse XML; names are ElementTree's `{namespace}tag`. Raises UserError for what is not well formed, declares
    entities, or nests too deep."""
    builder = ET.TreeBuilder()
    parser = expat.ParserCreate(namespace_separator="}")
    depth = 0

    def full(name: str) -> str:
        return "{" + name if "}" in name else name

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > DEPTH:
            raise UserError(f"{what} nests more than {DEPTH} elements inside one another: it is no document.")
        builder.start(full(name), {full(key): value for key, value in attributes.items()})

    def end(name: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(full(name))

    def entity(*_: Any) -> None:
        raise UserError(f"{what} declares entities of its own, which documents do not do and attacks do: not read.")

    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = builder.data
    parser.EntityDeclHandler = entity
    try:
        parser.Parse(data, True)
        return builder.close()
    except (expat.ExpatError, LookupError, ValueError, AssertionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{what} is damaged (its XML is not well formed): get or save it anew.") from None
