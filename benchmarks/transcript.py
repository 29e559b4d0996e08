"""What the README opens with: two questions about the demo's report, as the command prints them.

python benchmarks/transcript.py [--facts 0 6]
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from common import write_results

from longverse.commands_demo import sized_report
from longverse.inference.engine import Engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--facts", type=int, nargs="+", default=[0, 5], help="which of the report's ten facts to ask for"
    )
    wanted = parser.parse_args().facts
    report = sized_report(Engine.load("smol"), 1, 4000, 10, "en")
    questions = [report.facts[n].question for n in wanted]
    name = "longverse-report-1.md"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, name).write_text(report.text)
        command = [Path(sys.executable).with_name("longverse"), "ask", name, *questions]
        done = subprocess.run(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
        )
    asked = " \\\n      ".join(f'"{question}"' for question in questions)
    # On a terminal the lines of progress are a bar that goes away.
    printed = "\n".join(line for line in done.stdout.splitlines() if not line.startswith("Reading "))
    text = f"$ longverse ask {name} {asked}\n\n{printed.strip()}"
    print(text)
    print(f"written: {write_results('transcript', {'text': text})}")


if __name__ == "__main__":
    main()
