"""ReToK against the numbers of its official code, in the folder VISTOK_PARITY."""

import pytest
import torch
from official import Case, cases

from vistok.checkpoints.retok import tokenizer

UNCOMPARED = {}  # outputs left out, each with its reason


def ours(case):
    config = case.config
    arguments = config["init_args"]
    return tokenizer(
        case.weights,
        image_size=config["image_size"],
        encoder_heads=config["heads"],
        decoder_heads=config["heads"],
        groups=config["groups"],
        distill_depth=arguments["distill_depth"],
        feature_loss=arguments["fea_rec_loss_type"],
        feature_weight=arguments["fea_rec_loss_weight"],
        vq={
            "rotation": arguments["rot"],
            "l2_normalise": arguments["codebook_l2_norm"],
            "commitment": arguments["commit_loss_beta"],
            "entropy": arguments["entropy_loss_ratio"],
        },
    )


def official(channels_last):
    """Sequences of the official code are images of one row; ours have channels last."""
    return channels_last.transpose(1, 2).unsqueeze(2)


@pytest.mark.parametrize("folder", cases("retok"))
@torch.no_grad()
def test_retok(folder):
    case = Case(folder)
    model = ours(case).eval()
    images = (case.inputs["images"] + 1) / 2
    n = model.num_latent_tokens

    def compare_images(name, reconstruction):
        case.compare(name, 2 * reconstruction - 1, kind="images")

    features = model.to_features(images)
    case.compare("cnn_feat", features)
    case.compare("enc_tokens", official(model.to_tokens(features)))
    case.compare("z", official(model.to_latents(images)))
    ids = model.encode(images, redundant=True)
    case.compare("indices", ids)
    assert torch.equal(model.encode(images), ids[:, :n])
    codes = model.quantizer(model.to_latents(images)).quantised
    case.compare("quant", official(codes))
    case.compare("codebook_lookup", official(model.quantizer.decode(ids)))

    for k in case.config["lengths"]:
        compare_images(f"rec_k{k}", model.to_images(codes[:, :k]))
        case.compare(f"spatial_k{k}", model.to_decoder_features(codes[:, :k])[0])
        kept = torch.arange(ids.shape[1]) < k
        masked = model.to_images(codes, kept.expand(len(ids), -1))
        compare_images(f"rec_k{k}", masked)
    default = model(images)
    compare_images("rec_default", default.reconstruction)
    case.compare("inner_feat", default.features.flatten(1, 2))
    compare_images("rec_from_ids", model.to_images(model.quantizer.decode(ids[:, :n])))
    short = min(case.config["lengths"])
    compare_images("rec_from_ids_short", model.to_images(model.quantizer.decode(ids[:, :short])))
    for name, k in (("rec_from_ids", n), ("rec_from_ids_short", short)):
        if k == n or model.spec.ordered:
            decoded = 2 * model.decode(ids[:, :k]) - 1
            case.compare(name, decoded, part=lambda x: x.clamp(-1, 1), kind="images")

    model.train()
    trained = model(images, lengths=n)
    compare_images("train.dec", trained.reconstruction)
    compare_images("train.direct_dec", model.to_pixels(features))
    case.compare("train.vq_loss", trained.losses["codebook"])
    case.compare("train.commit_loss", trained.losses["commitment"])
    case.compare("train.fea_rec_loss", trained.losses["feature"])
    case.finish(UNCOMPARED)
