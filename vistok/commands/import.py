"""vistok import: published weights as a vistok checkpoint.

vistok import llamagen vq_ds16_c2i.pt --output runs/llamagen-l --options.image_size 384
vistok import llamagen c2i_L_384.pt --output runs/llamagen-l --options.shape "[24,24]"
vistok import nar c2i_B.pt --output runs/nar-b
vistok import kl16 kl16.ckpt --output runs/mar-l
vistok import mar checkpoint-last.pth --output runs/mar-l --plan "mar(64)" --steps "linear(50,5)"
vistok import var var_d16.pth --output runs/var-d16 --options.tokenizer vae_ch160v4096z32.pth
vistok import tokenflow-t2i Tokenflow-t2i/ --output runs/t2i --options.tokenizer runs/t2i/tokenizer
vistok import autoencoder-kl sd-vae-ft-mse --output runs/sd-vae --options.image_size 256
"""

from pathlib import Path
from typing import Any, Literal, Unpack

from vistok.checkpoints import (
    flextok,
    flowar,
    kl,
    larp,
    llamagen,
    mar,
    maskgit,
    rar,
    retok,
    titok,
    tokenbridge,
    tokenflow,
    tokenflow_t2i,
    var,
    xar,
)
from vistok.checkpoints.files import ENTRIES, read_weights
from vistok.decoding import DecodingOptions
from vistok.errors import UserError
from vistok.pipelines import DEFAULT, write_decoding
from vistok.text import caption_shape, remember_encoder, remembered_encoder
from vistok.tokenizers import Tokenizer

# Of files that hold averaged weights beside others.
PREFERRED = {
    "retok": retok.ENTRIES,
    "var": var.ENTRIES,
    "tokenflow": tokenflow.ENTRIES,
    **dict.fromkeys(("mar", "tokenbridge", "xar", "flowar"), mar.ENTRIES),
}
# Of all published text-conditional generators, and of all tokenizers that decode with captions.
T5, CLIP = "google/flan-t5-xl", "openai/clip-vit-large-patch14-336"
IMPORTERS = {
    "llamagen": llamagen.convert,
    "par": llamagen.convert,  # LlamaGen's layout, as that of NAR, and its tokenizers
    "nar": llamagen.convert,
    "larp": larp.tokenizer,
    "titok": titok.convert,  # also TA-TiTok, One-D-Piece, the MaskGIT-VQGAN
    "flextok": flextok.convert,
    "retok": retok.convert,
    "maskgit": maskgit.generator,
    "rar": rar.generator,
    "kl16": kl.mar,  # also of TokenBridge, xAR, FlowAR and DiSA
    "mar": mar.generator,  # also DiSA's
    "tokenbridge": tokenbridge.generator,
    "xar": xar.generator,
    "flowar": flowar.generator,
    "var": var.convert,
    "tokenflow": tokenflow.convert,  # also a new one around the image tower of a CLIP or SigLIP
}
# Of what is published as a directory, which says how it was made.
DIRECTORY_IMPORTERS = {"autoencoder-kl": kl.diffusers, "tokenflow-t2i": tokenflow_t2i.directory}


def main(
    system: Literal[
        "llamagen",
        "par",
        "nar",
        "larp",
        "titok",
        "flextok",
        "retok",
        "maskgit",
        "rar",
        "kl16",
        "mar",
        "tokenbridge",
        "xar",
        "flowar",
        "var",
        "tokenflow",
        "autoencoder-kl",
        "tokenflow-t2i",
    ],
    weights: str,
    output: str,
    options: dict[str, Any] | None = None,
    entries: list[str] | None = None,
    **changes: Unpack[DecodingOptions],
) -> None:
    """Turn published weights into a checkpoint, checking that every tensor fits.

    Args:
        system: whose weights they are
        weights: .pt, .pth, .bin, .ckpt or .safetensors file; of autoencoder-kl and tokenflow-t2i
            the directory or Hub repository
        output: directory of the checkpoint; the model goes into its tokenizer/ or generator/
        options: what the file does not tell, as --options.NAME VALUE; for tokenizers image_size,
            for generators shape (of the tokens, 16x16 by default), num_heads, class_names, ...
        entries: entries of the file of which the first present is taken, as '["ema", "model"]'
        changes: how the generator decodes where it is not told otherwise
    """
    options = options or {}
    try:
        if system in DIRECTORY_IMPORTERS:
            model = DIRECTORY_IMPORTERS[system](weights, **options)
        else:
            state = read_weights(weights, entries or PREFERRED.get(system, ENTRIES))
            model = IMPORTERS[system](state, where=weights, **options)
    except TypeError as error:
        raise UserError(f"--options {options}: {error}") from error
    part = "tokenizer" if isinstance(model, Tokenizer) else "generator"
    if part == "generator":
        decoding = DEFAULT.changed(**changes)
        decoding.plan_of(model)  # raises before anything is written
        if caption_shape(model) and remembered_encoder(model) is None:
            remember_encoder(model, T5)
    elif model.text_shape is not None:
        remember_encoder(model, CLIP)
    model.save_pretrained(Path(output, part))
    if part == "generator":
        write_decoding(Path(output), decoding)
    print(
        f"{weights}: {type(model).__name__}, {model.num_parameters():,} parameters, "
        f"{model.spec}: {Path(output, part)}"
    )
