# ViT-S/16 on ImageNet-1k in 90 epochs on one node of 8 GPUs: the recipe of "Better plain ViT baselines"
# (arXiv 2205.01580), with this repo's class token and learned positions.
dataset = "imagenet"
data_dir = "datasets/imagenet"
run_dir = "runs/vit_s16_in1k"
model = "S/16"

batch_size = 1024  # 128 images × 8 GPUs
epochs = 90  # 1,281,167 images // 1024 = 1,251 steps × 90 = 112,590
lr = 1e-3
lr_warmup_steps = 10_000  # 8 epochs
weight_decay = 0.1  # 1e-4 / 1e-3, as in vit_l16_in1k.py
rand_augment = 10
mixup = 0.2

# Not tuned. A window of 3 epochs is 3.3 times as large a share of 90 epochs as of 300, so more happens from
# one to the next: the paper's loosest thresholds (Exp1), and a third of its warmup.
tau = 1.0
zeta = 5.0
lora_warmup_epochs = 3
lora_scaling = "coherent"  # as vit_l16_in1k.py
lora_lr_factor = 2.0
