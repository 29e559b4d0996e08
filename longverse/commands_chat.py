"""`longverse chat`: a conversation in the terminal.

Nothing is dropped in silence: a turn that does not fit is refused with its numbers, and the conversation stays.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from . import commands_ask, commands_cite, console
from .commands_ask import read_documents
from .commands_open import PAST_THE_WINDOW, Opened, cache_needs, choose_attention, choose_cache, open_kept
from .documents.reader import Document
from .errors import UserError, expand

if TYPE_CHECKING:
    from .documents.ask import Prompts
    from .documents.citations import Cited
    from .documents.words import Index
    from .inference.engine import Cancelled, Engine, Session
    from .inference.sampling import Sampling

HELP = """/read FILE   put a document, or a folder of them, before your next message
/cite        show where the last answer stands in the documents; /cite off and /cite on: whether all answers are checked
/tool TEXT   send TEXT as the result of a tool call, where the model's format knows them
/system TEXT begin anew with these instructions
/save FILE   write the conversation as Markdown
/stats       figures of the last answer, and how full the window is
/reset       begin anew
/quit        leave (also Ctrl-D, or Ctrl-C twice)
A line that ends with \\ goes on in the next; a block between lines of \"\"\" is one message.
Ctrl-C stops an answer."""
STEP = 4096  # tokens: a session is planned for a multiple of it, so that it seldom has to be planned anew


def turns(messages: Sequence[dict[str, str]]) -> int:
    """How many messages are the user's."""
    return sum(message["role"] == "user" for message in messages)


@dataclass(frozen=True)
class Last:
    """The last answer: its question, its tokens, what was given out, and where that stands if it was looked for."""

    prompts: Prompts
    tokens: list[int]
    text: str
    cited: Cited | None


class Chat:
    """One conversation. `messages` are what the model sees; a document stands in the message it was read for.

    Documents that it begins with stand as `ask` puts them: what `longverse read` kept of them is found, and with `keep`
    their reading is kept.
    """

    def __init__(
        self, engine: Engine, sampling: Sampling, *, system: str | None = None, attention: str = "auto",
        keep: bool = False, quiet: bool = False,
    ) -> None:  # fmt: skip
        self.engine, self.sampling, self.system, self.quiet = engine, sampling, system, quiet
        self.attention, self.keep = attention, keep
        self.interactive = sys.stdin.isatty()
        self.session: Session | None = None
        self.messages: list[dict[str, str]] = []
        self.waiting: list[Document] = []  # they go with the next message
        self.read: list[Document] = []  # they stand in the conversation, in this order
        self.index: Index | None = None  # the words of `read`
        self.begun: Prompts | None = None  # the first question, where documents stand before it
        self.citing = True
        self.last: Last | None = None
        self.saved: set[Path] = set()  # files that hold this conversation, so that /save may write them again
        self.reset()

    def reset(self) -> None:
        """Forget the turns, the documents and where they were saved."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self.waiting, self.read, self.index, self.begun, self.last = [], [], None, None, None
        self.saved = set()
        self.session = None  # another conversation may want another attention and room

    # ---- the loop ---------------------------------------------------------------------------------------

    def run(self, documents: Sequence[Document] = ()) -> None:
        """Read turns until the end of input, /quit, or Ctrl-C twice at an empty prompt (KeyboardInterrupt).

        On a terminal a UserError is shown and the conversation goes on; a pipe cannot see it, and its next turns may
        build on what failed, so there it ends the chat.
        """
        if documents:
            self.attach(list(documents))
        if self.interactive:
            name = self.engine.name
            self.say(f"{name} reads {self.engine.window:,} tokens. /help lists the commands, /quit leaves.")
        with self.history():
            pressed = False
            while True:
                try:
                    turn = self.turn()
                except EOFError:
                    break
                except KeyboardInterrupt:
                    if pressed or not self.interactive:
                        raise
                    pressed = True
                    console.note("")
                    self.say("Ctrl-C once more leaves.")
                    continue
                except UserError as error:
                    self.refuse(error)
                    continue
                pressed = False
                if not turn.strip():
                    continue
                try:
                    if turn.startswith("/") and "\n" not in turn:
                        if not self.command(turn.strip()):
                            break
                    else:
                        self.answer(turn)
                except UserError as error:
                    self.refuse(error)
                except KeyboardInterrupt:  # the second one during an answer
                    console.note("")
                    self.say("Stopped.")
        if self.interactive:
            console.note("")

    def refuse(self, error: UserError) -> None:
        if not self.interactive:
            raise error
        console.error(str(error))

    def turn(self) -> str:
        """One message from the input; raises EOFError at its end. What the end leaves unfinished is a message too."""
        line = self.line("> ")
        lines: list[str] = []
        try:
            if line.strip() == '"""':
                while (line := self.line(". ")).strip() != '"""':
                    lines.append(line)
                return "\n".join(lines)
            while line.endswith("\\"):
                lines.append(line[:-1])
                line = self.line(". ")
            return "\n".join([*lines, line])
        except EOFError:
            if not lines:
                raise
            return "\n".join(lines)

    def line(self, prompt: str) -> str:
        try:
            line = input(prompt) + "\n" if self.interactive else sys.stdin.readline()
        except UnicodeDecodeError as error:
            wrong = error.object[error.start]
            raise UserError(
                f"Your input is not valid {error.encoding.upper()} (byte {wrong:#04x}): give it as UTF-8."
            ) from None
        if not line:
            raise EOFError
        return line.rstrip("\r\n")

    @contextlib.contextmanager
    def history(self):  # type: ignore[no-untyped-def]
        """Earlier input at the arrow keys, kept beside the converted models."""
        try:
            import readline
        except ImportError:  # no such library on this system: the prompt works without
            yield
            return
        if not self.interactive:
            yield
            return
        from .models.checkpoint import cache_folder

        file = cache_folder() / "chat_history"
        with contextlib.suppress(OSError):
            readline.read_history_file(file)
        readline.set_history_length(1000)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                file.parent.mkdir(parents=True, exist_ok=True)
                readline.write_history_file(file)

    # ---- commands ---------------------------------------------------------------------------------------

    def command(self, line: str) -> bool:
        """Do a /command; False means leave."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name in ("/quit", "/exit", "/q"):
            return False
        if name in ("/read", "/save") and not rest:
            raise UserError(f"{name} needs the name of a file: {name} FILE.")
        if name in ("/tool", "/system") and not rest:
            raise UserError(f"{name} needs a text: {name} TEXT.")
        if name == "/help":
            self.say(HELP)
        elif name == "/read":
            self.attach(read_documents([rest], quiet=self.quiet))
        elif name == "/cite":
            self.cite(rest)
        elif name == "/tool":
            self.tool(rest)
        elif name == "/system":
            self.system = rest
            self.reset()
            self.say("A new conversation, with these instructions.")
        elif name == "/save":
            self.save(expand(rest))
        elif name == "/stats":
            self.stats()
        elif name == "/reset":
            self.reset()
            self.say("A new conversation.")
        else:
            raise UserError(f"There is no command {name}: /help lists them.")
        return True

    def attach(self, documents: list[Document]) -> None:
        """Keep documents for the next message; refused when they cannot fit with an answer."""
        waiting = [*self.waiting, *documents]
        what = documents[0].name if len(documents) == 1 else f"{len(documents)} documents"
        self.fitting(self.with_documents("", waiting), what)
        self.waiting = waiting
        for document in documents:
            pages = f", {document.pages:,} {document.unit}s" if document.unit and document.pages > 1 else ""
            self.say(f"{document.name}: {document.words:,} words{pages}.")
            for remark in document.notes:
                self.say(remark)
        self.say("It goes with your next message." if len(waiting) == 1 else "They go with your next message.")

    def tool(self, text: str) -> None:
        """Answer the result of a tool call."""
        if self.engine.chat.kind == "plain":
            raise UserError(
                f"{self.engine.name} has no chat format, so it knows no tool results: send it as a message."
            )
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise UserError("A tool's result follows an answer of the model: ask something first.")
        self.send([*self.messages, {"role": "exec", "content": text}], text, [])

    def cite(self, what: str) -> None:
        """Show the passages that the last answer rests on; with on or off, say whether all are to be checked."""
        if what in ("on", "off"):
            self.citing = what == "on"
            self.say("Answers from documents are checked and cited." if self.citing else "Answers are not checked.")
            return
        if what:
            raise UserError(f"/cite takes on, off or nothing, not {what}.")
        if self.last is None or self.session is None:
            raise UserError("There is no answer to cite yet: ask something first.")
        if not self.read:
            raise UserError("No document stands in this conversation: /read FILE puts one there.")
        from .documents.ask import cited, not_found

        last = self.last
        found = last.cited or cited(self.session, last.prompts, 0, last.text, last.tokens)
        if not found.found:
            self.say(not_found(last.prompts, 0))
        commands_cite.show(found, several=len(self.read) > 1)

    def save(self, target: Path) -> None:
        """Write the conversation as Markdown; only a file that holds an earlier state of it is written over."""
        if not target.name or os.path.isdir(target):
            raise UserError(f"{target} is a folder: add the name of a file, as in /save {target / 'chat.md'}.")
        if os.path.lexists(target) and target.resolve() not in self.saved:
            raise UserError(f"{target} exists and is no save of this conversation: choose another name.")
        parts = [f"**{message['role']}**\n\n{message['content']}\n" for message in self.messages]
        beside = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            try:
                beside.write_text("\n".join(parts), encoding="utf-8")
                os.replace(beside, target)
            finally:
                beside.unlink(missing_ok=True)
        except (OSError, ValueError) as error:  # ValueError: a name with a zero byte or half a character
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"{target} cannot be written ({reason}): choose another place.") from None
        self.saved.add(target.resolve())
        turns = sum(message["role"] == "assistant" for message in self.messages)
        self.say(f"{turns} answers saved to {target}.")

    def stats(self) -> None:
        if self.session is None:
            self.say("There is no answer yet.")
            return
        held = len(self.session.tokens)
        self.say(console.figures(self.session.stats))
        if self.session.attention == "pages":
            self.say(f"{held:,} tokens are read, by pages.")
            return
        self.say(f"{held:,} of {self.engine.window:,} tokens of the window in use ({held / self.engine.window:.0%})")

    # ---- answers ----------------------------------------------------------------------------------------

    @property
    def way(self) -> str:
        """How this model cites: by attention, or by the numbers of paragraphs that it is shown."""
        from .documents.ask import way_for

        return way_for(self.engine, "auto")

    def with_documents(self, question: str, documents: Sequence[Document]) -> list[dict[str, str]]:
        """The conversation with a question about documents that it had not: below the instructions of `longverse ask`
        where it begins with them."""
        from .documents.ask import text_of
        from .wording import messages

        earlier, numbered = sum(len(document.paragraphs) for document in self.read), self.way == "numbers"
        text = text_of(documents, numbered=numbered, after=earlier)
        if turns(self.messages) and len(documents) == 1:  # others may stand above
            text = f"{documents[0].name}:\n\n{text}"
        asking = messages(text, question, system=self.system, numbered=numbered)
        return [*self.messages, asking[-1]] if turns(self.messages) else asking

    def prompts(self, question: str, ids: list[int], documents: Sequence[Document]) -> Prompts:
        """A question of this conversation, whose ids are the whole of it, as the check of an answer takes it."""
        from .documents.ask import Prompts
        from .documents.words import Index

        if self.citing and documents and (self.index is None or self.index.documents != tuple(documents)):
            self.index = Index(documents)
        return Prompts(
            (question,), (ids,), len(ids) + self.sampling.max_new_tokens, tuple(documents),
            numbered=self.way == "numbers", places=(None,), made_index=self.index if self.citing else None,
            follows=bool(turns(self.messages)),
        )  # fmt: skip

    def fitting(self, messages: list[dict[str, str]], what: str) -> list[int]:
        """The prompt's ids. Raises UserError with the numbers when prompt and answer exceed the window and no attention
        was allowed that reads past it."""
        ids = self.engine.chat.encode(messages)
        room = self.sampling.max_new_tokens
        if self.attention not in PAST_THE_WINDOW and len(ids) + room > self.engine.window:
            raise UserError(
                f"With {what} the conversation has {len(ids):,} tokens and the answer may take {room:,}, which is more"
                f" than the {self.engine.window:,} that {self.engine.name} reads: /reset begins anew, or shorten it."
            )
        return ids

    def answer(self, text: str) -> None:
        """Send a message and stream the answer; a message that does not fit changes nothing."""
        messages = [*self.messages, {"role": "user", "content": text}]
        self.send(self.with_documents(text, self.waiting) if self.waiting else messages, text, self.waiting)

    def send(self, messages: list[dict[str, str]], text: str, documents: list[Document]) -> None:
        """Stream the answer to `messages`, which become the conversation once there is one. `text` is what was asked
        and `documents` are those that come with it."""
        ids = self.fitting(messages, "this message")
        read = [*self.read, *documents]
        prompts = self.prompts(text, ids, read)
        self.begin(prompts, documents)
        try:
            opened = self.session_for(prompts.planned_tokens)
        except KeyboardInterrupt:  # while documents were read onto the disk
            if not self.interactive:
                raise
            self.say("The message was taken back.")
            return
        session = opened.session
        # The same seed for every turn would draw the same words again for the same question.
        seed = self.sampling.seed
        sampling = self.sampling if seed is None else replace(self.sampling, seed=(seed + len(messages)) % 2**63)
        cited, written = None, []  # type: ignore[var-annotated]
        with console.interruptible() as stopped:
            if read and self.citing and messages[-1]["role"] == "user":
                from .documents.ask import with_stop

                reply, cited = commands_ask.answer(
                    session, prompts, 0, with_stop(sampling, self.way, "auto"), way=self.way, shown=True,
                    quiet=self.quiet, cancelled=stopped, ids=written,
                )  # fmt: skip
                if cited is not None:
                    commands_cite.show(cited, several=len(read) > 1)
            else:
                reply = self.plain(session, ids, sampling, stopped, written)
        opened.correct(session.stats)
        finish = session.stats.finish_reason
        if finish == "length":
            self.say(f"The answer was cut after {self.sampling.max_new_tokens:,} tokens; --max-new-tokens allows more.")
        if finish == "cancelled":
            self.say("Stopped." if reply else "Stopped before the answer began; the message was taken back.")
        if not reply and finish != "cancelled":
            console.note("The model answered nothing; the message was taken back.")
        if reply:
            self.messages = [*messages, {"role": "assistant", "content": reply.rstrip()}]
            self.read = read
            self.waiting = []
            self.last = Last(prompts, written, reply.strip(), cited)

    def begin(self, prompts: Prompts, documents: list[Document]) -> None:
        """Remember the question that a conversation about documents begins with."""
        if not prompts.follows:
            if (self.begun.documents if self.begun is not None else ()) != prompts.documents:
                self.session = None  # of a first message that was taken back
            self.begun = prompts if prompts.documents else None
        elif documents and self.keep:
            self.say("What is read in mid-conversation is not kept on disk: begin with it, or `longverse read` it.")

    def plain(
        self, session: Session, ids: list[int], sampling: Sampling, stopped: Cancelled, written: list[int]
    ) -> str:
        """An answer that rests on no document, as the model writes it; its tokens are added to `written`."""
        reply = ""
        with console.Task("Reading", quiet=self.quiet) as task:
            for piece in session.stream(ids, sampling, on_progress=task, cancelled=stopped, ids=written):
                task.close()
                piece = piece if reply else piece.lstrip()
                reply += piece
                console.write(piece)
        console.write("" if reply.endswith("\n") else "\n")
        return reply

    def session_for(self, tokens: int) -> Opened:
        """The running session while `tokens` fit its plan, else a roomier one, in which the conversation is read anew
        but for what is kept on disk of the documents that it begins with."""
        if self.session is not None and self.session.planned_tokens >= tokens:
            return Opened(self.session)
        again = self.session is not None
        attention = choose_attention(self.engine, tokens, self.attention, quiet=self.quiet)
        planned = -(-2 * tokens // STEP) * STEP
        if attention != "pages":
            planned = min(self.engine.window, planned)
        self.session = None  # its cache goes before the next one comes
        if self.begun is not None:
            keep = self.keep and not turns(self.messages)  # under dynamic NTK a later reading would be another
            begun = replace(self.begun, planned_tokens=tokens)
            opened = open_kept(self.engine, begun, attention=attention, keep=keep, room=planned, quiet=self.quiet)
        else:
            need, free = list(cache_needs(self.engine, planned, attention).values())[-1]  # of the smallest format
            planned = tokens if need > free else planned  # no room to grow, then
            form = choose_cache(self.engine, planned, "auto", attention, quiet=self.quiet)
            opened = Opened(self.engine.session(planned, attention=attention, cache=form))
        self.session = opened.session
        if again:
            anew = "" if self.session.tokens else " it is read anew,"
            room = self.session.planned_tokens
            self.say(f"The conversation outgrew its plan;{anew} with room for {room:,} tokens now.")
        return opened

    def say(self, text: str) -> None:
        console.note(text, quiet=self.quiet and text is not HELP)
