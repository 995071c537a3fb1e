"""Tokenizers with several codes per latent, or with no table of codes, from a config to a file."""

import pytest
import torch
import yaml

from vistok.codec import Codec, dumps, loads
from vistok.images import to_pil
from vistok.options import parser_of
from vistok.tokenizers import Tokenizer

QUANTIZERS = {
    "residual": """
        class_path: Residual
        init_args:
          quantizer: {class_path: EMAVQ, init_args: {vocab_size: 20, dim: 6, expiry: 0.5}}
          layers: 3
          least_layers: 1
        """,
    "residual-shared": """
        class_path: Residual
        init_args:
          quantizer: {class_path: VQ, init_args: {vocab_size: 20, dim: 6, revival: true}}
          layers: 2
          shared: true
        """,
    "residual-fsq": """
        class_path: ResidualFSQ
        init_args: {levels: [5, 4, 3], layers: 2}
        """,
    "product": """
        class_path: Product
        init_args:
          quantizer:
          - {class_path: VQ, init_args: {vocab_size: 20, dim: 4}}
          - {class_path: FSQ, init_args: {levels: [5, 3]}}
          - {class_path: LFQ, init_args: {dim: 4, factors: [1, 3]}}
        """,
    "grouped-residual": """
        class_path: Projected
        init_args:
          dim: 8
          quantizer:
            class_path: Product
            init_args:
              quantizer:
                class_path: Residual
                init_args:
                  quantizer: {class_path: EMAVQ, init_args: {vocab_size: 20, dim: 3}}
                  layers: 2
              pieces: 2
        """,
    "lfq": "{class_path: LFQ, init_args: {dim: 10, gamma: 1.5}}",
    "lfq-factors": "{class_path: LFQ, init_args: {dim: 10, factors: [4, 6]}}",
    "bsq": "{class_path: BSQ, init_args: {dim: 10, entropy: 0.2}}",
}
TOKENIZERS = {
    "conv": """
        class_path: ConvTokenizer
        init_args:
          {image_size: 16, channels: 8, channel_multipliers: [1, 2, 3], num_res_blocks: 1,
           z_channels: 12}
        """,
    "titok": """
        class_path: TiTok
        init_args:
          {image_size: 16, patch_size: 4, num_latent_tokens: 5, encoder_width: 24,
           encoder_depth: 1, encoder_heads: 2, decoder_width: 20, decoder_depth: 1,
           decoder_heads: 4, tail_drop: uniform}
        """,
}


def of_config(tokenizer: Tokenizer) -> None:
    """Take the part of a training config that makes a tokenizer."""


@pytest.fixture(params=[(t, q) for t in TOKENIZERS for q in QUANTIZERS], ids="+".join)
def tokenizer(request):
    family, quantizer = request.param
    config = yaml.safe_load(TOKENIZERS[family])
    config["init_args"]["quantizer"] = yaml.safe_load(QUANTIZERS[quantizer])
    parser = parser_of(of_config, "of_config")
    return parser.instantiate(parser.parse_object({"tokenizer": config})).tokenizer


def test_from_a_config_to_a_file(tokenizer, tmp_path):
    images = torch.rand(3, *tokenizer.input_shape)
    optimiser = torch.optim.Adam(tokenizer.parameters(), lr=1e-3)
    before = tokenizer.last_layer.detach().clone()
    for _ in range(2):
        output = tokenizer.train()(images)
        tokenizer.spec.check(output.tokens, "training")
        assert set(output.usage) == {"codebook_usage", "codebook_perplexity", "dead_codes"}
        loss = (output.reconstruction - images).square().mean() + sum(output.losses.values())
        loss.backward()
        assert all(p.grad is not None for p in tokenizer.parameters())
        optimiser.step()
        optimiser.zero_grad()
        tokenizer.update_codebook(output.latents)
    assert not torch.equal(tokenizer.last_layer, before)

    tokens = tokenizer.eval().encode(images)
    tokenizer.spec.check(tokens, "encode")
    output = tokenizer(images)
    assert torch.equal(output.tokens, tokens)
    decoded = tokenizer.decode(tokens)
    torch.testing.assert_close(decoded, output.reconstruction.clamp(0, 1))

    tokenizer.save_pretrained(tmp_path)
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert loaded.spec == tokenizer.spec
    assert torch.equal(loaded.encode(images), tokens)
    assert torch.equal(loaded.decode(tokens), decoded)

    codec = Codec(loaded)
    stream = codec.encode(to_pil(images)[0])
    content = dumps(stream, codec.spec)
    read = loads(content, codec.spec, codec.fingerprint, "a.vtk")
    assert torch.equal(read.tokens, stream.tokens)
