"""Command lines: a script's options are the signature of its `main`, read by jsonargparse.

`run(main)` gives a script `--config FILE`, dotted overrides, `--print_config` and a `--help` that
ends with the command lines in the docstring of its file; a mistake in the input ends in one line
and exit code 2.
"""

import argparse
import importlib
import inspect
import itertools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter
from jsonargparse.typing import register_type

import vistok
from vistok.decoding.orders import Order
from vistok.decoding.samplers import Sampler
from vistok.decoding.schedules import Corrected, Schedule
from vistok.errors import UserError, fail, suggestion
from vistok.launch import start_all_processes

register_type(Schedule, str, Schedule)
register_type(Corrected, str, Corrected)
register_type(Order, str, Order)
register_type(Sampler, str, Sampler)

IMPORTS = "VISTOK_IMPORT"  # modules of one's own, whose classes and orders can then be named

_resolved: dict[str, Any] = {}


def resolved_config() -> dict[str, Any]:
    """Return the running command's options, defaults included, as plain nested values."""
    return _resolved


# How jsonargparse reports a name that it does not know.
_UNKNOWN = re.compile(r"(?:Option '|unrecognized arguments: -*|import path string: )([\w.]+)")
_EXAMPLE = re.compile(r"^ *((?:vistok [\w-]+|accelerate launch)(?: .*)?)$", re.MULTILINE)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Leaves examples as they are written."""


class _Parser(ArgumentParser):
    """Takes leading bare arguments as the first parameters of `main`, and ends a wrong option or
    key in one line that names the nearest right one."""

    parameters: tuple[str, ...] = ()

    def parse_args(self, args: Sequence[str] | None = None, *rest: Any, **options: Any):
        given = sys.argv[1:] if args is None else list(args)
        return super().parse_args(self._named(given), *rest, **options)

    def _named(self, arguments: list[str]) -> list[str]:
        bare = list(itertools.takewhile(lambda a: not a.startswith("-"), arguments))
        if len(bare) > len(self.parameters):
            fail(f"unexpected argument {bare[len(self.parameters)]}; see --help")
        pairs = zip(self.parameters, bare, strict=False)
        return [*itertools.chain(*((f"--{k}", v) for k, v in pairs)), *arguments[len(bare) :]]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        unknown = _UNKNOWN.search(message)
        if unknown:
            message += suggestion(unknown.group(1).split(".")[-1], self._known_names())
        fail(f"{message}; see --help")

    def _known_names(self) -> set[str]:
        """Options of this command, and vistok's classes with their arguments."""
        names = {option.lstrip("-") for a in self._actions for option in a.option_strings}
        names |= {name.split(".")[-1] for name in names} | set(vistok.__all__)
        for exported in (getattr(vistok, name) for name in vistok.__all__):
            if inspect.isclass(exported):
                names |= set(inspect.signature(exported.__init__).parameters)
        return names


def parser_of(main: Callable[..., None], prog: str) -> ArgumentParser:
    """Return what reads `main`'s options."""
    lines = examples(main)
    parser = _Parser(
        prog=prog,
        description=inspect.getdoc(main).split("\n\nArgs:")[0],
        epilog="\n  ".join(["examples:", *lines]) if lines else None,
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with these options.")
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    parser.add_function_arguments(main, as_group=False, fail_untyped=True, sub_configs=True)
    parser.parameters = tuple(inspect.signature(main).parameters)
    if "output" in parser.parameters:
        (written,) = (action for action in parser._actions if action.dest == "output")
        written.option_strings.append("-o")
        parser._option_string_actions["-o"] = written
    return parser


def examples(main: Callable[..., None]) -> list[str]:
    """Return the command lines in the docstring of `main`'s file."""
    return _EXAMPLE.findall(inspect.unwrap(main).__globals__.get("__doc__") or "")


def run(main: Callable[..., None], prog: str | None = None, args: list[str] | None = None) -> None:
    """Parse `main`'s options from the command line (or `args`) and call it."""
    start_all_processes()
    import_own()
    parser = parser_of(main, prog or os.path.basename(sys.argv[0]))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parser.parse_args(args)
    debug = options.pop("debug")
    options.pop("config")
    _resolved.clear()
    _resolved.update(yaml.safe_load(parser.dump(options, skip_validation=True)))
    if "seed" in options:
        torch.manual_seed(options.seed)  # configured models draw their weights before `main` starts
    try:
        main(**parser.instantiate(options).as_dict())
    except (UserError, TypeError, ValueError) as error:
        # jsonargparse wraps what the constructor of a configured class raises.
        mistake = next((e for e in _causes(error) if isinstance(e, UserError)), None)
        if debug or mistake is None:
            raise
        fail(str(mistake))
    except KeyboardInterrupt:
        sys.exit(130)


def import_own() -> None:
    """Import the modules that the environment lists, separated by commas."""
    for module in filter(None, os.environ.get(IMPORTS, "").split(",")):
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            fail(f"{IMPORTS}={module}: {error}; PYTHONPATH says where modules are looked for")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
