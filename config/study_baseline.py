from config.study import *

run_dir = "runs/study/baseline"
mode = "full"
