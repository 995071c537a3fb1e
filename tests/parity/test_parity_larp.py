"""LARP's video tokenizer against the numbers of the official one, in the folder VISTOK_PARITY."""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from vistok.checkpoints.larp import tokenizer

FOLDER = os.environ.get("VISTOK_PARITY")
if not FOLDER:
    pytest.skip("VISTOK_PARITY names no folder of numbers", allow_module_level=True)

# Outputs left out, each with its reason.
UNCOMPARED = {}

TABLES = {
    "encoder_patch": "encoder_patch_pe",
    "encoder_latent_query": "encoder_latent_query_embed",
    "decoder_latent": "decoder_latent_pe",
    "decoder_patch_query": "decoder_patch_query_embed",
}


def cases():
    for path in sorted(Path(FOLDER).glob("nar/*/case.json")):
        case = json.loads(path.read_text())
        if case["config"].get("class", "").endswith("LARPTokenizer"):
            yield pytest.param(path.parent, case, id=path.parent.name)


def ours(weights, config):
    vq = config["bottleneck"]["args"]["regularizer"]["args"]
    return tokenizer(
        weights,
        frames=config["frame_num"],
        image_size=config["input_size"],
        decoder_patch_size=[config["decoder_temporal_patch_size"]]
        + 2 * [config["decoder_patch_size"]],
        token_shape=[config["bottleneck_token_num"]],
        encoder_heads=config["encoder_num_heads"],
        decoder_heads=config["decoder_num_heads"],
        learned=[table for table, name in TABLES.items() if config[f"learned_{name}"]],
        latent_base=float(config["latent_pe_scale_factor"]),
        temperature=vq["stochastic_temperature"] if vq["stochastic"] else None,
        l2_normalise=vq["l2_normalized"],
        commitment=vq["commitment_loss_weight"],
        codebook_weight=vq["codebook_loss_weight"],
        entropy=vq["entropy_loss_weight"],
    )


def recorded(module, store, name):
    module.register_forward_hook(lambda module, args, output: store.update({name: output}))


@pytest.mark.parametrize(("folder", "case"), cases())
@torch.no_grad()
def test_larp(folder, case):
    tensors = load_file(folder / "tensors.safetensors")
    model = ours(load_file(folder / "weights.safetensors"), case["config"]).eval()
    computed = {
        "encoder_patch_pe": model.tables.encoder_patch.rows,
        "decoder_latent_pe": model.tables.decoder_latent.rows,
        "decoder_patch_query": model.tables.decoder_patch_query(),
    }
    for name, module in {
        "patch_embed": model.patch_embed,
        "encoder_queries": model.encoder,
        "projected_z": model.proj_out,
        "bottleneck_output": model.proj_in,
        "decoder_hidden": model.decoder,
    }.items():
        recorded(module, computed, name)
    output = model(tensors["in.video"])
    computed["patch_embed"] = computed["patch_embed"].flatten(2).transpose(1, 2)
    computed["z_normalised"] = F.normalize(computed["projected_z"], dim=-1)
    computed["ids"] = output.tokens
    computed["video"] = output.reconstruction
    computed["loss_commit"] = output.losses["commitment"] / model.quantizer.commitment
    computed["loss_q"] = sum(output.losses.values())

    expected = {k.removeprefix("out."): v for k, v in tensors.items() if k.startswith("out.")}
    for name in expected.keys() - UNCOMPARED.keys():
        exact = name == "ids"
        torch.testing.assert_close(
            computed[name].reshape(expected[name].shape),
            expected[name],
            **dict.fromkeys(("atol", "rtol"), 0) if exact else case["tolerance"],
            msg=lambda m, name=name: f"{name}: {m}",
        )
    assert torch.equal(model.encode(tensors["in.video"]), output.tokens)
    decoded = model.decode(expected["ids"])
    torch.testing.assert_close(decoded, expected["video"].clamp(0, 1), **case["tolerance"])
