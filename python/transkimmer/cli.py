"""The `transkimmer` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from transkimmer_kernels import BackendUnavailable

from . import __version__
from .arguments import as_option, say_defaults

# What the extra `train` installs.
TRAINING_PACKAGES = ("accelerate", "datasets", "sklearn", "scipy")


def build_parser() -> argparse.ArgumentParser:
    from .bench import command as bench
    from .bench import profiling
    from .training import command as train
    from .training import demo_command as train_demo
    from .training import evaluation_command as evaluate

    parser = argparse.ArgumentParser(prog="transkimmer", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module, text in (
        ("bench", bench, "time dense against skimming, side by side, on real text"),
        ("profile", profiling, "where a forward's time goes: by operator, by layer, and between kernels"),
        ("train", train, "fine-tune a skimming model on a task"),
        ("evaluate", evaluate, "judge a trained model: metric, FLOPs, wall-clock time, tokens kept"),
        ("train-demo", train_demo, "train the demo model anew from the pretrained MiniLM"),
    ):
        sub = commands.add_parser(name, help=text, description=text)
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    say_defaults(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser, words = build_parser(), list(sys.argv[1:] if arguments is None else arguments)
    parsed = parser.parse_args(words)
    part = getattr(parsed, "part", None)  # of `bench`; its own options would replace those before it
    if part is not None and words[1] != part:
        parser.error(f"{parsed.command} {part}: options must stand behind {part!r}, not before it")
    try:
        return parsed.run(parsed)
    except KeyboardInterrupt:
        print(f"transkimmer {parsed.command}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, BackendUnavailable) as error:
        print(f"transkimmer {parsed.command}: {as_option(str(error), parsed)}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name not in TRAINING_PACKAGES:
            raise
        print(
            f"transkimmer {parsed.command}: needs {error.name}; run: pip install 'transkimmer[train]'", file=sys.stderr
        )
        return 2


if __name__ == "__main__":
    sys.exit(main())
