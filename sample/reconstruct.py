"""Show what a tokenizer makes of pictures: `vistok reconstruct` as a script.

accelerate launch --num_processes 8 sample/reconstruct.py ...
"""

from vistok.commands.reconstruct import main
from vistok.options import run

if __name__ == "__main__":
    run(main)
