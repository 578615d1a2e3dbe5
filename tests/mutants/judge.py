"""The test command of cosmic-ray: run the tests that execute what is mutated in this checkout.

Ends with 0 (the mutant lives) if they pass. The folder of the map and the seconds for one mutant come by
``HYPERGRAD_MUTANTS`` and ``HYPERGRAD_MUTANT_SECONDS``.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.mutants.covering import covering, durations, in_order

NOTHING_COVERS_IT = "no test executes it"


def mutated() -> tuple[str, range]:
    """Return the module of this checkout that differs from its commit, and which lines do."""
    diff = subprocess.run(["git", "diff", "-U0"], capture_output=True, text=True, check=True).stdout
    module = re.search(r"^--- a/(.*)$", diff, re.M)[1]
    first, count = re.search(r"^@@ -(\d+)(?:,(\d+))?", diff, re.M).groups()
    return module, range(int(first), int(first) + int(count or 1))


def main() -> int:
    """Run them."""
    folder, budget = Path(os.environ["HYPERGRAD_MUTANTS"]), float(os.environ["HYPERGRAD_MUTANT_SECONDS"])
    module, lines = mutated()
    seconds = durations(folder)
    tests = in_order(covering(folder, module, lines), seconds, module, budget)
    if not tests:
        print(NOTHING_COVERS_IT)
        return 0
    # A loop without end is a kill too: no test may take ten times as long as it took without the mutant.
    longest = 20 + 10 * max(seconds[test] for test in tests)
    quiet = [
        "-q",
        "-x",
        "--no-cov",
        "--no-header",
        "--tb=line",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore::SyntaxWarning",
    ]
    limits = ["-o", f"faulthandler_timeout={longest:.0f}", "-o", "faulthandler_exit_on_timeout=true"]
    return subprocess.run([sys.executable, "-m", "pytest", *quiet, *limits, *tests]).returncode


if __name__ == "__main__":
    sys.exit(main())
