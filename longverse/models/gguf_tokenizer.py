"""A tokenizer from the metadata of a GGUF file, and back into one.

Two kinds are read: `gpt2` (byte-level BPE with merges) and `llama` (SentencePiece's BPE with scores and byte
fallback). What a `tokenizer.ggml.pre` name means is llama.cpp's to define (src/llama-vocab.cpp); the patterns
here say the same in the syntax of the `tokenizers` library, with the original pattern of the model's own
tokenizer.json where llama.cpp only approximates it.
"""

from __future__ import annotations

import json
from typing import Any

import gguf
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from longverse.errors import UserError
from longverse.models.tokenizer import Tokenizer, bos_processor

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type
MARK = "▁"  # SentencePiece's blank

# What tokenizers disagree about: blanks, digits, contractions, newlines, scripts, emoji, code, control strings.
PROBES = (
    "a",
    " a",
    "Hello, world! I'm sure they'll DON'T 's",
    "  two  and   three    four ",
    "x\n\n y\r\n\tz \n",
    "0 12 345 6789 12345678 3.14 1,234.5 v1.2 ２０２４ ½ Ⅷ x²",
    "第12章：报告（2024年2月29日）写明了“预算”——1,250,000元。",
    "文本text混排123测试，你好世界 。",
    "naïve café é Å ﬁ İstanbul ß",
    "Привет мир Γειά सुनिए สวัสดี مرحبا 안녕 カタカナ",
    "🙂 👩‍👩‍👧‍👦 🇨🇳 ☃️ \u200b\u3000\u00a0x",
    "def f(x):\n    return {'a': x[0]**2, \"b\": [i for i in x]}  # (ok)\n",
    'for(int i=0;i<n;++i){a[i]+=b[i];} // <div class="c">&amp;</div>',
    "https://example.com/a?b=c#d me@x.org C:\\dir\\f_1-2.tar.gz",
    "!!! ... --- === ((())) ?! $9.99 €5 50% #1 @a ^~`|\\",
    "<|im_start|>user\n<s>[INST] </s> <|im_end|> <0x41> ▁ Ġ",
    "\x00\x07\x1b \ufffd 𠮷 龘 ﷺ",
)

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _modern(digits: str) -> str:
    """The pattern of Llama 3 and Qwen 2, which differ in how many digits go together."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


# DeepSeek's own list of "letters" is the letters with case, as one Unicode version had them.
_DEEPSEEK = (
    r"[\r\n]",
    r"\s?[\p{Lu}\p{Ll}\p{Lt}]+",
    r"\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
    r"\s+$",
    "[一-龥ࠀ-一가-\ud7ff]+",
    r"\p{N}+",
)

# `pre` in the file: the patterns, applied one after the other, each cutting out what it matches.
PATTERNS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}$+<=>^~|]+", _WORDS, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": (_WORDS,),
    "smollm": (r"\p{N}", _WORDS),
    "llama-bpe": (_modern(r"\p{N}{1,3}"),),
    "smaug-bpe": (_modern(r"\p{N}{1,3}"),),  # as llama-bpe, but merges always count
    "qwen2": (_modern(r"\p{N}"),),
    "deepseek-llm": _DEEPSEEK,
}
ALIASES = {
    "phi-2": "gpt-2",
    "olmo": "gpt-2",
    "mpt": "gpt-2",
    "starcoder": "smollm",
    "refact": "smollm",
    "command-r": "smollm",
    "codeshell": "smollm",
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "falcon3": "llama-bpe",
    "dbrx": "smaug-bpe",
    "deepseek-r1-qwen": "qwen2",
    "megrez": "qwen2",
    "stablelm2": "qwen2",
}


TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|end_of_turn|>")


def build_tokenizer(metadata: dict[str, Any], source: str) -> Tokenizer:
    """`metadata`: the file's keys and values; `source` names it in errors."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise UserError(
            f"{source} has a tokenizer of type {kind!r}, and gpt2 and llama are read; use the model's own folder."
        )
    tokens: list[str] = metadata.get("tokenizer.ggml.tokens", [])
    types: list[int] = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    if not tokens or len(types) != len(tokens) or len(vocab) != len(tokens):
        raise UserError(
            f"{source} has a damaged vocabulary (empty, of unequal lists or with a token twice); convert it again."
        )
    if kind == "gpt2":
        backend, bos_by_habit = _byte_level(metadata, vocab, source), _pre(metadata) == "llama-bpe"
    else:
        backend, bos_by_habit = _sentencepiece(metadata, vocab, types, source), True
    backend.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, sort in zip(tokens, types, strict=True)
            if sort in (CONTROL, UNKNOWN)
        ]
    )
    backend.add_tokens(
        [
            AddedToken(token, special=False, normalized=False)
            for token, sort in zip(tokens, types, strict=True)
            if sort == USER_DEFINED
        ]
    )

    def token_id(key: str) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if value is not None and not 0 <= value < len(tokens):
            raise UserError(
                f"{source} names token {value} as {key}, but its vocabulary has {len(tokens):,}; convert it again."
            )
        return value

    bos_id = token_id("bos")
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", bos_by_habit)) and bos_id is not None
    backend.post_processor = bos_processor(backend, bos_id if add_bos else None)
    ends = {token_id(key) for key in ("eos", "eot", "eom")} - {None}
    # Early conversions name the text's end alone, while answers end with the turn's.
    template = metadata.get("tokenizer.chat_template") or ""
    ends |= {vocab[text] for text in TURN_ENDS if text in vocab and text in template and types[vocab[text]] == CONTROL}
    named = {
        name: tokens[value]
        for name, key in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("unk_token", "unknown"),
            ("pad_token", "padding"),
        )
        if (value := token_id(key)) is not None
    }
    return Tokenizer(
        backend,
        bos_id=bos_id,
        eos_ids=[end for end in ends if end is not None],
        pad_id=token_id("padding"),
        chat_template=metadata.get("tokenizer.chat_template"),
        add_bos=add_bos,
        special_tokens=named,
    )


def pre_tokenizer(pre: str) -> pre_tokenizers.PreTokenizer:
    """The pre-tokenizer behind a name of PATTERNS."""
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PATTERNS[pre]]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def _pre(metadata: dict[str, Any]) -> str:
    name = metadata.get("tokenizer.ggml.pre", "default")  # llama.cpp's reading of a file without the key
    return ALIASES.get(name, name)


def _byte_level(metadata: dict[str, Any], vocab: dict[str, int], source: str) -> Backend:
    pre = _pre(metadata)
    if pre not in PATTERNS:
        known = ", ".join(sorted({*PATTERNS, *ALIASES}))
        raise UserError(
            f"{source} asks for the pre-tokenizer {pre!r}, and these are known: {known}; use the model's own folder."
        )
    # A token may begin with a blank only in front of the separator, so the search starts at the second character.
    merges = []
    for merge in metadata.get("tokenizer.ggml.merges", []):
        cut = merge.find(" ", 1)
        merges.append((merge[:cut], merge[cut + 1 :]))
    if not merges:
        raise UserError(
            f"{source} has a byte-level tokenizer without merges; convert it again or use the model's own folder."
        )
    try:
        # Llama 3 takes a word that is in the vocabulary whole, whatever the merges say.
        model = models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe")
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise UserError(f"{source} has merges that do not fit its vocabulary ({error}); convert it again.") from None
    backend = Backend(model)
    if pre == "qwen2" and metadata.get("tokenizer.ggml.pre") == "qwen2":
        backend.normalizer = normalizers.NFC()  # Qwen's own tokenizer composes characters; llama.cpp leaves this out
    backend.pre_tokenizer = pre_tokenizer(pre)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(metadata: dict[str, Any], vocab: dict[str, int], types: list[int], source: str) -> Backend:
    scores: list[float] = metadata.get("tokenizer.ggml.scores", [])
    if len(scores) != len(vocab):
        raise UserError(
            f"{source} has a SentencePiece tokenizer without scores, so its merges cannot be known; "
            "use the tokenizer of the model's own folder."
        )
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    tokens = list(vocab)
    model = models.BPE(
        vocab=vocab,
        merges=merges_from_scores(vocab, scores, types),
        unk_token=tokens[unknown] if unknown is not None and unknown < len(tokens) else None,
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = Backend(model)
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    spaces = normalizers.Replace(" ", MARK)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), spaces]) if prefix else spaces
    steps: list[decoders.Decoder] = [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def merges_from_scores(vocab: dict[str, int], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose union has the best score; the same as a list of merges, best first.

    Ties within one score keep the order of the ids. Control, unknown, unused and byte tokens take no part.
    """
    usable = {token for token, token_id in vocab.items() if types[token_id] in (NORMAL, USER_DEFINED)}
    found: list[tuple[float, int, int, str, str]] = []
    for token in usable:
        token_id = vocab[token]
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in usable and right in usable:
                found.append((-scores[token_id], token_id, cut, left, right))
    found.sort(key=lambda item: item[:3])
    return [(left, right) for *_, left, right in found]


# ---- back into a file


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer, rows: int, template: str | None) -> list[str]:
    """Tokens, types, merges or scores, special ids and the template; one token for each of the `rows` of the
    embedding.
    """
    backend = tokenizer.backend
    state = json.loads(backend.to_str())
    model = state["model"]
    notes: list[str] = []
    if model["type"] != "BPE":
        raise UserError(
            f"llama.cpp is given BPE tokenizers here, and this one is {model['type']}: keep the model's own folder."
        )
    by_id = {token_id: token for token, token_id in backend.get_vocab(with_added_tokens=True).items()}
    if (largest := max(by_id, default=-1)) >= rows:
        raise UserError(
            f"The tokenizer has the id {largest:,} and the embedding {rows:,} rows: they do not belong together."
        )
    added = backend.get_added_tokens_decoder()
    spelling = tokenizer._spelling
    if spelling is None or not (spelling.byte_level or spelling.byte_fallback):
        raise UserError(
            "Only byte-level BPE and BPE with byte fallback can be written to GGUF: keep the model's own folder."
        )
    unknown = model.get("unk_token")
    tokens, types = [], []
    for token_id in range(rows):
        token = by_id.get(token_id)
        if token is None:  # a gap of the vocabulary, or a row that only pads the embedding
            tokens.append(f"[PAD{token_id}]")
            types.append(UNUSED)
            continue
        tokens.append(token)
        if not spelling.byte_level and token == unknown:
            types.append(UNKNOWN)
        elif token_id in added:
            types.append(CONTROL if added[token_id].special else USER_DEFINED)
        elif (
            not spelling.byte_level and len(spelling.piece(token)) == 1 and len(token) == 6 and token.startswith("<0x")
        ):
            types.append(BYTE)
        else:
            types.append(NORMAL)
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ", 1)) for merge in model["merges"]]
    normalizer = state.get("normalizer")
    if spelling.byte_level:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_name(tokenizer, bool(model.get("ignore_merges")), normalizer))
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges([" ".join(merge) for merge in merges])
    else:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores(scores_from_merges(tokens, merges))
        writer.add_token_types(types)
        writer.add_add_space_prefix(_has_prefix(tokenizer))
    if backend.normalizer is not None and any(_normalised(tokenizer, text) != text for text in PROBES):
        kind = "its normaliser" if normalizer is None else normalizer["type"]
        notes.append(f"llama.cpp does not normalise text ({kind}): text that this would change gets other ids there")
    _add_special_ids(writer, tokenizer, unknown, notes)
    if template is not None:
        writer.add_chat_template(template)
    return notes


def scores_from_merges(tokens: list[str], merges: list[tuple[str, ...]]) -> list[float]:
    """SentencePiece's scores for a list of merges: the earlier a token is made, the better; what is never made
    comes last.

    llama.cpp then joins any neighbours whose union is a token, best first. That is the list of merges, but for
    unions that exist and that no merge makes from these two parts, which trained vocabularies hardly ever offer
    (the check after writing, and benchmarks/llama_cpp_check.py, look for them).
    """
    rank: dict[str, int] = {}
    for place, (left, right) in enumerate(merges):
        rank.setdefault(left + right, place)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _pre_name(tokenizer: Tokenizer, ignore_merges: bool, normalizer: dict[str, Any] | None) -> str:
    """The name under which llama.cpp knows this pre-tokenizer, found by comparing what it does to the probes."""
    theirs = tokenizer.backend.pre_tokenizer
    composes = normalizer is not None and normalizer["type"] == "NFC"
    for name in PATTERNS:
        if (name == "llama-bpe") != ignore_merges:
            continue
        ours = pre_tokenizer(name)
        if theirs is not None and all(_pieces(ours, text) == _pieces(theirs, text) for text in PROBES):
            # The same pattern without Qwen's composing of characters goes by another name.
            return "deepseek-r1-qwen" if name == "qwen2" and not composes else name
    raise UserError(
        f"This tokenizer splits text in a way that llama.cpp has no name for (known: {', '.join(PATTERNS)}):"
        " keep the model's own folder."
    )


def _pieces(splitter: Any, text: str) -> list[str]:
    return [piece for piece, _ in splitter.pre_tokenize_str(text)]


def _has_prefix(tokenizer: Tokenizer) -> bool:
    ids = tokenizer.encode("a", add_bos=False)
    return (tokenizer.backend.id_to_token(ids[0]) or "").startswith(MARK)


def _normalised(tokenizer: Tokenizer, text: str) -> str:
    """`text` after the normaliser, less the blanks' mark, which is no change of the text."""
    normalizer = tokenizer.backend.normalizer
    if normalizer is None:
        return text
    changed = normalizer.normalize_str(text)
    plain = text.replace(" ", MARK)
    return text if changed in (text, plain, f"▁{plain}") else changed


def _add_special_ids(writer: gguf.GGUFWriter, tokenizer: Tokenizer, unknown: str | None, notes: list[str]) -> None:
    if tokenizer.bos_id is not None:
        writer.add_bos_token_id(tokenizer.bos_id)
    named = tokenizer.special_tokens.get("eos_token")
    first = tokenizer.backend.token_to_id(named) if named is not None else None
    ends = sorted(tokenizer.eos_ids, key=lambda token_id: (token_id != first, token_id))
    for add, token_id in zip(
        (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id), ends, strict=False
    ):
        add(token_id)
    if len(ends) > 3:
        notes.append(f"GGUF names three end tokens, and this tokenizer has {len(ends)}: {ends[3:]} are left out")
    unknown = unknown or tokenizer.special_tokens.get("unk_token")
    unknown_id = tokenizer.backend.token_to_id(unknown) if unknown is not None else None
    if unknown_id is not None:
        writer.add_unk_token_id(unknown_id)
    if tokenizer.pad_id is not None:
        writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(tokenizer.add_bos)
    writer.add_add_eos_token(False)


def compare_tokenizers(found: Tokenizer, expected: Tokenizer, notes: list[str]) -> None:
    differing = []
    for text in PROBES:
        if _normalised(expected, text) != text:
            continue
        for special in (False, True):
            if found.encode(text, special=special, add_bos=False) != expected.encode(
                text, special=special, add_bos=False
            ):
                differing.append(text)
    # SentencePiece puts its blank before a text that begins with one; some tokenizer.json files do not.
    if differing and all(text.startswith(" ") for text in differing) and _has_prefix(expected):
        notes.append("llama.cpp adds a blank before text that begins with a blank, and this tokenizer does not")
    elif differing:
        raise UserError(
            f"llama.cpp would split {differing[0]!r} into other tokens than this tokenizer; use the model's folder."
        )
