"""GPT-2's network of 124M parameters for one RTX 4070 (12 GB): 6.29B tokens of FineWeb.

    python train.py config/gpt2_124m_4070.py

nanoGPT took 9.35 s a step with the same network and batch on an RTX 4070, which makes 31 hours. Expect a val loss of
3.37 +- 0.08: the law of Hoffmann et al. 2022, shifted to meet llm.c's run (10.26B tokens, val loss 3.27).
"""

out_dir = "out/gpt2_124m_4070"
dataset = "fineweb"

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
dropout = 0.0
bias = False

batch_size = 8
gradient_accumulation_steps = 64  # 524,288 tokens a step
max_iters = 12000
lr_decay_iters = max_iters

learning_rate = 6e-4
min_lr = learning_rate / 10
warmup_iters = 500
weight_decay = 0.1
beta2 = 0.95
grad_clip = 1.0

eval_interval = 500
eval_tokens = 2**22
log_interval = 20
always_save_checkpoint = True

dtype = "bfloat16"  # nanoGPT run: float16, as fast on this card, but it skips steps to find its scale
compile = True
