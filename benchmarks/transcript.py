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
        "--facts", type=int, nargs="+", default=[0, 6], help="which of the report's ten facts to ask for"
    )
    wanted = parser.parse_args().facts
    report = sized_report(Engine.load("smol"), 0, 4000, 10, "en")
    questions = [report.facts[n].question for n in wanted]
    name = "longverse-report-0.md"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, name).write_text(report.text)
        command = [Path(sys.executable).with_name("longverse"), "ask", name, *questions]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    asked = " \\\n      ".join(f'"{question}"' for question in questions)
    text = f"$ longverse ask {name} {asked}\n\n{done.stdout.strip()}"
    print(text, done.stderr, sep="\n\n")
    print(f"written: {write_results('transcript', {'text': text, 'figures': done.stderr})}")


if __name__ == "__main__":
    main()
