"""Your own text, some KB to some MB of it: a book, notes, a chat. Minutes on two CPU cores, seconds on a card.

    python prepare.py my.txt notes/ --dataset=mine
    python train.py config/own_text.py --dataset=mine --out_dir=out/mine     (as prepare.py prints it)
    python sample.py out/mine --checkpoint=best

A network sees a small text many times and at last learns it by heart. So dropout is on, every evaluation is compared
with the best one so far, and the best checkpoint is kept. More text helps more than any setting here.
"""

out_dir = "out/own_text"
dataset = "mine"
overwrite = True  # a second run replaces the first
always_save_checkpoint = False  # only the best, and the last

arch = "qwen3"
n_layer = 4
n_head = 2  # head size 64
n_embd = 128  # 0.9M parameters with 1,024 ids
block_size = 256
dropout = 0.1

batch_size = 8  # 2,048 tokens a step
gradient_accumulation_steps = 1
max_iters = 1000  # 2.0M tokens, for 0.6 MB or more; prepare.py prints fewer steps for less text

optimizer = "muon"
learning_rate = 6e-3
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 10
weight_decay = 0.1

eval_interval = 50
eval_tokens = 16_384
log_interval = 50

compile = False  # compiling would take longer than the run
