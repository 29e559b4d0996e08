"""Could pages of a cache be chosen without reading their keys? What summaries of a page see of smol's attention.

While smol answers questions about a generated report, every layer's true attention is compared with what a summary of
each page of 64 keys would tell: the mean key (of the page, or of parts of it), mean and variance by channel (the second
order of the log of a mean of exponentials), and the bounds by channel of Quest (Tang et al. 2024, arXiv 2406.10774).
The fewest pages that hold the dial's share by the summary are taken. What they really hold is the result: as the mean
over layers, tokens and heads, in the worst layer, and at the worst token. "exact" chooses by the attention itself.

    python benchmarks/page_summaries.py [--tokens 8000] [--questions 3] [--mass 0.95]
"""

import argparse
from collections.abc import Iterator

import torch
from common import table, write_results
from torch import Tensor

from longverse.commands_demo import ANSWER_TOKENS, sized_report
from longverse.documents.ask import prepare
from longverse.documents.reader import decode
from longverse.inference.engine import Engine, Session
from longverse.inference.sampling import Sampling

PAGE = 64
PARTS = (64, 32, 16, 8)


def looks(session: Session, prompt: list[int], answer: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Layer by layer, the queries [G, h, T, D] (scaled) that wrote an answer and the keys [G, S, D] before it."""
    network, cache, begin = session.engine.network, session.cache, len(prompt) - 1
    cache.truncate(begin)
    del session.tokens[begin:]
    feed = [prompt[-1], *answer[:-1]]
    queries: dict[int, Tensor] = {}

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries[layer] = q[0].float()
        return cache.attend(layer, q, k, v)

    network.model(torch.tensor([feed]), torch.arange(begin, begin + len(feed))[None], cache.rope_length, attend)
    cache.advance(len(feed))
    session.tokens.extend(feed)
    for layer, q in queries.items():
        keys = cache.keys_of(layer, 0, begin)[0].float()
        yield q.unflatten(0, (keys.shape[0], -1)) * q.shape[-1] ** -0.5, keys


def summaries(q: Tensor, keys: Tensor) -> dict[str, Tensor]:
    """Each summary's share of every page [G, T, pages], the mean over a group's heads; keys [G, pages * PAGE, D]."""
    found = {}

    def told(scores: Tensor) -> Tensor:
        return scores.softmax(-1).mean(1)

    for part in PARTS:
        parts = keys.unflatten(1, (-1, PAGE // part, part))  # [G, pages, parts, part, D]
        mean = torch.einsum("ghtd,gpsd->ghtps", q, parts.mean(3))
        spread = torch.einsum("ghtd,gpsd->ghtps", q * q, parts.var(3, unbiased=False)) / 2
        found[f"means of {part}"] = told(mean.logsumexp(-1))
        found[f"means and variances of {part}"] = told((mean + spread).logsumexp(-1))
    pages = keys.unflatten(1, (-1, PAGE))
    high = torch.einsum("ghtd,gpd->ghtp", q.clamp(min=0), pages.amax(2))
    low = torch.einsum("ghtd,gpd->ghtp", q.clamp(max=0), pages.amin(2))
    found["bounds by channel"] = told(high + low)
    return found


def held(choice: Tensor, true: Tensor, rest: Tensor, mass: float) -> tuple[float, float, float]:
    """Share of pages taken, and what they hold of the true attention [G, T, pages]: mean and least."""
    ordered, order = choice.sort(-1, descending=True)
    taken = torch.zeros_like(true, dtype=torch.bool)
    taken.scatter_(-1, order, ordered.cumsum(-1) - ordered < mass * ordered.sum(-1, keepdim=True))
    taken[..., 0] = True
    kept = (true * taken).sum(-1) + rest
    return float(taken.float().mean()), float(kept.mean()), float(kept.min())


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--questions", type=int, default=3)
    parser.add_argument("--mass", type=float, default=0.95)
    options = parser.parse_args()
    engine = Engine.load("smol", device="cpu")
    report = sized_report(engine, 3, options.tokens, max(8, options.questions), "en")
    questions = [fact.question for fact in report.facts][: options.questions]
    prompts = prepare(engine, decode(report.text.encode(), "report.md"), questions, ANSWER_TOKENS)
    session = engine.session(prompts.planned_tokens)
    found: dict[str, list[tuple[float, float, float]]] = {}
    for prompt in prompts.ids:
        answer = session.complete(prompt, Sampling(max_new_tokens=24, stop=(". ",))).tokens
        for q, keys in looks(session, prompt, answer):
            whole = keys.shape[1] // PAGE * PAGE
            shares = torch.einsum("ghtd,gsd->ghts", q, keys).softmax(-1)
            true = shares[..., :whole].unflatten(-1, (-1, PAGE)).sum(-1).mean(1)  # [G, T, pages]
            rest = shares[..., whole:].sum(-1).mean(1)
            for name, choice in {"exact": true, **summaries(q, keys[:, :whole])}.items():
                found.setdefault(name, []).append(held(choice, true, rest, options.mass))
    rows = {}
    for name, layers in found.items():
        pages, kept, least = torch.tensor(layers).T
        rows[name] = {
            "pages": float(pages.mean()), "kept": float(kept.mean()), "worst layer": float(kept.min()),
            "worst token": float(least.min()),
        }  # fmt: skip
    lines = [[name, *(f"{value:.3f}" for value in row.values())] for name, row in rows.items()]
    print(table(["", "pages", "kept", "worst layer", "worst token"], lines))
    print(write_results("page_summaries", {"tokens": options.tokens, "mass": options.mass, "rows": rows}))


if __name__ == "__main__":
    main()
