"""`python -m benchmarks.gpu_check`: everything that only a GPU can show, in one command."""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
from pathlib import Path

MINUTES = 8.7  # with what starting and writing take, less than nine
# Of this process and of its steps; without Triton, its kernels are among what was not shown.
PACKAGES = ("torch", "transformers", "rich", "hypothesis", "pytest", "pytest-benchmark")


def missing_packages() -> list[str]:
    return [name for name in PACKAGES if importlib.util.find_spec(name.replace("-", "_")) is None]


def main(arguments: list[str] | None = None) -> int:
    """The exit status, see docs/gpu-check.md."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=(__doc__ or "").split(": ")[1])
    default = Path(os.environ.get("OUT") or "build/gpu-check")
    parser.add_argument("--out", type=Path, default=default, help="folder for gpu-check.json and gpu-check.log")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="limit for everything together")
    parser.add_argument(
        "--only", nargs="+", metavar="STEP", help="run these, e.g. --only conformance 'benchmark linear'"
    )
    parser.add_argument("--allow-no-gpu", action="store_true", help="exit with 0 where there is no GPU")
    options = parser.parse_args(arguments)
    if missing := missing_packages():
        print(f"gpu-check: {sys.executable} lacks {', '.join(missing)} (docs/gpu-check.md)", file=sys.stderr)
        return 2
    from rich.console import Console  # from here on, so that a missing package is one line

    from . import report, runner, verdict

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a running step is ended, too
    try:
        data = runner.check(options.out, options.minutes, options.only)
    except runner.UnknownStep as error:
        print(f"--only: {error}", file=sys.stderr)
        return verdict.BAD_ARGUMENTS
    report.show(data, Console(width=None if sys.stdout.isatty() else 150))
    print(f"wrote {options.out / 'gpu-check.json'} and {options.out / 'gpu-check.log'}")
    if data["device"] is None:
        print("there is no GPU here: nothing was shown about one")
    else:
        for heading, lines in (("not shown", verdict.not_shown(data)), ("aim missed", verdict.missed(data))):
            print("".join(f"{heading}: {line}\n" for line in lines), end="")
    return verdict.status(data, allow_no_gpu=options.allow_no_gpu)


if __name__ == "__main__":
    sys.exit(main())
