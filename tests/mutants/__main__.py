"""Mutation testing: ``python -m tests.mutants map``, then ``run``, then ``report`` (README.md tells more)."""

import argparse
import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from aiohttp import web
from cosmic_ray import commands
from cosmic_ray.distribution.http import HttpDistributor, handle_mutate_and_test
from cosmic_ray.work_db import WorkDB, use_db

from tests.mutants.covering import DURATIONS, MAP
from tests.mutants.draw import draw, modules
from tests.mutants.operators import register
from tests.mutants.score import report

SESSION, SIZES, PORT = "session.sqlite", "sizes.json", 9870
LONGEST = 1800.0  # seconds; the judge ends tests that hang long before


def environment(checkout: Path, **more: str) -> dict[str, str]:
    """Return one in which the packages of this checkout are imported, whatever is installed."""
    path = os.pathsep.join(str(checkout / folder) for folder in (".", "backends", "reference"))
    return os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"} | more


def checkout(folder: Path) -> Path:
    """Return a fresh checkout of the commit that this one is at."""
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run(["git", "clone", "--quiet", ".", folder], check=True)
    return folder


def make_map(out: Path, workers: int) -> None:
    """Run all tests once, and write down which test executes which line, and how long it takes."""
    here = checkout(out / "map")
    options = [
        "-q",
        "-n",
        str(workers),
        "-p",
        "no:cacheprovider",
        "--cov",
        "--cov-context=test",
        "--cov-report=",
    ]
    files = environment(here, COVERAGE_FILE=str(out / MAP))
    subprocess.run(
        [sys.executable, "-m", "pytest", *options, f"--junitxml={out / DURATIONS}"],
        cwd=here,
        env=files,
        check=True,
    )


def wait_for(port: int) -> None:
    """Return when a worker listens; raise after a minute."""
    for _ in range(600):
        with suppress(OSError), socket.create_connection(("localhost", port)):
            return
        time.sleep(0.1)
    raise TimeoutError(f"no worker listens at port {port}")


def run(out: Path, workers: int, count: int | None, seed: int, seconds: float) -> None:
    """Try the mutants, as many at a time as there are workers, each in a checkout of its own."""
    session = str(out / SESSION)
    if not (out / SESSION).exists():
        with use_db(session) as work:
            commands.init(modules(), work, {})
            (out / SIZES).write_text(json.dumps(draw(work, count, seed)))
    served = []
    for number in range(workers):
        here = checkout(out / f"worker{number}")
        told = environment(here, HYPERGRAD_MUTANTS=str(out), HYPERGRAD_MUTANT_SECONDS=str(seconds))
        worker = [sys.executable, "-m", "tests.mutants", "worker", "--port", str(PORT + number)]
        served.append(subprocess.Popen(worker, cwd=here, env=told))
    try:
        for number in range(workers):
            wait_for(PORT + number)
        with use_db(session, WorkDB.Mode.open) as work:
            asyncio.set_event_loop(asyncio.new_event_loop())
            HttpDistributor()(
                list(work.pending_work_items),
                f"{sys.executable} -m tests.mutants.judge",
                LONGEST,
                {"worker-urls": [f"http://localhost:{PORT + number}" for number in range(workers)]},
                on_task_complete=work.set_result,
            )
    finally:
        for worker in served:
            worker.terminate()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("do", choices=["map", "run", "report", "worker"])
    parser.add_argument("--out", type=Path, default=Path("mutants"), help="folder of the map and the session")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="tests run in so many processes")
    parser.add_argument("--all", action="store_true", help="try all mutants, not a sample")
    parser.add_argument("--sample", type=int, default=400, help="how many, in proportion to the folders")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--seconds", type=float, default=60.0, help="of tests for one mutant")
    parser.add_argument("--port", type=int, help="of a worker")
    asked = parser.parse_args()
    out = asked.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    register()
    match asked.do:
        case "map":
            make_map(out, asked.workers)
        case "run":
            run(out, asked.workers, None if asked.all else asked.sample, asked.seed, asked.seconds)
        case "report":
            with use_db(str(out / SESSION), WorkDB.Mode.open) as work:
                print(report(work, json.loads((out / SIZES).read_text())))
        case "worker":
            app = web.Application()
            app.add_routes([web.post("/", handle_mutate_and_test)])
            web.run_app(app, host="localhost", port=asked.port, print=None)  # it runs what it is told


if __name__ == "__main__":
    main()
