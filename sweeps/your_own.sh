#!/bin/sh
# Photographs: notebook 10 for a watermark, a background, a tint that no mask can hide, and no shortcut. Each run takes
# four minutes of one core; its row is in results/your_own/, and all rows together are results/reference_10_your_own.csv.
#   sh sweeps/your_own.sh 2 3        the seeds
for seed in "$@"; do
    for planted in watermark background tint none; do
        papermill notebooks/10_your_own.ipynb "runs/10_${planted}_$seed.ipynb" -p planted "$planted" -p seed "$seed"
    done
done
