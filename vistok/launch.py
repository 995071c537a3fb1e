"""Several processes on CPUs, as `accelerate launch --cpu --num_processes N` promises."""

import argparse
import os
import sys

import psutil
import torch

from vistok.errors import UserError


def start_all_processes() -> None:
    """Replace this process by N under torchrun if `accelerate launch --num_processes N` has started
    it alone, as it does on CPUs, without a word, unless MPI does the starting."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU") == "True" or not torch.accelerator.is_available()
    started = {"RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"} & set(os.environ)
    # The launcher gives an address to several processes only, and their number nowhere.
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    several = launched and os.environ.get("MASTER_ADDR") == "127.0.0.1"
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
    os.execv(sys.executable, [*torchrun, *address, *sys.argv])
