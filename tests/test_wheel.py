"What pip installs elsewhere: the sdist, wheels built from it and from a clone, the model in them"

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root / 'tools'))
import versions  # noqa: E402

python = sys.executable


def run(*command, **kw):
    "Run a command, show what it said where it fails, and return what it printed"
    done = subprocess.run(command, capture_output=True, text=True, **kw)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*arguments):
    return run(python, '-m', 'pip', '--disable-pip-version-check', *arguments)


@pytest.fixture(scope='module')
def dist(tmp_path_factory, repo_files):
    "A folder with sdist/*.tar.gz, sdist/*.whl (built from that) and wheel/*.whl (from a clone)"
    clone, out = tmp_path_factory.mktemp('clean clone'), tmp_path_factory.mktemp('dist')
    for path in repo_files:
        (clone / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / path, clone / path)
    run(python, '-m', 'build', '--no-isolation', '--outdir', out / 'sdist', clone)
    plain = ['--no-deps', '--no-build-isolation', '--use-pep517']
    pip('wheel', *plain, '--wheel-dir', out / 'wheel', clone)
    return out


def contents(wheel):
    "name -> bytes of what a wheel installs"
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def metadata(wheel):
    "name -> text of a wheel's metadata"
    files = contents(wheel).items()
    return {n.split('/')[-1]: content.decode() for n, content in files if '.dist-info/' in n}


def test_sdist_can_be_built_from(dist, repo_files):
    [sdist] = (dist / 'sdist').glob('*.tar.gz')
    with tarfile.open(sdist) as archive:
        names = {Path(*Path(name).parts[1:]) for name in archive.getnames()}
    weights = {path for path in repo_files if path.is_relative_to('weights/tiny')}
    assert names >= weights | {Path(n) for n in ('settings.ini', 'setup.py', 'README.md')}
    assert Path('LICENSE') in names


@pytest.mark.parametrize('source', ['wheel', 'sdist'])
def test_wheel_holds_the_package_and_the_model(dist, repo_files, source):
    [wheel] = (dist / source).glob('*.whl')
    installed = {n: data for n, data in contents(wheel).items() if '.dist-info/' not in n}
    model = [path for path in repo_files if path.is_relative_to('weights/tiny')]
    package = [path for path in repo_files if path.parts[0] == 'clipcap']
    assert model, 'weights/tiny is missing'
    expected = {f'clipcap/{path.as_posix()}': (root / path).read_bytes() for path in model}
    expected |= {path.as_posix(): (root / path).read_bytes() for path in package}
    assert installed == expected


@pytest.mark.parametrize('source', ['wheel', 'sdist'])
def test_wheel_says_what_settings_say(dist, source):
    [wheel] = (dist / source).glob('*.whl')
    info, settings = metadata(wheel), versions.settings()
    fields = info['METADATA'].partition('\n\n')[0].splitlines()
    assert f'Name: {settings["lib_name"]}' in fields
    assert f'Version: {settings["version"]}' in fields
    assert f'Requires-Python: >={settings["min_python"]}' in fields
    assert 'MIT License' in info['LICENSE']
    assert settings['console_scripts'].replace('=', ' = ') in info['entry_points.txt']


@pytest.mark.parametrize('source', ['wheel', 'sdist'])
def test_wheel_asks_for_ranges_not_for_the_lock(dist, source):
    [wheel] = (dist / source).glob('*.whl')
    lines = re.findall(r'(?m)^Requires-Dist: (.+)$', metadata(wheel)['METADATA'])
    asked = [Requirement(line) for line in lines]
    always = {r.name: r.specifier for r in asked if not r.marker}
    wanted = [Requirement(r) for r in versions.settings()['requirements'].split()]
    assert always == {r.name: r.specifier for r in wanted}
    assert not [r for r in asked if '==' in str(r.specifier)]


def test_installed_wheel_captions_away_from_the_checkout(dist, tmp_path):
    [wheel] = (dist / 'sdist').glob('*.whl')
    site = tmp_path / 'site'
    pip('install', '--quiet', '--no-deps', '--target', site, wheel)
    env = os.environ | {'PYTHONPATH': str(site)}
    code = '''import clipcap, numpy as np
from clipcap.image import Captioner, find_model
print(clipcap.__file__, find_model('tiny'), sep='\\n')
print(*Captioner('tiny').caption([np.full((64, 64, 3), 200, np.uint8)]), sep='\\n')'''
    package, model, caption = run(python, '-c', code, cwd=tmp_path, env=env).splitlines()
    assert Path(package).is_relative_to(site)
    assert Path(model).is_relative_to(site)
    assert caption
    assert run(site / 'bin' / 'clipcap', '--version', cwd=tmp_path, env=env).strip()
