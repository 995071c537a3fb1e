"""vistok quantize: a tokenizer of continuous latents as one of discrete tokens, without training.

vistok quantize --tokenizer runs/kl16/tokenizer --output runs/kl16-64
vistok quantize --tokenizer runs/kl-scaled --output runs/kl-16 --levels 16 --limit 4
"""

from vistok.errors import UserError
from vistok.tokenizers import KLTokenizer, QuantizedTokenizer


def main(tokenizer: str, output: str, levels: int = 64, limit: float = 5.0) -> None:
    """Round each number of the latents to one of a few fixed levels (TokenBridge, 2503.16430).

    Args:
        tokenizer: directory or Hub repository of a tokenizer of continuous latents, whose variance
            is about 1
        output: directory of the tokenizer of levels
        levels: values that a number can take
        limit: where they end: latents beyond about 0.8 of it, at 64 levels, become the outermost
    """
    model = QuantizedTokenizer.from_pretrained(tokenizer)
    if isinstance(model, KLTokenizer) and model.vae.arguments["scaling_factor"] == 1:
        raise UserError(
            f"{tokenizer}: its latents are not scaled to the levels' variance of about 1: do it "
            "with vistok latents --output, and quantize what that writes"
        )
    quantised = model.quantised(levels, limit)
    quantised.save_pretrained(output)
    print(
        f"{tokenizer}: {model.spec} as {quantised.spec}, {quantised.spec.bits:g} bits an image: "
        f"{output}"
    )
