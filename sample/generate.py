"""Sample images from a checkpoint: `vistok generate` as a script.

accelerate launch --num_processes 8 sample/generate.py ...
"""

from vistok.cli import run
from vistok.commands.generate import main

if __name__ == "__main__":
    run(main)
