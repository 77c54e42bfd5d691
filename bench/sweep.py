"""The best learning rate of a recipe: short but complete schedules, by factors of two until both neighbours are worse.

    python bench/sweep.py --data_dir=data --dataset=docs        # the options are those of bench/speedrun.py

Prints a table, the best rate of each recipe marked. The defaults of config/fineweb_4070_fast.py come from such tables.
"""

import sys

import speedrun

if __name__ == "__main__":
    sys.argv.append("--only=sweep")
    speedrun.run_script(speedrun.main, speedrun.ShardError)
