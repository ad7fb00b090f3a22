# Exp2 with the adapters as the authors' code trains them: scaled by 1, with head, norms and embeddings, a
# fresh AdamW at both switches, and a learning rate that rises again over 100 steps and then goes on with the
# cosine.
from config.vit_l16_in1k import *

run_dir = "runs/authors"
lora_scaling = "authors"
lora_lr_factor = None
lora_trainable = "adapters+rest"
optimizer_at_switch = "reset"
lora_rewarm_steps = 100
