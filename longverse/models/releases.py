"""The published XVERSE models: how to recognise one, and what its config.json leaves out.

XVERSE-13B-256K states no RoPE field at all; base 500,000 and dynamic NTK with factor 2 past 32,768 tokens stand only in
the Python file beside its weights, so every engine that reads the config alone runs it at base 10,000. What is filled
in here is said to the user, never done in silence.

Nothing heavy is imported at the top: the planner asks for shapes without torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROPE_KEYS = ("rope_parameters", "rope_theta", "rope_scaling", "rotary_emb_base")
LICENCE_NOTE = (
    "XVERSE weights have their own model licence (academic use free, commercial use free on application to"
    " opensource@xverse.cn); Apache-2.0 covers the code only."
)


@dataclass(frozen=True)
class Release:
    """One published model. `window` is in tokens; `theta` None where nothing but the usual base 10,000 is known."""

    name: str
    layers: int
    hidden: int
    window: int
    chat: bool
    theta: float | None = None
    dynamic_factor: float | None = None
    original_window: int | None = None

    @property
    def hub_id(self) -> str:
        """Where it is published."""
        return f"xverse/{self.name}"

    def config(self) -> dict[str, Any]:
        """Its config.json as far as sizes go, as published, with what it leaves out filled in."""
        mlp, heads = {4096: (11008, 32), 5120: (13824, 40), 8192: (22016, 64)}[self.hidden]
        return {
            "model_type": "xverse", "num_hidden_layers": self.layers, "hidden_size": self.hidden,
            "intermediate_size": mlp, "num_attention_heads": heads,
            "vocab_size": 100_278 if self.name in ("XVERSE-13B", "XVERSE-13B-Chat") else 100_534,
            "max_position_embeddings": self.original_window or self.window, "context_window": self.window,
            "rope_parameters": self.rope_parameters(), "torch_dtype": "bfloat16",
        }  # fmt: skip

    def rope_parameters(self) -> dict[str, Any]:
        """What the config should say."""
        theta = self.theta or 10_000.0
        if self.dynamic_factor is None:
            return {"rope_type": "default", "rope_theta": theta}
        return {"rope_type": "dynamic", "rope_theta": theta, "factor": self.dynamic_factor}


RELEASES = (
    Release("XVERSE-7B", 32, 4096, 8192, chat=False),
    Release("XVERSE-7B-Chat", 32, 4096, 8192, chat=True),
    Release("XVERSE-13B", 40, 5120, 8192, chat=False),
    Release("XVERSE-13B-Chat", 40, 5120, 8192, chat=True),
    Release("XVERSE-13B-2", 40, 5120, 8192, chat=False),
    Release("XVERSE-13B-2-Chat", 40, 5120, 8192, chat=True),
    Release("XVERSE-13B-256K", 40, 5120, 262_144, True, 500_000.0, dynamic_factor=2.0, original_window=32_768),
    Release("XVERSE-65B", 80, 8192, 16_384, chat=False),
    Release("XVERSE-65B-2", 80, 8192, 16_384, chat=False),
    Release("XVERSE-65B-Chat", 80, 8192, 16_384, chat=True),
)
LONG = next(release for release in RELEASES if release.name == "XVERSE-13B-256K")


def recognise(config: dict[str, Any], name: str) -> Release | None:
    """The release a checkpoint is of, by its config and by the name of its folder or hub id; None for anything else.

    Folders are renamed, so a config that says no word on RoPE is judged by shape and window first: the 256K model's
    says 32,768 (an older one 262,144) where the others of its size say 8,192. Then a name counts when the shape agrees
    with it, or when it is exactly a release's and the shape no release's. Which release it is among the rest matters
    for its prompts alone; a shape without a name is taken for the Chat release, whose prompts do no harm to a base
    model.
    """
    if config.get("model_type") != "xverse":
        return None
    shape = (config.get("num_hidden_layers"), config.get("hidden_size"))
    long = shape == (LONG.layers, LONG.hidden) and config.get("max_position_embeddings") in (
        LONG.original_window,
        LONG.window,
    )
    if long and not states_rope(config):
        return LONG
    known = any(shape == (release.layers, release.hidden) for release in RELEASES)
    for label in (name, str(config.get("_name_or_path", ""))):
        words = re.sub(r"[^a-z0-9]+", "-", label.lower())
        words = words.replace("chat-2", "2-chat")  # XVERSE-13B-Chat-2 in its announcement, XVERSE-13B-2-Chat on the hub
        for release in sorted(RELEASES, key=lambda r: -len(r.name)):  # the longest name that fits
            exact = label.removeprefix("xverse/").lower() == release.name.lower()
            fits = shape == (release.layers, release.hidden) or (exact and not known)
            if fits and re.search(rf"(^|-){release.name.lower()}($|-)", words):
                return release
    if long:
        return LONG
    return next((r for r in RELEASES if r.chat and shape == (r.layers, r.hidden)), None)


def states_rope(config: dict[str, Any]) -> bool:
    """Whether a config says anything about its RoPE."""
    return any(config.get(key) is not None for key in ROPE_KEYS)


def is_size(value: Any) -> bool:
    """Whether a value of a config.json is a whole number of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def has_sizes(config: dict[str, Any]) -> bool:
    """Whether a config has the sizes that a RoPE plan is read with."""
    given = [config.get(key) for key in ("head_dim", "max_position_embeddings")]
    return all(is_size(config.get(key)) for key in ("hidden_size", "num_attention_heads")) and all(
        value is None or is_size(value) for value in given
    )


def complete(config: dict[str, Any], name: str) -> tuple[dict[str, Any], Release | None, list[str]]:
    """A config with what its release leaves out filled in, the release (None when unknown), and notes that say so.

    What the file states is never overridden; a statement that contradicts the release is noted.
    """
    from .rope import RopePlan

    release = recognise(config, name)
    if release is None:
        return config, None, []
    if not has_sizes(config):
        return config, release, []  # nonsense, which whoever reads the shape says
    notes: list[str] = []
    filled = {**config, "_name_or_path": release.hub_id}  # a converted folder has another name
    if not states_rope(config):
        filled["rope_parameters"] = release.rope_parameters()
        if release.original_window is not None:
            filled["max_position_embeddings"] = release.original_window
            filled["context_window"] = release.window
            filled["rope_parameters"]["original_max_position_embeddings"] = release.original_window
        plan = RopePlan.from_config(filled)
        why = "as its own code has it" if release.theta else "the usual base, since none is published for it"
        window = filled.get("context_window") or filled.get("max_position_embeddings") or release.window
        notes.append(
            f"{release.name}: its config.json states no RoPE; filled in: {plan.describe()}, window {window:,} ({why})."
        )
    elif release.theta and RopePlan.from_config(config).theta < release.theta:
        base = RopePlan.from_config(config).theta
        notes.append(
            f"{release.name}: its config.json states base {base:,.0f}, and the model was trained with"
            f" {release.theta:,.0f}; `longverse doctor` says how to mend it."
        )
    if not filled.get("max_position_embeddings"):
        filled["max_position_embeddings"] = release.window
        notes.append(f"{release.name}: its config.json states no window; filled in: {release.window:,} tokens.")
    return filled, release, notes


def licence_note(release: Release) -> str | None:
    """The note on the weights' licence; None when this machine's user has seen it, see `licence_shown`."""
    return None if _licence_marker(release).exists() else f"{release.name}: {LICENCE_NOTE}"


def licence_shown(notes: Iterable[str]) -> None:
    """Remember the licence notes among `notes`; call it where they were put before a person's eyes.

    Where the cache folder cannot be written they are shown every time.
    """
    seen = set(notes)
    for release in RELEASES:
        if f"{release.name}: {LICENCE_NOTE}" not in seen:
            continue
        try:
            _licence_marker(release).parent.mkdir(parents=True, exist_ok=True)
            _licence_marker(release).touch()
        except OSError:
            pass  # a cache that cannot be written only means that the note is shown again


def _licence_marker(release: Release) -> Path:
    from .converted import safe_name
    from .places import cache_folder

    return cache_folder() / "licence-shown" / safe_name(release.name)
