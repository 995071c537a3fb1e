"""A tiny trained pair, made by the real commands once for all tests here."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

TOKENIZER = """
tokenizer:
  class_path: ConvTokenizer
  init_args:
    image_size: 16
    patch_size: 4
    channels: 8
    channel_multipliers: [1]
    num_res_blocks: 1
    z_channels: 8
    attention: false
    quantizer: {class_path: FSQ, init_args: {levels: [4, 4]}}
data: {class_path: Emoji, init_args: {split: held-out}}
validation: {class_path: Emoji, init_args: {split: held-out}}
transform: random-flip
images: 32
batch_size: 8
run: {num_workers: 0, validation_images: 8}
"""

GENERATOR = """
generator: {class_path: LlamaGen, init_args: {dim: 32, depth: 1, num_heads: 2, hidden_dim: 32}}
transform: resize-center-crop
data: {class_path: Emoji, init_args: {split: held-out}}
images: 32
batch_size: 8
run: {num_workers: 0}
"""


@pytest.fixture(scope="session")
def configs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("configs")
    (folder / "tokenizer.yaml").write_text(TOKENIZER)
    (folder / "generator.yaml").write_text(GENERATOR)
    return folder


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory, configs) -> Path:
    """A folder with tokenizer/ and generator/, each trained for four steps."""
    import runpy

    from commands import ROOT

    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        for part, more in (("tokenizer", []), ("generator", ["--tokenizer", folder / "tokenizer"])):
            options = ["--config", configs / f"{part}.yaml", "--output", folder / part, *more]
            patch.setattr(sys, "argv", [part, *map(str, options)])
            runpy.run_path(str(ROOT / "train" / f"{part}.py"), run_name="__main__")
    return folder
