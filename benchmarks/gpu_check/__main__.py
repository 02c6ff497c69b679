"""`python -m benchmarks.gpu_check`: everything that only a GPU can show, in one command."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from rich.console import Console

from . import report, runner

MINUTES = 8.7  # with what starting and writing take, less than nine


def main(arguments: list[str] | None = None) -> int:
    """0 when no step failed; 1 when one did, or when there is no GPU and that was not allowed; 2: bad arguments."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=(__doc__ or "").split(": ")[1])
    default = Path(os.environ.get("OUT") or "build/gpu-check")
    parser.add_argument("--out", type=Path, default=default, help="folder for gpu-check.json and gpu-check.log")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="limit for everything together")
    parser.add_argument(
        "--only", nargs="+", metavar="STEP", help="run these, e.g. --only conformance 'benchmark linear'"
    )
    parser.add_argument("--allow-no-gpu", action="store_true", help="exit with 0 where there is no GPU")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a running step is ended, too
    try:
        data = runner.check(options.out, options.minutes, options.only)
    except runner.UnknownStep as error:
        print(f"--only: {error}", file=sys.stderr)
        return 2
    report.show(data, Console(width=None if sys.stdout.isatty() else 150))
    print(f"wrote {options.out / 'gpu-check.json'} and {options.out / 'gpu-check.log'}")
    failed = any(step["status"] == "failed" for step in data["steps"])
    if data["device"] is None:
        print("there is no GPU here: nothing was shown about one")
        return int(failed or not options.allow_no_gpu)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
