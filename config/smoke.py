# The run to make before many GPUs are booked: ViT-L/16 through all three phases in 36 steps, on two nodes,
# without data.
#   python launch/submit.py --nodes 2 config/smoke.py
# With more GPUs give them as much to do: --batch_size 4096 --train_samples 16384 for 64.
dataset = "imagenet"
loader = "synthetic"
run_dir = "runs/smoke"
model = "L/16"

batch_size = 512  # 64 images × 8 GPUs
train_samples = 2048  # 4 steps an epoch × 9 epochs = 36
epochs = 9
lr = 1e-3
lr_warmup_steps = 4  # 1 epoch
drop_path = 0.1
dropout = 0.1

window_epochs = 1
num_windows = 2
switch_epoch = 3  # 12 steps with all parameters,
lora_warmup_epochs = 3  # 12 with base and adapters, 12 with the adapters alone
