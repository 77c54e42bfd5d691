"""A faster recipe with 40.6M parameters for one RTX 4070 (12 GB): Qwen3's shape, NorMuon, linear decay to zero.

    python train.py config/fineweb_4070_fast.py

It trains on 2.62B tokens, a quarter of config/fineweb_4070.py. Expect a val loss of 3.58 +- 0.12 (docs/recipe.md says
how that is known); config/fineweb_4070.py ends at 3.60. 6 hours are modelled, not measured on a card: 134.1k tokens/s
of the GPT-2 run on an RTX 4070, less a tenth for slower steps.

learning_rate follows from the best one of tiny networks by the root of the width, and is close to that of the public
speed runs (Muon at 0.02 is 3.6e-3 in the units of match_rms_adamw at width 768).
"""

out_dir = "out/fineweb_4070_fast"
dataset = "fineweb"

arch = "qwen3"
n_layer = 12
n_head = 6  # head size 64
n_embd = 384  # 40.56M parameters
block_size = 1024

tokens_per_step = 2**18  # 262,144; a network of this size gains little from more
batch_size = 16
max_iters = 10000  # 2.62B tokens

optimizer = "normuon"  # for the matrices in the blocks; AdamW for the rest
learning_rate = 4e-3
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 250
weight_decay = 0.1
beta2 = 0.95
grad_clip = 1.0

eval_interval = 500
eval_tokens = 2**22
log_interval = 20

dtype = "bfloat16"  # as fast as float16 on this card, without a GradScaler
