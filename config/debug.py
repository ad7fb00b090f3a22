# Fashion-MNIST on one CPU or GPU, all three phases in minutes on 2 cores.
dataset = "fashion_mnist"
data_dir = "datasets/fashion_mnist"
run_dir = "runs/debug"
model = "tiny-debug"  # 7×7 patches: 16 tokens and the class token
dtype = "float32"  # bfloat16 is slower than float32 on most CPUs; on a GPU try --dtype bfloat16

epochs = 18
train_samples = 12_000  # of 60,000
batch_size = 96  # 125 steps × 18 epochs = 2250
lr = 2e-3
lr_warmup_steps = 0  # windows of the convergence test that overlap a warmup would not count
drop_path = 0.1  # dropout stays 0: its random numbers double the time of a step on a CPU

# The paper's thresholds (0.5, 2.5) belong to windows of 3 in 300 epochs. Here a window is 2 of 18, eleven
# times as large a share of the run, and more happens from one to the next. Largest change of a family's norm
# and of the loss between windows, in a full phase:
#   1-2 -> 3-4: 3.6 %, 33 %     3-4 -> 5-6: 3.0 %, 17 %     5-6 -> 7-8: 2.6 %, 12 %
# The loss decides: zeta lies in the middle between the first pair and the second, so the test fails after
# epoch 6 and passes after 8, also where another CPU or number of threads changes these by a quarter.
tau = 6.0
zeta = 24.0
window_epochs = 2
lora_warmup_epochs = 2
rank_min = 4  # 4 … 32: the same four steps as 8 … 64, for a width of 64
rank_max = 32
