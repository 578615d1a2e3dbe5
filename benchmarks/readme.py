"""Run the first program of the README, as it is printed there, and compare its output.

python benchmarks/readme.py [README.md]
"""

import re
import subprocess
import sys
from pathlib import Path

readme = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "README.md").read_text()
program = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
printed = re.search(r"```\n(.*?)```", readme[readme.index(program) + len(program) + 3 :], re.DOTALL)[1]
output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
print(output, end="")
# Rounding differs between machines: compare what does not depend on the last digits.
loose = re.compile(r"\d\.\de-\d\d|\d\.\d{6,8}")
if loose.sub("#", output).split() != loose.sub("#", printed).split():
    sys.exit(f"the README prints something else:\n{printed}")
