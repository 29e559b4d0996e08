"""Pages: documents longer than the trained window, read in linear time and asked about in a window's worth of them.

    session = engine.session(planned_tokens=262_144, attention="pages")
    for piece in session.stream(prompt_ids): ...

Reading. Each chunk sees the first tokens and a local window (PageCache), so its cost does not grow with its place.

Asking. The end of the prompt, from the last blank line on, is the question. Its queries weigh the pages of the far past
(pages_choice); the heaviest are read once more, one after another, between the first tokens and the newest ones, at
positions 0, 1, 2 ... : a working set shorter than the trained window, in which the question is read and the answer
written with exact attention. What was read plainly stays; the question and its answer are no part of it, so the next
question finds the document as a first one would, and an answer never depends on what was asked before.

Sources: first tokens that must be seen, Xiao et al. 2023 (arXiv 2309.17453); pages by their queries' mass, in the line
of InfLLM (arXiv 2402.04617) and Quest (arXiv 2406.10774). Constants and variants were chosen by benchmarks/pages.py.
Not done: choosing pages while reading; what takes two far places to be understood is left to the question.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import UserError
from ..models import kernels
from ..models.cache import KVCache
from .engine import CHUNK, Session, Stats, common_prefix
from .pages_cache import Angles, PageCache
from .pages_choice import SCORES, Score, best_pages, page_mass, scaled_rows

Scope = Literal["all", "layer", "head"]
Vote = Literal["best", "sum"]
Positions = Literal["renumbered", "clamped"]
SCOPES, VOTES, POSITIONS = get_args(Scope), get_args(Vote), get_args(Positions)
HALVED = ("window", "chunk", "budget", "newest", "reserve")  # for a shorter trained window
LEAST, MOST = 12, 256  # tokens of a question that was not named
# choose(layer, q [1, H, T, D] unrotated, T tokens of the question) -> pages [G, count]
Choose = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class PagesSettings:
    """How a document is read and how pages are chosen. Lengths in tokens.

    first      tokens at the beginning that everything sees
    window     local window of a chunk
    chunk      tokens read at once
    page       a page; a multiple of block
    block      keys of a summary
    budget     tokens of chosen pages; with `anew`, of those the question is read over while it chooses
    newest     tokens before the question that it always sees
    reserve    positions kept for a question and its answer; longer ones leave room for fewer pages
    scope      who chooses: "all" layers by one vote, every "layer", or every key/value "head" of every layer
    vote       of "all": a page weighs what the "best" key/value head of any layer gives it (its query heads and the
               question's tokens added up), or the "sum" over all of them
    score      how a page is weighed (pages_choice.page_mass)
    shortlist  pages that "two-step" weighs exactly
    distance   how far before the question every far key is taken to be when it is weighed
    positions  "renumbered": chosen pages one after another; "clamped": all at one place before the newest tokens
    anew       for scope "all", where not all pages fit: so many tokens, the heaviest pages with `margin` tokens more
               before and after each, are read anew for every question, one after another, and no other page is laid
               out. 0: all chosen pages are laid out as they were read
    least      a page that weighs less than this share of the heaviest is not read anew: there are many such, and what
               stands in them is mistaken for the answer
    """

    first: int = 64
    window: int = 3072
    chunk: int = 1024
    page: int = 64
    block: int = 16
    budget: int = 2048
    newest: int = 1024
    reserve: int = 1024
    scope: Scope = "all"
    vote: Vote = "best"
    score: Score = "mass"
    shortlist: int = 256
    distance: int = 1536
    positions: Positions = "renumbered"
    anew: int = 1024
    margin: int = 32
    least: float = 0.3

    def __post_init__(self) -> None:
        for name in ("first", "page", "block", "shortlist", "anew", "margin", *HALVED):
            least = 0 if name in ("anew", "margin") else 1
            if getattr(self, name) < least:
                raise UserError(f"The setting {name} of pages is {getattr(self, name)} and must be at least {least}.")
        if not 0 <= self.least <= 1:
            raise UserError(f"The setting least of pages is {self.least} and must be a share from 0 to 1.")
        if self.page % self.block:
            raise UserError(f"A page of {self.page} tokens must be a multiple of its blocks of {self.block}.")
        if self.budget < self.page:
            raise UserError(f"A budget of {self.budget} tokens holds no page of {self.page}: raise it.")
        known = {"scope": SCOPES, "vote": VOTES, "score": SCORES, "positions": POSITIONS}
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise UserError(f"The {name} of pages is {getattr(self, name)!r} and must be {' or '.join(choices)}.")
        if self.positions == "clamped" and self.anew:
            raise UserError("Pages that are read anew stand one after another: clamped positions need anew 0.")

    @property
    def reach(self) -> int:
        """Positions in use, by reading or by asking, whichever needs more."""
        asking = self.first + self.budget + self.newest + self.page + self.reserve
        return max(self.first + self.window + self.chunk, asking)

    def within(self, window: int) -> "PagesSettings":
        """These settings, or their halves, quarters ... until they reach no further than a trained window."""
        settings = self
        while settings.reach > window:
            half = {name: getattr(settings, name) // 2 for name in HALVED}
            if min(half.values()) < self.page:
                raise UserError(f"A window of {window} tokens is too short for pages: ask without them.")
            settings = replace(settings, **half)
        return settings


@dataclass
class PagesSession(Session):
    """Session's surface over a PageCache. `tokens` are those read plainly.

    settings         by default the tuned ones, made smaller where the model's window is short
    question_tokens  tokens at the end of the next prompts that are the question; None: from the last blank line on
    chosen           pages of the latest question: int64 [layers, G, count], counted from the end of the first tokens
    """

    settings: PagesSettings | None = None
    question_tokens: int | None = None
    chosen: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        network = self.engine.network
        shape = network.config
        self.pages = settings = self.settings or PagesSettings().within(self.engine.window)
        self.reach, self.attention = settings.reach, "pages"
        self.rope_length = min(self.planned_tokens, self.reach)
        self.angles = Angles(shape.rope, self.reach, self.rope_length, network.dtype, network.device)
        self.cache = PageCache(  # type: ignore[assignment]
            *(shape.num_layers, shape.num_kv_heads, shape.head_dim, self.planned_tokens, self.engine.kept),
            network.device,
            angles=self.angles,
            first=settings.first,
            window=settings.window,
            chunk=settings.chunk,
            block=settings.block,
            bounds=settings.score == "bounds",
            allocate=self.allocate,
        )
        self.working: WorkingSet | None = None

    # ---- what Session calls -----------------------------------------------------------------------------

    def _begin(self, prompt: list[int], stats: Stats, new_tokens: int) -> int:
        stats.attention, stats.cache = "pages", self.cache.format
        stats.rope_base = self.engine.network.config.rope.base(self.rope_length)
        # After a document whose end is known everything is the question, but for a long conversation's beginning.
        after = len(prompt) - self.boundary if 0 < self.boundary < len(prompt) else 0
        asked = self.question_tokens or min(after, MOST) or self._question(prompt)
        self.plain = len(prompt) - min(max(asked, 1), len(prompt))
        held = min(common_prefix(self.tokens, prompt), self.plain)
        self.cache.truncate(held)
        del self.tokens[held:]
        self.working, self.new_tokens = None, new_tokens
        self._count(len(prompt) - self.plain, new_tokens)  # refuses before any work
        return held

    def _read_pieces(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        self.working, self.plain = None, end
        return self._plain_pieces(begin)

    def _pieces(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        yield from self._plain_pieces(begin)
        yield max(begin, self.plain), end

    def _plain_pieces(self, begin: int) -> Iterator[tuple[int, int]]:
        while begin < self.plain:
            stop = min((begin // self.pages.chunk + 1) * self.pages.chunk, self.plain)
            yield begin, stop
            begin = stop

    @torch.inference_mode()
    def _forward(self, ids: list[int]) -> Tensor:
        if self.cache.length < self.plain:
            hidden = self._run_network(ids, self.cache.attend)
            self.cache.advance(len(ids))
            self.tokens.extend(ids)
        elif self.working is None:
            hidden = self._ask(ids)
        else:
            hidden = self._run_network(ids, self.working.attend)
            self.working.held.advance(len(ids))
        return hidden[:, -1]

    def _next(self, token: int) -> Tensor:
        # A working set is an ordinary cache, so what writes answers fast for others does so here.
        decoder = self.engine.decoder()
        assert self.working is not None
        logits = decoder.step(token, self.working.held) if decoder is not None else None
        if decoder is None or logits is None:
            reason = kernels.unavailable()
            self.stats.kernels = f"torch ({reason})" if reason else "torch"
            return self._logits(self._forward([token]))
        self.stats.kernels, self.stats.weights = "compiled", decoder.weights
        return logits

    def _run_network(self, ids: list[int], attend: Callable[[int, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Hidden states [1, T, C]. At position 0 a rotation does nothing: `attend` gets keys and queries unrotated."""
        network = self.engine.network
        input_ids = torch.tensor([ids], device=network.device)  # [1, T]
        return network.model(input_ids, torch.zeros_like(input_ids), self.rope_length, attend)

    # ---- asking -----------------------------------------------------------------------------------------

    def _question(self, prompt: list[int]) -> int:
        """Tokens after the last blank line that leaves at least LEAST of them; at most MOST."""
        tail = prompt[-MOST:]
        pieces = [self.engine.tokenizer.decode([token], skip_special=False) for token in tail]
        text = "".join(pieces[:-LEAST])
        end = text.rfind("\n\n")
        if end < 0:
            return min(len(prompt), MOST)
        size = 0
        for number, piece in enumerate(pieces):  # the first token that begins after the blank line
            if size >= end + 2:
                return len(tail) - number
            size += len(piece)
        return LEAST

    def _count(self, question: int, new_tokens: int) -> tuple[int, int]:
        """Pages of the far past, and how many of them a question may take."""
        settings = self.pages
        far = max(0, self.plain - settings.newest - settings.first) // settings.page
        near = self.plain - far * settings.page  # tokens seen besides pages
        count = min(settings.budget, self.reach - near - question - new_tokens) // settings.page
        if count < min(far, 1):
            raise UserError(
                f"A question of {question:,} tokens and {new_tokens:,} for the answer leave no room for pages in a"
                f" working set of {self.reach:,}: ask for a shorter answer."
            )
        return far, min(far, count)

    def _ask(self, ids: list[int]) -> Tensor:
        """Choose pages for the question `ids` and read it over them; hidden states [1, T, C]."""
        settings = self.pages
        far, count = self._count(len(ids), self.new_tokens)
        self.working = working = WorkingSet(self.cache, self.angles, settings, far, count, self.reach)  # type: ignore[arg-type]
        working.held.rope_length = self.rope_length
        every = torch.arange(far)[None].expand(self.cache.keys.shape[2], -1)
        if count == far:
            working.choose = lambda layer, q: every
            return self._read_question(ids)
        working.choose = self._by_layer
        hidden = self._read_question(ids)
        if settings.scope != "all":
            return hidden
        return self._read_anew(ids) if settings.anew else self._read_over(ids, self._vote())

    def _read_question(self, ids: list[int]) -> Tensor:
        assert self.working is not None
        self.working.held.truncate(self.working.begin)
        hidden = self._run_network(ids, self.working.attend)
        self.working.held.advance(len(ids))
        self.working.choose = None  # what follows attends what was chosen
        self.chosen = self.working.chosen
        return hidden

    def _read_over(self, ids: list[int], chosen: Tensor) -> Tensor:
        """Read the question over given pages [layers, G, count]."""
        assert self.working is not None
        self.working.choose = lambda layer, q: chosen[layer]
        return self._read_question(ids)

    def _read_anew(self, ids: list[int]) -> Tensor:
        """Read the document's text around the heaviest pages once more, and the question over it: [1, T, C].

        A page read in its own neighbourhood says less of itself to a later question than one read just before it."""
        assert self.working is not None
        working = self.working
        layers, groups, _ = working.mass.shape
        spans, pages = heaviest_spans(working.weights(), self.pages, working.count * self.pages.page)
        first = working.first
        text = [token for begin, end in spans for token in self.tokens[first + begin : first + end]]
        working.held.truncate(first)
        for begin in range(0, len(text), CHUNK):
            piece = text[begin : begin + CHUNK]
            self._run_network(piece, working.attend)
            working.held.advance(len(piece))
        working.lay_newest(working.held.length)
        working.chosen = pages.expand(layers, groups, -1)
        return self._read_question(ids)

    def _by_layer(self, layer: int, q: Tensor) -> Tensor:
        assert self.working is not None
        mass = self.working.weigh(layer, q)
        if self.pages.scope != "head":
            mass = mass.sum(0, keepdim=True).expand_as(mass)
        return best_pages(mass, self.working.count)

    def _vote(self) -> Tensor:
        """The heaviest pages by one vote of all layers and heads, for every layer: [layers, G, count]."""
        assert self.working is not None
        layers, groups, _ = self.working.mass.shape
        return best_pages(self.working.weights(), self.working.count).expand(layers, groups, -1)


class WorkingSet:
    """Per layer, what a question sees: first tokens, chosen pages, newest tokens, and then itself and its answer.

    held     an ordinary cache with all of them at the positions 0, 1, 2 ... in that order
    far      pages there are; count: pages it holds
    choose   called once a layer, by the first pass over the question; None: the pages stay
    mass     [layers, G, far], what `weigh` found; chosen: [layers, G, count]
    """

    def __init__(
        self, cache: PageCache, angles: Angles, settings: PagesSettings, far: int, count: int, reach: int
    ) -> None:
        self.cache, self.angles, self.settings, self.far, self.count = cache, angles, settings, far, count
        self.first = min(settings.first, cache.length)
        self.pages_end = self.first + count * settings.page
        self.newest = self.first + far * settings.page  # where the newest tokens begin in the document
        self.begin = self.pages_end + cache.length - self.newest  # position of the question's first token
        layers, _, groups, _, size = cache.keys.shape
        kept, device = cache.keys.dtype, cache.keys.device
        self.held = KVCache(layers, groups, size, reach, angles.cos.dtype, device, kept=kept)
        self.held.expect(reach)
        self.held.restore(self.begin)
        self.choose: Choose | None = None
        self.chosen = torch.zeros(layers, groups, count, dtype=torch.int64)
        self.mass = torch.zeros(layers, groups, far)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append unrotated k, v [1, G, T, D] and attend unrotated q [1, H, T, D] over all: [1, H, T, D]."""
        own, turned = self.angles.rotate(k, self.held.length), self.angles.rotate(q, self.held.length)
        if self.choose is not None:
            self._fill_seen_anyway(layer)
            self.own, self.turned = own, turned  # for weigh
            self.chosen[layer] = self.choose(layer, q)
            self._fill_pages(layer)
        return self.held.attend(layer, turned, own, v)

    def weigh(self, layer: int, q: Tensor) -> Tensor:
        """Mass [G, far] of every page, from the question's unrotated queries [1, H, T, D]; kept in `mass`."""
        settings = self.settings
        near = self._near(layer, scaled_rows(self.turned[0], self.chosen.shape[1]), q.shape[2])
        turned = self.angles.rotate_all_to(q, min(settings.distance, self.angles.reach - 1))[0]
        far = self.cache.far(layer, self.far, settings.page)
        self.mass[layer] = page_mass(turned, near, far, settings.score, settings.shortlist)
        return self.mass[layer]

    def weights(self) -> Tensor:
        """What every page weighs in the vote of all layers and heads: [far]."""
        return self.mass.amax((0, 1)) if self.settings.vote == "best" else self.mass.sum((0, 1))

    def lay_newest(self, begin: int) -> None:
        """Lay the newest tokens out from position `begin` on, as the last ones that are held."""
        self.pages_end, self.begin = begin, begin + self.cache.length - self.newest
        for layer in range(self.cache.keys.shape[0]):
            self._fill_seen_anyway(layer)
        self.held.restore(self.begin)

    def _near(self, layer: int, q: Tensor, tokens: int) -> Tensor:
        """Log-sum-exps [G, R] of rotated rows q [G, R, D] over the first and newest tokens and the question itself."""
        keys = self.held.keys[layer, 0]  # [G, reach, D]
        seen = torch.cat((keys[:, : self.first], keys[:, self.pages_end : self.begin]), dim=1)
        seen = torch.cat((seen.to(q.dtype), self.own[0]), dim=1)
        scores = (q @ seen.transpose(1, 2)).float()  # [G, R, first + newest + T]
        future = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1)
        own = scores[:, :, -tokens:].unflatten(1, (-1, tokens))  # [G, H / G, T, T]
        own.masked_fill_(future, float("-inf"))
        return scores.logsumexp(-1)

    def _fill_seen_anyway(self, layer: int) -> None:
        cache, angles = self.cache, self.angles
        for held, stored in ((self.held.keys, cache.keys), (self.held.values, cache.values)):
            first = stored[layer, :, :, : self.first]
            newest = stored[layer, :, :, self.newest : cache.length]
            if held is self.held.keys:
                first, newest = angles.rotate(first, 0), angles.rotate(newest, self.pages_end)
            held[layer, :, :, : self.first] = first
            held[layer, :, :, self.pages_end : self.begin] = newest

    def _fill_pages(self, layer: int) -> None:
        cache, page, span = self.cache, self.settings.page, slice(self.first, self.pages_end)
        for held, stored in ((self.held.keys, cache.keys), (self.held.values, cache.values)):
            pages = stored[layer, 0, :, self.first : self.newest].unflatten(1, (self.far, page))  # [G, far, page, D]
            taken = torch.stack([pages[group, which] for group, which in enumerate(self.chosen[layer])])
            taken = taken.flatten(1, 2)[None]  # [1, G, count * page, D]
            if held is self.held.keys and self.settings.positions == "renumbered":
                taken = self.angles.rotate(taken, self.first)
            elif held is self.held.keys:
                taken = self.angles.rotate_all_to(taken, max(self.first, self.pages_end - 1))
            held[layer, :, :, span] = taken


def heaviest_spans(weights: Tensor, settings: PagesSettings, room: int) -> tuple[list[tuple[int, int]], Tensor]:
    """The heaviest of the pages that weigh `weights` [far], each with its margins: none below the settings' `least`, at
    most `anew` tokens and never more than `room`, but one page at least. Returns (begin, end) of what is to be read, in
    the document's order, counted from the end of the first tokens; and the pages, int64 [n]."""
    page, margin, most = settings.page, settings.margin, min(settings.anew, room)
    order = weights.argsort(descending=True, stable=True).tolist()
    taken = torch.zeros(len(weights) * page, dtype=torch.bool)
    chosen: list[int] = []
    for number in order:
        if weights[number] < settings.least * weights[order[0]]:
            break
        more = taken.clone()
        more[max(0, number * page - margin) : (number + 1) * page + margin] = True
        if int(more.sum()) > most:
            break
        taken, chosen = more, [*chosen, number]
    if not chosen:  # not even one has room for its margins
        chosen = order[:1]
        taken[chosen[0] * page : (chosen[0] + 1) * page] = True
    edges = torch.nn.functional.pad(taken.int(), (1, 1)).diff()
    begins, ends = ((edges == sign).nonzero()[:, 0].tolist() for sign in (1, -1))
    return list(zip(begins, ends, strict=True)), torch.tensor(sorted(chosen))
