"A training run that is killed, for real, ends at the same weights as an unbroken one"
import signal, subprocess, sys, time
import pandas as pd, pytest
from safetensors.torch import load_file

program = '''
import sys
import numpy as np, pandas as pd, torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from tokenizers import Tokenizer, models, pre_tokenizers
from clipcap.model import CaptionModel, MapperConfig
from clipcap.train import TrainConfig, train

torch.set_num_threads(1)
words = ['<|endoftext|>', *'abcdefghij']
spell = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[0]))
spell.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=spell, eos_token=words[0], pad_token=words[0])

class Store:
    cells, dim, fingerprint = 1, 16, 'random'
    features = np.random.default_rng(0).standard_normal((400, 1, 16)).astype(np.float16)
    def rows(self, names): return np.array([int(n) for n in names])
    def __getitem__(self, rows): return self.features[rows]

rng = np.random.default_rng(1)
table = pd.DataFrame([dict(image=str(i), caption=' '.join(rng.choice(words[1:], rng.integers(2, 9))), split='val' if i % 10 == 0 else 'train')
    for i in range(400) for _ in range(5)])
torch.manual_seed(0)
language = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0))
model = CaptionModel(language, tokenizer, MapperConfig('mlp', feature_dim=16, prefix_length=2, dropout=0.3))
train(model, table, Store(), TrainConfig(epochs=4, batch_size=32, save_every=7), sys.argv[1], progress=False)
'''

def start(folder): return subprocess.Popen([sys.executable, '-c', program, folder], stderr=subprocess.DEVNULL)

@pytest.fixture(scope='module')
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp('unbroken')
    assert start(folder).wait() == 0
    return folder

def test_sigkill_and_resume(unbroken, tmp_path):
    kills, checkpoint = 0, tmp_path/'run'/'last.safetensors'
    for after in (1, 3):                      # once early, once a few checkpoints later
        run, seen = start(tmp_path/'run'), set()
        while run.poll() is None and len(seen) < after:
            if checkpoint.exists(): seen.add(checkpoint.stat().st_mtime_ns)
            time.sleep(0.01)
        if run.poll() is None: run.send_signal(signal.SIGKILL); kills += 1
        run.wait()
    assert kills, 'the run ended before it could be killed'
    assert start(tmp_path/'run').wait() == 0
    whole, resumed = (load_file(folder/'last.safetensors') for folder in (unbroken, tmp_path/'run'))
    assert whole.keys() == resumed.keys() and all(whole[k].equal(resumed[k]) for k in whole)
    losses = [pd.read_csv(folder/'history.csv').drop(columns='captions_per_second') for folder in (unbroken, tmp_path/'run')]
    assert losses[0].equals(losses[1]) and len(losses[0]) == 4
