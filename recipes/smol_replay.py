"""smol's own answers to everyday requests, as messages: what its recipe mixes in so that it keeps its manners.

    python recipes/smol_replay.py recipes/smol_replay.jsonl
    python recipes/smol_replay.py build/smol-everyday.jsonl --each 12 --tokens 512 --batch 1405     on a card

Long-document training shows a model short answers and nothing else, and a small one soon answers everything so. Its own
answers to other requests, sampled before the training, hold it where it was (self-distillation; the idea is rehearsal,
Robins 1995). Requests are put together from the lists below; answers that were cut off are left out. (The file beside
this one is of an earlier, shorter list of subjects: 111 conversations.)
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch

from longverse.models.checkpoint import Loaded, load
from longverse.models.modeling_xverse import XverseForCausalLM
from longverse.models.shards import replacing

SUBJECTS = """volcanoes; photosynthesis; the water cycle; interest rates; chess; bread; the moon; bicycles; bees
glaciers; friendship; libraries; vaccines; gravity; magnets; democracy; jazz; tea; earthquakes; compasses; recycling
lighthouses; dreams; sleep; rainbows; rivers; batteries; bridges; maps; the printing press; penguins; mathematics
honesty; soap; inflation; the heart; forests; patience; telescopes; salt; museums; trains; the piano; gardens; whales
coffee; deserts; kindness; taxes; black holes; the alphabet; wool; football; insurance; fractions; dinosaurs; theatre
honey; robots; passports; humour; electricity; the nose; snow; elections; mirrors; paper; courage; the ocean; cheese
computers; swimming; memory; castles; glass; weather forecasts; spiders; budgets; poetry; mountains; the brain; shoes
clocks; migration; solar panels; cooking; silence; gold; wolves; vitamins; stories; the internet; rice; teamwork
antibiotics; painting; owls; sharing; concrete; the violin; hiking; curiosity; markets; dentists; satellites
anger; umbrellas; fire; the number zero; horses; proverbs; air; camels; neighbours""".replace("\n", "; ").split("; ")
ABOUT = (
    "Explain {} to a ten-year-old.",
    "Write a short poem about {}.",
    "Give me three interesting facts about {}.",
    "Write one paragraph on why {} matter to people.",
    "What is a common mistake people make about {}?",
    "Suggest a title for an essay about {} and write its first two sentences.",
    "What do you know about {}?",
    "Tell me a short story in which {} play a part.",
    "List five words that have to do with {} and explain each in one sentence.",
    "Write a friendly message to a friend about {}.",
    "What are the good and the bad sides of {}?",
    "Ask me one question about {} and then answer it yourself.",
)
OTHER = """Hello! How are you today?|Who are you?|What can you help me with?|Thank you very much, that was helpful.
Write a polite email asking for a day off.|Write an email to thank a colleague for help with a project.
Give me a simple recipe for pancakes.|Plan a weekend in a quiet town by the sea.|Suggest five names for a small bakery.
How do I stay focused while studying?|How can I fall asleep more easily?|What should I pack for a hike?
Write a Python function that reverses a string.|Write a Python function that says whether a number is prime.
What is the difference between a list and a tuple in Python?|Explain what a for loop does.
Translate 'good morning' into French and Spanish.|What is the capital of Japan?|Who wrote Romeo and Juliet?
What is 17 plus 25?|How many minutes are there in three hours?|List the planets of the solar system in order.
Rewrite this more formally: hey, can u send me the file asap?
Correct the grammar: She don't like apples and neither do he.
Summarize in one sentence: The old mill had stood empty for forty years when two sisters bought it and opened a bakery.
Is the following review positive or negative? 'The room was cold and the staff ignored us.'
Tell me a very short story about a lost key.|Tell me a joke about computers.|Write a haiku about autumn.
What are the advantages and disadvantages of working from home?|How do plants know when to bloom?
Give three tips for a job interview.|How do I apologise to a friend?|What does 'to break the ice' mean?
Describe the taste of lemon to someone who has never tried it.|Why is the sky blue?|Why do we yawn?"""


def requests(rng: random.Random, each: int) -> list[str]:
    """Every other request, and each subject with `each` ways of asking."""
    asked = [text for line in OTHER.splitlines() for text in line.split("|")]
    for subject in SUBJECTS:
        asked += [form.format(subject) for form in rng.sample(ABOUT, each)]
    return asked


def load_model() -> tuple[Any, Loaded]:
    """smol-8k behind transformers' class, for sampling in batches, and what it was loaded with."""
    from longverse.models.configuration_xverse import XverseConfig

    loaded = load("smol-8k", dtype="bfloat16")
    model = XverseForCausalLM(XverseConfig(**{k: v for k, v in loaded.config.items() if k != "model_type"}))
    model.load_state_dict(loaded.network.state_dict())
    return model.to(loaded.network.device, torch.bfloat16).eval(), loaded


def sample(model: Any, loaded: Loaded, prompts: list[list[int]], tokens: int) -> list[str]:
    """How each prompt goes on, up to an end token; nothing where `tokens` do not reach one."""
    ends = loaded.tokenizer.eos_ids
    width, pad = max(map(len, prompts)), min(ends)
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=True, temperature=0.6, top_k=20,
            pad_token_id=pad, eos_token_id=sorted(ends),
        )  # fmt: skip
    texts = []
    for row in out[:, width:].tolist():
        end = next((n for n, token in enumerate(row) if token in ends), None)
        texts.append(loaded.tokenizer.decode(row[:end]).strip() if end is not None else "")
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("--each", type=int, default=3, help="requests a subject")
    parser.add_argument("--tokens", type=int, default=256, help="longer answers are left out")
    parser.add_argument("--batch", type=int, default=80, help="answers sampled together")
    options = parser.parse_args()
    torch.manual_seed(1)
    model, loaded = load_model()
    asked = requests(random.Random(1), options.each)
    lines = []
    for start in range(0, len(asked), options.batch):
        part = asked[start : start + options.batch]
        prompts = [loaded.chat.encode([{"role": "user", "content": text}]) for text in part]
        for text, answer in zip(part, sample(model, loaded, prompts, options.tokens), strict=True):
            if answer:
                messages = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
                lines.append(json.dumps({"messages": messages}, ensure_ascii=False))
        print(f"{min(start + options.batch, len(asked))} of {len(asked)}", flush=True)
    options.target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(options.target) as aside:
        aside.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} conversations: {options.target}")


if __name__ == "__main__":
    main()
