"""The core with networks and images that are in no way ours."""

import re
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models import (
    VisionTransformer,
    resnet18,
    shufflenet_v2_x0_5,
    squeezenet1_1,
    swin_t,
)
from torchvision.models.resnet import BasicBlock, ResNet

from masktune_utils.choice import audit, choose
from masktune_utils.data import Split
from masktune_utils.masking import NOTHING, MaskedDataset, Rule
from masktune_utils.models import NoMapsError, target_layer
from masktune_utils.saliency import saliency_maps
from masktune_utils.settings import REPOSITORY


def small_resnet():
    torch.manual_seed(0)
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=2)


def fit(images, _share=1.0):
    return own_loop(small_resnet(), images)


def own_loop(network, images):
    """An epoch of training of one's own, with augmentation of one's own."""
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(network.parameters(), 0.01)
    network.train()
    for batch, labels in DataLoader(images, batch_size=32, shuffle=True):
        loss = F.cross_entropy(network(batch.flip(3)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


@pytest.fixture(scope="module")
def train(few_windows) -> Split:
    """Noise of two classes."""
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (240, 3, 32, 32), generator=random)
    labels = torch.arange(240) % 2
    return Split(images.byte(), labels)


@pytest.mark.slow
def test_the_lines_of_the_readme_run_as_they_are(capsys):
    readme = (REPOSITORY / "README.md").read_text()
    blocks = re.findall("```python\n(.+?)```", readme, re.DOTALL)
    shown = "".join(re.findall("```text\n(.+?)```", readme, re.DOTALL))
    namespace = {}
    exec("\n".join(blocks), namespace)
    printed = without_numbers(capsys.readouterr().out).splitlines()
    for line in without_numbers(shown.replace("…\n", "")).splitlines():
        assert line in printed
    before = namespace["found"].class_swaps.worst
    again = audit(
        namespace["network"], namespace["unseen"], place=namespace["found"].region
    )
    assert again.class_swaps.worst == before < 0.6
    after = audit(
        namespace["tuned"], namespace["unseen"], place=namespace["found"].region
    )
    assert after.class_swaps.worst > 0.85


def without_numbers(text):
    """Another processor has other last digits."""
    return re.sub(r"class \d|\d+(\.\d+)?", "N", text)


def test_a_choice_with_a_network_a_loop_and_candidates_of_ones_own(train):
    rule = Rule(param=1.0, fill="resample")
    choice = choose(train[:40], fit, own_loop, [rule], seed=np.int64(0))
    assert '"mean_std 1, resampled" covers ' in choice.reason
    taken = choice.take("mean_std 1, resampled")
    assert isinstance(taken.finetune(small_resnet()), ResNet)


RED = Image.new("RGB", (5, 4), "red")
IMAGES = {
    "PIL": RED,
    "grey": RED.getchannel("R"),
    "palette": RED.quantize(2),
    "palette with alpha": RED.convert("P").convert("PA"),
    "array": np.array(RED),
    "tensor": torch.ones(3, 4, 5),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_images_of_any_kind_are_read(kind):
    image = IMAGES[kind]
    pairs = [(image, 0), (image, torch.tensor(1))]
    split = Split.from_dataset(pairs)
    pixels, _ = split[torch.tensor(1)]
    channels = 1 if kind == "grey" else 3
    assert pixels.shape == (channels, 4, 5)
    assert pixels.dtype == torch.float32
    assert pixels[0].eq(1).all()


class Named(list):
    """A data set that names its classes, as ImageFolder does."""

    classes = ("cats", "dogs")
    target_transform = None


def test_the_names_of_classes_are_kept_for_reports():
    dataset = Named([(RED, 0), (RED, 1)])
    split = Split.from_dataset(dataset)
    assert split[1:].class_names == ("cats", "dogs")
    dataset.target_transform = "any"  # so that names are those of other labels
    assert Split.from_dataset(dataset).class_names == ("class 0", "class 1")


def test_a_choice_refuses_what_it_cannot_work_with(train):
    with pytest.raises(TypeError, match="the images are a list; allowed: a Split"):
        choose([(RED, 0)], fit)
    with pytest.raises(ValueError, match="there are 0 candidates that hide"):
        choose(train, fit, candidates=[NOTHING])
    message = r"have \[(120|2, 1)\] images; allowed: 2 classes or more, of 2"
    for images in (train[::2], train[[0, 1, 2]]):
        with pytest.raises(ValueError, match=message):
            choose(images, fit)


def test_each_epoch_of_a_data_loader_has_its_own_partners(train, monkeypatch):
    """One for each image, and not a whole permutation for each."""
    masks = torch.ones(240, 32, 32, dtype=torch.bool)  # all of the partner is seen
    masked = MaskedDataset(train, masks, "resample")
    loader = DataLoader(masked, batch_size=240)
    monkeypatch.delattr(torch, "randperm")
    first, labels = next(iter(loader))
    second, _ = next(iter(loader))
    assert not torch.equal(first, second)
    assert torch.equal(labels, train.labels)


def explain(network, **options):
    images = torch.rand(2, 3, 32, 32)
    labels = torch.tensor([0, 1])
    return saliency_maps(network, images, labels, **options)


def test_a_transformer_has_no_maps():
    network = VisionTransformer(32, 16, 2, 3, 48, 96, num_classes=2)
    with pytest.raises(NoMapsError, match="VisionTransformer computes with tokens"):
        explain(network)
    with pytest.raises(TypeError, match="allowed: N×C×h×w, in the proportions"):
        explain(network, layer="encoder.layers.encoder_layer_0")
    with pytest.raises(AttributeError, match="no attribute `layer9`"):
        explain(network, layer="layer9")


class Frozen(nn.Sequential):
    @torch.no_grad()
    def forward(self, images):
        return super().forward(images)


def test_a_network_without_layers_or_without_gradients_in_them_has_no_maps():
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2))
    with pytest.raises(NoMapsError, match="or no layer of it has a map N×C×h×w; name"):
        explain(flat)
    frozen = Frozen(nn.Conv2d(3, 1, 3), nn.Flatten())
    with pytest.raises(NoMapsError, match="without gradients"):
        explain(nn.Sequential(frozen, nn.Linear(900, 2)))


def test_the_last_layer_with_six_cells_or_more_is_explained():
    network = resnet18().eval()
    assert target_layer(network, (3, 64, 64)) is network.layer2
    assert target_layer(network, (3, 112, 112)) is network.layer3


def test_the_last_use_of_a_layer_counts_and_no_enlarged_map():
    relu = nn.ReLU()
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        relu,
        nn.Conv2d(4, 4, 3),
        relu,
        nn.AvgPool2d(8),
        nn.AdaptiveAvgPool2d(6),
        nn.Flatten(),
    )
    assert target_layer(network.double(), (3, 32, 32)) is relu


def test_where_all_maps_are_coarse_the_last_of_the_finest_is_explained():
    network = nn.Sequential(
        nn.AvgPool2d(8),
        nn.Conv2d(3, 4, 1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 2),
    )
    shape = (3, 32, 32)
    assert target_layer(network, shape) is network[2]
    network[5].get_grad_cam_target_layer = lambda: network[0]  # in a wrapper, too
    assert target_layer(network, shape) is network[0]


@pytest.mark.parametrize("make", [shufflenet_v2_x0_5, squeezenet1_1, swin_t])
def test_networks_of_torchvision_are_explained_one_by_one_as_in_batches(make):
    """In float64, since a small network's map may amplify the rounding of float32."""
    torch.manual_seed(0)
    network = make(num_classes=3).eval()
    images = torch.rand(4, 3, 96, 96)
    labels = torch.arange(4) % 3
    of_double = partial(saliency_maps, network.double(), images.double(), labels)
    maps = of_double()
    assert maps.any()
    alone = of_double(batch_size=1)
    torch.testing.assert_close(alone, maps, rtol=0, atol=1e-6)
