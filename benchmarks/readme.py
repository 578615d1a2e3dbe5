"""Run the complete programs of the README, as they are printed there, and compare their output.

    python benchmarks/readme.py [README.md]

A complete program is a Python block that begins with an import and is followed by its output. One whose
framework is not installed is passed over, with a word.
"""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

PROGRAM = re.compile(r"```python\n((?:import|from) .*?)```\n.*?```\n(.*?)```", re.DOTALL)
# Rounding differs between machines: compare what does not depend on the last digits.
LOOSE = re.compile(r"\d\.\de-\d\d|\d+\.\d+")


def main() -> None:
    readme = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "README.md").read_text()
    for program, printed in PROGRAM.findall(readme):
        first = program.splitlines()[0]
        missing = [name for name in ("torch", "jax") if f"import {name}" in program and not find_spec(name)]
        if missing:
            print(f"passed over, for want of {missing[0]}: {first} …")
            continue
        assert len(program.splitlines()) <= 40, f"more than 40 lines: {first} …"
        done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
        print(done.stdout, end="")
        if LOOSE.sub("#", done.stdout).split() != LOOSE.sub("#", printed).split():
            sys.exit(f"the README prints something else:\n{printed}")


if __name__ == "__main__":
    main()
