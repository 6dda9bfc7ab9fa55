"""Measure speed and memory: each figure compares two ways in one run, on the same weights and data.

python benchmarks/bench.py [store] [embed] [caption] [large] [training] [photos] [video] [webcam]      (all of them where none is named)"""

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
from PIL import Image

from clipcap.base.photos import list_images, open_image
from clipcap.base.scenes import draw_dataset, draw_scene
from clipcap.base.store import FeatureStore
from clipcap.embed import VisionTower, embed_images, features_of, pixels_of
from clipcap.generate import GenerationOptions, generate_captions
from clipcap.image import Captioner
from clipcap.model import CaptionModel, MapperConfig
from clipcap.train import TokenisedCaptions, TrainConfig, batches_by_length, make_optimizer, train
from clipcap.video import VideoReader, caption_samples, sample_moments, spread, video_length


def shortest(work, times=3):
    "The shortest of some runs, the first one not counted"
    work()
    runs = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        runs.append(time.perf_counter() - began)
    return min(runs)


def compare(name, one, other):
    "One line: both ways and how many times faster the second one is"
    a, b = shortest(one), shortest(other)
    print(f'{name}: {a:.2f} s -> {b:.2f} s, {a / b:.3g}x', flush=True)


def resident():
    return int(Path('/proc/self/statm').read_text().split()[1]) * resource.getpagesize() / 2**20


def store(work, rows=100_000, cells=49, dim=512):
    "Opening a store of 5 GB, and training from it: what stays in memory"
    folder = work / 'store'
    folder.mkdir()
    array = np.lib.format.open_memmap(folder / 'features.npy', 'w+', np.float16, (rows, cells, dim))
    for start in range(0, rows, 10_000):
        array[start : start + 10_000] = np.random.default_rng(start).standard_normal(
            (1, cells, dim)
        )
    array.flush()
    del array
    names = [f'{n}.jpg' for n in range(rows)]
    (folder / 'manifest.json').write_text(
        json.dumps(
            dict(
                whole=True,
                fingerprint='bench',
                skipped={},
                names=names,
                tower=dict(name='bench', features='grid', dim=dim, cells=cells, image_size=None),
            )
        )
    )
    before, began = resident(), time.perf_counter()
    opened = FeatureStore.open(folder, 'bench')
    print(
        f'store {rows:,} x {cells} x {dim}, {(folder / "features.npy").stat().st_size / 2**30:.1f} GiB: opened in {time.perf_counter() - began:.2f} s, {resident() - before:+.0f} MiB'
    )
    tiny = Captioner('tiny').model
    for share in 0.02, 0.1:
        chosen = np.random.default_rng(0).permutation(rows)[: int(share * rows)]
        table = pd.DataFrame(
            dict(image=[names[i] for i in chosen], caption='a dog runs', split='train')
        )
        model = CaptionModel(
            tiny.language,
            tiny.tokenizer,
            MapperConfig('linear', feature_dim=dim, cells=cells),
            freeze_language=True,
        )
        before = resident()
        train(
            model,
            table,
            opened,
            TrainConfig(epochs=1, save_every=10**9),
            work / f'run{share}',
            progress=False,
        )
        print(
            f'  trained on {len(chosen):,} random rows ({len(chosen) * cells * dim * 2 / 2**20:,.0f} MiB of features): {resident() - before:+.0f} MiB resident',
            flush=True,
        )


def embed(work):
    "Embedding a folder of photos: one at a time, in batches with decoding in threads, and the bare forward pass; with the bundled tower, and with one as large as CLIP ViT-B/32"
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    scenes, count = (
        list_images(draw_dataset(work / 'scenes', 256, size=256) / 'images'),
        iter(range(100)),
    )
    for name, tower, paths in (
        ('the bundled tower', Captioner('tiny').tower, scenes),
        (
            "ViT-B/32's size",
            VisionTower(CLIPVisionModel(CLIPVisionConfig()), CLIPImageProcessorPil(), 'pooled'),
            scenes[:64],
        ),
    ):

        def one_by_one():
            for p in paths:
                tower(tower.preprocess([open_image(p)]))

        pixels = pixels_of([open_image(p) for p in paths], tower.processor, tower.image_size)

        def ours():
            embed_images(tower, paths, work / f'features{next(count)}', progress=False)

        @torch.inference_mode()
        def bare():
            for start in range(0, len(paths), 32):
                features_of(tower.model, pixels[start : start + 32], tower.features)

        compare(
            f'embedding {len(paths)} photos, {name}, one at a time -> embed_images',
            one_by_one,
            ours,
        )
        compare(
            f'embedding {len(paths)} photos, {name}, embed_images -> bare forward pass', ours, bare
        )


def caption(work):
    "Captioning 64 features with the bundled model: one at a time, and in one batch"
    model = Captioner('tiny').model
    features = torch.randn(64, model.config.cells, model.config.feature_dim).abs()
    for beams in 1, 5:
        options = GenerationOptions(beams=beams, max_length=16)
        compare(
            f'captioning 64 features with {beams} beam(s), one at a time -> one batch',
            lambda: [generate_captions(model, features[i : i + 1], options) for i in range(64)],
            lambda: generate_captions(model, features, options),
        )


def large(work, tokens=16, few=8):
    "The same at GPT-2's size, random weights: one at a time without a cache, in one batch with one, and the bare forward passes of that batch"
    from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    tokenizer = Captioner('tiny').model.tokenizer
    model = CaptionModel(
        GPT2LMHeadModel(GPT2Config()),
        tokenizer,
        MapperConfig('mlp', feature_dim=512, prefix_length=10),
    ).eval()
    features, language = torch.randn(64, 1, 512), model.language
    how = dict(
        do_sample=False,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        pad_token_id=0,
        eos_token_id=50256,
    )

    def write(prefix, **more):
        language.generate(
            inputs_embeds=prefix,
            attention_mask=torch.ones(prefix.shape[:2], dtype=torch.long),
            generation_config=GenerationConfig(**how, **more),
        )

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
            seen = language(
                input_ids=seen.logits[:, -1].argmax(-1, keepdim=True),
                past_key_values=seen.past_key_values,
                use_cache=True,
            )

    one, batch, passes = shortest(alone, 1) * 64 / few, shortest(together), shortest(bare)
    print(
        f'captioning 64 features at GPT-2 size, {tokens} tokens: one at a time without a cache {one:.1f} s ({64 // few} times {few} of them) -> one batch with a cache {batch:.2f} s, {one / batch:.1f}x'
    )
    print(f'  its forward passes alone: {passes:.2f} s, {passes / batch:.2f} of it', flush=True)


def _padded_step(
    model, features, ids, mask
):  # as the earlier systems train: every position of the longest caption, logits of all
    prefix = model.mapper(features)
    embeddings = torch.cat([prefix, model.language.get_input_embeddings()(ids)], 1)
    logits = model.language(
        inputs_embeds=embeddings,
        attention_mask=torch.cat([mask.new_ones(prefix.shape[:2]), mask], 1),
        use_cache=False,
    ).logits
    targets = torch.cat([torch.full(prefix.shape[:2], -100), ids.masked_fill(mask == 0, -100)], 1)
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())


def _train_some(
    way, photos=400
):  # in a process of its own: captions a second, and the peak of memory in MiB
    rng, captioner = np.random.default_rng(0), Captioner('tiny')
    words = captioner.model.tokenizer.convert_tokens_to_string(
        list(captioner.model.tokenizer.get_vocab())[1000:2000]
    ).split()
    lengths = (
        rng.normal(10.8, 3.8, 5 * photos).round().clip(2, 36).astype(int)
    )  # as in Flickr8k: 10.8 words on average, 3.8 their spread, 36 at most
    table = pd.DataFrame(
        dict(
            image=[f'{i // 5}.jpg' for i in range(5 * photos)],
            caption=[' '.join(rng.choice(words, n)) for n in lengths],
        )
    )

    class Store(dict):  # what training asks of a store
        def __getitem__(self, rows):
            return rng.standard_normal((len(rows), 1, 512), np.float32)

        def rows(self, names):
            return np.array([int(name[:-4]) for name in names])

    captions, model = TokenisedCaptions(table, Store(), captioner.model.tokenizer), captioner.model
    if way in ('apart', 'together'):
        model = CaptionModel(
            model.language,
            model.tokenizer,
            MapperConfig('transformer', feature_dim=512, prefix_length=40),
            freeze_language=True,
        )
    model.train()
    optimizer, longest = make_optimizer(model, TrainConfig()), captions.lengths.max()
    batches = (
        [np.arange(i, i + 128) for i in range(0, len(captions) - 127, 128)]
        if way == 'padded'
        else batches_by_length(
            captions.lengths, 128, photos=captions.rows if way == 'together' else None
        )
    )

    def go():
        for which in batches:
            features, ids, mask, about = captions.batch(which)
            if way == 'padded':
                room = (0, int(longest) - ids.shape[1])
                loss = _padded_step(
                    model,
                    features[about],
                    torch.nn.functional.pad(ids, room),
                    torch.nn.functional.pad(mask, room),
                )
            else:
                loss = model(features, ids, mask, about)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    before, speed = resident(), sum(map(len, batches)) / shortest(go, 2)
    print(json.dumps([speed, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before]))


def training(work):
    "Training on captions as long as Flickr8k's: every one padded to the longest, with logits for the whole sequence; and as `train` does it"
    run = lambda way: json.loads(
        subprocess.run(
            [sys.executable, __file__, f'_train_some={way}'],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.splitlines()[-1]
    )
    (slow, much), (fast, little) = run('padded'), run('ours')
    print(
        f'training: padded to the longest, logits of everything {slow:.0f} captions/s, +{much:.0f} MiB at the peak -> as `train` does {fast:.0f} captions/s, +{little:.0f} MiB; {fast / slow:.1f}x, {little / much:.2f} of the memory',
        flush=True,
    )
    (apart, much), (together, little) = run('apart'), run('together')
    print(
        f'training a transformer mapper (prefix 40, 8 layers) before a frozen LM: captions of a photo apart {apart:.0f} captions/s -> together {together:.0f} captions/s, {together / apart:.1f}x, {little / much:.2f} of the memory',
        flush=True,
    )


def photos(work):
    "From file to caption with the bundled model's defaults, a folder of 64 photos"
    paths, captioner = (
        list_images(draw_dataset(work / 'some', 64, size=256) / 'images'),
        Captioner('tiny'),
    )
    compare(
        '64 photos to captions, one call each -> one call',
        lambda: [captioner.caption([p]) for p in paths],
        lambda: captioner.caption(paths),
    )
    print(f'  {shortest(lambda: captioner.caption(paths)) / 64:.3f} s a photo')


def video(work, seconds=30, fps=25, n=32):
    "A clip of 30 s, 32 frames: against decoding it once and captioning 32 photos in one batch; and against loading the model for every frame"
    scenes = [
        np.asarray(draw_scene(random.Random(seed), 640)[0].crop((0, 80, 640, 560)))[..., ::-1]
        for seed in range(10)
    ]
    film = cv2.VideoWriter(
        str(work / 'clip.mp4'), cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*'mp4v'), fps, (640, 480)
    )
    for frame in range(seconds * fps):
        film.write(np.roll(scenes[frame * 10 // (seconds * fps)], frame, 1))
    film.release()
    captioner, options, pictures = (
        Captioner('tiny', batch_size=n),
        GenerationOptions(),
        [Image.fromarray(scenes[i % 10][..., ::-1]) for i in range(n)],
    )

    def decode():
        reader = cv2.VideoCapture(str(work / 'clip.mp4'))
        while reader.grab():
            pass

    def ours():
        reader = VideoReader(work / 'clip.mp4')
        list(
            caption_samples(
                sample_moments(reader, spread(video_length(reader.path), n)), captioner, options
            )
        )

    def apart():
        decode()
        captioner.caption(pictures, options)

    compare(
        f'{seconds} s of video, {n} frames: clipcap.video -> decoding once plus {n} photos in one batch',
        ours,
        apart,
    )
    each, mine = (
        n * shortest(lambda: Captioner('tiny').caption(pictures[:1], options)),
        shortest(ours),
    )
    print(
        f'  loading the model for every frame: {each:.1f} s ({n} times one), {each / mine:.1f}x as long'
    )
    pictures[0].save(work / 'frame.jpg')
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, '-m', 'clipcap.cli.main', 'caption', work / 'frame.jpg'],
        check=True,
        capture_output=True,
    )
    each = n * (time.perf_counter() - began)
    print(
        f'  a process of its own for every frame: {each:.1f} s ({n} times one), {each / mine:.1f}x as long'
    )


def webcam(work):
    "A camera in the browser and the bundled model: JupyterLab, headless Chromium, a film in place of the camera"
    from browser import jupyterlab, opened
    from test_browser import camera_flags, write_camera

    one, two = (draw_scene(random.Random(seed), 320)[0].crop((0, 40, 320, 280)) for seed in (3, 5))
    flags = camera_flags(write_camera(work / 'camera.y4m', [one] * 60 + [two] * 60))
    cells = [
        'from clipcap.generate import GenerationOptions\nfrom clipcap.image import Captioner\nfrom clipcap.webcam import Webcam',
        'Webcam(Captioner(), GenerationOptions(beams=1))',
    ]
    with jupyterlab(work) as url, opened((url, work), cells, flags, permissions=['camera']) as page:
        page.wait_for_selector('.clipcap-start').click()
        page.wait_for_function(
            "() => document.querySelector('.clipcap-status').textContent.includes('captions a second')"
        )
        page.wait_for_timeout(8000)  # the figure is that of the last 5 s
        print(
            f"webcam in the browser: {page.locator('.clipcap-status').inner_text()}; load {os.getloadavg()[0]:.1f}"
        )


if __name__ == '__main__':
    if sys.argv[1:2] and sys.argv[1].startswith('_train_some='):
        _train_some(sys.argv[1].partition('=')[2])
        sys.exit()
    print(f'{os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads')
    for name in sys.argv[1:] or [
        'store',
        'embed',
        'caption',
        'large',
        'training',
        'photos',
        'video',
        'webcam',
    ]:
        with tempfile.TemporaryDirectory() as folder:
            globals()[name](Path(folder))
