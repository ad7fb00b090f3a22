# Table 1's relaxed setting: the earliest switch, the fastest run.
from config.vit_l16_in1k import *

run_dir = "runs/exp1"
tau = 1.0
zeta = 5.0
lora_lr_factor = 1.0  # the switch comes early, and twice the rate there would be above the peak
