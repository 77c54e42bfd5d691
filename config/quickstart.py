"""A first run: two to three minutes on two CPU cores, seconds on a card.

    python prepare.py                            (makes data/quickstart: half a million tokens of Python's own manual)
    python train.py config/quickstart.py         (loss from 10.8, the logarithm of the vocabulary size, to below 6)
    python sample.py --out_dir=out/quickstart

It trains for less than half an epoch: enough to learn words, not enough for text that makes sense.
"""

out_dir = "out/quickstart"
dataset = "quickstart"
overwrite = True  # a second run replaces the first

n_layer = 4
n_head = 3
n_embd = 192
block_size = 128

batch_size = 8
gradient_accumulation_steps = 1  # 1,024 tokens a step
max_iters = 240  # 0.25M tokens, 0.43 epochs

learning_rate = 2e-3  # small networks tolerate large learning rates
min_lr = learning_rate / 20
warmup_iters = 20

eval_interval = 120
eval_tokens = 8_192
log_interval = 20

compile = False  # compiling would take longer than the run
