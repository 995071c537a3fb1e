"""vistok decompress: the picture that a file of tokens stands for.

vistok decompress photo.vtk --tokenizer DIR -o back.png
vistok decompress photo.vtk --tokenizer DIR -o coarse.png --tokens 8
"""

from pathlib import Path

from accelerate import Accelerator

from vistok.codec import Codec, loads
from vistok.errors import UserError
from vistok.files import replaced
from vistok.tokenizers import Tokenizer


def main(file: str, tokenizer: str, output: str, tokens: int | None = None) -> None:
    """Write the picture of a .vtk file, at its original size.

    Args:
        file: what `vistok compress` wrote
        tokenizer: directory or Hub repository of the tokenizer that made it
        output: PNG file to write
        tokens: decode that many of the first only; by default all that the file holds
    """
    path = Path(output)
    if path.suffix.lower() != ".png":
        raise UserError(f"--output {output}: pictures are written as .png")
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    codec = Codec(Tokenizer.from_pretrained(tokenizer).to(Accelerator().device).eval())
    stream = loads(content, codec.spec, codec.fingerprint, file)
    if tokens is not None:
        stream = stream.first(tokens, codec.spec)
    picture = codec.decode(stream)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as aside:
        picture.save(aside, "PNG")
    length = len(stream.tokens) if codec.spec.has_prefixes else codec.spec.num_tokens
    print(
        f"{file}, {len(content)} bytes: {length} tokens, {picture.width} x {picture.height}: {path}"
    )
