"""The `vistok` command: passes the rest of its line to one of `vistok.commands`.

Only the command that was asked for is imported, so that `vistok --help` answers at once.
"""

import ast
import importlib
import pkgutil
import sys
from pathlib import Path

from vistok import commands
from vistok.errors import fail, suggestion

HELP = ("-h", "--help")


def main() -> None:
    """Run `vistok COMMAND ...`."""
    modules = command_modules()
    name = sys.argv[1] if len(sys.argv) > 1 else HELP[0]
    if name in HELP:
        print(overview(modules))
        return
    if name not in modules:
        fail(
            f"vistok has no command '{name}', only {', '.join(modules)}{suggestion(name, modules)}"
        )
    from vistok.options import run  # what reads options takes seconds to import

    command = importlib.import_module(f"{commands.__name__}.{modules[name]}")
    run(command.main, f"vistok {name}", sys.argv[2:])


def command_modules() -> dict[str, str]:
    """Return the module of each command."""
    modules = [module.name for module in pkgutil.iter_modules(commands.__path__)]
    return {module.replace("_", "-"): module for module in modules}


def overview(modules: dict[str, str]) -> str:
    """Return a line for each command."""
    width = max(map(len, modules))
    return "\n".join(
        [
            "usage: vistok COMMAND ...",
            "",
            *(f"  {name:{width}}  {summary(module)}" for name, module in modules.items()),
            "",
            "vistok COMMAND --help says more of one of them, with examples;",
            "vistok completion bash prints what completes these names and their options.",
        ]
    )


def summary(module: str) -> str:
    """Return what the first line of a command's file says of it, without importing it."""
    source = Path(*commands.__path__, f"{module}.py").read_text(encoding="utf-8")
    first = ast.get_docstring(ast.parse(source)).splitlines()[0]
    return first.partition(": ")[2].removesuffix(".")


if __name__ == "__main__":
    main()
