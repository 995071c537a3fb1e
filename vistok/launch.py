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
    """Replace this process by this machine's share of N under torchrun if `accelerate launch
    --num_processes N` has started it alone, as it does on CPUs, without a word, unless MPI does the
    starting.

    Where the launcher is ended by a signal, its processes are asked to end as well.
    """
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:  # started otherwise
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    on_cpu = os.environ.get("ACCELERATE_USE_CPU") == "True" or not torch.accelerator.is_available()
    started = {"RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"} & set(os.environ)
    if started or not on_cpu:
        return
    launcher = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("num_processes", "num_machines", "machine_rank"):
        launcher.add_argument(f"--{name}", f"--{name.replace('_', '-')}", type=int)
    asked = launcher.parse_known_args(psutil.Process().parent().cmdline())[0]
    machines = asked.num_machines or 1
    # The launcher gives an address to several processes only, and their number nowhere.
    if machines == 1 and os.environ.get("MASTER_ADDR") != "127.0.0.1":
        return
    if asked.num_processes is None:
        raise UserError(
            "accelerate launch starts one process on CPUs, whatever its config file says: pass it "
            "--num_processes as an argument"
        )
    if asked.num_processes % machines:
        raise UserError(
            f"--num_processes {asked.num_processes}, of all machines together, must be a multiple "
            f"of --num_machines {machines}"
        )
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    torchrun += ["--nproc_per_node", str(asked.num_processes // machines)]
    torchrun += ["--nnodes", str(machines), "--node_rank", str(asked.machine_rank or 0)]
    address = ["--master_addr", os.environ["MASTER_ADDR"]]
    address += ["--master_port", os.environ["MASTER_PORT"]]
    # A module run by its path would find its neighbours under the names of other packages.
    module = sys.modules["__main__"].__spec__
    program = ["-m", module.name, *sys.argv[1:]] if module else sys.argv
    os.execv(sys.executable, [*torchrun, *address, *program])
