# ViT-L/16 on ImageNet-1k from scratch, as the paper trains it: Exp2, w = 10, on 16 nodes × 4 A100. The recipe
# is AugReg's (arXiv 2106.10270): its entry L/16 · i1k · 300 epochs · lr 1e-3 · medium1 · wd 0.1 · do 0.1 ·
# sd 0.1.
dataset = "imagenet"
data_dir = "datasets/imagenet"  # train.beton and val.beton: docs/data.md says how to make them
run_dir = "runs/vit_l16_in1k"
model = "L/16"
dropout = 0.1
drop_path = 0.1

batch_size = 4096  # 64 images × 64 GPUs; on 8 GPUs add --grad_accum_steps 8
epochs = 300  # 1,281,167 images // 4096 = 312 steps × 300 = 93,600
lr = 1e-3
lr_warmup_steps = 10_000  # 32 epochs; windows of the convergence test count from there
weight_decay = 0.1  # AugReg's 1e-4 is not multiplied by the learning rate: 1e-4 / 1e-3
grad_clip = 1.0
rand_augment = 15  # medium1: RandAugment(2, 15) and mixup of Beta(0.2, 0.2)
mixup = 0.2

tau = 0.5  # Exp2; Exp1 1.00 and 5.00, Exp3 0.25 and 1.00
zeta = 2.5
lora_warmup_epochs = 10
# What docs/study.md found best, at its size. The authors' own is one flag away, --lora_scaling authors, and
# all of theirs is config/authors.py.
lora_scaling = "coherent"
lora_lr_factor = 2.0  # where half the peak is left, which it is about half way: so not above the peak
