"""The published XVERSE models: how to recognise one, and what its config.json leaves out.

XVERSE-13B-256K states no RoPE field at all; base 500,000 and dynamic NTK with factor 2 past 32,768 tokens stand only in
the Python file beside its weights, so every engine that reads the config alone runs it at base 10,000. What is filled
in here is said to the user, never done in silence.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from .converted import cache_folder, safe_name
from .rope import RopePlan

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
    """The release a checkpoint is of, by the name of its folder or hub id, else by its config; None for anything else.

    Among releases of one shape the window tells the 256K model apart (its config says 32,768, an older one 262,144, the
    others 8,192). Which of the others it is matters for its prompts alone; a shape without a name is taken for the
    Chat release, whose prompts do no harm to a base model.
    """
    if config.get("model_type") != "xverse":
        return None
    for label in (name, str(config.get("_name_or_path", ""))):
        words = re.sub(r"[^a-z0-9]+", "-", label.lower())
        words = words.replace("chat-2", "2-chat")  # XVERSE-13B-Chat-2 in its announcement, XVERSE-13B-2-Chat on the hub
        for release in sorted(RELEASES, key=lambda r: -len(r.name)):  # the longest name that fits
            if re.search(rf"(^|-){release.name.lower()}($|-)", words):
                return release
    shape = (config.get("num_hidden_layers"), config.get("hidden_size"))
    long = config.get("max_position_embeddings", 0) in (LONG.original_window, LONG.window)
    if shape == (LONG.layers, LONG.hidden) and long:
        return LONG
    return next((r for r in RELEASES if r.chat and shape == (r.layers, r.hidden)), None)


def states_rope(config: dict[str, Any]) -> bool:
    """Whether a config says anything about its RoPE."""
    return any(config.get(key) is not None for key in ROPE_KEYS)


def complete(config: dict[str, Any], name: str) -> tuple[dict[str, Any], Release | None, list[str]]:
    """A config with what its release leaves out filled in, the release (None when unknown), and notes that say so.

    What the file states is never overridden; a statement that contradicts the release is noted.
    """
    release = recognise(config, name)
    if release is None:
        return config, None, []
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
        notes.append(
            f"{release.name}: its config.json states no RoPE; filled in: {plan.describe()},"
            f" window {release.window:,} ({why})."
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
    """The note on the weights' licence, once per machine and release; None when it was shown before.

    Where the cache folder cannot be written the note is shown every time.
    """
    marker = cache_folder() / "licence-shown" / safe_name(release.name)
    if marker.exists():
        return None
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
    except OSError:
        pass
    return f"{release.name}: {LICENCE_NOTE}"
