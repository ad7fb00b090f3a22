# LoRA from epoch 0, every rank rank_max; head, norms and embeddings train, too.
from config.study import *

run_dir = "runs/study/static_lora"
mode = "lora"
