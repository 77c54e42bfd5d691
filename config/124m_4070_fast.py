"""A faster recipe with 124M parameters for one RTX 4070 (12 GB): Qwen3's shape, NorMuon, linear decay to zero.

    python train.py config/124m_4070_fast.py

It trains on 1.84B tokens. Expect a val loss of 3.31 +- 0.13, which GPT-2's recipe reaches with 8B tokens
(docs/recipe.md says how that is known). 10 hours are modelled, not measured on a card: 56.1k tokens/s of the GPT-2
run on an RTX 4070, less a tenth for slower steps. learning_rate: that of the public speed runs (modded-nanogpt, track
3), Muon at 0.02, is 3.6e-3 in the units of match_rms_adamw at width 768. The rule of our tiny networks gives 2.8e-3.
"""

out_dir = "out/124m_4070_fast"
dataset = "fineweb"

arch = "qwen3"
n_layer = 12
n_head = 12  # head size 64
n_embd = 768
block_size = 1024

tokens_per_step = 2**19  # 524,288
batch_size = 8
max_iters = 3500  # 1.84B tokens

optimizer = "normuon"  # for the matrices in the blocks; AdamW for the rest
learning_rate = 3.6e-3
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 100
weight_decay = 0.1
beta2 = 0.95
grad_clip = 1.0

eval_interval = 250
eval_tokens = 2**22
log_interval = 10

dtype = "bfloat16"  # as fast as float16 on this card, without a GradScaler
