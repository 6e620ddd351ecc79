"""MaskTune, on two floors.

The core, plain functions on networks and images, which know no settings and no files:

    progress     bars
    data         `Split`: images with labels, from any data set of torch; two folds
    models       networks, and the layer that is explained
    shortcuts    what is planted in images, and groups
    training     one loop, for ERM and fine-tuning
    saliency     maps, by torchcam, and by exchanging windows
    masking      rules from maps to masks; masked images; MaskTune itself
    metrics      predictions, accuracies, what a network relies on
    held_out     what models predict for images that they have not seen
    selection    the choice of a mask by these predictions

The shell, which gives the core settings, files, caching, notebooks and a command:

    settings     every setting, its range and default; where files lie
    store        devices; atomic writing, weights, checkpoints
    datasets     digits as the sets of an experiment
    evaluation   how well a model does on its test sets
    results      results read, gathered, summarized
    experiment   models, maps and choices: loaded, or else made
    plotting     figures that more than one notebook draws
    runner       the command: grids, kernels, notebooks as jobs

A module imports only from those above it.
"""
