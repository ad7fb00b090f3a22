# The paper's baseline: all parameters to the end. Its kept checkpoints are what exp1.py and the others may be
# forked from.
from config.vit_l16_in1k import *

run_dir = "runs/baseline"
mode = "full"
keep_every = 3  # every window's end: 100 checkpoints of 3.7 GB
