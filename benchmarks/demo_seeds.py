"""How many of the demo's ten questions smol answers rightly, over many reports: the default seed is one of them.

python benchmarks/demo_seeds.py [--seeds 12] [--tokens 4000]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import table, write_results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=4000)
    options = parser.parse_args()
    command = Path(sys.executable).with_name("longverse")
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            line = [command, "demo", "--json", "--seed", str(seed), "--tokens", str(options.tokens), "--folder", folder]
            done = subprocess.run([*map(str, line)], capture_output=True, text=True, check=True)
            answer = json.loads(done.stdout)
            runs.append({"seed": seed, "tokens": answer["tokens"], "right": answer["right"], "of": answer["questions"]})
            print(runs[-1], flush=True)
    mean = sum(run["right"] for run in runs) / len(runs)
    print(
        table(["seed", "tokens", "right of 10"], [[str(run[k]) for k in ("seed", "tokens", "right")] for run in runs])
    )
    print(f"mean {mean:.1f}; written: {write_results('demo_seeds', {'runs': runs, 'mean': mean})}")


if __name__ == "__main__":
    main()
