"Caption models: damaged folders are refused, nothing prompts, what does not fit is said"

import json
import math
import subprocess
import sys

import pytest
import torch
from conftest import root
from safetensors.torch import load_file, save_file

from clipcap.base.files import ClipcapError
from clipcap.image import Captioner, find_model
from clipcap.model import (
    CaptionModel,
    MapperConfig,
    check_weights,
    load_language,
    read_model_config,
    remaining_tokens,
    token_logits,
)


@pytest.fixture
def folder(tmp_path):
    "The bundled model, to be damaged"
    CaptionModel.from_pretrained(find_model('tiny')).save_pretrained(tmp_path / 'model')
    return tmp_path / 'model'


def change(file, edit):
    save_file(edit(load_file(file)), file, metadata={'format': 'pt'})


def without(name):
    return lambda weights: {n: w for n, w in weights.items() if not n.endswith(name)}


@pytest.mark.parametrize('name', ['ln_f.bias', 'wte.weight', 'h.0.mlp.c_fc.weight'])
def test_a_language_model_that_lacks_a_weight(folder, name):
    change(folder / 'language' / 'model.safetensors', without(name))
    with pytest.raises(ClipcapError, match=f'missing, .*{name}|missing'):
        CaptionModel.from_pretrained(folder)
    with pytest.raises(ClipcapError, match='missing'):
        load_language(folder / 'language')


def test_a_language_model_whose_weights_have_another_shape(folder):
    change(
        folder / 'language' / 'model.safetensors',
        lambda weights: {n: w[:-1] if n.endswith('ln_f.bias') else w for n, w in weights.items()},
    )
    with pytest.raises(ClipcapError, match='language: .*') as refused:
        load_language(folder / 'language')
    assert '\n' not in str(refused.value)
    report = dict(
        missing_keys=set(), unexpected_keys=set(), mismatched_keys={('ln_f.bias', (2,), (3,))}
    )
    with pytest.raises(ClipcapError, match='mine: .*of another shape, ln_f.bias'):
        check_weights(torch.nn.Linear(1, 1), report, 'mine')


@pytest.mark.parametrize('part', ['language/model.safetensors', 'model.safetensors'])
@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_weights_that_are_not_finite(folder, part, value):
    change(folder / part, lambda weights: {n: w + value for n, w in weights.items()})
    with pytest.raises(ClipcapError, match='not finite'):
        CaptionModel.from_pretrained(folder)


def test_one_weight_that_is_not_finite(folder):
    def edit(weights):
        name = sorted(weights)[0]
        weights[name].view(-1)[0] = math.nan
        return weights

    change(folder / 'language' / 'model.safetensors', edit)
    with pytest.raises(ClipcapError, match='not finite'):
        CaptionModel.from_pretrained(folder)


def test_weights_of_another_model(folder):
    extra = {'extra.weight': torch.zeros(2)}
    change(folder / 'language' / 'model.safetensors', lambda weights: weights | extra)
    with pytest.raises(ClipcapError, match='of another model, extra.weight'):
        CaptionModel.from_pretrained(folder)
    language, _ = load_language(folder / 'language')  # not ours: what it has no use for is fine
    assert language.config.model_type == 'gpt2'
    change(folder / 'model.safetensors', lambda weights: weights | extra)
    with pytest.raises(ClipcapError, match='model'):
        CaptionModel.from_pretrained(folder)


@pytest.mark.parametrize(
    'edit',
    [
        lambda config: [],
        lambda config: 7,
        lambda config: {'model_type': 'clipcap'},
        lambda config: {**config, 'mapper': ['mlp']},
        lambda config: {**config, 'mapper': {**config['mapper'], 'layers': 1_000_000}},
        lambda config: {**config, 'mapper': {**config['mapper'], 'layers': 'many'}},
        lambda config: {**config, 'mapper': {**config['mapper'], 'feature_dim': 10**12}},
        lambda config: {**config, 'mapper': {**config['mapper'], 'colour': 'red'}},
        lambda config: {**config, 'mapper': {**config['mapper'], 'kind': 'wish'}},
        lambda config: {**config, 'freeze_language': 'no'},
        lambda config: {**config, 'tower': 3},
    ],
)
def test_faults_of_the_configuration(folder, edit):
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(edit(config)))
    with pytest.raises(ClipcapError) as refused:
        CaptionModel.from_pretrained(folder)
    assert '\n' not in str(refused.value) and len(str(refused.value)) < 400


def test_no_config(tmp_path):
    with pytest.raises(ClipcapError, match='no model here'):
        read_model_config(tmp_path)


def test_nothing_prompts_and_nothing_foreign_runs(folder, tmp_path):
    "Whatever stands on stdin, code that lies beside the weights is not run"
    trap = tmp_path / 'sprung'
    code = f'open({str(trap)!r}, "w")\nclass Trap: pass\n'
    (folder / 'language' / 'trap.py').write_text(code)
    config = folder / 'language' / 'config.json'
    told = json.loads(config.read_text())
    told['model_type'] = 'trap'
    told['auto_map'] = {
        'AutoConfig': 'trap.Trap',
        'AutoModelForCausalLM': 'trap.Trap',
        'AutoTokenizer': ['trap.Trap', None],
    }
    config.write_text(json.dumps(told))
    run = subprocess.run(
        [
            sys.executable,
            '-c',
            'import sys; from clipcap.model import CaptionModel; '
            'CaptionModel.from_pretrained(sys.argv[1])',
            folder,
        ],
        input='y\n' * 50,
        capture_output=True,
        text=True,
        cwd=root,
    )
    assert run.returncode and 'ClipcapError' in run.stderr
    assert 'y/N' not in run.stdout + run.stderr and not trap.exists()


def test_prefixes_and_captions_share_the_positions():
    tiny = CaptionModel.from_pretrained(find_model('tiny'))
    positions = tiny.language.config.max_position_embeddings
    assert remaining_tokens(tiny) == positions - tiny.config.prefix_length
    with pytest.raises(ClipcapError, match=f'{positions} positions'):
        CaptionModel(tiny.language, tiny.tokenizer, MapperConfig(prefix_length=positions - 1))
    long = MapperConfig('linear', feature_dim=4, prefix_length=positions - 8)
    model = CaptionModel(tiny.language, tiny.tokenizer, long)
    ids = torch.ones(1, 9, dtype=torch.long)
    with pytest.raises(ClipcapError, match=f'captions of 9 tokens .* {positions} positions'):
        token_logits(model, torch.zeros(1, 1, 4), ids, ids)
    grid = MapperConfig('mlp', feature_dim=4, cells=positions)
    with pytest.raises(ClipcapError, match='leaves no room'):
        CaptionModel(tiny.language, tiny.tokenizer, grid)


def test_a_published_model_stays_one(folder, tmp_path):
    "Saved and opened again, by whichever name, it decodes as before"
    model = CaptionModel.from_pretrained(folder)
    model.published = 'clipcap'
    model.save_pretrained(tmp_path / 'again')
    assert CaptionModel.from_pretrained(tmp_path / 'again').published == 'clipcap'


def test_a_model_without_a_tower(folder):
    with pytest.raises(ClipcapError, match='without its vision tower'):
        Captioner(folder, 'cpu')
