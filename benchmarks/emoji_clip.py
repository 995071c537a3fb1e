"""A small CLIP of the emoji: what stands in for a pretrained teacher where none can be fetched.

python benchmarks/emoji_clip.py --output runs/semantic/clip

Pictures of the training split and the words of their names are brought together (Radford et al.,
2021, arXiv:2103.00020); it sees neither categories nor held-out pictures. What stands for a picture
is the mean of its patches, not the class token: they are what is taught to others, and too few
pictures are here for them to mean something by themselves. Written as transformers saves a
CLIPModel, so that it is read like any other teacher.
"""

import shutil
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from torch.utils.data import DataLoader
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from vistok.data import Emoji, EvaluationImages, Images, Stream, Transform, make_loader
from vistok.options import run

LONGEST = 16  # words of a name, with its end


def main(
    output: str = "runs/semantic/clip",
    images: int = 80_000,
    batch_size: int = 256,
    image_size: int = 32,
    patch_size: int = 4,
    width: int = 128,
    depth: int = 4,
    lr: float = 1e-3,
    word_dropout: float = 0.3,
    threads: int = 1,
) -> None:
    """Train, and print how often a held-out picture is nearest to its own name among 100.

    Args:
        output: directory of the model
        images: length of the training
        batch_size: pictures to be told apart by their names
        image_size: pixels of a side
        patch_size: of the image tower
        width: of both towers and of what they share
        depth: layers of the image tower; the text tower has half as many
        lr: highest learning rate
        word_dropout: share of the words left out
        threads: of the CPU
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train, held_out = Emoji("train"), Emoji("held-out")
    words = sorted({word for caption in train.captions for word in caption.split()})
    ids = {word: i for i, word in enumerate(words, start=2)}  # 0 begins, 1 is unknown
    net = CLIPModel(config(len(ids) + 2, image_size, patch_size, width, depth)).to(device)
    stream = Stream(Images(train, Transform("random-crop-flip", image_size)), 0)
    steps = images // batch_size
    adam = torch.optim.AdamW(net.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, lr, steps, pct_start=0.05)
    loader = make_loader(stream, start_step=0, num_steps=steps, batch_size=batch_size)
    for step, batch in enumerate(loader):
        logits = scores(net, batch["image"], tokens(batch["caption"], ids, word_dropout))
        own = torch.arange(len(logits), device=device)
        loss = (cross_entropy(logits, own) + cross_entropy(logits.t(), own)) / 2
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}, found {found(net, held_out, ids):.3f}")
    shutil.rmtree(output, ignore_errors=True)
    net.save_pretrained(output)
    CLIPImageProcessor(size=image_size, crop_size=image_size).save_pretrained(output)
    print(f"wrote {Path(output)}")


def config(vocab: int, image_size: int, patch_size: int, width: int, depth: int) -> CLIPConfig:
    """Return that of both towers, whose text ends in the highest id."""
    shared = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": 4}
    vision = {"image_size": image_size, "patch_size": patch_size, "num_hidden_layers": depth}
    text = {"vocab_size": vocab + 1, "max_position_embeddings": LONGEST, "eos_token_id": vocab}
    text |= {"num_hidden_layers": depth // 2, "bos_token_id": 0, "pad_token_id": vocab}
    return CLIPConfig(
        text_config=shared | text, vision_config=shared | vision, projection_dim=width
    )


def tokens(names: list[str], ids: dict[str, int], dropout: float = 0.0) -> Tensor:
    """Return the words of each name as numbers, some left out, and the end."""
    rows = torch.full((len(names), LONGEST), len(ids) + 2)
    for row, name in zip(rows, names, strict=True):
        words = [ids.get(word, 1) for word in name.split() if torch.rand(()) >= dropout]
        words = [0, *words][: LONGEST - 1]
        row[: len(words)] = torch.tensor(words)
    return rows


def scores(net: CLIPModel, images: Tensor, texts: Tensor) -> Tensor:
    """Return the similarity of each picture with each name, sharpened."""
    processor = CLIPImageProcessor()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (processor.image_mean, processor.image_std))
    tower, normalised = net.vision_model, ((images - mean) / std).to(net.device)
    patches = tower(pixel_values=normalised).last_hidden_state[:, 1:]
    pictures = net.visual_projection(tower.post_layernorm(patches)).mean(1)
    names = net.text_projection(net.text_model(input_ids=texts.to(net.device)).pooler_output)
    return net.logit_scale.exp() * normalize(pictures) @ normalize(names).t()


@torch.no_grad()
def found(net: CLIPModel, source: Emoji, ids: dict[str, int], among: int = 100) -> float:
    """Return the share of pictures that are nearest to their own name among so many."""
    net.eval()
    size = net.config.vision_config.image_size
    held_out = EvaluationImages(source, Transform("resize-center-crop", size))
    hits = []
    for batch in DataLoader(held_out, among, drop_last=True):
        logits = scores(net, batch["image"], tokens(batch["caption"], ids))
        hits.append((logits.argmax(1).cpu() == torch.arange(among)).float().mean())
    net.train()
    return torch.stack(hits).mean().item()


if __name__ == "__main__":
    run(main)
