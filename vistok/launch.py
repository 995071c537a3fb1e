"""What `accelerate launch` leaves undone: several processes on CPUs, and passing signals on."""

import argparse
import ctypes
import os
import signal
import sys

import psutil
import torch

from vistok.errors import UserError

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def start_all_processes() -> None:
    """Replace this process by N under torchrun if `accelerate launch --num_processes N` has started
    it alone, as it does on CPUs, without a word, unless MPI does the starting.

    Where the launcher is ended by a signal, its processes are asked to end as well.
    """
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:  # started otherwise
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    on_cpu = os.environ.get("ACCELERATE_USE_CPU") == "True" or not torch.accelerator.is_available()
    started = {"RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"} & set(os.environ)
    # The launcher gives an address to several processes only, and their number nowhere.
    several = os.environ.get("MASTER_ADDR") == "127.0.0.1"
    if started or not (on_cpu and several):
        return
    launcher = argparse.ArgumentParser(allow_abbrev=False)
    launcher.add_argument("--num_processes", "--num-processes")
    asked = launcher.parse_known_args(psutil.Process().parent().cmdline())[0].num_processes
    if asked is None:
        raise UserError(
            "accelerate launch starts one process on CPUs, whatever its config file says: pass it "
            "--num_processes as an argument"
        )
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", asked]
    address = ["--master_port", os.environ["MASTER_PORT"]]
    # A module run by its path would find its neighbours under the names of other packages.
    module = sys.modules["__main__"].__spec__
    program = ["-m", module.name, *sys.argv[1:]] if module else sys.argv
    os.execv(sys.executable, [*torchrun, *address, *program])
