"""smol's own answers to everyday requests, as messages: what its recipe mixes in so that it keeps its manners.

    python recipes/smol_replay.py recipes/smol_replay.jsonl

Long-document training shows a model short answers and nothing else, and a small one soon answers everything so. Its own
answers to other requests, sampled before the training, hold it where it was (self-distillation; the idea is rehearsal,
Robins 1995). Requests are put together from the lists below; answers that were cut off are left out.
"""

import json
import random
import sys
from pathlib import Path

import torch

from longverse.models.checkpoint import load
from longverse.models.modeling_xverse import XverseForCausalLM
from longverse.models.shards import replacing

SUBJECTS = """volcanoes; photosynthesis; the water cycle; interest rates; chess; bread; the moon; bicycles; bees
glaciers; friendship; libraries; vaccines; gravity; magnets; democracy; jazz; tea; earthquakes; compasses; recycling
lighthouses; dreams; sleep; rainbows; rivers; batteries; bridges; maps; the printing press; penguins; mathematics
honesty; soap; inflation; the heart; forests; patience; telescopes; salt""".replace("\n", "; ").split("; ")
ABOUT = (
    "Explain {} to a ten-year-old.",
    "Write a short poem about {}.",
    "Give me three interesting facts about {}.",
    "Write one paragraph on why {} matter to people.",
    "What is a common mistake people make about {}?",
    "Suggest a title for an essay about {} and write its first two sentences.",
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
NEW_TOKENS = 256


def requests(rng: random.Random) -> list[str]:
    """Every other request, and each subject with three ways of asking."""
    asked = [text for line in OTHER.splitlines() for text in line.split("|")]
    for subject in SUBJECTS:
        asked += [form.format(subject) for form in rng.sample(ABOUT, 3)]
    return asked


def main() -> None:
    target = Path(sys.argv[1])
    rng = random.Random(1)
    torch.manual_seed(1)
    loaded = load("smol", dtype="bfloat16")
    from longverse.models.configuration_xverse import XverseConfig

    model = XverseForCausalLM(XverseConfig(**{k: v for k, v in loaded.config.items() if k != "model_type"}))
    model.load_state_dict(loaded.network.state_dict())
    model.to(torch.bfloat16).eval()
    lines = []
    asked = requests(rng)
    for start in range(0, len(asked), 80):
        part = asked[start : start + 80]
        prompts = [loaded.chat.encode([{"role": "user", "content": text}]) for text in part]
        width = max(map(len, prompts))
        pad = min(loaded.tokenizer.eos_ids)
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=True, temperature=0.6,
                top_k=20, pad_token_id=pad, eos_token_id=sorted(loaded.tokenizer.eos_ids),
            )  # fmt: skip
        for text, row in zip(part, out[:, width:].tolist(), strict=True):
            end = next((n for n, token in enumerate(row) if token in loaded.tokenizer.eos_ids), None)
            answer = loaded.tokenizer.decode(row[:end]).strip() if end is not None else ""
            if answer:
                messages = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
                lines.append(json.dumps({"messages": messages}, ensure_ascii=False))
        print(f"{start + len(part)} of {len(asked)}", flush=True)
    with replacing(target) as aside:
        aside.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} conversations: {target}")


if __name__ == "__main__":
    main()
