"Two towers and detectors: what is damaged, strange or foreign is refused, never judged by"

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import root
from hub import Hub
from PIL import Image
from safetensors.torch import load_file, save_file

from clipcap.base.files import ClipcapError
from clipcap.image import find_model
from clipcap.methods.regions import Detector, RegionTower, make_random_detector, open_regions
from clipcap.methods.retrieval import (
    TwoTowers,
    clip_metrics,
    clip_score,
    make_random_clip,
    recall_table,
)


@pytest.fixture()
def clip(tmp_path):
    return make_random_clip(tmp_path / 'clip', ['a red ball', 'a star'])


@pytest.fixture()
def photos(tmp_path):
    paths = []
    for n, colour in enumerate(['red', 'green', 'blue']):
        paths.append(tmp_path / f'{n}.png')
        Image.new('RGB', (40, 32), colour).save(paths[-1])
    return paths


@pytest.mark.parametrize('strange', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('everywhere', [True, False])
def test_what_is_no_number_is_never_a_perfect_rank(strange, everywhere):
    agreement = np.eye(4)
    agreement[:] = strange if everywhere else agreement
    agreement[2, 1] = strange
    with pytest.raises(ClipcapError, match=r'photo [02] and caption [01] agree by -?(nan|inf)'):
        recall_table(agreement, range(4))
    with pytest.raises(ClipcapError, match='no photos|shape'):
        recall_table(np.zeros((0, 0)), [])


def spoil(folder, change):
    "Change the weights of a folder: change(tensors) in place"
    tensors = load_file(folder / 'model.safetensors')
    change(tensors)
    save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})


def drop(name):
    return lambda tensors: tensors.pop(name)


def fill(name, value):
    return lambda tensors: tensors[name].fill_(value)


def foreign(tensors):
    tensors['strange.weight'] = torch.ones(2)


@pytest.mark.parametrize(
    'change, reason',
    [
        (drop('text_projection.weight'), 'missing'),
        (drop('visual_projection.weight'), 'missing'),
        (fill('logit_scale', np.nan), 'not finite'),
        (fill('text_model.final_layer_norm.bias', np.inf), 'not finite'),
        (foreign, 'another model'),
    ],
)
def test_two_towers_with_damaged_weights_are_refused(clip, change, reason):
    TwoTowers(clip, 'cpu')
    spoil(clip, change)
    with pytest.raises(ClipcapError, match=f'two towers .*clip.*{reason}'):
        TwoTowers(clip, 'cpu')


def test_a_detector_with_damaged_weights_is_refused(tmp_path):
    folder = make_random_detector(tmp_path / 'detr')
    Detector(folder, 'cpu')
    name = next(key for key in load_file(folder / 'model.safetensors') if 'bbox' in key)
    spoil(folder, fill(name, np.nan))
    with pytest.raises(ClipcapError, match='detector .*not finite'):
        Detector(folder, 'cpu')
    spoil(folder, drop(name))
    with pytest.raises(ClipcapError, match='detector .*missing'):
        Detector(folder, 'cpu')


def test_numbers_that_are_not_finite_end_scoring(clip, photos, monkeypatch):
    towers = TwoTowers(clip, 'cpu')
    towers.model.text_projection.weight.data.fill_(np.nan)  # after loading: as overflow would
    with pytest.raises(ClipcapError, match='vectors of captions are not finite'):
        clip_metrics(towers, photos, [['a ball']] * 3, ['a star'] * 3)
    with pytest.raises(ClipcapError, match='CLIPScore: photo 1 has nan'):
        clip_score([[1.0, 0], [np.nan, 0]], [[1.0, 0], [1.0, 0]])


def test_weights_stored_in_half_are_computed_in_full(clip):
    spoil(clip, lambda tensors: tensors.update({k: v.half() for k, v in tensors.items()}))
    config = json.loads((clip / 'config.json').read_text())
    (clip / 'config.json').write_text(json.dumps(config | dict(dtype='float16')))
    assert TwoTowers(clip, 'cpu').model.dtype == torch.float32


@pytest.mark.parametrize('opener', ['TwoTowers', 'Detector'])
def test_no_code_of_a_model_is_run_whatever_stdin_says(opener, tmp_path):
    "A folder with code of its own: it is neither run nor asked about"
    folder = tmp_path / 'model'
    folder.mkdir()
    proof = tmp_path / 'was-run'
    (folder / 'code.py').write_text(f'open({str(proof)!r}, "w")\nclass C: pass\n')
    names = ['AutoConfig', 'AutoModel', 'AutoModelForObjectDetection', 'AutoTokenizer']
    (folder / 'config.json').write_text(
        json.dumps(dict(model_type='own', auto_map=dict.fromkeys(names, 'code.C')))
    )
    program = (
        'from clipcap.methods.retrieval import TwoTowers\n'
        'from clipcap.methods.regions import Detector\n'
        'from clipcap.base.files import ClipcapError\n'
        f'try: {opener}({str(folder)!r})\n'
        'except ClipcapError as fault: print(fault)\n'
    )
    run = subprocess.run(
        [sys.executable, '-c', program],
        input='y\n' * 9,
        capture_output=True,
        text=True,
        cwd=root,
        timeout=300,
    )
    assert run.returncode == 0 and len(run.stdout.splitlines()) == 1, run.stderr
    assert 'y/N' not in run.stdout + run.stderr and not proof.exists()


def test_a_photo_that_cannot_be_read_is_left_out_where_that_is_wanted(clip, photos, tmp_path):
    towers = TwoTowers(clip, 'cpu')
    (tmp_path / 'broken.png').write_text('no photo')
    some = [photos[0], tmp_path / 'broken.png', photos[1]]
    texts = ['a red ball', 'a star', 'a ball']
    skipped = {}
    rest = clip_metrics(towers, some, [[text] for text in texts], texts, skipped)
    alone = clip_metrics(towers, photos[:2], [[texts[0]], [texts[2]]], [texts[0], texts[2]])
    assert list(rest.index) == [0, 2] and list(skipped) == [1] and 'broken' in skipped[1]
    assert np.allclose(rest, alone, atol=1e-5)
    with pytest.raises(ClipcapError, match='broken.png'):
        clip_metrics(towers, some, [[text] for text in texts], texts)
    with pytest.raises(ClipcapError, match="none of 1 photos"):
        clip_metrics(towers, some[1:2], [['a']], ['a'], skipped={})


def test_a_fingerprint_leaves_the_device_before_it_is_doubled(tmp_path):
    "MPS has no float64: a tensor that stands for one there refuses `.double()`"

    class OnMps(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is torch.Tensor.double:
                raise TypeError('MPS has no float64')
            found = super().__torch_function__(function, types, args, kwargs or {})
            if function is torch.Tensor.cpu:
                return found.as_subclass(torch.Tensor)
            return found

    detector = Detector(make_random_detector(tmp_path / 'detr'), 'cpu')
    pooled = open_regions('tiny', detector=detector.name, boxes=2, device='cpu').tower
    plain = RegionTower(pooled, detector, 2).fingerprint
    state = {k: v.as_subclass(OnMps) for k, v in detector.model.state_dict().items()}
    detector.model.state_dict = lambda: state
    assert RegionTower(pooled, detector, 2).fingerprint == plain


asking = '''
import sys, time
from clipcap.base.files import ClipcapError
from clipcap.methods.regions import Detector
from clipcap.methods.retrieval import TwoTowers
from clipcap.model import load_language
for line in sys.stdin:
    kind, name = line.split()
    start = time.time()
    try:
        if kind == 'language':
            load_language(name)
        else:
            (TwoTowers if kind == 'towers' else Detector)(name, 'cpu')
        print('opened', flush=True)
    except ClipcapError as error:
        print(f'{time.time() - start:.0f}', error, flush=True)
'''


def test_without_the_hub_models_come_from_the_cache_at_once(tmp_path):
    make_random_clip(tmp_path / 'hub' / 'clip', ['a red ball', 'a star'])
    make_random_detector(tmp_path / 'hub' / 'detr')
    language = find_model('tiny') / 'language'
    shutil.copytree(language, tmp_path / 'hub' / 'gpt')
    hub = Hub(tmp_path / 'hub')
    wanted = ['towers someone/clip', 'detector someone/detr', 'language someone/gpt']
    with hub.asked(asking, tmp_path / 'home') as ask:
        assert [ask(line) for line in wanted] == ['opened'] * 3
        hub.close()
        assert [ask(line) for line in wanted] == ['opened'] * 3
        for kind in ('towers', 'detector', 'language'):
            seconds, reason = ask(f'{kind} someone/else').split(maxsplit=1)
            assert int(seconds) < 15
            assert 'someone/else' in reason
