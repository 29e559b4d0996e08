"""Small made-up documents and tokenizers for the tests of the data builders."""

import json
import random
from functools import lru_cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

_PEOPLE = "Arthur Brenda Clement Dorothea Edmund Frances Gilbert Harriet"
_THINGS = "lantern garden letter carriage window harbour ledger kettle bridge orchard ribbon candle"
_VERBS = "carried painted remembered forgot described mended discovered praised counted watched"
PEOPLE, THINGS, VERBS = _PEOPLE.split(), _THINGS.split(), _VERBS.split()
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def novel(seed, paragraphs=120, chapters=6):
    """English prose with dialogue and chapter headings; every sentence is different."""
    rng = random.Random(seed)
    out = []
    for chapter in range(1, chapters + 1):
        out.append(f"CHAPTER {chapter}. {rng.choice(THINGS).upper()} AND {rng.choice(THINGS).upper()}")
        for i in range(paragraphs // chapters):
            sentences = [_sentence(rng) for _ in range(rng.randint(3, 6))]
            if i % 3 == 0:
                said = f"I never saw the {rng.choice(THINGS)} of number {rng.randint(10, 9999)} before today"
                sentences.append(f'"{said}," said {rng.choice(PEOPLE)}.')
            out.append(" ".join(sentences))
    return "\n\n".join(out)


def _sentence(rng):
    return (
        f"On day {rng.randint(100, 99999)} the old {rng.choice(THINGS)} was {rng.choice(VERBS)} by "
        f"{rng.choice(PEOPLE)} near the {rng.choice(THINGS)} that {rng.choice(PEOPLE)} had "
        f"{rng.choice(VERBS)} in the {rng.choice(THINGS)}."
    )


def law(seed, articles=24):
    """A Chinese law with numbered articles, a definition and a date of effect."""
    rng = random.Random(seed)
    subject = rng.choice(["渔业", "道路", "园林", "供水", "消防"])
    name = f"{rng.choice('东西南北中')}{rng.choice('山河湖海江')}市{subject}管理条例第{seed}号"
    digits = "一二三四五六七八九"

    def number(n):
        tens, ones = divmod(n, 10)
        return (
            ("" if tens == 1 else digits[tens - 1] if tens else "")
            + ("十" if tens else "")
            + (digits[ones - 1] if ones else "")
        )

    lines = [
        f"# {name}",
        "",
        f"第一条 为了加强第{seed}号事务的管理，维护当事人的合法权益，根据有关法律，制定本条例。",
        "",
    ]
    for n in range(2, articles):
        lines += [
            f"第{number(n)}条 主管部门应当在{rng.randint(3, 900)}日内对第{rng.randint(100, 99999)}号申请"
            "作出决定，并且书面告知申请人。",
            "",
        ]
    lines.append(f"第{number(articles)}条 本条例自{rng.randint(1990, 2020)}年{rng.randint(1, 12)}月1日起施行。")
    return name, "\n".join(lines)


def history(seed, paragraphs=150):
    """Chinese prose with volumes, speech and people."""
    rng = random.Random(seed)
    out = []
    for i in range(paragraphs):
        if i % 30 == 0:
            out.append(f"卷{'一二三四五六七八九'[i // 30]}　列传第{'一二三四五六七八九'[i // 30]}")
        a, b = rng.randint(10, 99999), rng.randint(10, 99999)
        out.append(
            f"是岁第{a}日，军队到达第{b}号渡口，百姓都出来观看。次日大雨，城中粮食只剩{rng.randint(100, 9999)}石。"
            f"太守派人去修{rng.randint(10, 999)}里长堤。众人都很高兴，于是在堤上种了{rng.randint(10, 999)}棵柳树。"
        )
        if i % 4 == 0:
            out.append(f"高祖曰：「第{rng.randint(10, 99999)}号渡口不可以丢失，应当派兵把守。」")
    return "\n\n".join(out)


def code_tree(folder, modules=24):
    """A small repository: modules that call each other."""
    folder.mkdir(parents=True)
    for n in range(modules):
        other = (n * 7 + 3) % modules
        body = [f'"""Module number {n} of the made-up project."""', "", f"from part{other} import compute_{other}", ""]
        body += [f"LIMIT_{n} = {n * 31 + 7}", "", ""]
        body += [
            f"def compute_{n}(value, factor={n + 2}):",
            f'    """Return the value of rule {n} times the factor."""',
        ]
        body += ["    return value * factor", "", ""]
        for k in range(12):
            body += [f"def helper_{n}_{k}(x):", f"    return x + {n * 100 + k}", ""]
        body += [
            "",
            f"def run_{n}(items):",
            f"    result = compute_{other}(len(items), factor={n * 13 + 5})",
            "    return result",
        ]
        (folder / f"part{n}.py").write_text("\n".join(body) + "\n")


def corpus_text():
    return [novel(0, 40), history(0, 40), law(0)[1], "def f(x):\n    return x + 1\n" * 20]


@lru_cache
def tokenizer_json(kind):
    """JSON of a small BPE tokenizer: gpt2, llama3 (byte-level), xverse, llama (marker for spaces), prefix (no
    pieces)."""
    if kind in ("gpt2", "llama3"):
        made = Tokenizer(models.BPE())
        if kind == "gpt2":
            made.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
        else:
            made.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        special = ["<|im_start|>", "<|im_end|>"]
        trainer = trainers.BpeTrainer(
            vocab_size=900, initial_alphabet=alphabet, special_tokens=special, show_progress=False
        )
        made.train_from_iterator(corpus_text(), trainer)
        return made.to_str()
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    texts = corpus_text()
    if kind == "prefix":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        texts = [word for text in texts for word in text.split(" ")]
    elif kind == "xverse":
        made.normalizer = normalizers.NFKC()
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace(prepend_scheme="never"),
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.Punctuation(),
            ]
        )
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1200, special_tokens=special, show_progress=False))
    return made.to_str()


TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer_folder(folder):
    """A folder with a byte-level tokenizer and a ChatML template, as a model would have."""
    folder.mkdir(parents=True, exist_ok=True)
    made = Tokenizer.from_str(tokenizer_json("gpt2"))
    made.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    made.save(str(folder / "tokenizer.json"))
    settings = {"chat_template": TEMPLATE, "eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
