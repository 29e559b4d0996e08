"""Build a tokenizer from the metadata of a GGUF file.

Two kinds are read: `gpt2` (byte-level BPE with merges) and `llama` (SentencePiece's BPE with scores and byte
fallback). What a `tokenizer.ggml.pre` name means is llama.cpp's to define (src/llama-vocab.cpp); the patterns
here say the same in the syntax of the `tokenizers` library, with the original pattern of the model's own
tokenizer.json where llama.cpp only approximates it.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from longverse.errors import UserError
from longverse.models.tokenizer import Tokenizer, bos_processor

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type
MARK = "▁"  # SentencePiece's blank

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
    except Exception as error:
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
