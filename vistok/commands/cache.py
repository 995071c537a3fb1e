"""vistok cache: encode a data set once, so that generators train on its tokens.

vistok cache --tokenizer runs/quickstart/tokenizer --data Emoji --output runs/quickstart/tokens
accelerate launch --num_processes 8 -m vistok.cli cache --tokenizer DIR --data train/ --output DIR
vistok cache --tokenizer DIR --data "train-*.tar" --output DIR --text_encoder google/flan-t5-xl
vistok cache --tokenizer DIR --data train.tar --output DIR --text_encoder DIR --caption_ids true
"""

from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from vistok.data import (
    CaptionSpec,
    ImageCrops,
    ImageSource,
    TokenCache,
    TokenCacheHeader,
    TokenCacheWriter,
    Transform,
    shard_range,
)
from vistok.data.token_cache import HEADER
from vistok.metrics import open_pictures
from vistok.text import PromptReader, TextEncoder
from vistok.tokenizers import Tokenizer


@torch.inference_mode()
def main(
    tokenizer: str,
    data: ImageSource | str,
    output: str,
    transform: str = "resize-center-crop",
    crops: int | None = None,
    text_encoder: str | None = None,
    caption_length: int = 120,
    caption_ids: bool = False,
    batch_size: int = 64,
    num_workers: int = 2,
    seed: int = 0,
) -> None:
    """Encode a data set into a memory-mapped token cache, on one process or several.

    Args:
        tokenizer: directory or Hub repository of the tokenizer
        data: pictures to encode: a data set by name, a folder, tar shards or an npz
        output: directory of the cache
        transform: how a picture becomes the tokenizer's size; training must name the same
        crops: versions of each picture, of which training takes one at each sight; by default all
            that the transform counts (`ten-crop`: 10), or one draw of a random one
        text_encoder: directory or Hub repository of a T5 that encodes the captions, too, for
            text-conditional generators; or of what reads them as ids
        caption_length: tokens to which captions are padded or cut
        caption_ids: keep the ids of captions, for generators that embed these
        batch_size: crops encoded at once on each process; those of one picture stay together
        num_workers: processes that load pictures, for each process
        seed: of the random transform
    """
    process = Accelerator()
    model = Tokenizer.from_pretrained(tokenizer).to(process.device).eval()
    crop = Transform(transform, model.image_size[0])
    data = open_pictures(data)
    images = ImageCrops(data, crop, crops, seed)
    text = None
    if text_encoder:
        reader = PromptReader if caption_ids else TextEncoder
        text = reader(text_encoder, caption_length, device=process.device)
    header = TokenCacheHeader(
        model.fingerprint(),
        model.statistics_spec,
        crop,
        data.name,
        data.class_names,
        len(data),
        images.crops,
        captions=CaptionSpec(text_encoder, caption_length, text.dim) if text else None,
    )
    if Path(output, HEADER).exists() and TokenCache(output).header == header:
        process.print(f"{output} holds these tokens already")
        return
    writer = TokenCacheWriter(output, header)
    if process.is_main_process:
        writer.allocate()
    process.wait_for_everyone()

    mine = shard_range(len(data), process.process_index, process.num_processes)
    pictures = max(1, batch_size // images.crops)
    loader = DataLoader(Subset(images, mine), pictures, num_workers=num_workers)
    start = mine.start
    for batch in tqdm(loader, "encoding", disable=not process.is_main_process):
        tokens = model.statistics(batch["image"].flatten(0, 1).to(process.device)).cpu()
        labels = batch["label"]
        captions = ()
        if text:
            encoded = text.encode(batch["caption"])
            captions = encoded.ids if caption_ids else encoded.features, encoded.mask
        writer.write(start, tokens.unflatten(0, (-1, images.crops)), labels, *captions)
        start += len(labels)
    process.wait_for_everyone()
    if process.is_main_process:
        writer.finish()
        with_captions = f", captions {header.captions}" if text else ""
        made = f"{images.crops} x {model.statistics_spec}{with_captions}"
        print(f"{len(data)} pictures of {data.name} as {made}: {output}")
