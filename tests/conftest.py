"Marks, and what several tests share"
import os, shutil, subprocess
from pathlib import Path
import pytest

root = Path(__file__).resolve().parent.parent
os.environ['HF_HUB_OFFLINE'] = '1'     # nothing here may need the network, nor find it by accident
os.environ.pop('CLIPCAP_DATA', None)

def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: takes minutes; run by `make test-slow` (pytest -m slow)')
    config.addinivalue_line('markers', 'browser: drives headless Chromium; skipped where there is none')
    if not config.option.markexpr: config.option.markexpr = 'not slow'

def pytest_runtest_setup(item):
    if item.get_closest_marker('browser') and not shutil.which('chromium'): pytest.skip('needs chromium')

@pytest.fixture(scope='session')
def repo_files():
    "Paths, relative to the root, of the files that git has or would add"
    command = ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard']
    names = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.split('\0')
    return sorted(Path(n) for n in set(names) if n and (root/n).is_file())
