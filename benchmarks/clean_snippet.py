"""Does the model card's own snippet run on folders that longverse wrote, where longverse is not installed?

Makes a fresh virtual environment with transformers, accelerate, torch and safetensors alone (the versions of this
one), writes two folders, smol in the XVERSE layout and a converted checkpoint of random weights that was laid out as
the official repositories are, and runs the snippet on each: word for word, but for the folder's name, and `.cuda()`
where there is no card. Writes results/clean_snippet.json.

    python benchmarks/clean_snippet.py
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from common import seconds, table, write_results

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("transformers", "accelerate", "torch", "safetensors")
CUDA_LINE = "inputs = inputs.cuda()\n"
SNIPPET = (
    """import torch
from transformers import AutoTokenizer, AutoModelForCausalLM
tokenizer = AutoTokenizer.from_pretrained("xverse/XVERSE-13B-256K")
model = AutoModelForCausalLM.from_pretrained("xverse/XVERSE-13B-256K", trust_remote_code=True, """
    """torch_dtype=torch.bfloat16, device_map='auto')
model = model.eval()
inputs = tokenizer('北京的景点:故宫、天坛、万里长城等。\\n深圳的景点:', return_tensors='pt').input_ids
""" + CUDA_LINE + """generated_ids = model.generate(inputs, max_new_tokens=64, eos_token_id=tokenizer.eos_token_id, """
    """repetition_penalty=1.1)
print(tokenizer.batch_decode(generated_ids, skip_special_tokens=True))
"""
)
# Run after the snippet: what it ran, and that nothing of ours was there to help.
FACTS = """
import importlib.util, json
rope = model.config.rope_parameters
facts = {"longverse": importlib.util.find_spec("longverse") is not None, "class": type(model).__name__,
         "module": type(model).__module__.split(".")[0], "rope": dict(rope), "prompt_tokens": inputs.shape[1],
         "new_tokens": generated_ids.shape[1] - inputs.shape[1],
         "text": tokenizer.batch_decode(generated_ids, skip_special_tokens=True)[0]}
print("FACTS " + json.dumps(facts, ensure_ascii=False))
"""


def folders(home: Path) -> dict[str, Path]:
    """smol exported, and a random official-layout folder converted."""
    sys.path.insert(0, str(ROOT))
    from longverse.models.convert import convert
    from longverse.models.export import export
    from tests.models.official_layout import make_official

    _, check = export("smol", home / "smol", layout="xverse")
    assert check is not None
    official, _ = make_official(home, dtype=torch.bfloat16)
    convert(str(official), home / "official")
    return {"smol, exported --to xverse": home / "smol", "random weights, official layout": home / "official"}


def run(python: Path, folder: Path, home: Path) -> dict[str, Any]:
    """The snippet on one folder in the clean environment; stops with its output where it fails."""
    snippet = SNIPPET if torch.cuda.is_available() else SNIPPET.replace(CUDA_LINE, "")
    code = snippet.replace("xverse/XVERSE-13B-256K", str(folder)) + FACTS
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LONGVERSE", "PYTHON", "HF_", "VIRTUAL_ENV"))}
    environment = {**kept, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home / "hf")}
    done = subprocess.run(
        [python, "-I", "-c", code], capture_output=True, text=True, env=environment, cwd=home, check=False
    )
    if done.returncode:
        sys.exit(f"The snippet failed on {folder}:\n{done.stdout}\n{done.stderr}")
    facts: dict[str, Any] = json.loads(done.stdout.rsplit("FACTS ", 1)[1])
    assert not facts.pop("longverse")
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="clean-snippet-") as temporary:
        home = Path(temporary)
        venv.create(home / "venv", with_pip=True)
        python = home / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
        pins = [f"{name}=={version(name).partition('+')[0]}" for name in PACKAGES]
        made = seconds(lambda: subprocess.run([python, "-m", "pip", "install", "-q", *pins], check=True))
        results = {name: run(python, folder, home) for name, folder in folders(home).items()}
    print(f"A clean environment with {', '.join(pins)} ({made:.0f} s to make):\n")
    rows = [
        [name, f"{facts['module']}.{facts['class']}", f"{facts['rope']['rope_theta']:,.0f}", str(facts["new_tokens"])]
        for name, facts in results.items()
    ]
    print(table(["folder", "class", "RoPE base", "new tokens"], rows))
    print(write_results("clean_snippet", {"packages": pins, "snippet": SNIPPET, "folders": results}).name)


if __name__ == "__main__":
    main()
