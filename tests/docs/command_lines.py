"""Reads a command line as its command would, without running it."""

import importlib
import inspect
import itertools
import re
import runpy
import shlex
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from accelerate.commands.launch import launch_command_parser
from pages import ROOT

from vistok import options as command_options

STARTERS = ("vistok", "python", "accelerate")
OPERATORS = ("&", "&&", "|", "||", ";", ">")
FILLED_IN = re.compile(r"\$\(\(.*?\)\)|\$\([^)]*\)|\$\{?\w+\}?")


def command_of(words: list[str]) -> list[str]:
    """Return the words from the command on, without what sets variables, starts it elsewhere or
    takes it on; none where it is no command of the project's. What the shell would fill in is 1."""
    words = [FILLED_IN.sub("1", word) for word in words]
    while words and (re.match(r"\w+=", words[0]) or words[0] == "srun"):
        words = words[1:]
    if words[:2] == ["bash", "-c"]:
        words = shlex.split(words[2])
    words = list(itertools.takewhile(lambda word: word not in OPERATORS, words))
    return words if words and words[0] in STARTERS else []


def check(words: list[str]) -> None:
    """Parse a command line; raises SystemExit, having printed why, or ValueError."""
    if words[0] == "accelerate":
        launch = launch_command_parser().parse_args(words[2:])
        words = ["python", *(["-m"] if launch.module else []), launch.training_script]
        words += launch.training_script_args
    if words[:3] == ["python", "-m", "vistok.cli"]:
        words = ["vistok", *words[3:]]
    if words[0] == "vistok":
        name, *rest = words[1:]
        if name in ("-h", "--help"):
            return
        main = _module(f"vistok.commands.{name.replace('-', '_')}")
        arguments = rest
    elif words[1] == "-m" and words[2].startswith("vistok."):
        main, arguments = _module(words[2]), words[3:]
    elif words[1].endswith(".py"):
        if not (ROOT / words[1]).is_file():
            raise ValueError(f"no file {words[1]}")
        main, arguments = _script(words[1]), words[2:]
    else:
        return
    if {"-h", "--help"} & set(arguments):
        return
    options = _parser(main).parse_args(arguments)
    if main is _module("vistok.commands.import"):
        _check_importer(options)


def _check_importer(options) -> None:
    """What an importer takes beside the file is its own signature."""
    commands = importlib.import_module("vistok.commands.import")
    importer = (commands.IMPORTERS | commands.DIRECTORY_IMPORTERS)[options.system]
    takes = inspect.signature(importer).parameters
    unknown = set(options.options or {}) - set(takes)
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        raise ValueError(f"{options.system} has no option {', '.join(unknown)}")


@lru_cache
def _module(name: str) -> Callable:
    try:
        return importlib.import_module(name).main
    except ModuleNotFoundError as error:
        raise ValueError(str(error)) from error


@lru_cache
def _script(path: str) -> Callable:
    return runpy.run_path(str(ROOT / Path(path)))["main"]


@lru_cache
def _parser(main: Callable):
    return command_options.parser_of(main, "command")
