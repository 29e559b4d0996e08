"""The transformers config of the XVERSE family: Llama's fields, the options of its relatives, and RoPE held to account.

transformers ignores `rope_theta` given to `from_pretrained` or set on a config later; here both are errors.
"""

import warnings
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ..errors import UserError
from .network import NetworkConfig
from .rope import RopePlan

# Old names that transformers ignores (rope_theta), or takes while dropping the base (rope_scaling).
OLD_NAMES = ("rope_theta", "rope_scaling")
IGNORED = (
    "{name} set beside a config loses the RoPE base or is ignored: set config.rope_parameters ="
    " {{'rope_type': 'default', 'rope_theta': BASE}}, with all that belongs to it, before the model is built."
)


def _completed(config: dict[str, Any]) -> dict[str, Any]:
    """A config that states no RoPE, with its release's filled in where the longverse package is installed: without it,
    where this file stands beside exported weights, whose config states everything."""
    try:
        from longverse.models.releases import complete, states_rope
    except ImportError:
        return config
    if config.get("model_type") != "xverse" or states_rope(config):
        return config
    filled, _, notes = complete(config, str(config.get("_name_or_path", "")))
    for note in notes:
        warnings.warn(note, stacklevel=3)
    return filled


@strict
class XverseConfig(PreTrainedConfig):
    """Shape of an XVERSE-like decoder.

    Fields are LlamaConfig's, and: `qkv_bias` (biases on q, k, v alone, Qwen2), `qk_norm` (norms on q and k, Qwen3),
    `context_window` (usable tokens, where `max_position_embeddings` is the L0 of dynamic NTK). `rope_parameters` is
    what `RopePlan.from_config` reads. Sizes default to XVERSE-13B's.
    """

    model_type = "xverse"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - transformers' own class attribute

    vocab_size: int = 100_534
    hidden_size: int = 5120
    intermediate_size: int = 13_824
    num_hidden_layers: int = 40
    num_attention_heads: int = 40
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 8192
    context_window: int | None = None
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_bias: bool = False
    qkv_bias: bool | None = None
    mlp_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.qkv_bias is None:
            self.qkv_bias = self.attention_bias
        rope = {key: kwargs[key] for key in ("rope_theta", "rope_scaling") if kwargs.get(key) is not None}
        # Reads both spellings and refuses contradictions, which transformers would settle in silence.
        plan = RopePlan.from_config({**self._rope_fields(), **rope})
        kwargs.pop("rope_theta", None)
        kwargs.pop("rope_scaling", None)
        self.ignore_keys_at_rope_validation = {"bucket", "original_max_position_embeddings"}
        self.set_plan(plan)
        super().__post_init__(**kwargs)

    def __setattr__(self, key: str, value: Any) -> None:
        if key in OLD_NAMES:
            raise UserError(IGNORED.format(name=key))
        super().__setattr__(key, value)

    def set_plan(self, plan: RopePlan) -> None:
        """Write a plan into `rope_parameters`; a model already built does not follow (its `set_rope` does)."""
        self.rope_parameters = plan.to_rope_parameters()
        if plan.kind == "dynamic" and plan.original_window != self.max_position_embeddings:
            self.rope_parameters["original_max_position_embeddings"] = plan.original_window

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers', which drops an override of the base in silence; here that is an error. What a release's
        config.json leaves out, XVERSE-13B-256K its RoPE, is filled in with a warning."""
        for name in OLD_NAMES:
            if name in kwargs:
                raise UserError(IGNORED.format(name=name))
        return super().from_dict(_completed(config_dict), **kwargs)

    def to_network(self) -> NetworkConfig:
        """The plain network's config. Reads `rope_parameters` as they stand now."""
        names = ("vocab_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "hidden_act")
        more = ("rms_norm_eps", "attention_bias", "qkv_bias", "mlp_bias", "qk_norm", "tie_word_embeddings")
        fields = {name: getattr(self, name) for name in (*names, *more, "context_window")}
        return NetworkConfig.from_dict({"model_type": "xverse", **self._rope_fields(), **fields})

    def _rope_fields(self) -> dict[str, Any]:
        names = ("hidden_size", "num_attention_heads", "head_dim", "max_position_embeddings", "rope_parameters")
        return {name: getattr(self, name) for name in names}
