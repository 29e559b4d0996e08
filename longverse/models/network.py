"""The whole network in plain torch: a Llama-shaped decoder, one forward, read top to bottom.

Shapes: B batch, T tokens, C hidden size, H query heads, G key/value heads, D head size, M MLP width, V vocabulary.

Tensor names are Llama's (`model.layers.0.self_attn.q_proj.weight` ...), so XVERSE, Llama, Mistral, Yi and Qwen
checkpoints load as they are. `modeling_xverse.py` puts the same modules behind transformers' classes; this file needs
torch alone, which keeps the start of a command short. Norm, rotation and gate are the lines of `rows.py`, through
`rowwise.py`, which has kernels for them on a CPU.

Attention over the past belongs to whoever holds the past: the forward takes `attend(layer, q, k, v)`, which is
`KVCache.attend` in the engine, causal attention in training, and transformers' caches in `generate`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from ..errors import UserError
from .attention import one_shot_attention
from .rope import RopePlan, Rotary, number
from .rowwise import rms_norm, rotate, swiglu

# attend(layer, q [B, H, T, D], k [B, G, T, D], v [B, G, T, D]) -> [B, H, T, D]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
# Whole numbers of a config.json, and whether it must state them.
SIZES = {
    "vocab_size": True,
    "hidden_size": True,
    "intermediate_size": True,
    "num_hidden_layers": True,
    "num_attention_heads": True,
    "max_position_embeddings": True,
    "num_key_value_heads": False,
    "head_dim": False,
    "context_window": False,
    "sliding_window": False,
}
FAMILIES = ("xverse", "llama", "mistral", "qwen2", "qwen3", "Yi", "yi")


@dataclass(frozen=True)
class NetworkConfig:
    """What the forward needs, whatever family the checkpoint is of. `window` is the usable window in tokens."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    window: int
    rope: RopePlan
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads evenly:"
                " num_key_value_heads must divide num_attention_heads."
            )
        assert self.rope.head_dim == self.head_dim

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "NetworkConfig":
        """Map a config.json of one of FAMILIES. Raises UserError for a foreign family or a part we do not have."""
        family = config.get("model_type")
        if family not in FAMILIES:
            raise UserError(
                f"Models of type {family!r} are not supported: this network is Llama-shaped and reads"
                f" {', '.join(FAMILIES[:-1])}."
            )
        for name, needed in SIZES.items():
            value = config.get(name)
            if value is None and not needed:
                continue
            if name not in config:
                raise UserError(f"The config lacks {name}: it is no complete config.json of a model.")
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"The config's {name} is {value!r} and must be a whole number of at least 1.")
        if config.get("hidden_act", "silu") not in ("silu", "swish"):
            raise UserError(f"Activation {config['hidden_act']!r} is not supported: this network has SwiGLU (silu).")
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        rope = RopePlan.from_config(config)
        bias = bool(config.get("attention_bias", False))
        return cls(
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=rope.head_dim,
            norm_eps=number("rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
            window=_window(config, rope),
            rope=rope,
            qkv_bias=family == "qwen2" or bool(config.get("qkv_bias", bias)),
            output_bias=bias,
            mlp_bias=bool(config.get("mlp_bias", False)),
            qk_norm=family == "qwen3" or bool(config.get("qk_norm", False)),
            tied=bool(config.get("tie_word_embeddings", False)),
            vocab_size=config["vocab_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
        )

    def with_rope(self, change: str) -> "NetworkConfig":
        """The same with its RoPE plan changed by hand (RopePlan.parse), and the window that this plan is meant for;
        where it stretches positions as before, the window stays."""
        plan, old = RopePlan.parse(change, self.rope, self.window), self.rope
        as_before = (plan.kind, plan.factor, plan.original_window) == (old.kind, old.factor, old.original_window)
        window = self.window if as_before else plan.window_after(old.trained_window or self.window)
        return replace(self, rope=plan, window=window)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor a checkpoint must hold; a tied `lm_head.weight` is left out."""
        tensors = skeleton(self).state_dict()
        if self.tied:
            del tensors["lm_head.weight"]
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _window(config: dict[str, Any], rope: RopePlan) -> int:
    """Usable tokens. `context_window` is our own field, written where max_position_embeddings must mean something
    else (dynamic NTK takes L0 from there). Sliding attention equals full attention up to its width, and no further."""
    stated = config["max_position_embeddings"]
    window = config.get("context_window") or stated
    if not config.get("context_window") and rope.kind in ("dynamic", "yarn"):
        window = rope.window_after(stated)
    sliding = config.get("sliding_window")
    if sliding and config.get("use_sliding_window", config["model_type"] == "mistral"):
        window = min(window, sliding)
    if dual := config.get("dual_chunk_attention_config"):  # Qwen2.5-1M: farther positions need that attention
        window = min(window, dual.get("original_max_position_embeddings") or 262_144)
    return int(window)


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang and Sennrich 2019, arXiv 1910.07467) over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: NetworkConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.config = layer, config
        size, q_size, kv_size = config.hidden_size, config.num_heads, config.num_kv_heads
        self.q_proj = nn.Linear(size, q_size * config.head_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(size, kv_size * config.head_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(size, kv_size * config.head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size * config.head_dim, size, bias=config.output_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        batch, tokens, _ = x.shape  # x: [B, T, C]
        size = self.config.head_dim
        q = self.q_proj(x).view(batch, tokens, -1, size)  # [B, T, H, D]
        k = self.k_proj(x).view(batch, tokens, -1, size)  # [B, T, G, D]
        v = self.v_proj(x).view(batch, tokens, -1, size)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H or G, T, D]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mixed = attend(self.layer, q, k, v)  # [B, H, T, D]
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, tokens, -1))


class MLP(nn.Module):
    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, C] -> [B, T, M] -> [B, T, C]
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Layer(nn.Module):
    def __init__(self, config: NetworkConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers and final norm: everything but the head."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, n) for n in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.rotary = Rotary(config.rope)
        self.gradient_checkpointing = False

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        rope_length: int | Tensor,
        attend: Attend = one_shot_attention,
    ) -> Tensor:
        """x: ids int64 [B, T] or embeddings [B, T, C]; positions int64 [B or 1, T]; rope_length as in RopePlan.cos_sin.
        Returns hidden states [B, T, C] after the final norm."""
        if not x.is_floating_point():
            x = self.embed_tokens(x)
        cos, sin = self.rotary(positions, rope_length)  # float32 [B or 1, 1, T, D]
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, cos, sin, attend, use_reentrant=False)
            else:
                x = layer(x, cos, sin, attend)
        return self.norm(x)


class CausalLM(nn.Module):
    """Decoder and head. Build it on the meta device and `load_state_dict(assign=True)` to hold the weights once."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mapped_bytes = 0  # of the weights, those that are views of a file
        self.tie()

    def tie(self) -> None:
        """Point the head at the embedding where the config says so; call again after weights were assigned."""
        if self.config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.norm.weight.dtype

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        rope_length: int | Tensor | None = None,
        attend: Attend = one_shot_attention,
        logits_to_keep: int = 0,
    ) -> Tensor:
        """ids int64 [B, T] to float32 logits [B, T, V], or [B, n, V] of the last n = logits_to_keep tokens.

        positions    int64 [B or 1, T]; 0 .. T-1 when left out
        rope_length  planned total length in tokens; T when left out, which is right only without a past
        attend       who attends over the past; plain causal attention when left out
        """
        if positions is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        if rope_length is None:
            rope_length = input_ids.shape[1]
        hidden = self.model(input_ids, positions, rope_length, attend)  # [B, T, C]
        hidden = hidden[:, -logits_to_keep:]  # [B, n, C]; all tokens when logits_to_keep is 0
        # Two dimensions for the head: with three, torch may pick a batched product that copies the whole weight.
        logits = self.lm_head(hidden.reshape(-1, hidden.shape[-1]))  # [B * n, V]
        return logits.view(*hidden.shape[:2], -1).float()


class _NoValues(TorchFunctionMode):
    """Leaves out the filling of new weights. On the meta device it costs no memory, and yet two seconds: torch's
    meta `normal_` imports its whole compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init" or func in (Tensor.normal_, Tensor.uniform_):
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def skeleton(config: NetworkConfig) -> CausalLM:
    """A network on the meta device: names and shapes, no memory, no values. Fill it by load_state_dict(assign=True)."""
    with torch.device("meta"), _NoValues():
        return CausalLM(config)
