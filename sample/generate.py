"""Sample images from a checkpoint: `vistok generate` as a script.

accelerate launch --num_processes 8 sample/generate.py ...
"""

from vistok.commands.generate import main
from vistok.options import run

if __name__ == "__main__":
    run(main)
