"""vistok demo: a page on which a checkpoint generates, reconstructs and edits.

vistok demo --checkpoint assets/emoji
vistok demo --checkpoint assets/emoji-lengths --port 8000
"""

from pathlib import Path

from accelerate import Accelerator

from vistok.errors import UserError
from vistok.pipelines import ImagePipeline
from vistok.tokenizers import Tokenizer


def main(
    checkpoint: str,
    text_encoder: str | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    share: bool = False,
    device: str | None = None,
) -> None:
    """Serve a page on which images are generated, tokens appearing as they are decoded, pictures
    reconstructed and edited by their tokens; until Ctrl-C.

    Args:
        checkpoint: directory or Hub repository of a pipeline with tokenizer/ and generator/; or the
            directory of a tokenizer alone, which reconstructs and edits
        text_encoder: directory or Hub repository of what reads prompts, where they are taken; the
            one that the checkpoint was trained with by default
        host: address to serve at; 0.0.0.0 lets other machines in
        port: port to serve at
        share: also serve at a public address of gradio.live, for which the network is needed
        device: as cuda:1; an accelerator where there is one by default
    """
    try:
        from vistok.demo.page import serve
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise UserError('the page is made by gradio: pip install "vistok[demo]"') from error

    model = load(checkpoint, text_encoder).to(device or Accelerator().device)
    serve(model, host, port, share)


def load(checkpoint: str, text_encoder: str | None = None) -> ImagePipeline | Tokenizer:
    """Return the pipeline or, where there is no generator, the tokenizer of a checkpoint."""
    folder = Path(checkpoint)
    if Path(folder, "generator").exists() or not folder.exists():
        return ImagePipeline.from_pretrained(checkpoint, text_encoder)
    inside = Path(folder, "tokenizer").exists()
    return Tokenizer.from_pretrained(checkpoint, subfolder="tokenizer" if inside else None)
