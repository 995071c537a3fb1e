"""Command lines: every script's options are the signature of its `main`, read by jsonargparse.

`run(main)` gives a script `--config FILE`, dotted overrides, `--help` and `--print_config`; a
mistake in the input ends in one line and exit code 2. `main` is the `vistok` command, which passes
the rest of its line to one of `vistok.commands`.
"""

import importlib
import inspect
import itertools
import logging
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser
from jsonargparse.typing import register_type

import vistok
from vistok import commands
from vistok.decoding.orders import Order
from vistok.decoding.samplers import Sampler
from vistok.decoding.schedules import Corrected, Schedule
from vistok.errors import UserError, suggestion
from vistok.launch import start_all_processes

register_type(Schedule, str, Schedule)
register_type(Corrected, str, Corrected)
register_type(Order, str, Order)
register_type(Sampler, str, Sampler)

_resolved: dict[str, Any] = {}


def resolved_config() -> dict[str, Any]:
    """Return the running command's options, defaults included, as plain nested values."""
    return _resolved


# How jsonargparse reports a name that it does not know.
_UNKNOWN = re.compile(r"(?:Option '|unrecognized arguments: -*|import path string: )([\w.]+)")


class _Parser(ArgumentParser):
    """Ends a wrong option or key in one line that names the nearest right one."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        unknown = _UNKNOWN.search(message)
        if unknown:
            message += suggestion(unknown.group(1).split(".")[-1], self._known_names())
        _fail(f"{message}; see --help")

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
    parser = _Parser(prog=prog, description=inspect.getdoc(main).split("\n\nArgs:")[0])
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with these options.")
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    parser.add_function_arguments(main, as_group=False, fail_untyped=True, sub_configs=True)
    return parser


def run(main: Callable[..., None], prog: str | None = None, args: list[str] | None = None) -> None:
    """Parse `main`'s options from the command line (or `args`) and call it."""
    start_all_processes()
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
        _fail(str(mistake))
    except KeyboardInterrupt:
        sys.exit(130)


def main() -> None:
    """Run `vistok COMMAND ...`."""
    modules = [module.name for module in pkgutil.iter_modules(commands.__path__)]
    names = [module.replace("_", "-") for module in modules]
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(f"usage: vistok {{{','.join(names)}}} ...; vistok COMMAND --help says more")
        return
    if name not in names:
        _fail(f"vistok has no command '{name}', only {', '.join(names)}{suggestion(name, names)}")
    command = importlib.import_module(f"vistok.commands.{modules[names.index(name)]}")
    run(command.main, f"vistok {name}", _named(sys.argv[2:], command.main))


def _named(arguments: list[str], command: Callable[..., None]) -> list[str]:
    """Give the leading bare arguments the names of the command's first parameters, and -o that of
    the one for what it writes."""
    names = list(inspect.signature(command).parameters)
    written = next((f"--{name}" for name in names if name in ("out", "output")), "-o")
    arguments = [written if argument == "-o" else argument for argument in arguments]
    bare = list(itertools.takewhile(lambda a: not a.startswith("-"), arguments))
    if len(bare) > len(names):
        _fail(f"unexpected argument {bare[len(names)]}; see --help")
    pairs = zip(names, bare, strict=False)
    return [*itertools.chain(*((f"--{k}", v) for k, v in pairs)), *arguments[len(bare) :]]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _one_line(message: str) -> str:
    return re.sub(r"\s*\n\s*", " ", message.strip())


def _fail(message: str) -> NoReturn:
    print(f"error: {_one_line(message)}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
