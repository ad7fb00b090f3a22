# PreLoRA on Fashion-MNIST at a size where one CPU core trains it in five minutes: Exp2's place among the study_*.py of `make study`.
dataset = "fashion_mnist"
data_dir = "datasets/fashion_mnist"
run_dir = "runs/study/prelora"
model = "small-study"  # 14×14 patches: 4 tokens and the class token; wide, so that adapters cost less than what they save
dtype = "float32"
compile = False  # as fast as compiled on a CPU at this size, and 50 short runs start at once
num_workers = 1

epochs = 24
train_samples = 6_000  # of 60,000
batch_size = 64  # 93 steps × 24 epochs = 2232
eval_every = 3  # all 10,000 test images take as long as half an epoch
lr = 3e-4
lr_warmup_steps = 93  # 1 epoch
drop_path = 0.1
window_epochs = 2
keep_every = 2  # every window's end, for forks
