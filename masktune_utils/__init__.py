"""The package under the MaskTune notebooks, one module for each stage.

progress, settings, models, images → data, shortcuts → training → saliency → masking →
store, evaluation → results → experiment → selection → plotting; and, for the command,
runner: grids, kernels → jobs, report → stages → command. A module imports only from
those before it, and no notebook imports runner.

Paper: Asgari Taghanaki et al., "MaskTune: Mitigating Spurious Correlations by Forcing
to Explore", NeurIPS 2022.
"""
