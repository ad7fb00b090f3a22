# Figures 5 and 6: Exp2 with the shortest warmup.
from config.vit_l16_in1k import *

run_dir = "runs/warmup5"
lora_warmup_epochs = 5
