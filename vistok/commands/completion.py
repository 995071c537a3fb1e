"""vistok completion: what lets a shell complete commands, options and their values at the tab key.

vistok completion bash > ~/.local/share/bash-completion/completions/vistok
vistok completion zsh > ~/.zfunc/_vistok
vistok completion fish > ~/.config/fish/completions/vistok.fish
"""

import importlib
import inspect
from typing import Any, Literal, get_args, get_origin

import shtab
from jsonargparse import ArgumentParser

from vistok import commands, data
from vistok.cli import command_modules, summary
from vistok.options import parser_of

SOURCES = [data.Emoji, data.ImageFolder, data.TarShards]


def main(shell: Literal["bash", "zsh", "fish"]) -> None:
    """Print a script of completions, made from the options that the commands have now. It stands
    alone: no tab starts Python.

    Args:
        shell: whose script
    """
    parser = ArgumentParser(prog="vistok")
    subcommands = parser.add_subcommands()
    for name, module in command_modules().items():
        imported = importlib.import_module(f"{commands.__name__}.{module}")
        command = parser_of(imported.main, f"vistok {name}")
        complete(command)
        subcommands.add_subcommand(name, command, help=summary(module))
    print(parser.get_completion_script(f"shtab-{shell}"))


def complete(command: ArgumentParser) -> None:
    """Add what completes, beside what jsonargparse knows: file names for words, the options of
    pictures, and bare arguments."""
    actions = [action for action in command._actions if hasattr(action, "_typehint")]
    for action in actions:
        allowed = alternatives(action._typehint)
        if str in allowed:
            action.complete = shtab.FILE
        if data.ImageSource in allowed and str in allowed:
            parameters = {k: v for s in SOURCES for k, v in inspect.signature(s).parameters.items()}
            for name, parameter in parameters.items():
                command.add_argument(f"--{action.dest}.{name}", type=parameter.annotation)
    choices = get_args(actions[0]._typehint)
    if get_origin(actions[0]._typehint) is Literal:
        command.add_argument("bare", choices=choices)
    command.add_argument("files", nargs="*").complete = shtab.FILE


def alternatives(hint: Any) -> set[Any]:
    """Return the types of a union, or of a list of them."""
    return {hint, *(found for part in get_args(hint) for found in alternatives(part))}
