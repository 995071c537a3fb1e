"""What reads the command lines of pages refuses those that their commands would."""

import shlex

import pytest
from command_lines import check, command_of
from pages import ROOT, Block


def words_of(text: str) -> list[list[str]]:
    return [words for _, words in Block("page.md", 7, "", text).command_lines()]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("vistok generate --chekpoint runs/x", "checkpoint"),
        ("vistok import llamgen c2i_L.pt --output runs/x", "llamgen"),
        ("vistok import kl16 kl16.ckpt --output runs/x --options.imagesize 1", "imagesize"),
        ("vistok generate --checkpoint runs/x --guidance 'liner(1,2)'", "liner"),
        ("vistok genrate --checkpoint runs/x", "genrate"),
        ("accelerate launch --num_proceses 8 train/tokenizer.py", "num_proceses"),
        ("accelerate launch train/tokenizer.py --config configs/nothing.yaml", "nothing.yaml"),
        ("srun bash -c 'accelerate launch train/tokenizer.py --imges $N'", "imges"),
        ("python sample/nothing.py", "nothing.py"),
    ],
)
def test_a_wrong_line_is_refused(line, message, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises((SystemExit, ValueError)) as error:
        check(command_of(shlex.split(line)))
    assert message in capsys.readouterr().err + str(error.value)


def test_lines_are_joined_as_a_shell_joins_them():
    text = "# a comment\nvistok info \\\n  assets/emoji  # what it is\nvistok a '{\"x\":\n 1}'\n"
    assert words_of(text) == [["vistok", "info", "assets/emoji"], ["vistok", "a", '{"x":\n 1}']]
    with pytest.raises(ValueError, match=r"page\.md:7: a quote is not closed"):
        words_of("vistok info 'assets/emoji\n")


def test_what_stands_around_a_command_is_left_out():
    line = "WANDB_MODE=offline accelerate launch --machine_rank ${RANK} x.py > log"
    assert command_of(shlex.split(line))[2:] == ["--machine_rank", "1", "x.py"]
    line = "srun bash -c 'vistok info runs/$((8 * NODES)) &'"
    assert command_of(shlex.split(line)) == ["vistok", "info", "runs/1"]
    assert command_of(["wait", "-n"]) == command_of(["for", "rank", "in", "0"]) == []
    assert command_of(shlex.split("vistok info $HOME/x && wait"))[1:] == ["info", "1/x"]
