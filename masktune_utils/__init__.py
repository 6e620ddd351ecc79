"""MaskTune, and the bookkeeping of the series, in three folders.

The core, plain functions on networks and images, which know no settings:

    progress     bars
    store        files that are whole or not there; one cache
    data         `Split`: images with labels, from any data set of torch; groups, folds
    models       devices; networks, and the layer that is explained
    shortcuts    what is planted in images, and in which
    training     one loop, for ERM and fine-tuning
    saliency     maps, by torchcam
    masking      rules from maps to masks; masked images; MaskTune itself
    metrics      predictions, accuracies
    choice/      where do mistakes come from, which mask? exchange, audit, held_out,
                 score, chosen

The shell, which gives the core settings, names of files and a command:

    settings     every setting, its range and default; where files lie
    datasets     digits as the sets of an experiment
    results      how good a model is; results read, gathered, summarized
    experiment   models, maps and choices: loaded, or else made
    plotting     figures that more than one notebook draws
    panels       figures that a reader of JupyterLab plays with
    runner/      the command: grids, kernels, notebooks as jobs

A module imports only from those above it.
"""
