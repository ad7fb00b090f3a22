# LoRA from epoch 0, every rank 64; head, norms and embeddings train, too.
from config.vit_l16_in1k import *

run_dir = "runs/static_lora"
mode = "lora"
lora_scaling = "matched"  # from epoch 0, at the peak's rate: better than alpha 64 in docs/study.md
lora_alpha = 0.5
