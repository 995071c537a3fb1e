"""MAR's autoencoder and TokenBridge's quantiser of its latents against the official code."""

import os
import subprocess
import sys

import pytest
import torch
from official import Case, cases

from vistok.checkpoints.kl import mar
from vistok.data import to_uint8
from vistok.heads.dimension_wise import FREQUENCY_ORDER
from vistok.quantizers import DimensionWise, Gaussian, dimension_wise

UNCOMPARED: dict[str, str] = {}
# exp and erf differ between processors in their last bits, which the tables amplify. The numbers
# were recorded where Intel's library takes the path that this mode takes anywhere.
REPRODUCIBLE = {"MKL_CBWR": "COMPATIBLE"}
TABLES = """
import sys, torch
from vistok.quantizers.dimension_wise import normal_cells
sizes = zip(map(int, sys.argv[2::2]), map(float, sys.argv[3::2]))
torch.save([normal_cells(*size) for size in sizes], sys.argv[1])
"""


@pytest.mark.parametrize("folder", cases("mar", lambda case: case["config"].get("kind") == "vae"))
@torch.inference_mode()
def test_autoencoder(folder):
    case = Case(folder)
    images, noise = (case.inputs["image"] + 1) / 2, case.inputs["posterior_noise"]
    config = case.config
    model = mar(case.weights, images.shape[2:], config["scale_factor"], config["norm_groups"])
    network, inner = model.eval().vae.vae, {}
    for name, part in (("encoder", network.encoder), ("post_quant", network.post_quant_conv)):
        part.register_forward_hook(lambda m, i, out, name=name: inner.update({name: out}))

    case.compare("moments_flip", model.vae.moments(images.flip(-1)))
    moments = model.vae.moments(images)
    case.compare("encoder", inner["encoder"])
    case.compare("moments", moments)
    unscaled = moments.movedim(1, -1)
    mean, log_variance = model.quantizer.moments(unscaled)
    case.compare("mean", mean.movedim(-1, 1))
    case.compare("logvar_clamped", log_variance.movedim(-1, 1))
    case.compare("kl", model.quantizer.divergence(unscaled).sum((1, 2)))
    unit = torch.ones_like(mean)
    std = model.quantizer.encode(unscaled, sample=True, noise=unit) - mean
    case.compare("std", std.movedim(-1, 1))

    statistics = model.statistics(images)
    latents = model.quantizer.encode(statistics, sample=True, noise=noise.movedim(1, -1))
    case.compare("latent_scaled", latents.movedim(-1, 1))
    case.compare("decoded", 2 * model.to_images(latents) - 1)
    case.compare("post_quant", inner["post_quant"])
    case.compare("decoded_mode", 2 * model.to_images(model.encode(images)) - 1)
    case.finish(UNCOMPARED)


@pytest.fixture
def reproducible_tables(monkeypatch, tmp_path):
    """Give `DimensionWise` tables that are computed as those of the recorded numbers."""

    def prepare(*sizes: tuple[int, float]) -> None:
        arguments = [str(number) for size in sizes for number in size]
        command = [sys.executable, "-c", TABLES, str(tmp_path / "tables.pt"), *arguments]
        subprocess.run(command, check=True, env=os.environ | REPRODUCIBLE)
        tables = dict(zip(sizes, torch.load(tmp_path / "tables.pt"), strict=True))
        monkeypatch.setattr(dimension_wise, "normal_cells", lambda *size: tables[size])

    return prepare


@pytest.mark.parametrize("folder", cases("tokenbridge", lambda c: "variants" in c["config"]))
def test_quantizer(folder, reproducible_tables):
    case = Case(folder)
    variants = case.config["variants"]
    reproducible_tables(*((2 ** v["bits"], v["std_range"]) for v in variants.values()))
    values = case.inputs["x"]
    for name, variant in variants.items():
        levels, limit, deviations = 2 ** variant["bits"], variant["range"], variant["std_range"]
        quantizer = DimensionWise(values.shape[1], levels, limit, deviations)
        bounds, means = dimension_wise.normal_cells(levels, deviations)
        case.compare(f"{name}.boundaries", bounds)
        case.compare(f"{name}.reconstruction_values", means)
        ids = quantizer.quantise(values)
        case.compare(f"{name}.ids", ids)
        decoded = quantizer.decode(ids)
        case.compare(f"{name}.dequant", decoded)
        case.compare(f"{name}.dequant_from_ids", decoded)
        case.compare(f"{name}.clip_fraction", (values.abs() > limit).float().mean())
        units = values / limit * deviations
        distance = (units.unsqueeze(-1) - quantizer.midpoints()).abs().amin(-1)
        case.compare(f"{name}.threshold_distance", distance)
    order = torch.tensor(FREQUENCY_ORDER)
    case.compare("channel_order", order)
    case.compare("inv_channel_order", order.argsort())
    case.finish(UNCOMPARED)


@pytest.mark.parametrize("folder", cases("tokenbridge", lambda c: "vae" in c["config"]))
@torch.inference_mode()
def test_quantised_autoencoder(folder, reproducible_tables):
    case = Case(folder)
    images, noise = (case.inputs["images"] + 1) / 2, case.inputs["noise"].movedim(1, -1)
    config, levels = case.config, 2 ** case.config["bits"]
    reproducible_tables((levels, 3.0))
    groups = config["vae"].get("norm_groups", 32)
    continuous = mar(case.weights, images.shape[2:], config["scale"], groups).eval()
    model = continuous.quantised(levels, config["range"])
    case.compare("moments", model.vae.moments(images).float())
    statistics = model.statistics(images)
    latents = continuous.quantizer.encode(statistics, sample=True, noise=noise)
    case.compare("latents", latents.movedim(-1, 1))
    unit = Gaussian(model.quantizer.dim).encode(statistics, True, torch.ones_like(latents))
    std = (unit - continuous.encode(images)) / config["scale"]
    case.compare("std", std.movedim(-1, 1))
    ids = model.quantizer.encode(statistics, sample=True, noise=noise)
    case.compare("ids", ids.movedim(-1, 1))
    quantised = model.quantizer.decode(ids)
    case.compare("dequant", quantised.movedim(-1, 1))
    case.compare("recon_quantised", 2 * model.to_images(quantised) - 1)
    case.compare("recon_continuous", 2 * continuous.to_images(latents) - 1)
    # Pixels may differ by one; their evaluation cuts fractions off where their sampler rounds.
    decoded = model.decode(ids)
    for name, pixels in (("recon_png", (255 * decoded).byte()), ("gen_png", to_uint8(decoded))):
        if name in case.expected:
            case.left.discard(name)
            assert (pixels.int() - case.expected[name].int()).abs().max() <= 1, name
    case.finish(UNCOMPARED)
