# Figures 5 and 6: another warmup.
from config.study import *

run_dir = "runs/study/warmup1"
lora_warmup_epochs = 1
