"""Score a tokenizer, a generator or pictures: `vistok evaluate` as a script.

accelerate launch --num_processes 8 sample/evaluate.py ...
"""

from vistok.commands.evaluate import main
from vistok.options import run

if __name__ == "__main__":
    run(main)
