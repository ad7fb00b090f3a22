# PreLoRA on Fashion-MNIST at a size where one CPU core trains it in five minutes: Exp2's place among the
# presets of `make study`.
dataset = "fashion_mnist"
data_dir = "datasets/fashion_mnist_dev"  # `make study` makes it: the last 10,000 training images validate
run_dir = "runs/study/prelora"
model = "small-study"  # 4 tokens and the class token; wide, so that adapters cost less than they save
dtype = "float32"
compile = False  # as fast as compiled on a CPU at this size, and 60 short runs start at once
num_workers = 1

epochs = 24
train_samples = 6_000  # of 50,000
batch_size = 64  # 93 steps × 24 epochs = 2232
eval_every = 6  # 10,000 images take as long as half an epoch
lr = 3e-4
lr_warmup_steps = 93  # 1 epoch
drop_path = 0.1

# Largest change of a family's norm and of the loss between windows of 2 epochs, as measured in a full phase:
#   3-4 -> 5-6: 0.28 %, 14 %     -> 7-8: 0.27 %, 10 %     -> 9-10: 0.26 %, 8 %     -> 11-12: 0.24 %, 6 %
#   -> 13-14: 0.21 %, 9 %        -> 15-16: 0.17 %, 9 %    -> 17-18: 0.12 %, 7 %    -> 19-20: 0.07 %, 7 %
# The loss changes as much late (the learning rate falls) as in the middle, so zeta only keeps the first
# windows out and tau decides: Exp1 (0.30, 15) after 8 or 10 epochs, Exp2 after 14 or 16.
tau = 0.25
zeta = 10.0
window_epochs = 2
lora_warmup_epochs = 2
rank_min = 4  # 4 … 32: the same four steps as 8 … 64, for a width of 320
rank_max = 32
lora_scaling = "alpha"
lora_alpha = 64.0  # scaling 2 to 16: between the authors' 1 and what matches a full step, `coherent`
log_displacement = True
