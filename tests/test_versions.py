"Versions: ranges in settings.ini, a tested choice in requirements.lock, and who installs which"

import os
import re
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root / 'tools'))
import lock  # noqa: E402
import versions  # noqa: E402

KEYS = ['requirements', 'dev_requirements', *versions.extras()]
lines = [line for line in lock.lock.read_text().splitlines() if not line.startswith('#')]
locked = dict(line.split('==') for line in lines)


def make(*arguments):
    "What `make` would run, without running it, as if nothing were built yet"
    command = ['make', '--always-make', '--dry-run', f'PYTHON={sys.executable}', *arguments]
    # a `make` that runs these tests hands its own variables on, by two ways
    ours = {'MAKEFLAGS', 'MFLAGS', 'MAKELEVEL', 'PYTHON', 'VENV', 'VERSIONS'}
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- the lock
def test_lock_is_names_and_versions_alone():
    assert all(re.fullmatch(r'[a-z0-9-]+==[0-9][0-9a-z.]*', line) for line in lines), lines
    assert [canonicalize_name(name) for name in locked] == sorted(locked), 'run `make lock`'
    assert versions.project() not in locked


@pytest.mark.parametrize('key', ['requirements', 'dev_requirements'])
def test_lock_is_within_the_ranges_of_settings(key):
    for name, specifiers in versions.requirements(key).items():
        version = locked.get(canonicalize_name(name))
        assert version, f'{name} is not locked: run `make lock`'
        assert Version(version) in SpecifierSet(','.join(specifiers)), f'{name}: run `make lock`'


def test_lock_has_no_package_of_some_systems_only():
    some = 'nvidia-|cuda-|triton|colorama|pywin|winpty|pexpect|ptyprocess|appnope|pyobjc'
    assert not [name for name in locked if re.match(some, name)]


def test_what_only_some_systems_need_is_found_by_its_marker():
    class Installed:
        def __init__(self, *requires):
            self.requires = requires

    installed = {
        'ours': Installed('everywhere', 'posix; sys_platform != "win32"', 'tool; extra == "dev"'),
        'everywhere': Installed('kernels; platform_system == "Linux"', 'part[more]'),
        'part': Installed('deep; extra == "more"', 'never; extra == "other"'),
        **{name: Installed() for name in ('posix', 'tool', 'kernels', 'deep', 'never')},
    }
    found = [lock.needed('ours', {'dev'}, system, installed) for system in lock.SYSTEMS]
    common = {'ours', 'everywhere', 'tool', 'part', 'deep'}
    assert set.intersection(*found) == common
    assert found[0] == common | {'posix', 'kernels'}


@pytest.mark.skipif(sys.version_info < (3, 11, 5), reason='the lock is not for this Python')
@pytest.mark.parametrize('target', ['demo', 'test', 'lint', 'lab', 'bench'])
def test_commands_install_the_locked_versions(target):
    installs = [line for line in make(target).splitlines() if re.search(r'-m pip\b', line)]
    assert installs
    assert all('--constraint requirements.lock' in line for line in installs)
    assert all('--no-build-isolation' in line for line in installs if '--editable' in line)


def test_ci_runs_the_two_commands_of_the_readme():
    script = (root / '.ci' / 'run').read_text()
    assert re.search(r'(?m)^make demo\b', script)
    assert re.search(r'(?m)^make test\b', script)
    assert 'VERSIONS' not in script, 'CI installs from the lock, as everybody does'


def test_both_ends_are_tested_without_the_lock():
    for end in 'newest', 'lowest':
        commands = make(f'test-{end}')
        assert f'.venv-{end}/bin/python -m pytest' in commands
        assert 'requirements.lock' not in commands
    assert 'tools/versions.py lowest > .lowest.tmp' in make('test-lowest')


# ---- the ranges
def test_every_requirement_has_a_lower_and_an_upper_bound():
    for key in ['requirements', 'dev_requirements']:
        for name, specifiers in versions.requirements(key).items():
            assert sorted(s[:1] for s in specifiers) == ['<', '>'], f'{name} in {key}'


def test_a_requirement_named_twice_has_one_range():
    ranges = {}
    for key in KEYS:
        for name, specifiers in versions.requirements(key).items():
            assert ranges.setdefault(name, specifiers) == specifiers, f'{name} in {key}'


def test_lowest_versions_are_the_lower_bounds():
    lowest = dict(line.split('==') for line in versions.lowest())
    for key in ['requirements', 'dev_requirements']:
        for name, specifiers in versions.requirements(key).items():
            assert f'>={lowest[name]}' in specifiers


# ---- the name
def test_no_message_leads_to_another_project_of_our_name(repo_files):
    assert versions.project() != versions.settings()['lib_path'] == 'clipcap'
    assert distribution(versions.project()).version == versions.settings()['version']
    wrong = re.compile(r'pip3? install\s+(?:-\S+\s+)*[\\\'"`]*clipcap(?![\w./-])')
    text = [p for p in repo_files if p.suffix in {'.ipynb', '.py', '.md', '.ini', '.toml', ''}]
    own = Path(__file__).relative_to(root)
    found = [p for p in text if p != own and wrong.search((root / p).read_text(encoding='utf-8'))]
    assert not found, 'name the missing package itself: pip install peft'
    assert wrong.search("pip install -U 'clipcap[lora]'")
    assert wrong.search('pip install clipcap')
    assert not wrong.search('pip install clipcap-course')
