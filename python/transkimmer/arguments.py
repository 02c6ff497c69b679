"""Checks of what a command is given, before it does any work; errors name the option, its value and what is allowed."""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

# Seconds that the hub gets to say whether it has a model. Loading would ask it again and again, for more than a minute.
_SECONDS = 10.0
_ALLOWED = "a folder that save_pretrained wrote, or a model's name on the Hugging Face hub"
# What a folder has to hold -> by which of its files it is known.
_PARTS = {
    "config.json": ("config.json",),
    "weights": ("*.safetensors", "*.bin"),
    "tokenizer": ("tokenizer*", "vocab*", "*.model"),
}
MODEL = ("config.json", "weights")


def option_of(name: str) -> str:
    """The option of a parameter: `--batch-size` of "batch_size"."""
    return f"--{name.replace('_', '-')}"


def check_least(arguments: argparse.Namespace, **least: int) -> None:
    """ValueError for the first of `least` that is below its value there; one that was not given, None, passes."""
    for name, allowed in least.items():
        value = getattr(arguments, name)
        if value is not None and value < allowed:
            raise ValueError(f"{option_of(name)} {value}: must be at least {allowed}")


def check_outputs(arguments: argparse.Namespace, names: Iterable[str]) -> None:
    """Looks at the files that a command is to write, before it works for them.

    Args:
        arguments: of the command. names: of those that are files to write, None where they were not given.

    Raises:
        ValueError: one of them cannot be a file there, or is given for two.
    """
    taken: dict[Path, str] = {}
    for name in names:
        path: Path | None = getattr(arguments, name)
        if path is None:
            continue
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise ValueError(f"--{name} {path}: must be a file in a folder that exists")
        other = taken.setdefault(path.resolve(), name)
        if other != name:
            raise ValueError(f"--{name} {path}: must be another file than --{other}")


def check_pretrained(option: str, name: str, parts: Sequence[str] = MODEL) -> None:
    """Sees to it that there is something pretrained to be loaded by `name`, a folder or a name on the hub.

    Args:
        option: that names it. parts: what a folder has to hold: "config.json", "weights", "tokenizer".

    Raises:
        ValueError: no such folder, or one that lacks a part; no such model on the hub, or no hub to be reached.
    """
    if (name and Path(name).is_dir()) or not _may_be_on_the_hub(name):
        check_folder(option, name, parts)
    else:
        _ask_the_hub(option, name)


def check_folder(option: str, name: str, parts: Sequence[str] = MODEL, allowed: str = _ALLOWED) -> None:
    """As `check_pretrained`, of what can be a folder only; allowed: how an error says what it must be."""
    if not name or not Path(name).is_dir():
        raise ValueError(f"{option} {name or repr(name)}: no such folder; must be {allowed}")
    for part in parts:
        if not any(any(Path(name).glob(pattern)) for pattern in _PARTS[part]):
            inside = Path(name) / "model"  # where a run of `train` has it
            hint = f"; did you mean {inside}?" if (inside / "config.json").is_file() else ""
            raise ValueError(f"{option} {name}: the folder has no {part}; must be {allowed}{hint}")


def _may_be_on_the_hub(name: str) -> bool:
    """Whether `name` has the form of a name there, and does not point at where there is a file or folder here."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    path = Path(name)
    return not path.exists() and (path.parent == Path() or not path.parent.is_dir())


@functools.cache  # a refusal is not kept
def _ask_the_hub(option: str, name: str) -> None:
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.utils import RepositoryNotFoundError

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        HfApi().model_info(name, timeout=_SECONDS)
    except RepositoryNotFoundError as error:
        raise ValueError(f"{option} {name}: no such folder, and no such model on the hub") from error
    except Exception as error:  # whatever the hub's client raises: offline, busy, too slow
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{option} {name}: no such folder, and the hub cannot be asked ({reason}); must be {_ALLOWED}"
        ) from error


def as_option(message: str, arguments: argparse.Namespace) -> str:
    """What an error says, with the option in the place of the parameter or of the `SkimConfig` field of its name."""
    found = re.match(r"(?:SkimConfig\.)?(\w+)=.+?: ", message)
    value = None if found is None else getattr(arguments, found[1], None)
    if found is None or value is None:
        return message
    return f"{option_of(found[1])} {value}: {message[found.end() :]}"


def say_defaults(parser: argparse.ArgumentParser) -> None:
    """Adds to the help of every option what it is where it is not given, unless the help says that."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                say_defaults(command)
            continue
        default = " ".join(map(str, action.default)) if isinstance(action.default, list) else action.default
        if action.option_strings and default not in (None, False, "", argparse.SUPPRESS):
            help_text = action.help or ""
            if "default" not in help_text:
                action.help = "; ".join(part for part in (help_text, f"default: {default}") if part)
