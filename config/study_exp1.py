# As Exp1: the relaxed setting, the earliest switch.
from config.study import *

run_dir = "runs/study/exp1"
tau = 0.3
zeta = 15.0
