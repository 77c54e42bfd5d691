"""A first run, on two CPU cores in two to three minutes, on any card in seconds: Python's own manual and docstrings.

    python prepare.py                            (makes data/quickstart, about half a million tokens)
    python train.py config/quickstart.py         (from a loss of 10.8, ln of the vocabulary, to below 6)
    python sample.py --out_dir=out/quickstart

Less than half an epoch: enough for words and their habits, not for sense.
"""

out_dir = "out/quickstart"
dataset = "quickstart"
overwrite = True  # a second try replaces the first

n_layer = 4
n_head = 3
n_embd = 192
block_size = 128

batch_size = 8
gradient_accumulation_steps = 1  # 1,024 tokens a step
max_iters = 240  # 0.25M tokens, 0.43 epochs

learning_rate = 2e-3  # small networks bear large rates
min_lr = learning_rate / 20
warmup_iters = 20

eval_interval = 120
eval_tokens = 8_192
log_interval = 20

compile = False  # would take longer than the run
