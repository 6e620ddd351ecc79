"""The package under the MaskTune notebooks, one module for each stage.

progress, models, strict, settings → decoding, data, shortcuts → training → saliency → masking → store, evaluation → experiment
→ selection → plotting → kernels → sweep → command. A module imports only from those before it.

Paper: Asgari Taghanaki et al., "MaskTune: Mitigating Spurious Correlations by Forcing to Explore", NeurIPS 2022.
"""
