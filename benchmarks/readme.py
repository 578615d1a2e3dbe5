"""Run the complete programs of README and docs, as they are printed there, and compare their output.

    python -m benchmarks.readme [README.md docs/implicit.md …]

A complete program is a Python block that begins with an import and is followed by its output. One that
imports what is not installed is passed over, with a word.
"""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAM = re.compile(r"```python\n((?:import|from) .*?)```\n(?:(?!```).)*```\n(.*?)```", re.DOTALL)
IMPORTED = re.compile(r"^(?:import|from) (\w+)", re.MULTILINE)
# Rounding differs between machines: compare what does not depend on the last digits.
LOOSE = re.compile(r"\d\.\de-\d\d|\d+\.\d+|\d+(?= products)")


def main() -> None:
    given = [Path(name) for name in sys.argv[1:]] or [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
    for path in given:
        longest = 40 if path.name == "README.md" else 60
        for program, printed in PROGRAM.findall(path.read_text()):
            first = program.splitlines()[0]
            missing = [name for name in IMPORTED.findall(program) if not find_spec(name)]
            if missing:
                print(f"passed over, for want of {missing[0]}: {first} …")
                continue
            assert len(program.splitlines()) <= longest, f"more than {longest} lines: {first} …"
            done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
            print(done.stdout, end="")
            if LOOSE.sub("#", done.stdout).split() != LOOSE.sub("#", printed).split():
                sys.exit(f"{path.name} prints something else:\n{printed}")


if __name__ == "__main__":
    main()
