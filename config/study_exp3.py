# As Exp3: the strict setting, the latest switch.
from config.study import *

run_dir = "runs/study/exp3"
tau = 0.18
