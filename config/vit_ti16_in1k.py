# ViT-Ti/16 on ImageNet-1k for small budgets: one GPU with --grad_accum_steps 8, or a few. A model this small
# underfits: AugReg trains it best without mixup, RandAugment or dropout. Schedule and thresholds are
# vit_s16_in1k.py's.
from config.vit_s16_in1k import *

run_dir = "runs/vit_ti16_in1k"
model = "Ti/16"
rand_augment = 0
mixup = 0.0
rank_max = 32  # of a width of 192; a rank of 64 would cost as much as it saves
