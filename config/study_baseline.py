from config.study import *

run_dir = "runs/study/baseline"
mode = "full"
keep_every = 1  # for forks, and for the means of its weights in docs/study.md
