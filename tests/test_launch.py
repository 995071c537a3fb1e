"""What `accelerate launch` starts alone on CPUs becomes all processes of its machine."""

import contextlib
import os
import sys
from itertools import pairwise

import psutil
import pytest

from vistok.errors import UserError
from vistok.launch import start_all_processes


class Started(Exception):
    """In place of the program that would replace this one."""


@pytest.fixture
def launched(monkeypatch):
    def launch(arguments: str, address: str | None = "127.0.0.1") -> list[str]:
        """Return the command that takes this process's place; none where none does."""
        environment = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True"}
        if address:
            environment |= {"MASTER_ADDR": address, "MASTER_PORT": "29500"}
        monkeypatch.setattr(os, "environ", environment)
        monkeypatch.setattr("ctypes.CDLL", lambda name: type("C", (), {"prctl": print})())
        command = ["python", "accelerate", "launch", *arguments.split(), "x.py"]
        monkeypatch.setattr(psutil.Process, "cmdline", lambda self: command)
        monkeypatch.setattr(sys, "argv", ["x.py", "--seed", "1"])
        found = []

        def execv(program: str, words: list[str]):
            found.extend(words)
            raise Started

        monkeypatch.setattr(os, "execv", execv)
        with contextlib.suppress(Started):
            start_all_processes()
        return found

    return launch


def options(words: list[str]) -> dict[str, str]:
    return {k[2:]: v for k, v in pairwise(words) if k.startswith("--")}


def test_processes_of_one_machine(launched):
    found = options(launched("--cpu --num_processes 3"))
    assert found["nproc_per_node"] == "3" and found["nnodes"] == "1" and found["node_rank"] == "0"
    assert launched("--cpu --num_processes 1", address=None) == []


def test_processes_of_several_machines(launched):
    several = "--cpu --num_machines 2 --machine-rank 1 --num_processes"
    found = options(launched(f"{several} 4", address="10.0.0.1"))
    assert found["nproc_per_node"] == "2" and found["nnodes"] == "2" and found["node_rank"] == "1"
    assert found["master_addr"] == "10.0.0.1" and found["master_port"] == "29500"
    with pytest.raises(UserError, match="--num_processes 3, of all machines together, must be a"):
        launched(f"{several} 3")


def test_a_number_of_processes_that_the_launcher_keeps_to_itself(launched):
    with pytest.raises(UserError, match="pass it --num_processes as an argument"):
        launched("--cpu")
