"""Choosing the next token. Each setting means what it means in transformers' `generate`, in transformers' order:
repetition penalty, temperature, top-k, top-p, min-p, then one draw; so a seed gives the same text in both.

Sources: repetition penalty, Keskar et al. 2019 (arXiv 1909.05858); top-p, Holtzman et al. 2019 (arXiv 1904.09751);
min-p, Nguyen et al. 2024 (arXiv 2407.01082).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..errors import UserError


class Constraint(Protocol):
    """What may be written, token by token: one answer's state, made anew for each answer."""

    def allowed(self, size: int) -> Tensor | None:
        """Which of `size` tokens may come next: bool [V] on the CPU with at least one true; None allows all."""

    def accept(self, token: int) -> None:
        """The chosen token; called once for each, the end token included."""


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn and when it ends.

    max_new_tokens      the answer's length limit in tokens
    temperature         0 takes the likeliest token (greedy); above 0 divides the logits
    top_k               keep the k likeliest tokens; 0 keeps all
    top_p               keep the likeliest tokens that together hold this probability; 1 keeps all
    min_p               keep tokens at least this fraction as likely as the likeliest; 0 keeps all
    repetition_penalty  above 1 makes tokens that stand in the prompt or the answer less likely
    seed                makes a draw repeatable; None draws anew
    stop                texts that end the answer and are left out of it
    presence_penalty    taken off the logit of every token that the answer (not the prompt) holds already
    frequency_penalty   the same, times how often it holds it; both as in OpenAI's interface
    constraint          forbids tokens, such as those that would break a JSON text
    on_token            called with each chosen token and the model's own logits, float32 [V], before any setting
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    constraint: Constraint | None = field(default=None, compare=False, repr=False)
    on_token: Callable[[int, Tensor], None] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens} and must be at least 1.")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature} and must be 0 (always the likeliest token) or above.")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k} and must be 0 (off) or above.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p} and must be above 0 and at most 1 (off).")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p is {self.min_p} and must be from 0 (off) to 1.")
        if not 0 < self.repetition_penalty < float("inf"):
            raise UserError(f"repetition_penalty is {self.repetition_penalty} and must be above 0 (1 is off).")
        for name in ("presence_penalty", "frequency_penalty"):
            if not abs(getattr(self, name)) < float("inf"):
                raise UserError(f"{name} is {getattr(self, name)} and must be a finite number (0 is off).")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UserError(f"seed is {self.seed} and must be from 0 to 2^63 - 1.")
        if any(not text for text in self.stop):
            raise UserError("A stop text is empty: it would end every answer before it begins.")


class Sampler:
    """One answer's draws: keeps the random generator and the tokens already seen."""

    def __init__(self, sampling: Sampling, seen: list[int], device: torch.device | str = "cpu") -> None:
        self.sampling = sampling
        self.seen = torch.tensor(sorted(set(seen)), dtype=torch.int64, device=device)  # distinct ids, for the penalty
        self.counts: Tensor | None = None  # float32 [V]: how often the answer holds each token, where a penalty asks
        self.generator = torch.Generator(device=device)
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)

    def __call__(self, logits: Tensor) -> int:
        """The next id from float32 logits [V]; the id counts as seen from then on."""
        settings = self.sampling
        own, logits = logits, logits.clone()
        if settings.repetition_penalty != 1:
            old = logits[self.seen]
            logits[self.seen] = torch.where(
                old < 0, old * settings.repetition_penalty, old / settings.repetition_penalty
            )
        if settings.presence_penalty or settings.frequency_penalty:
            if self.counts is None:
                self.counts = torch.zeros_like(logits)
            logits -= settings.frequency_penalty * self.counts + settings.presence_penalty * (self.counts > 0)
        if settings.constraint is not None and (allowed := settings.constraint.allowed(len(logits))) is not None:
            logits.masked_fill_(~allowed.to(logits.device), float("-inf"))
        if settings.temperature == 0:
            token = int(logits.argmax())
        else:
            token = self._draw((logits - logits.max()) / settings.temperature)  # the likeliest stays finite
        if self.counts is not None:
            self.counts[token] += 1
        if settings.constraint is not None:
            settings.constraint.accept(token)
        if settings.on_token is not None:
            settings.on_token(token, own)
        if settings.repetition_penalty != 1 and not (self.seen == token).any():
            self.seen = torch.cat((self.seen, self.seen.new_tensor([token])))
        return token

    def _draw(self, logits: Tensor) -> int:
        settings = self.sampling
        if settings.top_k:
            least = logits.topk(min(settings.top_k, logits.numel())).values[-1]
            logits = logits.masked_fill(logits < least, float("-inf"))
        if settings.top_p < 1:
            ascending, order = logits.sort()
            # A token goes when it and all less likely ones together hold no more than 1 - top_p; the likeliest stays.
            drop = ascending.softmax(-1).cumsum(-1) <= 1 - settings.top_p
            drop[-1] = False
            logits[order[drop]] = float("-inf")
        if settings.min_p > 0:
            share = logits.softmax(-1)
            logits = logits.masked_fill(share < settings.min_p * share.max(), float("-inf"))
        return int(torch.multinomial(logits.softmax(-1), 1, generator=self.generator))
