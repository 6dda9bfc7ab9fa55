"clipcap.embed: every family of towers, faults of photos and of weights, a look-alike of the Hub"

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hub import Hub
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    GPT2Config,
    GPT2Model,
    MobileNetV2Config,
    MobileNetV2Model,
    ResNetConfig,
    ResNetModel,
    SiglipConfig,
    SiglipModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from clipcap.base.files import ClipcapError, lock
from clipcap.base.store import FeatureStore
from clipcap.embed import (
    VisionTower,
    best_device,
    embed_images,
    features_of,
    fingerprint,
    load_vision_model,
    pixels_of,
)


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    "Such small models only lose by several threads"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


root = Path(__file__).resolve().parent.parent
text = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
sees = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    image_size=64,
    patch_size=16,
)
square, cropped = (
    dict(size=dict(height=64, width=64)),
    dict(size=dict(shortest_edge=72), crop_size=dict(height=64, width=64), do_center_crop=True),
)
families = dict(  # model, image processor and its settings, cells of its grid
    clip=(
        lambda: CLIPModel(
            CLIPConfig(
                text_config=dict(**text, vocab_size=9, bos_token_id=0, eos_token_id=1),
                vision_config=sees,
                projection_dim=24,
            )
        ),
        'CLIPImageProcessor',
        cropped,
        16,
    ),
    siglip=(
        lambda: SiglipModel(
            SiglipConfig(text_config=dict(**text, vocab_size=9), vision_config=sees)
        ),
        'SiglipImageProcessor',
        square,
        16,
    ),
    dinov2=(lambda: Dinov2Model(Dinov2Config(**sees)), 'BitImageProcessor', cropped, 16),
    registers=(
        lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sees)),
        'BitImageProcessor',
        cropped,
        16,
    ),
    vit=(lambda: ViTModel(ViTConfig(**sees)), 'ViTImageProcessor', square, 16),
    swin=(
        lambda: SwinModel(
            SwinConfig(
                image_size=64,
                patch_size=4,
                window_size=4,
                embed_dim=16,
                depths=[1, 1],
                num_heads=[2, 2],
            )
        ),
        'ViTImageProcessor',
        square,
        49,
    ),
    resnet=(
        lambda: ResNetModel(
            ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type='basic')
        ),
        'ConvNextImageProcessor',
        dict(size=dict(shortest_edge=64)),
        49,
    ),
    convnext=(
        lambda: ConvNextModel(ConvNextConfig(hidden_sizes=[8, 8, 8, 16], depths=[1] * 4)),
        'ConvNextImageProcessor',
        dict(size=dict(shortest_edge=64)),
        4,
    ),
    mobilenet=(
        lambda: MobileNetV2Model(MobileNetV2Config(depth_multiplier=0.25)),
        'MobileNetV2ImageProcessor',
        cropped,
        4,
    ),
)


def picture(seed, size=(80, 60)):
    "Coarse coloured noise"
    cells = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC)


def write_tower(folder, model, kind, settings):
    "A transformers folder, with a processor as the Hub has it"
    model.save_pretrained(folder)
    (folder / 'preprocessor_config.json').write_text(
        json.dumps(dict(image_processor_type=kind, **settings))
    )
    return folder


@pytest.fixture(scope='session')
def folders(tmp_path_factory):
    "A folder of each family"
    torch.manual_seed(0)
    base = tmp_path_factory.mktemp('towers')
    return {
        name: write_tower(base / name, make().eval(), kind, settings)
        for name, (make, kind, settings, _) in families.items()
    }


@pytest.fixture(scope='session')
def photos(tmp_path_factory):
    "24 photos in a folder"
    base = tmp_path_factory.mktemp('photos')
    for i in range(24):
        picture(i).save(base / f'{i:02}.png')
    return sorted(base.iterdir())


@pytest.fixture(scope='session')
def tower(folders):
    return VisionTower.from_pretrained(folders['resnet'], 'grid', device='cpu')


@contextmanager
def refuses(*words):
    "One line of `ClipcapError` with all these words"
    with pytest.raises(ClipcapError) as caught:
        yield
    told = str(caught.value)
    assert '\n' not in told and all(word in told for word in words), told


# ---- towers
@pytest.mark.parametrize('name', families)
def test_family(name, folders, capfd):
    original = AutoModel.from_pretrained(folders[name]).eval()
    capfd.readouterr()
    towers = {
        kind: VisionTower.from_pretrained(folders[name], kind, device='cpu')
        for kind in ('pooled', 'grid')
    }
    assert capfd.readouterr() == ('', ''), 'loading is silent'
    pictures, processor = (
        [picture(1), picture(2, (60, 90))],
        AutoImageProcessor.from_pretrained(folders[name], backend='pil'),
    )
    pixels, theirs = (
        towers['grid'].preprocess(pictures),
        torch.from_numpy(np.stack([processor(images=[p])['pixel_values'][0] for p in pictures])),
    )
    with torch.no_grad():
        seen = (original.vision_model if name in ('clip', 'siglip') else original)(
            pixel_values=theirs
        )
    torch.testing.assert_close(towers['pooled'](pixels)[:, 0], seen.pooler_output.flatten(1))
    grid, hidden, cells = towers['grid'](pixels), seen.last_hidden_state, families[name][3]
    assert (
        grid.shape
        == (2, cells, hidden.shape[1 if hidden.ndim == 4 else 2])
        == (2, towers['grid'].cells, towers['grid'].dim)
    )
    if name == 'swin':
        return  # 64 merged patches, averaged down to 49 cells
    if hidden.ndim == 4:
        hidden = (
            torch.nn.functional.adaptive_avg_pool2d(hidden, int(cells**0.5))
            .flatten(2)
            .transpose(1, 2)
        )
    torch.testing.assert_close(grid, hidden[:, -cells:])
    if name == 'clip':
        projected = VisionTower.from_pretrained(folders[name], 'projected', device='cpu')
        torch.testing.assert_close(
            projected(pixels)[:, 0], original.get_image_features(pixel_values=theirs).pooler_output
        )
        assert not any('text' in key for key in projected.model.state_dict())
    else:
        with refuses("'projected'", 'grid, pooled'):
            VisionTower.from_pretrained(folders[name], 'projected')


@pytest.mark.parametrize('name', families)
def test_image_size(name, folders):
    tower = VisionTower.from_pretrained(folders[name], 'grid', image_size=96, device='cpu')
    pixels = tower.preprocess([picture(1), picture(2, (60, 90))])
    assert pixels.shape == (2, 3, 96, 96) and torch.equal(
        pixels[1:], tower.preprocess([picture(2, (60, 90))])
    )
    assert (
        tower(pixels).shape == (2, tower.cells, tower.dim) and tower.describe()['image_size'] == 96
    )
    ends, own = (
        pixels_of(
            [Image.new('RGB', (64, 64), c) for c in ('black', 'white')], tower.processor, size
        )
        for size in (96, None)
    )
    torch.testing.assert_close(ends[:, :, 48, 48], own[:, :, 32, 32])  # the same arithmetic


@pytest.mark.parametrize('name', families)
def test_hypercolumn(name, folders):
    column, pooled = (
        VisionTower.from_pretrained(folders[name], kind, image_size=96, device='cpu')
        for kind in ('hypercolumn', 'pooled')
    )
    pixels = column.preprocess([picture(1), picture(2, (60, 90))])
    seen, mirrored = column(pixels), column(pixels.flip(3))
    assert (
        seen.shape == (2, 1, column.dim) and column.dim > 2 * pooled.dim and seen.isfinite().all()
    )
    torch.testing.assert_close(seen[..., : pooled.dim], pooled(pixels))
    torch.testing.assert_close(
        mirrored[..., pooled.dim :], seen[..., pooled.dim :], atol=1e-4, rtol=1e-3
    )  # the mirror image has the same one
    torch.testing.assert_close(column(pixels[1:]), seen[1:], atol=1e-4, rtol=1e-3)


def test_grids_are_averaged_down_and_registers_left_out(folders):
    tower = VisionTower.from_pretrained(
        folders['registers'], 'grid', image_size=256, device='cpu'
    )  # 16 x 16 patches, 1 class token, 4 registers
    pixels = tower.preprocess([picture(3)])
    with torch.no_grad():
        patches = (
            tower.model(pixel_values=pixels_of([picture(3)], tower.processor, 256))
            .last_hidden_state[:, 5:]
            .transpose(1, 2)
            .unflatten(2, (16, 16))
        )
    torch.testing.assert_close(
        tower(pixels),
        torch.nn.functional.adaptive_avg_pool2d(patches, 7).flatten(2).transpose(1, 2),
    )
    assert (
        VisionTower.from_pretrained(
            folders['registers'], 'grid', image_size=256, max_cells=20, device='cpu'
        ).cells
        == 16
    )


def test_what_was_never_trained_is_not_used(tmp_path):
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**sees)).eval()
    tower = VisionTower.from_pretrained(
        write_tower(tmp_path / 'vit', model, 'ViTImageProcessor', square), 'pooled', device='cpu'
    )
    pixels = tower.preprocess([picture(1)])
    with torch.no_grad():
        torch.testing.assert_close(
            tower(pixels)[:, 0],
            model.vit(pixel_values=pixels_of([picture(1)], tower.processor)).last_hidden_state[
                :, 0
            ],
        )
    tower.save_pretrained(tmp_path / 'again')
    assert (
        VisionTower.from_pretrained(tmp_path / 'again', device='cpu').fingerprint
        == tower.fingerprint
    )
    half = write_tower(
        tmp_path / 'half', CLIPVisionModel(CLIPVisionConfig(**sees)), 'CLIPImageProcessor', cropped
    )
    with refuses('projected'):
        VisionTower.from_pretrained(half, 'projected')
    weights = {
        k: v for k, v in model.state_dict().items() if 'layers.1' not in k and 'layer.1' not in k
    }
    assert len(weights) < len(model.state_dict())
    model.save_pretrained(tmp_path / 'vit', state_dict=weights)
    with refuses('vit', 'missing'):
        load_vision_model(tmp_path / 'vit')


def test_refusals(tmp_path, folders):
    with refuses('./nothing', 'no such folder', 'give a folder'):
        load_vision_model('./nothing')
    with refuses('some/model', 'a vision model of the Hub'):
        load_vision_model('some/model')  # HF_HUB_OFFLINE, see conftest.py
    (tmp_path / 'empty').mkdir()
    with refuses('empty'):
        load_vision_model(tmp_path / 'empty')
    with refuses('gpt2', 'does not see photos'):
        load_vision_model(
            write_tower(
                tmp_path / 'gpt2', GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=1)), '', {}
            )
        )
    bare = shutil.copytree(folders['vit'], tmp_path / 'bare')
    (bare / 'preprocessor_config.json').unlink()
    with refuses('bare', 'preprocessor_config.json'):
        load_vision_model(bare)
    cut = shutil.copytree(folders['vit'], tmp_path / 'cut')
    (cut / 'model.safetensors').write_bytes((cut / 'model.safetensors').read_bytes()[:999])
    with refuses('cut'):
        load_vision_model(cut)
    with refuses('abacus'):
        VisionTower.from_pretrained(folders['vit'], device='abacus')
    with refuses("'best'", 'pooled'):
        VisionTower.from_pretrained(folders['vit'], 'best')
    loose = write_tower(
        tmp_path / 'loose',
        families['resnet'][0](),
        'BitImageProcessor',
        dict(size=dict(shortest_edge=64), do_center_crop=False),
    )
    with refuses('BitImageProcessor', 'image_size'):
        VisionTower.from_pretrained(loose)
    assert VisionTower.from_pretrained(loose, image_size=64, device='cpu').cells == 1


def test_fingerprint(folders):
    def load(name='clip', kind='pooled', **options):
        return VisionTower.from_pretrained(folders[name], kind, device='cpu', **options)

    towers = [
        load(),
        load(kind='grid'),
        load(kind='projected'),
        load(image_size=64),
        load('siglip'),
    ]
    assert len({t.fingerprint for t in towers}) == 5 and load().fingerprint == towers[0].fingerprint
    processor, model = towers[0].processor, CLIPModel.from_pretrained(folders['clip'])
    assert (
        VisionTower(model, processor, 'pooled').fingerprint
        == VisionTower(model.vision_model, processor, 'pooled').fingerprint
        == towers[0].fingerprint
    )
    with torch.no_grad():
        model.vision_model.post_layernorm.weight += 0.01
    assert VisionTower(model, processor, 'pooled').fingerprint != towers[0].fingerprint
    processor.image_mean = [0.4, 0.5, 0.5]
    assert VisionTower(towers[0].model, processor, 'pooled').fingerprint != towers[0].fingerprint


def test_real_tower(tmp_path, photos):
    folder = root.parent / 'shared' / 'models' / 'mobilenet_v2_1.0_224'
    if not folder.exists():
        pytest.skip(f'{folder} is not on this machine')
    grid, pooled = (
        VisionTower.from_pretrained(folder, kind, device='cpu') for kind in ('grid', 'pooled')
    )
    store = embed_images(grid, photos[:4], tmp_path / 'store', progress=False)
    assert store.features.shape == (4, 49, 1280)
    pixels = pooled.preprocess([Image.open(p).convert('RGB') for p in photos[:4]])
    torch.testing.assert_close(
        torch.tensor(store[:]).float().mean(1), pooled(pixels)[:, 0], atol=5e-3, rtol=5e-3
    )


# ---- the store
def test_names_duplicates_and_order(tmp_path, photos, tower, capfd):
    store = embed_images(
        tower, [photos[3], photos[1], photos[3], photos[0]], tmp_path / 'a', batch_size=2
    )
    assert (
        store.names == ['03.png', '01.png', '00.png']
        and len(store) == 3
        and store.rows(['00.png', '03.png']).tolist() == [2, 0]
    )
    assert 'photos' in capfd.readouterr().err  # the bar
    assert (
        store[[2, 0]].shape == (2, tower.cells, tower.dim)
        and store.features.dtype == np.float16
        and isinstance(store.features, np.memmap)
    )
    for index in 1, -1, slice(0, 2), [2, 2, 0], np.array([True, False, True]):
        assert np.array_equal(store[index], store.features[index])
    with pytest.raises(IndexError):
        store[3]
    alone = embed_images(tower, photos[1:2], tmp_path / 'b', progress=False)
    np.testing.assert_allclose(alone[0], store[1], atol=2e-3, rtol=2e-3)
    named = embed_images(
        tower, photos[:2], tmp_path / 'c', root=photos[0].parent.parent, progress=False
    )
    assert named.names == [f'{photos[0].parent.name}/0{i}.png' for i in range(2)]
    with refuses(f'does not lie in {tmp_path}'):
        embed_images(tower, photos[:2], tmp_path / 'd', root=tmp_path)
    with refuses('another photo is called 1.png, too'):
        embed_images(tower, ['x/1.png', 'y/1.png'], tmp_path / 'd')
    with refuses('no photos'):
        embed_images(tower, [], tmp_path / 'd')
    with refuses('lacks 2 of 3', 'nobody.png'):
        store.rows(['03.png', 'nobody.png', 'x.png'])
    (tmp_path / 'file').write_text('')
    with refuses('cannot be written'):
        embed_images(tower, photos[:2], tmp_path / 'file' / 'store', progress=False)
    assert not (tmp_path / 'd').exists()


def test_broken_photos_are_named_and_mended(tmp_path, photos, tower):
    good, cut, lost = tmp_path / 'good.png', tmp_path / 'cut.png', tmp_path / 'lost.png'
    good.write_bytes(photos[0].read_bytes())
    cut.write_bytes(photos[1].read_bytes()[:300])
    with pytest.warns(UserWarning) as said:
        store = embed_images(tower, [cut, good, lost], tmp_path / 'store', progress=False)
    assert store.names == ['good.png'] and set(store.skipped) == {'cut.png', 'lost.png'}
    assert [w.message.args[0].split(':')[0] for w in said] == [
        str(cut),
        str(lost),
    ] and '\n' not in str(said[0].message)
    with refuses('cut.png', 'lost.png'):
        store.rows(['cut.png', 'lost.png', 'good.png'])
    cut.write_bytes(photos[1].read_bytes())
    with pytest.warns(UserWarning, match='lost.png'):
        store = embed_images(tower, [cut, good, lost], tmp_path / 'store', progress=False)
    assert store.names == ['good.png', 'cut.png'] and set(store.skipped) == {'lost.png'}
    with pytest.warns(UserWarning), refuses('none of 1', 'lost.png'):
        embed_images(tower, [lost], tmp_path / 'none', progress=False)


def test_other_features_are_refused(tmp_path, photos, tower, folders):
    embed_images(tower, photos[:3], tmp_path / 'store', progress=False)
    other = VisionTower.from_pretrained(folders['resnet'], 'pooled', device='cpu')
    with refuses('holds grid features', tower.fingerprint, other.fingerprint, 'another folder'):
        embed_images(other, photos[:3], tmp_path / 'store')
    with refuses('holds grid features'):
        FeatureStore.open(tmp_path / 'store', other.fingerprint)
    assert len(FeatureStore.open(tmp_path / 'store', tower.fingerprint)) == 3


@pytest.fixture
def scenes(tmp_path):
    "Twelve photos that may be changed"
    folder = tmp_path / 'scenes'
    folder.mkdir()
    for i in range(12):
        picture(100 + i).save(folder / f'{i:02}.bmp')
    return sorted(folder.iterdir())


def test_other_photos_under_the_same_names(tmp_path, scenes, tower):
    "One photo replaced (a bitmap: as long as before), then all of another data set"
    store = embed_images(tower, scenes, tmp_path / 'store', progress=False)
    before = store[:]
    times = scenes[3].stat().st_atime_ns, scenes[3].stat().st_mtime_ns
    picture(999).save(scenes[3])
    os.utime(scenes[3], ns=times)
    store = embed_images(tower, scenes, tmp_path / 'store', progress=False)
    alone = embed_images(tower, scenes[3:4], tmp_path / 'alone', progress=False)
    rows = store.rows([path.name for path in scenes])
    np.testing.assert_allclose(store[rows[3]], alone[0], atol=2e-3, rtol=2e-3)
    others = np.arange(12) != 3
    assert np.array_equal(store[rows[others]], before[others])
    assert not np.allclose(store[rows[3]], before[3], atol=2e-3)

    second = tmp_path / 'second'
    second.mkdir()
    for i, path in enumerate(scenes):
        picture(500 + i).save(second / path.name)
    photos = sorted(second.iterdir())
    store = embed_images(tower, photos, tmp_path / 'store', progress=False)
    fresh = embed_images(tower, photos, tmp_path / 'fresh', progress=False)
    assert store.names == fresh.names and np.array_equal(store[:], fresh[:])


def test_nothing_is_read_or_locked_where_nothing_has_changed(tmp_path, scenes, tower):
    embed_images(tower, scenes, tmp_path / 'store', progress=False)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / 'store').iterdir()}
    with lock(tmp_path / 'store', 'another run'), ThreadPoolExecutor(1) as pool:
        run = pool.submit(embed_images, tower, scenes, tmp_path / 'store', progress=False)
        assert len(run.result()) == 12
        more = [*scenes, scenes[0].parent / 'more.bmp']
        run = pool.submit(embed_images, tower, more, tmp_path / 'store', progress=False)
        with refuses('in use'):
            run.result()
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / 'store').iterdir()}
    assert after == before


embedding = """
import sys
from pathlib import Path
from clipcap.embed import VisionTower, embed_images
tower = VisionTower.from_pretrained(sys.argv[1], 'grid', device='cpu')
print('ready', flush=True)
sys.stdin.read()
embed_images(tower, sorted(Path(sys.argv[2]).iterdir()), sys.argv[3], batch_size=1, progress=False)
"""


def test_of_two_runs_at_once_one_is_refused_and_no_row_is_wrong(tmp_path, folders, tower):
    sets = []
    for k in range(2):
        folder = tmp_path / f'set-{k}'
        folder.mkdir()
        for i in range(60):
            picture(1000 * k + i).save(folder / f'{i:03}.png')
        sets.append(folder)
    runs = [
        subprocess.Popen(
            [sys.executable, '-c', embedding, folders['resnet'], folder, tmp_path / 'store'],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for folder in sets
    ]
    for run in runs:
        assert run.stdout.readline() == 'ready\n'
    for run in runs:
        run.stdin.close()
    errors = [run.stderr.read() for run in runs]
    codes = [run.wait(60) for run in runs]
    assert 0 in codes
    for code, error in zip(codes, errors, strict=True):
        assert code == 0 or 'in use by process' in error
    store = FeatureStore.open(tmp_path / 'store')
    rights = [embed_images(tower, sorted(s.iterdir()), tmp_path / s.name.upper()) for s in sets]
    right = [np.allclose(store[:], all_rows[:], atol=2e-3, rtol=2e-3) for all_rows in rights]
    assert any(right) and len(store) == 60
    for path in sets[0], sets[1]:  # and whoever comes next sets everything right
        store = embed_images(tower, sorted(path.iterdir()), tmp_path / 'store', progress=False)
        wanted = rights[sets.index(path)]
        np.testing.assert_allclose(store[:], wanted[:], atol=2e-3, rtol=2e-3)


class Sick(VisionTower):
    "A tower that gives NaN, or too much, for dark photos, and for all of them once it is dead"

    dead = False
    value = float('nan')

    def __call__(self, pixels):
        rows = super().__call__(pixels)
        dark = pixels.float().flatten(1).mean(1) < 1
        rows[dark | self.dead] = self.value
        return rows


@pytest.mark.parametrize('value', [float('nan'), float('inf'), 1e6])
def test_features_that_are_not_finite_are_named_and_left_out(tmp_path, scenes, tower, value):
    sick = Sick(tower.model, tower.processor, 'grid')
    sick.value = value
    Image.new('RGB', (60, 40)).save(scenes[5])
    with pytest.warns(UserWarning, match='05.bmp: its features are not finite') as said:
        store = embed_images(sick, scenes, tmp_path / 'store', batch_size=4, progress=False)
    assert len(said) == 1 and len(store) == 11 and list(store.skipped) == ['05.bmp']
    assert np.isfinite(store[:]).all()
    sick.dead = True
    with refuses('00.bmp', 'all photos beside it', 'choose another tower'):
        embed_images(sick, scenes, tmp_path / 'dead', batch_size=4, progress=False)


def test_a_row_of_a_photo_that_can_no_longer_be_read_is_not_kept(tmp_path, scenes, tower):
    embed_images(tower, scenes, tmp_path / 'store', progress=False)
    scenes[2].write_bytes(scenes[2].read_bytes()[:100])
    scenes[4].unlink()
    with pytest.warns(UserWarning) as said:
        store = embed_images(tower, scenes, tmp_path / 'store', progress=False)
    assert [str(w.message).split(':')[0] for w in said] == [str(scenes[2]), str(scenes[4])]
    assert len(store) == 10 and set(store.skipped) == {'02.bmp', '04.bmp'}
    with refuses('02.bmp', '04.bmp'):
        store.rows(['02.bmp', '04.bmp'])


# ---- weights and code that come with a model
def test_weights_that_are_not_finite_are_refused(tmp_path, folders):
    broken = shutil.copytree(folders['vit'], tmp_path / 'vit')
    model = ViTModel.from_pretrained(broken)
    with torch.no_grad():
        next(model.parameters()).view(-1)[1] = float('inf')
    model.save_pretrained(broken)
    with refuses('vit', 'not finite', 'damaged'):
        load_vision_model(broken, 'cpu')


def test_no_code_of_a_model_is_run_whoever_says_yes(tmp_path, folders):
    trace = tmp_path / 'trace'
    code = f"open({str(trace)!r}, 'w').close()\nclass Mine: pass\n"
    for kind in 'vit', 'none':
        model = shutil.copytree(folders['vit'], tmp_path / kind)
        (model / 'mine.py').write_text(code)
        names = dict(AutoConfig='mine.Mine', AutoModel='mine.Mine', AutoImageProcessor='mine.Mine')
        for file in 'config.json', 'preprocessor_config.json':
            settings = json.loads((model / file).read_text())
            settings['auto_map'] = names
            if kind == 'none':
                settings['model_type'] = 'a-kind-of-its-own'
                settings['image_processor_type'] = 'OfItsOwn'
            (model / file).write_text(json.dumps(settings))
    program = """
import sys
from clipcap.base.files import ClipcapError
from clipcap.embed import VisionTower
for name in sys.argv[1:]:
    try: print(VisionTower.from_pretrained(name, device='cpu').dim)
    except ClipcapError as fault: print(fault)
"""
    command = [sys.executable, '-c', program, tmp_path / 'vit', tmp_path / 'none']
    run = subprocess.run(command, input='y\n' * 99, capture_output=True, text=True, timeout=300)
    first, second = run.stdout.splitlines()
    assert first == '32' and second.startswith('vision tower ')
    assert 'Do you wish' not in run.stdout + run.stderr and not trace.exists()


# ---- other machines
def test_the_fastest_device_is_taken(monkeypatch, folders):
    for cuda, mps, best in (
        (False, False, 'cpu'),
        (False, True, 'mps'),
        (True, False, 'cuda'),
        (True, True, 'cuda'),
    ):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, 'is_available', lambda mps=mps: mps)
        assert best_device() == best
    if not torch.backends.cuda.is_built():
        with refuses(' on cuda: '):
            load_vision_model(folders['vit'])


def test_what_apples_mps_lacks_is_not_asked_of_it(monkeypatch, folders):
    "It has no doubles, no bicubic resizing, and averages only into parts that divide the whole"
    from clipcap import embed

    class OnMps(torch.Tensor):
        "Weights that lie on MPS until `cpu` is called"

        def cpu(self):
            return self.as_subclass(torch.Tensor)

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if getattr(function, '__name__', '') == 'double':
                raise TypeError('MPS has no float64')
            return super().__torch_function__(function, types, args, kwargs or {})

    tower = VisionTower.from_pretrained(folders['vit'], 'pooled', device='cpu')
    state = {name: w.as_subclass(OnMps) for name, w in tower.model.state_dict().items()}
    with monkeypatch.context() as patch:
        patch.setattr(tower.model, 'state_dict', lambda: state)
        assert fingerprint(tower) == tower.fingerprint

    def resize(tensor, size):
        assert tensor == 'on the cpu'
        return SimpleNamespace(to=lambda device: (device.type, size))

    there = SimpleNamespace(device=torch.device('mps'), cpu=lambda: 'on the cpu')
    assert embed.on_cpu_for_mps(resize, there, (7, 7)) == ('mps', (7, 7))

    asked, here = [], embed.on_cpu_for_mps

    def note(function, *arguments, **options):
        asked.append(function.__name__)
        return here(function, *arguments, **options)

    monkeypatch.setattr(embed, 'on_cpu_for_mps', note)
    pixels = torch.rand(1, 3, 256, 256)
    for kind in 'hypercolumn', 'grid':
        features_of(Dinov2WithRegistersModel.from_pretrained(folders['registers']), pixels, kind)
    assert asked == ['interpolate', 'adaptive_avg_pool2d']


# ---- the Hub
asking = '''
import sys, time
from clipcap.base.files import ClipcapError
from clipcap.embed import VisionTower
for name in sys.stdin:
    start = time.time()
    try:
        tower = VisionTower.from_pretrained(name.strip(), device='cpu')
        print(name.strip(), tower.fingerprint, flush=True)
    except ClipcapError as error: print(f'{time.time() - start:.0f}', error, flush=True)
'''


def test_hub(tmp_path, folders):
    hub = Hub(folders['clip'].parent)
    expected = VisionTower.from_pretrained(folders['clip'], device='cpu').fingerprint
    with hub.asked(asking, home=tmp_path) as ask:
        assert ask('someone/clip').split() == ['someone/clip', expected]
        missing = ask('someone/nothing')
        assert 'someone/nothing' in missing
        assert 'not a valid model identifier' in missing
        assert 'give a folder' in missing
        hub.close()
        from_cache = ask('someone/clip')
        assert from_cache.split() == ['someone/clip', expected]
        away = ask('someone/siglip')
        assert int(away.split()[0]) < 15
        for part in ('someone/siglip', 'connect', 'give a folder'):
            assert part in away
