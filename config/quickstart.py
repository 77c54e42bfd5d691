"""A first run: two minutes on two CPU cores, seconds on a card.

    python prepare.py                            (makes data/quickstart: 1 MB of prose from Python's own documentation)
    python train.py config/quickstart.py         (loss from 6.9, the logarithm of the vocabulary size, to below 3)
    python sample.py out/quickstart

The network and the vocabulary of 1,024 ids are small, so that it learns to write sentences within 1.2M tokens. What it
writes about Python is mostly wrong.
"""

out_dir = "out/quickstart"
dataset = "quickstart"
overwrite = True  # a second run replaces the first

arch = "qwen3"
n_layer = 4
n_head = 2  # head size 64
n_embd = 128  # 1.0M parameters
block_size = 256

batch_size = 8
gradient_accumulation_steps = 1  # 2,048 tokens a step
max_iters = 600  # 1.2M tokens, below 4 epochs

optimizer = "muon"
learning_rate = 8e-3  # small networks tolerate large learning rates
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 20

eval_interval = 50
eval_tokens = 16_384
log_interval = 10

compile = False  # compiling would take longer than the run
