"""Documents that were read stay on disk (inference/store.py), so that a new server does not read them again.

What `longverse read` kept is found in any case; what this server reads is kept where it was started with --keep.
"""

import logging
from dataclasses import dataclass

from ..inference.engine import Engine, Session, common_prefix
from ..inference.store import Store
from .sessions import WORTH
from .worker import Turn

log = logging.getLogger("longverse.server")


@dataclass(frozen=True)
class Keeping:
    """How documents are kept. `keep`: also write what is read here."""

    engine: Engine
    store: Store
    keep: bool = False
    attention: str = "exact"
    cache: str = "full"

    def bring(self, session: Session, turn: Turn, beginning: list[int]) -> Session:
        """The session itself where it holds the document already, else one from the disk, which then takes its place.
        Called with the baton held; others compute while files are looked through."""
        held = common_prefix(session.tokens, beginning)
        if len(beginning) - held <= WORTH:
            return session
        with turn.aside():
            found = self.store.find(
                self.engine, beginning, session.planned_tokens, cache=self.cache, attention=self.attention
            )
            self._tell()
        if found is None or common_prefix(found.tokens, beginning) <= held:
            return session
        turn.replace(found)
        return found

    def read(self, session: Session, turn: Turn, beginning: list[int], name: str) -> Session:
        """A session that holds the document, all of it but where it was cancelled. It is on disk then if `keep`."""
        session = self.bring(session, turn, beginning)
        if len(beginning) - common_prefix(session.tokens, beginning) <= WORTH or not self.keep:
            session.boundary = len(beginning)
            session.read(beginning, on_progress=turn.progress, cancelled=turn.cancelled)
            return session
        kept = self.store.read(
            self.engine, beginning, session.planned_tokens, name=name, cache=self.cache, attention=self.attention,
            must_keep=False, on_progress=turn.progress, cancelled=turn.cancelled,
        )  # fmt: skip
        self._tell()
        turn.replace(kept)
        return kept

    def _tell(self) -> None:
        for note in self.store.notes:
            log.warning("%s", note)
        self.store.notes.clear()
