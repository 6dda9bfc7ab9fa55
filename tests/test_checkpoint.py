"Checkpoints: exact, whole or not at all, and only for the run that they belong to"

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from clipcap.base.checkpoint import differing, load_checkpoint, save_checkpoint
from clipcap.base.files import ClipcapError


def learner():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    return model, torch.optim.AdamW(model.parameters())


def steps(model, optimizer, n=3):
    for _ in range(n):
        optimizer.zero_grad()
        model(torch.randn(8, 3)).square().mean().backward()
        optimizer.step()


def test_goes_on_exactly_with_running_means_and_random_numbers(tmp_path):
    model, optimizer = learner()
    steps(model, optimizer)
    save_checkpoint(tmp_path / 'c.safetensors', model, optimizer, dict(epoch=1))
    steps(model, optimizer)
    other, its_optimizer = learner()
    assert load_checkpoint(tmp_path / 'c.safetensors', other, its_optimizer) == dict(epoch=1)
    steps(other, its_optimizer)
    for name, t in model.state_dict().items():
        assert torch.equal(t, other.state_dict()[name]), name


def test_what_differs_is_named():
    before = dict(rate=0.1, sizes=[1, 2], gone=3)
    assert differing(before, dict(rate=0.1, sizes=(1, 2), gone=3), {}) == []
    assert differing(before, dict(rate=0.2, sizes=(1, 2), gone=3), {}) == ['rate 0.1, now 0.2']
    assert differing(before, dict(rate=0.1, sizes=(1, 2)), {}) == ['gone 3, now null']
    assert differing(dict(a_hash='x'), dict(a_hash='y'), {}) == ['other a']
    now = dict(before, new=5)
    assert differing(before, now, dict(new=5)) == []  # not known then, and as it is by default
    assert differing(before, now, dict(new=4)) == ['new 4, now 5']


def test_others_are_refused_in_one_line_and_nothing_is_changed(tmp_path):
    model, optimizer = learner()
    steps(model, optimizer)
    file = tmp_path / 'run' / 'last.safetensors'
    save_checkpoint(file, model, optimizer, dict(epoch=1), dict(rate=0.1))
    whole = file.read_bytes()

    def refused(match):
        fresh, its_optimizer = learner()
        before = {name: t.clone() for name, t in fresh.state_dict().items()}
        with pytest.raises(ClipcapError, match=match) as fault:
            load_checkpoint(file, fresh, its_optimizer, dict(rate=0.2))
        assert len(str(fault.value).splitlines()) == 1
        for name, t in fresh.state_dict().items():
            assert torch.equal(t, before[name])

    refused('rate 0.1, now 0.2')
    for damaged in (b'', whole[:100], whole[:-1], b'x' * len(whole)):
        file.write_bytes(damaged)
        refused('damaged')
    save_file({'model.0.weight': torch.zeros(4, 3)}, file, metadata={'progress': '{}'})
    refused('older version')


def test_an_older_checkpoint_survives_a_failed_write(tmp_path):
    model, optimizer = learner()
    file = tmp_path / 'c.safetensors'
    save_checkpoint(file, model, optimizer, dict(epoch=1))
    with pytest.raises(TypeError):
        save_checkpoint(file, model, optimizer, dict(epoch={1, 2}))
    assert load_checkpoint(file, model, optimizer) == dict(epoch=1)
    assert [p.name for p in tmp_path.iterdir()] == ['c.safetensors']
