"""Adapter folders that are incomplete; merging itself is tested beside the training that makes adapters."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from longverse.errors import UserError
from longverse.models.adapters import CONFIG, PREFIX, WEIGHTS, merge_adapter
from tests.helpers import random_network, tiny_config

Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"r": None}, "has r None"),
        ({"r": 0}, "has r 0"),
        ({"r": "x"}, "has r 'x'"),
        ({"lora_alpha": None}, "has lora_alpha None"),
        ({"peft_type": "IA3"}, "only LoRA"),
        ({"use_dora": True}, "DoRA"),
    ],
)
def test_an_adapter_config_that_says_too_little(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | change
    (tmp_path / CONFIG).write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    save_file(
        {f"{PREFIX}{Q}.lora_A.weight": torch.ones(2, 64), f"{PREFIX}{Q}.lora_B.weight": torch.ones(64, 2)},
        tmp_path / WEIGHTS,
    )
    with pytest.raises(UserError, match=says):
        merge_adapter(random_network(tiny_config()), tmp_path)
