"What `pip install` elsewhere gets: the sdist, the wheels built from it and from the checkout, the model inside them"

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent


def run(*command, **kw):
    "Run a command, show what it said where it fails, and return what it printed"
    done = subprocess.run(command, capture_output=True, text=True, **kw)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope='module')
def dist(tmp_path_factory, repo_files):
    "A folder with sdist/*.tar.gz, sdist/*.whl (built from that sdist) and wheel/*.whl (built from a clean clone)"
    clone, out = tmp_path_factory.mktemp('clean clone'), tmp_path_factory.mktemp('dist')
    for p in repo_files:
        (clone / p).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / p, clone / p)
    run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', out / 'sdist', clone)
    run(
        sys.executable,
        '-m',
        'pip',
        'wheel',
        '--no-deps',
        '--no-build-isolation',
        '--use-pep517',
        '--wheel-dir',
        out / 'wheel',
        clone,
    )
    return out


def contents(wheel):
    "name -> bytes of what a wheel installs"
    with zipfile.ZipFile(wheel) as z:
        return {n: z.read(n) for n in z.namelist()}


def test_sdist_can_be_built_from(dist, repo_files):
    [sdist] = (dist / 'sdist').glob('*.tar.gz')
    names = {Path(*Path(n).parts[1:]) for n in tarfile.open(sdist).getnames()}
    weights = {p for p in repo_files if p.is_relative_to('weights/tiny')}
    assert names >= weights | {
        Path(n) for n in ('settings.ini', 'setup.py', 'README.md', 'LICENSE')
    }


@pytest.mark.parametrize('source', ['wheel', 'sdist'])
def test_wheel_holds_package_model_and_metadata(dist, repo_files, source):
    [wheel] = (dist / source).glob('*.whl')
    got = contents(wheel)
    model = {
        f'clipcap/{p.as_posix()}': (root / p).read_bytes()
        for p in repo_files
        if p.is_relative_to('weights/tiny')
    }
    package = {p.as_posix(): (root / p).read_bytes() for p in repo_files if p.parts[0] == 'clipcap'}
    assert model, 'weights/tiny is missing'
    assert {n: b for n, b in got.items() if '.dist-info/' not in n} == model | package
    info = {n.split('/')[-1]: b.decode() for n, b in got.items() if '.dist-info/' in n}
    ini = dict(re.findall(r'(?m)^(\w+) = (.*)$', (root / 'settings.ini').read_text()))
    runtime = re.findall(r'(?m)^Requires-Dist: ([^;\n]+)$', info['METADATA'])
    normal = lambda specs: {
        frozenset(re.split(r'(?=[<>=!~])|,', s.replace(' ', ''))) for s in specs
    }
    assert normal(runtime) == normal(ini['requirements'].split())
    assert (
        f"Version: {ini['version']}\n" in info['METADATA']
        and f"Requires-Python: >={ini['min_python']}" in info['METADATA']
    )
    assert (
        'MIT License' in info['LICENSE']
        and 'clipcap = clipcap.cli.main:main' in info['entry_points.txt']
    )


def test_installed_wheel_captions_away_from_the_checkout(dist, tmp_path):
    [wheel] = (dist / 'sdist').glob('*.whl')
    run(
        sys.executable,
        '-m',
        'pip',
        'install',
        '--quiet',
        '--no-deps',
        '--target',
        tmp_path / 'site',
        wheel,
    )
    env = os.environ | {'PYTHONPATH': str(tmp_path / 'site')}
    code = '''import clipcap, numpy as np
from clipcap.image import Captioner, find_model
print(clipcap.__file__, find_model('tiny'), sep='\\n')
print(*Captioner('tiny').caption([np.full((64, 64, 3), 200, np.uint8)]), sep='\\n')'''
    package, model, caption = run(sys.executable, '-c', code, cwd=tmp_path, env=env).splitlines()
    assert (
        Path(package).is_relative_to(tmp_path) and Path(model).is_relative_to(tmp_path) and caption
    )
    assert run(tmp_path / 'site' / 'bin' / 'clipcap', '--version', cwd=tmp_path, env=env).strip()
