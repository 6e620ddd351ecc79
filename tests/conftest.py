import copy

import pytest

from masktune_utils import data, models, training


@pytest.fixture(scope="session")
def splits() -> data.BiasedMNIST:
    """Two hundred real digits to train on and two hundred to test on."""
    return data.load("mnist5k", limit=200)


@pytest.fixture(scope="session")
def _trained(splits) -> models.SmallCNN:
    model = models.new_model(seed=3)
    training.train(model, splits.train, epochs=3, batch_size=32)
    return model.eval()


@pytest.fixture
def model(_trained) -> models.SmallCNN:
    """A network that is right on some of the test images and wrong on others; each test has its own."""
    return copy.deepcopy(_trained)
