"""MaskTune on a biased MNIST, one module per stage of the data's way.

data → models → training → saliency → masking → evaluation → plotting; beside them `experiment` (settings,
artefacts, loading and saving), `explorer` (the panels of the notebooks) and `sweep` (the command `masktune`).

Paper: Asgari Taghanaki et al., "MaskTune: Mitigating Spurious Correlations by Forcing to Explore", NeurIPS 2022.
"""
