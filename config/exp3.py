# Table 1's strict setting: the latest switch.
from config.vit_l16_in1k import *

run_dir = "runs/exp3"
tau = 0.25
zeta = 1.0
