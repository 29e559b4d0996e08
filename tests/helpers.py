"""Small random models for the tests: the same weights in our network and in a transformers class we did not write."""

from typing import Any

import torch

from longverse.models.network import CausalLM, NetworkConfig

TINY: dict[str, Any] = {
    "vocab_size": 151,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
}


def tiny_config(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    """A config.json dict of a three-layer model; `changes` override single fields."""
    return {"model_type": model_type, **TINY, **changes}


def random_tensors(config: NetworkConfig, seed: int = 0, scale: float = 0.15) -> dict[str, torch.Tensor]:
    """Random float32 weights by checkpoint name; norms near 1, everything else normal with `scale`."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in config.parameter_shapes().items():
        values = torch.randn(shape, generator=generator)
        tensors[name] = 1 + 0.1 * values if "norm" in name else scale * values
    return tensors


def random_network(config: dict[str, Any], seed: int = 0, scale: float = 0.15) -> CausalLM:
    """Our network with random weights, in float32 and evaluation mode."""
    network_config = NetworkConfig.from_dict(config)
    network = CausalLM(network_config)
    missing, unexpected = network.load_state_dict(random_tensors(network_config, seed, scale), strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    network.tie()
    return network.eval()


def transformers_twin(network: CausalLM, config: dict[str, Any]) -> torch.nn.Module:
    """transformers' own class for the same config, holding the same weights, with plain SDPA attention."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(config)
    twin_config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    twin = AutoModelForCausalLM.from_config(twin_config, attn_implementation="sdpa").float().eval()
    missing, unexpected = twin.load_state_dict(network.state_dict(), strict=False)
    assert not unexpected, unexpected
    assert not missing, missing
    return twin
