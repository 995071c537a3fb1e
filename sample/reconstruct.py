"""Show what a tokenizer makes of pictures: `vistok reconstruct` as a script.

accelerate launch --num_processes 8 sample/reconstruct.py ...
"""

from vistok.cli import run
from vistok.commands.reconstruct import main

if __name__ == "__main__":
    run(main)
