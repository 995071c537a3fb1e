"""The command line as a whole: every command explains itself, in the same words as the others, and
a shell completes it."""

import importlib
import inspect
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import NoneType

import pytest

from vistok.cli import command_modules, main, overview, summary
from vistok.commands import completion
from vistok.commands.completion import alternatives
from vistok.options import examples, parser_of

ROOT = Path(__file__).parents[1]
COMMANDS = command_modules()


@pytest.fixture(scope="module")
def mains():
    return {
        name: importlib.import_module(f"vistok.commands.{module}").main
        for name, module in COMMANDS.items()
    }


@pytest.fixture(scope="module")
def parsers(mains):
    return {name: parser_of(main, f"vistok {name}") for name, main in mains.items()}


def test_help_names_every_command_and_imports_none():
    code = (
        "import sys; sys.argv = ['vistok', '--help']; from vistok.cli import main; main();"
        "assert not {'torch', 'jsonargparse'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith("  ")]
    assert [name for name, _ in lines] == list(COMMANDS)
    assert done.stdout == overview(COMMANDS) + "\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_its_line(name):
    source = (ROOT / "vistok" / "commands" / f"{COMMANDS[name]}.py").read_text()
    assert source.lstrip("r").startswith(f'"""vistok {name}: {summary(COMMANDS[name])}')
    assert summary(COMMANDS[name])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_is(name, parsers):
    silent = [a.dest for a in parsers[name]._actions if not a.help]
    assert silent == []


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_examples_that_can_be_run(name, mains, parsers, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests" / "docs")
    from command_lines import check

    lines = examples(mains[name])
    assert lines
    assert parsers[name].format_help().endswith("\n  ".join(["examples:", *lines]) + "\n")
    monkeypatch.chdir(ROOT)
    for line in lines:
        line = line.partition(" > ")[0].replace("SPEC.yaml", "benchmarks/comparison/emoji.yaml")
        words = shlex.split(line)
        assert name in words
        check(words)


def test_an_option_is_of_one_type_in_all_commands(parsers):
    found: dict[str, dict[frozenset, list[str]]] = {}
    for name, parser in parsers.items():
        for action in parser._actions:
            if hasattr(action, "_typehint"):
                types = frozenset(alternatives(action._typehint) - {NoneType})
                leaves = frozenset(t for t in types if not alternatives(t) - {t})
                found.setdefault(action.dest, {}).setdefault(leaves, []).append(name)
    assert {option: types for option, types in found.items() if len(types) > 1} == {}


def test_what_is_written_is_named_output(mains):
    names = {name: list(inspect.signature(main).parameters) for name, main in mains.items()}
    for other in ("out", "file", "path", "ckpt", "workers"):
        assert [name for name in names if other in names[name]] in ([], ["decompress"])


def test_the_first_options_may_stay_unnamed(parsers):
    options = parsers["compress"].parse_args(["a.png", "DIR", "-o", "a.vtk", "--bytes", "9"])
    given = options.image, options.tokenizer, options.output, options.bytes
    assert given == ("a.png", "DIR", "a.vtk", 9)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inof"], "did you mean 'info'"),
        (["info", "--chekpoint", "DIR"], "did you mean 'checkpoint'"),
        (["info", "DIR", "another"], "unexpected argument another"),
        (["completion", "bsh"], "bash"),
    ],
)
def test_mistakes_end_in_one_line(words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vistok", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory) -> Path:
    """What `vistok completion bash` prints."""
    path = tmp_path_factory.mktemp("completion") / "vistok"
    with path.open("w") as file, redirect_stdout(file):
        completion.main("bash")
    return path


TAB = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
$(complete -p vistok | sed 's/.* -F \\([^ ]*\\) .*/\\1/')
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("vistok ge", ["generate"]),
        ("vistok co", ["compare", "completion", "compress"]),
        ("vistok generate --pl", ["--plan"]),
        ("vistok import --system tokenf", ["tokenflow", "tokenflow-t2i"]),
        ("vistok import tokenf", ["tokenflow", "tokenflow-t2i"]),
        ("vistok export --tokenizer_dtype fl", ["float16", "float32", "float8_e4m3fn"]),
        ("vistok evaluate --probe ", ["false", "true"]),
        ("vistok evaluate --data.spl", ["--data.split"]),
        ("vistok info asset", ["assets"]),
        ("vistok generate --checkpoint asset", ["assets"]),
        ("vistok evaluate --data asset", ["assets"]),
    ],
)
def test_bash_completes(line, expected, bash_script):
    words = line.split(" ")
    command = ["bash", "-c", TAB, "bash", bash_script, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert sorted(done.stdout.split()) == expected


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_know_the_same_options(shell, capsys, parsers):
    completion.main(shell)
    script = capsys.readouterr().out
    for name in COMMANDS:
        assert name in script
    for option in ("lpips_weights", "tokenizer_dtype", "per_channel"):
        assert option in script
