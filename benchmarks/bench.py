"""Measure speed and memory: each figure compares two ways in one run, on the same weights and data.

python benchmarks/bench.py [NAME ...]     (all of them where none is named; `--help` lists them)
"""

import argparse
import base64
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from clipcap.base.decode import video_span
from clipcap.base.photos import list_images, open_image
from clipcap.base.scenes import draw_dataset, draw_scene
from clipcap.base.store import FeatureStore
from clipcap.embed import VisionTower, embed_images, features_of, pixels_of
from clipcap.generate import GenerationOptions, generate_captions
from clipcap.image import Captioner
from clipcap.model import CaptionModel, MapperConfig
from clipcap.train import TokenisedCaptions, TrainConfig, batches_by_length, make_optimizer, train
from clipcap.video import VideoReader, caption_samples, sample_moments, spread

root = Path(__file__).resolve().parent.parent
MIB = 2**20


def report(*sentences):
    "Print one line at once"
    print(*sentences, flush=True)


def seconds_of(work):
    "How long one call takes"
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def shortest(work, times=3):
    "The shortest of some runs, the first one not counted"
    work()
    return min(seconds_of(work) for _ in range(times))


def compare(name, one, other):
    "One line: both ways, and how many times faster the second one is"
    slow, fast = shortest(one), shortest(other)
    report(f'{name}: {slow:.2f} s -> {fast:.2f} s, {slow / fast:.3g}x')


def resident():
    "Memory of this process, MiB"
    pages = int(Path('/proc/self/statm').read_text().split()[1])
    return pages * resource.getpagesize() / MIB


# ---- the feature store
def write_random_store(folder, rows, cells, dim):
    "A store of random features, without a tower: returns the names of its photos"
    folder.mkdir()
    array = np.lib.format.open_memmap(folder / 'features.npy', 'w+', np.float16, (rows, cells, dim))
    for start in range(0, rows, 10_000):
        rng = np.random.default_rng(start)
        array[start : start + 10_000] = rng.standard_normal((1, cells, dim))
    array.flush()
    names = [f'{n}.jpg' for n in range(rows)]
    tower = dict(name='bench', features='grid', dim=dim, cells=cells, image_size=None)
    manifest = dict(whole=True, fingerprint='bench', skipped={}, names=names, tower=tower)
    manifest['identities'] = base64.b64encode(bytes(32 * rows)).decode()
    (folder / 'manifest.json').write_text(json.dumps(manifest))
    return names


def store(work, rows=100_000, cells=49, dim=512):
    "Opening a store of 5 GB, and training from it: what stays in memory"
    names = write_random_store(work / 'store', rows, cells, dim)
    size = (work / 'store' / 'features.npy').stat().st_size / 2**30
    before, began = resident(), time.perf_counter()
    opened = FeatureStore.open(work / 'store', 'bench')
    took, grown = time.perf_counter() - began, resident() - before
    report(f'store {rows:,} x {cells} x {dim}, {size:.1f} GiB: {took:.2f} s, {grown:+.0f} MiB')
    tiny = Captioner('tiny').model
    for share in 0.02, 0.1:
        chosen = np.random.default_rng(0).permutation(rows)[: int(share * rows)]
        images = [names[i] for i in chosen]
        table = pd.DataFrame(dict(image=images, caption='a dog runs', split='train'))
        mapper = MapperConfig('linear', feature_dim=dim, cells=cells)
        model = CaptionModel(tiny.language, tiny.tokenizer, mapper, freeze_language=True)
        config = TrainConfig(epochs=1, save_every=10**9)
        before = resident()
        train(model, table, opened, config, work / f'run{share}', progress=False)
        read = len(chosen) * cells * dim * 2 / MIB
        report(
            f'  trained on {len(chosen):,} random rows ({read:,.0f} MiB of features): '
            f'{resident() - before:+.0f} MiB resident'
        )


# ---- embedding
def compare_embedding(name, tower, paths, work):
    "One at a time, in batches with decoding in threads, and the bare forward pass"
    pixels = pixels_of([open_image(p) for p in paths], tower.processor, tower.image_size)

    def one_by_one():
        for path in paths:
            tower(tower.preprocess([open_image(path)]))

    def ours():
        with tempfile.TemporaryDirectory(dir=work) as folder:
            embed_images(tower, paths, folder, progress=False)

    @torch.inference_mode()
    def bare():
        for start in range(0, len(paths), 32):
            features_of(tower.model, pixels[start : start + 32], tower.features)

    what = f'embedding {len(paths)} photos, {name}'
    compare(f'{what}, one at a time -> embed_images', one_by_one, ours)
    compare(f'{what}, embed_images -> bare forward pass', ours, bare)


def embed(work):
    "Embedding a folder of photos, with the bundled tower and with one as large as CLIP ViT-B/32"
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    paths = list_images(draw_dataset(work / 'scenes', 256, size=256) / 'images')
    compare_embedding('the bundled tower', Captioner('tiny').tower, paths, work)
    clip = CLIPVisionModel(CLIPVisionConfig())
    large_tower = VisionTower(clip, CLIPImageProcessorPil(), 'pooled')
    compare_embedding("a tower of ViT-B/32's size", large_tower, paths[:64], work)


# ---- captioning
def caption(work):
    "Captioning 64 features with the bundled model: one at a time, and in one batch"
    model = Captioner('tiny').model
    features = torch.randn(64, model.config.cells, model.config.feature_dim).abs()
    for beams in 1, 5:
        options = GenerationOptions(beams=beams, max_length=16)

        def one_by_one(options=options):
            for i in range(64):
                generate_captions(model, features[i : i + 1], options)

        def together(options=options):
            generate_captions(model, features, options)

        compare(
            f'captioning 64 features, beams {beams}, one by one -> a batch', one_by_one, together
        )


def large(work, tokens=16, few=8):
    "The same at GPT-2's size: one at a time without a cache, a batch, and its bare passes"
    from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    language, tokenizer = GPT2LMHeadModel(GPT2Config()), Captioner('tiny').model.tokenizer
    mapper = MapperConfig('mlp', feature_dim=512, prefix_length=10)
    model = CaptionModel(language, tokenizer, mapper).eval()
    features = torch.randn(64, 1, 512)
    fixed = dict(min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=0, eos_token_id=50256)

    def write(prefix, **more):
        mask = torch.ones(prefix.shape[:2], dtype=torch.long)
        config = GenerationConfig(do_sample=False, **fixed, **more)
        language.generate(inputs_embeds=prefix, attention_mask=mask, generation_config=config)

    @torch.inference_mode()
    def alone():  # the first few, for it takes long
        for i in range(few):
            write(model.mapper(features[i : i + 1]), use_cache=False)

    @torch.inference_mode()
    def together():
        write(model.mapper(features), use_cache=True)

    @torch.inference_mode()
    def bare():
        seen = language(inputs_embeds=model.mapper(features), use_cache=True, logits_to_keep=1)
        for _ in range(tokens - 1):
            ids, cache = seen.logits[:, -1].argmax(-1, keepdim=True), seen.past_key_values
            seen = language(input_ids=ids, past_key_values=cache, use_cache=True)

    one = shortest(alone, 1) * 64 / few
    batch, passes = shortest(together), shortest(bare)
    report(
        f'captioning 64 features at GPT-2 size, {tokens} tokens: one at a time without a cache '
        f'{one:.1f} s ({64 // few} times {few} of them) -> one batch with a cache {batch:.2f} s, '
        f'{one / batch:.1f}x'
    )
    report(f'  its forward passes alone: {passes:.2f} s, {passes / batch:.2f} of it')


def photos(work):
    "From file to caption with the bundled model's defaults, a folder of 64 photos"
    paths = list_images(draw_dataset(work / 'some', 64, size=256) / 'images')
    captioner = Captioner('tiny')

    def one_by_one():
        for path in paths:
            captioner.caption([path])

    def together():
        captioner.caption(paths)

    compare('64 photos to captions, one call each -> one call', one_by_one, together)
    report(f'  {shortest(together) / 64:.3f} s per photo')


# ---- training
class RandomStore:
    "What training asks of a store: random features for photos named by their number"

    def __init__(self, rng):
        self.rng = rng

    def __getitem__(self, rows):
        return self.rng.standard_normal((len(rows), 1, 512), np.float32)

    def rows(self, names):
        return np.array([int(name.removesuffix('.jpg')) for name in names])


def random_captions(rng, tokenizer, photos):
    "Captions as long as Flickr8k's: 10.8 words on average, 3.8 their spread, 36 at most"
    tokens = list(tokenizer.get_vocab())[1000:2000]
    words = tokenizer.convert_tokens_to_string(tokens).split()
    lengths = rng.normal(10.8, 3.8, 5 * photos).round().clip(2, 36).astype(int)
    captions = [' '.join(rng.choice(words, n)) for n in lengths]
    return pd.DataFrame(dict(image=[f'{i // 5}.jpg' for i in range(5 * photos)], caption=captions))


def padded_loss(model, features, ids, mask):
    "As the earlier systems train: every position of the longest caption, logits of everything"
    prefix = model.mapper(features)
    embeddings = torch.cat([prefix, model.language.get_input_embeddings()(ids)], 1)
    seen = torch.cat([mask.new_ones(prefix.shape[:2]), mask], 1)
    outputs = model.language(inputs_embeds=embeddings, attention_mask=seen, use_cache=False)
    ignored = torch.full(prefix.shape[:2], -100)
    targets = torch.cat([ignored, ids.masked_fill(mask == 0, -100)], 1)
    return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())


def train_one_way(way, photos=400):
    "In a process of its own: captions per second, and the peak of memory in MiB, as JSON"
    rng, bundled = np.random.default_rng(0), Captioner('tiny').model
    table = random_captions(rng, bundled.tokenizer, photos)
    captions = TokenisedCaptions(table, RandomStore(rng), bundled.tokenizer)
    model = bundled
    if way in ('apart', 'together'):
        mapper = MapperConfig('transformer', feature_dim=512, prefix_length=40)
        model = CaptionModel(bundled.language, bundled.tokenizer, mapper, freeze_language=True)
    model.train()
    optimizer, longest = make_optimizer(model, TrainConfig()), int(captions.lengths.max())
    if way == 'padded':
        batches = [np.arange(i, i + 128) for i in range(0, len(captions) - 127, 128)]
    else:
        photo = captions.rows if way == 'together' else None
        batches = batches_by_length(captions.lengths, 128, photos=photo)

    def epoch():
        for indices in batches:
            features, ids, mask, photo_index = captions.batch(indices)
            if way == 'padded':
                fill = (0, longest - ids.shape[1])
                loss = padded_loss(
                    model, features[photo_index], F.pad(ids, fill), F.pad(mask, fill)
                )
            else:
                loss = model(features, ids, mask, photo_index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    before = resident()
    speed = sum(map(len, batches)) / shortest(epoch, 2)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    report(json.dumps([speed, peak - before]))


def in_own_process(way):
    "What `train_one_way` reports"
    command = [sys.executable, __file__, '--train-one-way', way]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def training(work):
    "Captions padded to the longest against `train`; a photo's captions apart and together"
    pairs = [
        (
            'training: padded to the longest, logits of everything -> as `train` does',
            'padded',
            'ours',
        ),
        (
            'training a transformer mapper (prefix 40, 8 layers) before a frozen LM: '
            'captions of a photo apart -> together',
            'apart',
            'together',
        ),
    ]
    for what, one, other in pairs:
        (slow, much), (fast, little) = in_own_process(one), in_own_process(other)
        report(
            f'{what}: {slow:.0f} -> {fast:.0f} captions per second, {fast / slow:.1f}x; '
            f'+{much:.0f} -> +{little:.0f} MiB at the peak, {little / much:.2f} of the memory'
        )


# ---- video and webcam
def video(work, seconds=30, fps=25, n=32):
    "A clip of 30 s, 32 frames: against decoding it once and captioning 32 photos in one batch"
    scenes = [draw_scene(random.Random(seed), 640)[0].crop((0, 80, 640, 560)) for seed in range(10)]
    clip, codec = work / 'clip.mp4', cv2.VideoWriter_fourcc(*'mp4v')
    film = cv2.VideoWriter(str(clip), cv2.CAP_FFMPEG, codec, fps, (640, 480))
    for frame in range(seconds * fps):
        scene = np.asarray(scenes[frame * 10 // (seconds * fps)])[..., ::-1]
        film.write(np.roll(scene, frame, 1))
    film.release()
    captioner, options = Captioner('tiny', batch_size=n), GenerationOptions()
    pictures = [scenes[i % 10] for i in range(n)]

    def ours():
        reader = VideoReader(clip)
        samples = sample_moments(reader, spread(*video_span(clip), n))
        list(caption_samples(samples, captioner, options))

    def apart():
        reader = cv2.VideoCapture(str(clip))
        while reader.grab():
            pass
        captioner.caption(pictures, options)

    what = f'{seconds} s of video, {n} frames: clipcap.video'
    compare(f'{what} -> decoding once plus {n} photos in one batch', ours, apart)
    mine = shortest(ours)
    pictures[0].save(work / 'frame.jpg')
    command = [sys.executable, '-m', 'clipcap.cli.main', 'caption', work / 'frame.jpg']
    ways = {
        'loading the model': shortest(lambda: Captioner('tiny').caption(pictures[:1], options)),
        'a process': seconds_of(lambda: subprocess.run(command, check=True, capture_output=True)),
    }
    for way, one in ways.items():
        report(f'  {way} for every frame: {n * one:.1f} s ({n} times one), {n * one / mine:.1f}x')


def webcam(work):
    "A camera in the browser and the bundled model: JupyterLab, headless Chromium, a film as camera"
    sys.path.append(str(root / 'tests'))
    from browser import jupyterlab, opened
    from test_browser import camera_flags, write_camera

    one, two = (draw_scene(random.Random(seed), 320)[0].crop((0, 40, 320, 280)) for seed in (3, 5))
    flags = camera_flags(write_camera(work / 'camera.y4m', [one] * 60 + [two] * 60))
    cells = [
        'from clipcap import Captioner, GenerationOptions\nfrom clipcap.webcam import Webcam',
        'Webcam(Captioner(), GenerationOptions(beams=1))',
    ]
    ready = (
        "() => /per second|a second/.test(document.querySelector('.clipcap-status').textContent)"
    )
    with jupyterlab(work) as url, opened((url, work), cells, flags, permissions=['camera']) as page:
        page.wait_for_selector('.clipcap-start').click()
        page.wait_for_function(ready)
        page.wait_for_timeout(8000)  # the figure is that of the last 5 s
        status = page.locator('.clipcap-status').inner_text()
        report(f'webcam in the browser: {status}; load {os.getloadavg()[0]:.1f}')


BENCHMARKS = dict(
    store=store,
    embed=embed,
    caption=caption,
    large=large,
    training=training,
    photos=photos,
    video=video,
    webcam=webcam,
)


def main():
    known = '\n'.join(f'{name:9} {work.__doc__}' for name, work in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=known, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('names', nargs='*', choices=[*BENCHMARKS, []], metavar='NAME')
    parser.add_argument('--train-one-way', help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train_one_way:
        train_one_way(arguments.train_one_way)
        return
    threads = torch.get_num_threads()
    report(f'{os.cpu_count()} cores, torch {torch.__version__}, {threads} threads')
    for name in arguments.names or BENCHMARKS:
        with tempfile.TemporaryDirectory() as folder:
            BENCHMARKS[name](Path(folder))


if __name__ == '__main__':
    main()
