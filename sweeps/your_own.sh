#!/bin/sh
# Photographs: notebook 11 for a watermark, a background, a tint that no mask can hide, and no shortcut. A run takes five
# minutes of one core; its rows go to results/your_own/. All of them together are results/reference_11_your_own.csv.
#   sh sweeps/your_own.sh 2 3        the seeds
for seed in "$@"; do
    for planted in watermark background tint none; do
        papermill notebooks/11_your_own.ipynb "runs/11_${planted}_$seed.ipynb" -p planted "$planted" -p seed "$seed"
    done
done
