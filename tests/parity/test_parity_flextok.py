"""FlexTok and its class-conditional generator against the official code."""

import pytest
import torch
import torch.nn.functional as F
from official import Case, cases

from vistok.checkpoints.flextok import generator, tokenizer
from vistok.decoding import Decoding, Sampling, Schedule, StoredNoise, decode, probabilities
from vistok.decoding.flow import FlowSampler, Guidance
from vistok.layers.positions import sincos_grid, time_features
from vistok.losses.flow import FlowTimes, flow_loss, noised
from vistok.quantizers import FSQ
from vistok.tokenizers.sequence import kept_of

UNCOMPARED: dict[str, str] = {}
PLAIN = Guidance(momentum=0.0, threshold=None, parallel=1.0)
FAR = "multi_step_and_images"  # the tolerance of what many steps lead to


def kind(name):
    return lambda description: description["kind"] == name


def load(case):
    config = case.config
    encoder, vae = config["encoder"], config.get("vae", {})
    if "vae" in config:
        vae = {"scaling_factor": vae["scaling_factor"], "norm_groups": vae["norm_num_groups"]}
    model = tokenizer(
        case.weights,
        config["fsq_levels"],
        config.get("image_size"),
        config["patch_size"],
        encoder["head_dim"],
        config["decoder"]["head_dim"],
        encoder_mask=encoder["mask_mode"],
        **vae,
    )
    for part in ("encoder", "decoder"):
        sizes = config[part]
        assert getattr(model, part).patches.proj.out_features == sizes["dim"]
        assert len(getattr(model, part).blocks) == sizes["depth"]
        assert model.spec.shape == (sizes["n_registers"],)
    return model.eval()


def sampler(steps, scale, is_projected):
    return FlowSampler(steps, Schedule(scale), Guidance() if is_projected else PLAIN)


@pytest.mark.parametrize("folder", cases("flextok", kind("core")))
@torch.inference_mode()
def test_core(folder):
    case = Case(folder)
    model = load(case)
    losses, temb = [], {}
    handle = model.decoder.time.register_forward_hook(lambda m, i, o: temb.update(x=o))
    model.decoder.modulations(case.inputs["sigmas"])
    handle.remove()
    case.compare("temb", temb["x"])
    for i, size in enumerate(case.config["latent_sizes"]):
        latents, noise = case.inputs[f"latents.{i}"], case.inputs[f"noise.{i}"]
        times, keep = case.inputs["sigmas"][i : i + 1], case.inputs["keep_k"][i : i + 1]
        assert list(latents.shape[2:]) == size

        registers = {}
        last = model.encoder.blocks[-1]
        handle = last.register_forward_hook(lambda m, args, out, at=registers: at.update(x=out))
        z = model.encoder(latents)
        handle.remove()
        case.compare(f"enc_registers.{i}", registers["x"][:, -model.spec.num_tokens :])
        case.compare(f"z.{i}", z)
        tokens = model.encode_latents(latents)
        case.compare(f"tokens.{i}", tokens)
        codes = model.quantizer.decode(tokens)
        case.compare(f"quant.{i}", codes)

        x = noised(latents, noise, times)
        case.compare(f"x_t.{i}", x)
        modulations = model.decoder.modulations(times)
        kept = model.decoder.slots(codes, kept_of(codes, keep))
        case.compare(f"dec_registers_keep.{i}", kept.rows)
        full, null = model.decoder.slots(codes), model.decoder.null_slots(1)
        case.compare(f"v_full.{i}", model.decoder(x, full, modulations)[0])
        case.compare(f"v_uncond.{i}", model.decoder(x, null, modulations)[0])
        velocity, features = model.decoder(x, kept, modulations)
        case.compare(f"v_keep.{i}", velocity)
        case.compare(f"repa_feat.{i}", features)
        losses.append(flow_loss(velocity, latents, noise))
        # The same from the prefix alone, whose masked registers are merged.
        merged = model.decoder.slots(codes[:, : int(keep)])
        case.compare(f"v_keep.{i}", model.decoder(x, merged, modulations)[0])

        for tag, *settings in case.config["samplers"]:
            for run in ({"lengths": keep}, {}):
                prefix = tokens if run else tokens[:, : int(keep)]
                drawn = StoredNoise(noise)
                run |= {"size": tuple(size), "sampler": sampler(*settings)}
                final = model.decode_latents(prefix, noise=drawn, **run)
                case.compare(f"{tag}.{i}", final, kind=FAR)
    case.compare("flow_loss", torch.cat(losses))
    case.finish(UNCOMPARED)


@pytest.mark.parametrize("folder", cases("flextok", kind("pixels")))
@torch.inference_mode()
def test_pixels(folder):
    case = Case(folder)
    config = case.config
    model = load(case)
    images, keep = (case.inputs["images"] + 1) / 2, case.inputs["keep_k"]
    mean, log_variance = model.vae.moments(images).chunk(2, dim=1)
    case.compare("vae_mean", mean)
    case.compare("vae_logvar", log_variance.clamp(-30, 20))
    case.compare("vae_latents", model.vae.encode(images))
    case.compare("z", model.to_latents(images))
    tokens = model.encode(images)
    case.compare("tokens", tokens)
    is_kept = torch.arange(tokens.shape[1]) < keep[:, None]
    case.compare("prepared_quants", model.quantizer.decode(tokens.where(is_kept, 0)))
    model.sampler = sampler(config["timesteps"], config["guidance_scale"], config["apg"])
    final = model.decode_latents(tokens, keep, StoredNoise(case.inputs["noise"]))
    case.compare("latents_final", final, kind=FAR)
    case.compare("images", 2 * model.vae.decode(final) - 1, kind=FAR)
    decoded = model.decode(tokens.where(is_kept, 0), keep, noise=StoredNoise(case.inputs["noise"]))
    case.compare("images", 2 * decoded - 1, part=lambda t: t.clamp(-1, 1), kind=FAR)
    case.finish(UNCOMPARED)


@pytest.mark.parametrize("folder", cases("flextok", kind("func")))
def test_functions(folder):
    case = Case(folder)
    given, config = case.inputs, case.config
    for i, levels in enumerate(config["fsq_levels_list"]):
        quantizer = FSQ(levels)
        case.compare(f"basis.{i}", quantizer.basis)
        case.compare(f"tokens.{i}", quantizer.encode(given[f"z.{i}"]))
        case.compare(f"quant.{i}", quantizer(given[f"z.{i}"]).quantised.detach())
        case.compare(f"bounded.{i}", quantizer._bound(given[f"z.{i}"]))
        case.compare(f"emb.{i}", quantizer.decode(given[f"ids.{i}"]))

    scale, past, guided = float(config["apg_scale"]), None, []
    for cond, uncond in zip(given["cond"], given["uncond"], strict=True):
        out, past = Guidance()(cond, uncond, scale, past)
        guided.append(out)
    case.compare("apg", torch.stack(guided))
    first = given["cond"][0], given["uncond"][0]
    case.compare("apg_eta", Guidance(0.0, None, 0.3)(*first, scale)[0])
    pairs = zip(given["cond"], given["uncond"], strict=True)
    case.compare("cfg", torch.stack([PLAIN(*pair, scale)[0] for pair in pairs]))

    case.compare("sigma_uniform", FlowTimes("uniform").of(given["u"]))
    case.compare("sigma_lognorm", FlowTimes("logit_normal").of(given["n"]))
    case.compare("sigma_stratified", FlowTimes("stratified").of(given["u"]))
    for name in [n for n in case.expected if n.startswith("sigma_mode_")]:
        bend = int(name.rpartition("_")[2]) / 100
        case.compare(name, FlowTimes(f"mode({bend})").of(given["u"]))
    case.compare("tfreq_max1", time_features(given["t"], config["freq_dim"]))
    thousands = time_features(1000 * given["t"], config["freq_dim"], highest=1.0)
    case.compare("tfreq_max1000", thousands)
    case.compare("sincos", sincos_grid(*config["sincos"]).permute(2, 0, 1))
    case.finish(UNCOMPARED)


@pytest.mark.parametrize("folder", cases("flextok", kind("ar")))
@torch.inference_mode()
def test_generator(folder):
    case = Case(folder)
    config = case.config
    model = generator(case.weights, num_heads=config["heads"]).eval()
    assert (model.config.norm == "rms") == (config["norm"] == "rms")
    assert model.config.qk_norm == config["qk_norm"]
    ids, labels, scale = case.inputs["ids"], case.inputs["labels"], config["cfg_factor"]
    null = model.null_condition(labels)

    def logits_of(ids, labels):
        return model.head.logits(model.teacher_forced(ids, labels))

    def guided(ids, null):
        cond, uncond = logits_of(ids, labels), logits_of(ids, null)
        return uncond + scale * (cond - uncond)

    case.compare("embeddings", model.embed(ids, labels, model.plan().training))
    logits = logits_of(ids, labels)
    case.compare("logits", logits)
    case.compare("logits_uncond", logits_of(ids, null))
    case.compare("ce", F.cross_entropy(logits.transpose(1, 2), ids))
    case.compare("ce", model(ids, labels).loss)

    draws = torch.zeros(ids.shape)
    greedy = Decoding(temperature=Schedule(0))
    case.compare("greedy_nocfg", decode(model, labels, StoredNoise(draws), greedy))
    greedy = greedy.changed(guidance=Schedule(scale))
    tokens = decode(model, labels, StoredNoise(draws), greedy)
    case.compare("greedy_cfg_fixed", tokens)
    fixed = guided(tokens, null)
    case.compare("cfg_logits_fixed", fixed)

    # The official loop overwrites the null label: from the second step on it means class 0.
    tokens = torch.zeros_like(ids)
    for step in range(ids.shape[1]):
        half = null if step == 0 else torch.zeros_like(null)
        tokens[:, step] = guided(tokens, half)[:, step].argmax(-1)
    case.compare("greedy_cfg_official", tokens)

    sampling = Sampling(config["temperature"], config["top_k"], config["top_p"] or 1.0)
    case.compare("sample_probs", probabilities(fixed[:, 0], sampling))
    case.finish(UNCOMPARED)
